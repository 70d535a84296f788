//! The state of the pool: slots, the lanes of the languages and the queue, with the operations that change several of
//! them.
//!
//! The operations return discarded sandboxes to the caller, who drops them after unlocking the state.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use crate::model::language::Language;
use crate::sandbox::Sandbox;
use crate::scheduler::lane::{Image, Lane};
use crate::scheduler::queue::Queue;
use crate::scheduler::{PoolError, QueueSettings};

/// The state behind the lock of the pool.
pub(super) struct State {
    pub(super) queue: Queue,
    /// The configured number of slots.
    slots: u32,
    /// All slots, free or taken. After their number was reduced there are more than `slots` until taken ones are
    /// returned.
    existing: BTreeSet<u32>,
    pub(super) free: Vec<u32>,
    /// Slots of discarded sandboxes that have not been returned yet.
    pub(super) closing: BTreeSet<u32>,
    pub(super) lanes: BTreeMap<String, Lane>,
    pub(super) draining: bool,
}

impl State {
    /// `slots` free slots, an empty queue, and a lane without an image for each language.
    pub(super) fn new(slots: u32, queue: QueueSettings, languages: &[Arc<Language>]) -> State {
        let lane = |(rank, language): (usize, &Arc<Language>)| (language.name.clone(), Lane::new(rank, language));
        let mut state = State {
            queue: Queue::new(queue),
            slots: 0,
            existing: BTreeSet::new(),
            free: Vec::new(),
            closing: BTreeSet::new(),
            lanes: languages.iter().enumerate().map(lane).collect(),
            draining: false,
        };
        state.resize(slots);
        state
    }

    pub(super) fn lane(&mut self, language: &str) -> Result<&mut Lane, PoolError> {
        self.lanes.get_mut(language).ok_or_else(|| PoolError::not_enabled(language))
    }

    /// Sets the image of a language. Returns the sandboxes discarded for it, or `None` if nothing changes.
    pub(super) fn set_image(&mut self, language: &str, image: Image) -> Option<VecDeque<Sandbox>> {
        let lane = self.lane(language).ok()?;
        let known = matches!(lane.image, Image::Ready(_));
        if lane.image == image || (known && matches!(image, Image::Unknown(_))) {
            return None;
        }
        lane.image = image;
        let refusal = lane.image_id().err();
        lane.clear_failures();
        lane.generation += 1;
        let discarded = std::mem::take(&mut lane.ready);
        let making = std::mem::take(&mut lane.making);
        self.closing.extend(making);
        self.note_closing(&discarded);
        // Waiting requests get the same refusal as new ones.
        if let Some(refusal) = refusal {
            self.queue.refuse(language, &refusal);
        }
        Some(discarded)
    }

    /// Changes the number of slots, the queue's settings and the languages. Returns the sandboxes discarded for it.
    pub(super) fn reconfigure(
        &mut self,
        slots: u32,
        queue: QueueSettings,
        languages: &[Arc<Language>],
    ) -> Vec<Sandbox> {
        self.resize(slots);
        self.queue.settings = queue;
        let mut before = std::mem::take(&mut self.lanes);
        let mut discarded = Vec::new();
        for (rank, language) in languages.iter().enumerate() {
            let lane = match before.remove(&language.name) {
                Some(mut same) if same.language == *language => {
                    same.rank = rank;
                    same
                }
                Some(mut other) => {
                    discarded.extend(std::mem::take(&mut other.ready));
                    self.closing.append(&mut other.making);
                    let mut lane = Lane::new(rank, language);
                    if other.language.image == language.image {
                        lane.image = other.image;
                    }
                    // Sandboxes that are being made have the old limits: with a new generation they are discarded.
                    lane.generation = other.generation + 1;
                    lane
                }
                None => Lane::new(rank, language),
            };
            self.lanes.insert(language.name.clone(), lane);
        }
        for (name, lane) in before {
            self.queue.refuse(&name, &PoolError::not_enabled(&name));
            discarded.extend(lane.ready);
            self.closing.extend(lane.making);
        }
        for lane in self.lanes.values_mut() {
            let (kept, beyond) =
                std::mem::take(&mut lane.ready).into_iter().partition(|sandbox| sandbox.number < slots);
            lane.ready = kept;
            let beyond: VecDeque<Sandbox> = beyond;
            discarded.extend(beyond);
        }
        self.note_closing(&discarded);
        discarded
    }

    /// Stops making sandboxes and refuses all waiting requests. Returns all ready sandboxes.
    pub(super) fn drain(&mut self) -> Vec<Sandbox> {
        self.draining = true;
        self.queue.clear();
        self.lanes.values_mut().flat_map(|lane| std::mem::take(&mut lane.ready)).collect()
    }

