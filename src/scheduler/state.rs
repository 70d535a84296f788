//! The state of the pool: its slots, the lanes of the languages, the queue; and what changes several of these.
//!
//! Sandboxes that are given up are returned to the caller, who drops them when the pool is unlocked again.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use crate::model::language::Language;
use crate::sandbox::Sandbox;
use crate::scheduler::lane::{Image, Lane};
use crate::scheduler::queue::Queue;
use crate::scheduler::{PoolError, QueueSettings};

/// What the pool's lock protects.
pub(super) struct State {
    pub(super) queue: Queue,
    /// How many slots there may be.
    slots: u32,
    /// The slots that there are, free or taken: more than there may be, for a while after their number was reduced.
    existing: BTreeSet<u32>,
    pub(super) free: Vec<u32>,
    /// Slots of sandboxes given up that have not come back yet.
    pub(super) closing: BTreeSet<u32>,
    pub(super) lanes: BTreeMap<String, Lane>,
    pub(super) draining: bool,
}

impl State {
    /// So many free slots, an empty queue, and a lane for each language, none of which has an image yet.
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

    /// Sets the image of a language; the sandboxes given up for that, or `None` where nothing changes.
    pub(super) fn set_image(&mut self, language: &str, image: Image) -> Option<VecDeque<Sandbox>> {
        let lane = self.lane(language).ok()?;
        let known = matches!(lane.image, Image::Ready(_));
        if lane.image == image || (known && matches!(image, Image::Unknown(_))) {
            return None;
        }
        lane.image = image;
        let refusal = lane.image_id().err();
        lane.forget_failures();
        lane.generation += 1;
        let given_up = std::mem::take(&mut lane.ready);
        let making = std::mem::take(&mut lane.making);
        self.closing.extend(making);
        self.note_closing(&given_up);
        // Requests that wait get the same refusal as new ones.
        if let Some(refusal) = refusal {
            self.queue.refuse(language, &refusal);
        }
        Some(given_up)
    }

    /// Changes the number of slots, the queue's settings and the languages; the sandboxes given up for that.
    pub(super) fn reconfigure(
        &mut self,
        slots: u32,
        queue: QueueSettings,
        languages: &[Arc<Language>],
    ) -> Vec<Sandbox> {
        self.resize(slots);
        self.queue.settings = queue;
        let mut before = std::mem::take(&mut self.lanes);
        let mut given_up = Vec::new();
        for (rank, language) in languages.iter().enumerate() {
            let lane = match before.remove(&language.name) {
                Some(mut same) if same.language == *language => {
                    same.rank = rank;
                    same
                }
                Some(mut other) => {
                    given_up.extend(std::mem::take(&mut other.ready));
                    self.closing.append(&mut other.making);
                    let mut lane = Lane::new(rank, language);
                    if other.language.image == language.image {
                        lane.image = other.image;
                    }
                    // Sandboxes that are being made have the old limits: they are given up on arrival.
                    lane.generation = other.generation + 1;
                    lane
                }
                None => Lane::new(rank, language),
            };
            self.lanes.insert(language.name.clone(), lane);
        }
        for (name, lane) in before {
            self.queue.refuse(&name, &PoolError::not_enabled(&name));
            given_up.extend(lane.ready);
            self.closing.extend(lane.making);
        }
        for lane in self.lanes.values_mut() {
            let (kept, beyond) =
                std::mem::take(&mut lane.ready).into_iter().partition(|sandbox| sandbox.number < slots);
            lane.ready = kept;
            let beyond: VecDeque<Sandbox> = beyond;
            given_up.extend(beyond);
        }
        self.note_closing(&given_up);
        given_up
    }

    /// Makes nothing more and refuses the requests that wait; all ready sandboxes.
    pub(super) fn drain(&mut self) -> Vec<Sandbox> {
        self.draining = true;
        self.queue.clear();
        self.lanes.values_mut().flat_map(|lane| std::mem::take(&mut lane.ready)).collect()
    }

    /// Changes the number of slots; those beyond it go when they come back.
    fn resize(&mut self, slots: u32) {
        self.slots = slots;
        // Beyond the new number only those that are taken still exist.
        for number in std::mem::take(&mut self.free) {
            let _none = self.take_back(number);
        }
        for number in (0..slots).rev() {
            if self.existing.insert(number) {
                self.free.push(number);
            }
        }
    }

    /// Takes back a slot; with it the ready sandbox that was in it, if its container ended by itself.
    pub(super) fn take_back(&mut self, number: u32) -> Vec<Sandbox> {
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

    /// Takes out the ready sandboxes whose init has exited, whether or not their engine knows. Each costs a system
    /// call.
    pub(super) fn take_dead(&mut self) -> VecDeque<Sandbox> {
        let mut dead = VecDeque::new();
        for lane in self.lanes.values_mut() {
            let (gone, living) = std::mem::take(&mut lane.ready).into_iter().partition(Sandbox::is_gone);
            lane.ready = living;
            dead.extend::<VecDeque<Sandbox>>(gone);
        }
        self.note_closing(&dead);
        dead
    }

    /// Notes that the slots of these sandboxes are going to come back. The slot of a container that ended by itself may
    /// be back already.
    pub(super) fn note_closing<'a>(&mut self, given_up: impl IntoIterator<Item = &'a Sandbox>) {
        let numbers = given_up.into_iter().map(|sandbox| sandbox.number);
        self.closing.extend(numbers.filter(|number| self.existing.contains(number) && !self.free.contains(number)));
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Duration;

    use tokio::time::Instant;

    use super::*;
    use crate::model::client::Client;
    use crate::scheduler::queue::Turn;
    use crate::scheduler::step::Step;

    /// So many slots, and languages of these names, whose images are there.
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
        pub fn wait_for(&mut self, language: &str) -> Turn {
            self.queue.join(language, &Client::default()).unwrap().1
        }

        /// Follows the steps until there is nothing to do; the languages in the order in which they were made.
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
        drop(state.take_back(0));
        assert_eq!(state.closing, BTreeSet::from([1]), "the slot of a finished run was not closing");
        drop(state.take_back(1));
        assert!(state.closing.is_empty());
    }

    #[tokio::test]
    async fn slots_shrink_and_grow_without_being_given_twice() {
        let mut state = state(4, &["a"]);
        let taken: Vec<u32> = (0..3).map(|_| state.free.pop().unwrap()).collect();
        state.resize(1);
        state.resize(4);
        let mut seen = taken.clone();
        seen.extend(&state.free);
        seen.sort_unstable();
        assert_eq!(seen, [0, 1, 2, 3]);
        state.resize(1);
        taken.into_iter().for_each(|number| drop(state.take_back(number)));
        assert_eq!(state.free, [0]);
    }
}
