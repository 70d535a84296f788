//! Images that failed, and when each of them is tried again.
//!
//! A registry counts pulls, and each check makes a sandbox, so only images that failed are tried again, after pauses
//! that grow. An image that could not be pulled (registry down, disk full, podman failing) may be available a moment
//! later: the pauses grow from 10 s to an hour. A version that was pulled and does not work is most likely the same
//! when it is pulled again: the copy on this host is checked again after the same pauses, for the host may have been at
//! fault, but it is pulled again after an hour at the earliest, then less and less often, down to once a day. Docker
//! Hub, which allows the least, lets a host without an account pull a hundred times in six hours.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::model::backoff::Backoff;

/// First and longest pause before a failed pull or check is tried again.
const FIRST: Duration = Duration::from_secs(10);
const LONGEST: Duration = Duration::from_secs(3600);

/// First and longest pause before a name is pulled again whose latest version does not work.
const PULL_FIRST: Duration = Duration::from_secs(3600);
const PULL_LONGEST: Duration = Duration::from_secs(24 * 3600);

/// How an image failed.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Failed {
    /// A newer version was looked for, not just any.
    pub(super) newer: bool,
    /// There is a version on this host, and it fails its health programs.
    pub(super) unfit: bool,
    /// It was pulled in this attempt.
    pub(super) pulled: bool,
    /// Another version stays in use, and this one is deleted.
    pub(super) kept: bool,
}

/// The images that failed, by name.
#[derive(Debug, Default)]
pub(super) struct Failures(BTreeMap<String, Failure>);

#[derive(Debug)]
struct Failure {
    how: Failed,
    again: Retry,
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

    /// An attempt failed: the next one is due after the pause.
    fn note(&mut self, now: Instant) {
        self.due = now + self.backoff.failed();
    }
}

impl Failures {
    /// Notes that an image failed.
    pub(super) fn note(&mut self, name: &str, how: Failed, now: Instant) {
        let failure = self.0.entry(name.to_owned()).or_insert_with(|| Failure {
            how,
            again: Retry::new(FIRST, LONGEST, now),
            pull: Retry::new(PULL_FIRST, PULL_LONGEST, now),
        });
        failure.how = Failed { newer: failure.how.newer || how.newer, ..how };
        failure.again.note(now);
        if how.unfit && how.pulled {
            failure.pull.note(now);
        }
        if how.kept {
            // There is nothing to check before another pull.
            failure.again.due = failure.again.due.max(failure.pull.due);
        }
    }

    /// Notes that the newest version of an image works.
    pub(super) fn forget(&mut self, name: &str) {
        self.0.remove(name);
    }

    /// Notes that an image is in use. A newer version that failed stays noted.
    pub(super) fn found(&mut self, name: &str) {
        self.0.retain(|failed, failure| failed != name || failure.how.kept);
    }

    /// Whether an image failed and there is none in use for it.
    pub(super) fn is_missing(&self, name: &str) -> bool {
        self.0.get(name).is_some_and(|failure| !failure.how.kept)
    }

    /// When the next one is to be tried again.
    pub(super) fn next(&self) -> Option<Instant> {
        self.0.values().map(|failure| failure.again.due).min()
    }

    /// Whether an image is to be tried again now, and if so, whether it is to be pulled though there is one.
    pub(super) fn due(&self, name: &str, now: Instant) -> Option<bool> {
        let failure = self.0.get(name).filter(|failure| failure.again.due <= now)?;
        Some(failure.pull.due <= now && (failure.how.newer || failure.how.unfit))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The attempts within so many seconds: when, and whether by a pull although there is an image. `failed` says how
    /// each one fails.
    fn tries(seconds: u64, first: Failed, failed: impl Fn(bool) -> Failed) -> Vec<(u64, bool)> {
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
    fn an_image_that_cannot_be_pulled_is_retried_at_growing_pauses_of_at_most_an_hour() {
        let failed = Failed::default();
        let times: Vec<u64> = tries(4 * 3600, failed, |_| failed).iter().map(|(time, _)| *time).collect();
        assert_eq!(times[..5], [10, 30, 70, 150, 310]);
        assert!(times.windows(2).all(|two| two[1] - two[0] <= 3600));
        assert!(times.len() < 13, "{times:?}");
        let newer = Failed { newer: true, kept: true, ..failed };
        assert_eq!(tries(30, newer, |_| newer), [(10, true), (30, true)], "a registry that was down for a moment");
    }

    #[test]
    fn an_image_that_fails_its_check_is_checked_again_but_rarely_pulled() {
        let unfit = |pulled| Failed { unfit: true, pulled, ..Failed::default() };
        let tries = tries(24 * 3600, unfit(true), unfit);
        assert_eq!(tries[..3], [(10, false), (30, false), (70, false)]);
        let pulls: Vec<u64> = tries.iter().filter(|(_, pull)| *pull).map(|(time, _)| *time).collect();
        assert!(pulls[0] >= 3600 && pulls[1] >= 3 * 3600 && pulls.len() <= 5, "{pulls:?}");
    }

    #[test]
    fn a_new_version_that_fails_its_check_is_not_pulled_again_soon() {
        let unfit = Failed { newer: true, unfit: true, pulled: true, kept: true };
        let tries = tries(10 * 24 * 3600, unfit, |_| unfit);
        assert_eq!(tries[..3], [(3600, true), (3 * 3600, true), (7 * 3600, true)]);
        assert!(tries.len() <= 14, "once a day in the end: {tries:?}");
    }

    #[test]
    fn an_image_that_was_never_pulled_is_pulled_once_it_fails_its_check() {
        let here = Failed { unfit: true, ..Failed::default() };
        assert_eq!(tries(30, here, |pulled| Failed { pulled, ..here }), [(10, true), (30, false)]);
    }

    #[test]
    fn an_image_that_works_is_forgotten() {
        let (now, mut failures) = (Instant::now(), Failures::default());
        failures.note("image", Failed::default(), now);
        assert!(failures.is_missing("image"));
        failures.found("image");
        assert!(!failures.is_missing("image") && failures.next().is_none());
        failures.note("image", Failed { newer: true, kept: true, ..Failed::default() }, now);
        failures.found("image");
        assert!(!failures.is_missing("image") && failures.next().is_some(), "a newer one is still wanted");
        failures.forget("image");
        assert!(failures.next().is_none());
    }
}