    /// Changes the number of slots. Taken slots beyond it are removed when they are returned.
    fn resize(&mut self, slots: u32) {
        self.slots = slots;
        // Removes free slots beyond the new number.
        for number in std::mem::take(&mut self.free) {
            let _none = self.slot_freed(number);
        }
        for number in (0..slots).rev() {
            if self.existing.insert(number) {
                self.free.push(number);
            }
        }
    }

    /// Records that a slot is free again. Returns the ready sandbox in it, whose container then ended by itself.
    pub(super) fn slot_freed(&mut self, number: u32) -> Vec<Sandbox> {
        self.closing.remove(&number);
        let mut ended = Vec::new();
        for lane in self.lanes.values_mut() {
            lane.making.remove(&number);
            let at = lane.ready.iter().position(|sandbox| sandbox.number == number);
            ended.extend(at.and_then(|at| lane.ready.remove(at)));
        }
        match number < self.slots {
            true => self.free.push(number),
            false => drop(self.existing.remove(&number)),
        }
        ended
    }

    /// Removes and returns the ready sandboxes whose init has exited, even if their engine has not noticed. Checking
    /// each is a system call.
    pub(super) fn take_dead(&mut self) -> VecDeque<Sandbox> {
        let mut dead = VecDeque::new();
        for lane in self.lanes.values_mut() {
            let (gone, alive) = std::mem::take(&mut lane.ready).into_iter().partition(Sandbox::is_gone);
            lane.ready = alive;
            dead.extend::<VecDeque<Sandbox>>(gone);
        }
        self.note_closing(&dead);
        dead
    }

    /// Records that the slots of these sandboxes will be returned. The slot of a container that ended by itself may
    /// already have been.
    pub(super) fn note_closing<'a>(&mut self, discarded: impl IntoIterator<Item = &'a Sandbox>) {
        let numbers = discarded.into_iter().map(|sandbox| sandbox.number);
        self.closing.extend(numbers.filter(|number| self.existing.contains(number) && !self.free.contains(number)));
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Duration;

    use tokio::time::Instant;

    use super::*;
    use crate::model::client::Client;
    use crate::scheduler::queue::SandboxReceiver;
    use crate::scheduler::step::Step;

    /// A state with `slots` slots and languages of these names, whose images are ready.
    pub fn state(slots: u32, names: &[&str]) -> State {
        let language = |name: &&str| {
            let mut language = crate::config::tests::language("bash");
            language.name = (*name).to_owned();
            Arc::new(language)
        };
        let languages: Vec<_> = names.iter().map(language).collect();
        let queue = QueueSettings { length: 10, wait: Duration::from_secs(1), fair: true };
        let mut state = State::new(slots, queue, &languages);
        state.lanes.values_mut().for_each(|lane| lane.image = Image::Ready("id".into()));
        state
    }

    impl State {
        pub fn wait_for(&mut self, language: &str) -> SandboxReceiver {
            self.queue.join(language, &Client::default()).unwrap().1
        }

        /// Follows the steps until nothing is left to do; returns the languages in the order in which sandboxes were
        /// made.
        pub fn made(&mut self) -> Vec<String> {
            let mut made = Vec::new();
            while let Step::Make(name) = self.next_step(usize::MAX, Instant::now()) {
                let number = self.free.pop().unwrap();
                self.lanes.get_mut(&name).unwrap().making.insert(number);
                made.push(name);
            }
            made
        }
    }

    #[tokio::test]
    async fn only_slots_that_are_given_up_are_closing_until_they_come_back() {
        let mut state = state(3, &["a"]);
        state.free.clear();
        state.closing.insert(1);
        drop(state.slot_freed(0));
        assert_eq!(state.closing, BTreeSet::from([1]), "the slot of a finished run was not closing");
        drop(state.slot_freed(1));
        assert!(state.closing.is_empty());
    }

    #[tokio::test]
    async fn resizing_never_hands_out_a_slot_twice() {
        let mut state = state(4, &["a"]);
        let taken: Vec<u32> = (0..3).map(|_| state.free.pop().unwrap()).collect();
        state.resize(1);
        state.resize(4);
        let mut seen = taken.clone();
        seen.extend(&state.free);
        seen.sort_unstable();
        assert_eq!(seen, [0, 1, 2, 3]);
        state.resize(1);
        taken.into_iter().for_each(|number| drop(state.slot_freed(number)));
        assert_eq!(state.free, [0]);
    }
}
