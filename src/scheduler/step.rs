//! Decides what the manager does next: which language gets a sandbox, and which one loses a ready sandbox for it.

use std::collections::BTreeMap;

use tokio::time::Instant;

use crate::scheduler::lane::Lane;
use crate::scheduler::state::State;

/// The next action of the manager.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Make a sandbox of this language.
    Make(String),
    /// Discard a ready sandbox of this language, so that another language gets its slot.
    Discard(String),
    /// Wait until something changes.
    Nothing,
}

impl State {
    /// Makes sandboxes for waiting requests first, in the order of the queue; then for the most requested languages. At
    /// most `cores` are made at the same time.
    pub(super) fn next_step(&mut self, cores: usize, now: Instant) -> Step {
        if self.draining {
            return Step::Nothing;
        }
        let making: usize = self.lanes.values().map(|lane| lane.making.len()).sum();
        let mut expected: BTreeMap<&str, usize> =
            self.lanes.iter().map(|(name, lane)| (name.as_str(), lane.making.len())).collect();
        let mut coming = self.closing.len();
        for language in self.queue.languages() {
            let Some(lane) = self.lanes.get(language) else {
                continue;
            };
            if let Some(on_the_way @ 1..) = expected.get_mut(language) {
                *on_the_way -= 1;
                continue;
            }
            if !lane.can_make(now) {
                continue;
            }
            if !self.free.is_empty() {
                return if making < cores { Step::Make(language.to_owned()) } else { Step::Nothing };
            }
            if coming > 0 {
                coming -= 1;
                continue;
            }
            // A language with a ready sandbox has no waiting request: it would have got the sandbox.
            let spare = self.lanes.iter().filter(|(_, lane)| !lane.ready.is_empty());
            return match spare.max_by_key(|(_, lane)| (lane.ready.len(), lane.rank)) {
                Some((name, _)) => Step::Discard(name.clone()),
                None => Step::Nothing,
            };
        }
        if self.free.is_empty() {
            return match self.closing.is_empty() {
                true => self.rebalance(now),
                false => Step::Nothing,
            };
        }
        // Refilling leaves one core to running jobs.
        if making >= cores.saturating_sub(1).max(1) {
            return Step::Nothing;
        }
        let refill = self.lanes.iter().filter(|(_, lane)| lane.can_make(now)).max_by(|(_, a), (_, b)| {
            a.refill_priority(now).total_cmp(&b.refill_priority(now)).then_with(|| b.rank.cmp(&a.rank))
        });
        refill.map_or(Step::Nothing, |(name, _)| Step::Make(name.clone()))
    }

    /// Makes sure that every language has a ready sandbox if there are enough slots: a language without one, such as
    /// one whose image arrived late, gets the slot of a language that has several, or, if it never had a sandbox, of a
    /// language that comes later in the configuration.
    fn rebalance(&self, now: Instant) -> Step {
        let lanes = || self.lanes.iter();
        let has_none =
            |lane: &Lane| lane.ready.len() + lane.making.len() == 0 && lane.failures == 0 && lane.can_make(now);
        let Some((_, needy)) = lanes().filter(|(_, lane)| has_none(lane)).min_by_key(|(_, lane)| lane.rank) else {
            return Step::Nothing;
        };
        let can_give = |lane: &Lane| match lane.ready.len() {
            0 => false,
            1 => needy.enforced.is_none() && needy.rank < lane.rank,
            _ => true,
        };
        let giver = lanes().filter(|(_, lane)| can_give(lane)).max_by_key(|(_, lane)| (lane.ready.len(), lane.rank));
        giver.map_or(Step::Nothing, |(name, _)| Step::Discard(name.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::PoolError;
    use crate::scheduler::lane::{BROKEN_AFTER, Image, RETRY_LONGEST};
    use crate::scheduler::state::tests::state;

    #[tokio::test]
    async fn every_language_gets_one_sandbox_before_any_gets_two() {
        let mut state = state(4, &["z", "b", "a"]);
        assert_eq!(state.made()[..3], ["z", "b", "a"], "in the order of the configuration");
        assert!(state.free.is_empty());
    }

    #[tokio::test]
    async fn spare_slots_go_to_the_languages_that_are_used() {
        let mut state = state(10, &["a", "b"]);
        (0..8).for_each(|_| state.lanes.get_mut("b").unwrap().note_request());
        let made = state.made();
        assert!(made.iter().filter(|name| *name == "b").count() >= 8, "{made:?}");
        assert!(made.contains(&"a".to_owned()));
    }

    #[tokio::test]
    async fn waiting_requests_are_served_first_in_order_of_arrival() {
        let mut state = state(3, &["a", "b", "c"]);
        let _turns = [state.wait_for("c"), state.wait_for("c"), state.wait_for("b")];
        assert_eq!(state.made(), ["c", "c", "b"]);
    }

    #[tokio::test]
    async fn a_request_that_has_left_is_not_served() {
        let mut state = state(1, &["a", "b"]);
        drop(state.wait_for("b"));
        assert_eq!(state.made(), ["a"]);
    }

    #[tokio::test]
    async fn no_more_sandboxes_are_made_at_once_than_there_are_cores() {
        let mut state = state(10, &["a"]);
        state.lanes.get_mut("a").unwrap().making.insert(0);
        assert_eq!(state.next_step(2, Instant::now()), Step::Nothing, "no request waits: one core is left free");
        state.lanes.get_mut("a").unwrap().making.insert(1);
        let _turns = [state.wait_for("a"), state.wait_for("a"), state.wait_for("a")];
        assert_eq!(state.next_step(2, Instant::now()), Step::Nothing);
        assert_eq!(state.next_step(3, Instant::now()), Step::Make("a".into()));
    }

    #[tokio::test]
    async fn a_failing_language_is_retried_after_a_pause_and_does_not_hold_up_others() {
        let mut state = state(4, &["a", "b"]);
        let broken = state.lanes.get_mut("a").unwrap();
        (0..BROKEN_AFTER).for_each(|_| broken.note_failure("no podman"));
        assert!(matches!(broken.check_available(), Err(PoolError::Broken { .. })));
        assert_eq!(state.made(), ["b"; 4]);
        let later = Instant::now() + RETRY_LONGEST;
        state.free.push(9);
        assert_eq!(state.next_step(usize::MAX, later), Step::Make("a".into()), "tried again after the pause");
        state.lanes.get_mut("a").unwrap().making.insert(9);
        assert_ne!(state.next_step(usize::MAX, later), Step::Make("a".into()), "one attempt at a time");
    }

    #[tokio::test]
    async fn no_sandbox_is_started_without_image_or_while_draining() {
        let mut state = state(2, &["a"]);
        state.lanes.get_mut("a").unwrap().image = Image::Missing("not pulled".into());
        assert!(state.made().is_empty());
        state.lanes.get_mut("a").unwrap().image = Image::Ready("id".into());
        state.draining = true;
        assert!(state.made().is_empty());
    }
}
