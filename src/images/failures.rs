//! Failed images, and when each of them is retried.
//!
//! Registries limit pulls, and each check makes a sandbox, so only failed images are retried, with growing pauses. An
//! image that could not be pulled (registry down, disk full, podman failing) may be available a moment later: its
//! pauses grow from 10 s to an hour. A version that was pulled and does not work is most likely the same when it is
//! pulled again: the copy on this host is checked again after the same pauses, since the host may have been at fault,
//! but it is pulled again after an hour at the earliest, with pauses growing to a day. Docker Hub, the strictest
//! registry, allows a host without an account a hundred pulls in six hours.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::model::backoff::Backoff;

/// First and longest pause before a failed pull or check is retried.
const CHECK_FIRST: Duration = Duration::from_secs(10);
const CHECK_LONGEST: Duration = Duration::from_secs(3600);

/// First and longest pause before a name is pulled again after its latest version failed the check.
const PULL_FIRST: Duration = Duration::from_secs(3600);
const PULL_LONGEST: Duration = Duration::from_secs(24 * 3600);

/// How an image failed.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct FailureKind {
    /// The attempt was an update, which looks for a newer version.
    pub(super) newer: bool,
    /// The version on this host fails its health programs.
    pub(super) unfit: bool,
    /// The image was pulled in this attempt.
    pub(super) pulled: bool,
    /// An older version stays in use; the failed one is deleted.
    pub(super) kept: bool,
}

/// Failed images by name.
#[derive(Debug, Default)]
pub(super) struct Failures(BTreeMap<String, Failure>);

#[derive(Debug)]
struct Failure {
    kind: FailureKind,
    check: Retry,
    pull: Retry,
}

/// Attempts with growing pauses between them.
#[derive(Debug)]
struct Retry {
    backoff: Backoff,
    due: Instant,
}

impl Retry {
    fn new(first: Duration, longest: Duration, now: Instant) -> Retry {
        Retry { backoff: Backoff::new(first, longest), due: now }
    }

    /// Records a failed attempt: the next one is due after the pause.
    fn note(&mut self, now: Instant) {
        self.due = now + self.backoff.failed();
    }
}

impl Failures {
    /// Records that an image failed.
    pub(super) fn note(&mut self, name: &str, kind: FailureKind, now: Instant) {
        let failure = self.0.entry(name.to_owned()).or_insert_with(|| Failure {
            kind,
            check: Retry::new(CHECK_FIRST, CHECK_LONGEST, now),
            pull: Retry::new(PULL_FIRST, PULL_LONGEST, now),
        });
        failure.kind = FailureKind { newer: failure.kind.newer || kind.newer, ..kind };
        failure.check.note(now);
        if kind.unfit && kind.pulled {
            failure.pull.note(now);
        }
        if kind.kept {
            // The failed version is deleted: there is nothing to check before the next pull.
            failure.check.due = failure.check.due.max(failure.pull.due);
        }
    }

    /// Records that the newest version of an image works.
    pub(super) fn forget(&mut self, name: &str) {
        self.0.remove(name);
    }

    /// Records that an image is in use. A failed newer version stays recorded.
    pub(super) fn note_in_use(&mut self, name: &str) {
        self.0.retain(|failed, failure| failed != name || failure.kind.kept);
    }

    /// Whether an image failed and no version of it is in use.
    pub(super) fn is_missing(&self, name: &str) -> bool {
        self.0.get(name).is_some_and(|failure| !failure.kind.kept)
    }

    /// When the next retry is due.
    pub(super) fn next(&self) -> Option<Instant> {
        self.0.values().map(|failure| failure.check.due).min()
    }

    /// `Some` if an image is to be retried now; the value says whether to pull it even if it is on this host.
    pub(super) fn due(&self, name: &str, now: Instant) -> Option<bool> {
        let failure = self.0.get(name).filter(|failure| failure.check.due <= now)?;
        Some(failure.pull.due <= now && (failure.kind.newer || failure.kind.unfit))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The attempts within so many seconds: their times, and whether each pulls although the image is on this host.
    /// `failed` returns how each attempt fails.
    fn tries(seconds: u64, first: FailureKind, failed: impl Fn(bool) -> FailureKind) -> Vec<(u64, bool)> {
        let (begin, mut failures, mut tries) = (Instant::now(), Failures::default(), Vec::new());
        failures.note("image", first, begin);
        while let Some(now) = failures.next().filter(|next| *next <= begin + Duration::from_secs(seconds)) {
            let pull = failures.due("image", now).unwrap();
            assert!(failures.due("other", now).is_none());
            tries.push(((now - begin).as_secs(), pull));
            failures.note("image", failed(pull), now);
        }
        tries
    }

    #[test]
    fn failed_pulls_are_retried_with_delays_growing_to_an_hour() {
        let failed = FailureKind::default();
        let times: Vec<u64> = tries(4 * 3600, failed, |_| failed).iter().map(|(time, _)| *time).collect();
        assert_eq!(times[..5], [10, 30, 70, 150, 310]);
        assert!(times.windows(2).all(|two| two[1] - two[0] <= 3600));
        assert!(times.len() < 13, "{times:?}");
        let newer = FailureKind { newer: true, kept: true, ..failed };
        assert_eq!(tries(30, newer, |_| newer), [(10, true), (30, true)], "a registry that was down for a moment");
    }

    #[test]
    fn an_image_that_fails_its_check_is_checked_again_but_rarely_pulled() {
        let unfit = |pulled| FailureKind { unfit: true, pulled, ..FailureKind::default() };
        let tries = tries(24 * 3600, unfit(true), unfit);
        assert_eq!(tries[..3], [(10, false), (30, false), (70, false)]);
        let pulls: Vec<u64> = tries.iter().filter(|(_, pull)| *pull).map(|(time, _)| *time).collect();
        assert!(pulls[0] >= 3600 && pulls[1] >= 3 * 3600 && pulls.len() <= 5, "{pulls:?}");
    }

    #[test]
    fn a_new_version_that_fails_its_check_is_not_pulled_again_soon() {
        let unfit = FailureKind { newer: true, unfit: true, pulled: true, kept: true };
        let tries = tries(10 * 24 * 3600, unfit, |_| unfit);
        assert_eq!(tries[..3], [(3600, true), (3 * 3600, true), (7 * 3600, true)]);
        assert!(tries.len() <= 14, "once a day in the end: {tries:?}");
    }

    #[test]
    fn an_image_that_was_never_pulled_is_pulled_once_it_fails_its_check() {
        let here = FailureKind { unfit: true, ..FailureKind::default() };
        assert_eq!(tries(30, here, |pulled| FailureKind { pulled, ..here }), [(10, true), (30, false)]);
    }

    #[test]
    fn failures_of_working_images_are_forgotten() {
        let (now, mut failures) = (Instant::now(), Failures::default());
        failures.note("image", FailureKind::default(), now);
        assert!(failures.is_missing("image"));
        failures.note_in_use("image");
        assert!(!failures.is_missing("image") && failures.next().is_none());
        failures.note("image", FailureKind { newer: true, kept: true, ..FailureKind::default() }, now);
        failures.note_in_use("image");
        assert!(
            !failures.is_missing("image") && failures.next().is_some(),
            "the failed newer version is still retried"
        );
        failures.forget("image");
        assert!(failures.next().is_none());
    }
}
