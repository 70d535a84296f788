//! Images that failed, and when each of them is tried again.
//!
//! A registry counts pulls, and each check makes a sandbox: so only what failed is tried again, after pauses that grow. What
//! could not be had (registry down, no room, podman failing) may be there in a moment: from 10 s up to an hour. A version
//! that was pulled and does not work is most likely the same when it is pulled again: what is here is checked again after
//! the pauses above, for the host may have been at fault, but pulled again after an hour at the earliest, then ever less
//! often, down to once a day. Docker Hub, which allows the least, lets a host without an account pull a hundred times in
//! six hours.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

/// First and longest pause before a failed pull or check is tried again, doubled in between.
const FIRST: Duration = Duration::from_secs(10);
const LONGEST: Duration = Duration::from_secs(3600);

/// The same before a name is pulled again whose version of then does not work.
const PULL_FIRST: Duration = Duration::from_secs(3600);
const PULL_LONGEST: Duration = Duration::from_secs(24 * 3600);

/// How an image failed.
#[derive(Debug, Clone, Copy, Default)]
pub struct Failed {
    /// While a newer version was looked for, not just any.
    pub newer: bool,
    /// There is a version, and it does not work.
    pub unfit: bool,
    /// It was pulled for this.
    pub pulled: bool,
    /// Another version is in use, and this one deleted.
    pub kept: bool,
}

/// Those that failed, by name.
#[derive(Debug, Default)]
pub struct Failures(BTreeMap<String, Failure>);

#[derive(Debug)]
struct Failure {
    how: Failed,
    again: Backoff,
    pull: Backoff,
}

/// Pauses that double.
#[derive(Debug)]
struct Backoff {
    pause: Duration,
    longest: Duration,
    due: Instant,
}

impl Backoff {
    fn new(first: Duration, longest: Duration, now: Instant) -> Backoff {
        Backoff { pause: first, longest, due: now }
    }

    fn note(&mut self, now: Instant) {
        self.due = now + self.pause;
        self.pause = (self.pause * 2).min(self.longest);
    }
}

impl Failures {
    /// An image failed.
    pub fn note(&mut self, name: &str, how: Failed, now: Instant) {
        let failure = self.0.entry(name.to_owned()).or_insert_with(|| Failure {
            how,
            again: Backoff::new(FIRST, LONGEST, now),
            pull: Backoff::new(PULL_FIRST, PULL_LONGEST, now),
        });
        failure.how = Failed { newer: failure.how.newer || how.newer, ..how };
        failure.again.note(now);
        if how.unfit && how.pulled {
            failure.pull.note(now);
        }
        if how.kept {
            // There is nothing to be tried but what another pull brings.
            failure.again.due = failure.again.due.max(failure.pull.due);
        }
    }

    /// An image works.
    pub fn forget(&mut self, name: &str) {
        self.0.remove(name);
    }

    /// An image is in use. Whether a newer one works is another matter.
    pub fn found(&mut self, name: &str) {
        self.0.retain(|failed, failure| failed != name || failure.how.kept);
    }

    /// Whether an image failed and there is none in use for it.
    pub fn is_missing(&self, name: &str) -> bool {
        self.0.get(name).is_some_and(|failure| !failure.how.kept)
    }

    /// When the next one is to be tried again.
    pub fn next(&self) -> Option<Instant> {
        self.0.values().map(|failure| failure.again.due).min()
    }

    /// Whether an image is to be tried again now, and if so, whether it is to be pulled though there is one.
    pub fn due(&self, name: &str, now: Instant) -> Option<bool> {
        let failure = self.0.get(name).filter(|failure| failure.again.due <= now)?;
        Some(failure.pull.due <= now && (failure.how.newer || failure.how.unfit))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is tried in so many seconds: when, and whether by a pull though there is one. `failed` says how that goes.
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
    fn what_cannot_be_had_is_tried_at_growing_pauses_of_an_hour_at_most() {
        let failed = Failed::default();
        let times: Vec<u64> = tries(4 * 3600, failed, |_| failed).iter().map(|(time, _)| *time).collect();
        assert_eq!(times[..5], [10, 30, 70, 150, 310]);
        assert!(times.windows(2).all(|two| two[1] - two[0] <= 3600));
        assert!(times.len() < 13, "{times:?}");
        let newer = Failed { newer: true, kept: true, ..failed };
        assert_eq!(tries(30, newer, |_| newer), [(10, true), (30, true)], "a registry that was down for a moment");
    }

    #[test]
    fn what_does_not_work_is_checked_again_but_hardly_pulled() {
        let unfit = |pulled| Failed { unfit: true, pulled, ..Failed::default() };
        let tries = tries(24 * 3600, unfit(true), unfit);
        assert_eq!(tries[..3], [(10, false), (30, false), (70, false)]);
        let pulls: Vec<u64> = tries.iter().filter(|(_, pull)| *pull).map(|(time, _)| *time).collect();
        assert!(pulls[0] >= 3600 && pulls[1] >= 3 * 3600 && pulls.len() <= 5, "{pulls:?}");
    }

    #[test]
    fn a_new_version_that_does_not_work_is_not_pulled_again_soon() {
        let unfit = Failed { newer: true, unfit: true, pulled: true, kept: true };
        let tries = tries(10 * 24 * 3600, unfit, |_| unfit);
        assert_eq!(tries[..3], [(3600, true), (3 * 3600, true), (7 * 3600, true)]);
        assert!(tries.len() <= 14, "once a day in the end: {tries:?}");
    }

    #[test]
    fn an_image_that_was_here_already_is_pulled_once_it_does_not_work() {
        let here = Failed { unfit: true, ..Failed::default() };
        assert_eq!(tries(30, here, |pulled| Failed { pulled, ..here }), [(10, true), (30, false)]);
    }

    #[test]
    fn what_works_is_forgotten() {
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
