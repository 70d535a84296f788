//! The manager: the background task that makes sandboxes, and the state that it shares with the pool.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::sandbox::{Engine, Sandbox, SandboxError, SandboxSpec, Slot};
use crate::scheduler::state::State;
use crate::scheduler::step::Step;

/// Time between two checks for ready sandboxes that died without their engine noticing.
const CHECK_INTERVAL: Duration = Duration::from_secs(10);

/// State shared by the pool and its manager.
pub(super) struct Shared {
    pub(super) engine: Arc<dyn Engine>,
    state: Mutex<State>,
    /// Wakes the manager.
    pub(super) changed: Notify,
    /// On which [`Slot`]s report that they are free again.
    freed: mpsc::UnboundedSender<u32>,
    pub(super) stop: CancellationToken,
}

impl Shared {
    /// Wraps the state. Slots are returned on `freed`.
    fn new(engine: Arc<dyn Engine>, state: State, freed: mpsc::UnboundedSender<u32>) -> Shared {
        Shared { engine, state: Mutex::new(state), changed: Notify::new(), freed, stop: CancellationToken::new() }
    }

    /// Locks the state. The lock is never held across an await.
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Handles the result of a start: a sandbox goes to the first request that waits for one, else to the ready ones.
    fn start_finished(&self, language: &str, generation: u64, number: u32, made: Result<Sandbox, SandboxError>) {
        // A sandbox that is not needed or has already ended. Dropped after the state is unlocked.
        let mut unwanted = None;
        {
            let mut state = self.lock();
            let State { lanes, queue, closing, draining, .. } = &mut *state;
            let Some(lane) = lanes.get_mut(language).filter(|lane| lane.generation == generation) else {
                return;
            };
            // The slot of a failed start may already have been returned and be in use again.
            let was_making = lane.making.remove(&number);
            closing.remove(&number);
            match made {
                Ok(sandbox) if *draining || sandbox.is_gone() => unwanted = Some(sandbox),
                Ok(sandbox) => {
                    lane.clear_failures();
                    let missing = sandbox.enforced.missing().join(", ");
                    if lane.enforced.replace(sandbox.enforced) != Some(sandbox.enforced) && !missing.is_empty() {
                        tracing::warn!(
                            language,
                            missing,
                            "limits are NOT enforced on this host: see `coderunner doctor`"
                        );
                    }
                    lane.ready.extend(queue.serve(language, sandbox));
                }
                Err(error) => {
                    closing.extend(was_making.then_some(number));
                    lane.note_failure(&error.to_string());
                    if let Err(refusal) = lane.check_available() {
                        queue.refuse(language, &refusal);
                    }
                }
            }
        }
        drop(unwanted);
        self.changed.notify_one();
    }
}

/// Starts the manager of a pool.
pub(super) fn spawn(engine: Arc<dyn Engine>, state: State) -> Arc<Shared> {
    let (freed, freed_slots) = mpsc::unbounded_channel();
    let shared = Arc::new(Shared::new(engine, state, freed));
    tokio::spawn(manage(Arc::clone(&shared), freed_slots));
    shared
}

/// Follows [`State::next_step`] until the pool is drained.
async fn manage(shared: Arc<Shared>, mut freed_slots: mpsc::UnboundedReceiver<u32>) {
    let cores = std::thread::available_parallelism().map_or(2, usize::from);
    let mut check_at = Instant::now() + CHECK_INTERVAL;
    loop {
        if Instant::now() >= check_at {
            check_at = Instant::now() + CHECK_INTERVAL;
            let dead = shared.lock().take_dead();
            drop(dead);
        }
        let retry_at = loop {
            let mut state = shared.lock();
            let now = Instant::now();
            match state.next_step(cores, now) {
                Step::Make(name) => {
                    let state = &mut *state;
                    let Some(lane) = state.lanes.get_mut(&name) else { break None };
                    let Ok(image) = lane.image_id() else { break None };
                    let Some(number) = state.free.pop() else { break None };
                    lane.making.insert(number);
                    let generation = lane.generation;
                    let slot = Slot::new(number, shared.freed.clone());
                    let spec = SandboxSpec { language: Arc::clone(&lane.language), image, slot };
                    let shared = Arc::clone(&shared);
                    tokio::spawn(async move {
                        let made = tokio::select! {
                            made = shared.engine.start(spec) => made,
                            () = shared.stop.cancelled() => return,
                        };
                        shared.start_finished(&name, generation, number, made);
                    });
                }
                Step::Discard(name) => {
                    let discarded = state.lanes.get_mut(&name).and_then(|lane| lane.ready.pop_front());
                    state.note_closing(&discarded);
                    drop(state);
                    drop(discarded);
                }
                // A language whose backoff is over waits for a start to finish, a slot or a core; each wakes the
                // manager.
                Step::Nothing => {
                    break state.lanes.values().filter_map(|lane| lane.retry_at).filter(|at| *at > now).min();
                }
            }
        };
        let wake = retry_at.map_or(check_at, |at| at.min(check_at));
        tokio::select! {
            () = shared.changed.notified() => {}
            Some(number) = freed_slots.recv() => {
                let ended = shared.lock().slot_freed(number);
                drop(ended);
            }
            () = tokio::time::sleep_until(wake) => {}
            () = shared.stop.cancelled() => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::fake;
    use crate::scheduler::state::tests::state;

    #[tokio::test]
    async fn the_slot_of_a_failed_start_is_closing_unless_it_is_back() {
        for is_back in [true, false] {
            let mut state = state(1, &["a"]);
            assert_eq!(state.made(), ["a"]);
            if is_back {
                drop(state.slot_freed(0));
            }
            let shared = Shared::new(fake::engine().0, state, mpsc::unbounded_channel().0);
            shared.start_finished("a", 0, 0, Err(SandboxError::Lost));
            let mut state = shared.lock();
            assert_eq!(state.closing.is_empty(), is_back);
            if !is_back {
                drop(state.slot_freed(0));
            }
            assert!(state.closing.is_empty() && state.lanes["a"].making.is_empty());
        }
    }
}
