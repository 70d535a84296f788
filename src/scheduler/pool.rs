//! The pool: a bounded number of sandboxes, made ahead of time, and a queue for requests that find none ready.
//!
//! One task, the manager, makes sandboxes; everything else happens in the tasks of the callers. One lock protects the
//! state and is never held across an await.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::model::client::Client;
use crate::model::language::Language;
use crate::sandbox::{Engine, Event, Sandbox};
use crate::scheduler::lane::{Image, Lane, LanguageStatus};
use crate::scheduler::manager::{self, Shared};
use crate::scheduler::state::State;
use crate::scheduler::{PoolError, QueueSettings};

/// Time between two checks of the queue position of a watched request.
const POSITION_CHECK: Duration = Duration::from_millis(200);

/// Ready sandboxes of all languages.
pub struct Pool {
    shared: Arc<Shared>,
}

impl Pool {
    /// A pool of `slots` sandboxes for these languages. It makes none until [`Pool::set_image`] names an image.
    pub fn new(engine: Arc<dyn Engine>, slots: u32, queue: QueueSettings, languages: &[Arc<Language>]) -> Pool {
        Pool { shared: manager::spawn(engine, State::new(slots, queue, languages)) }
    }

    /// Takes a ready sandbox of a language, or waits in the queue for one, at most `queue.wait` from `arrived_at` on. A
    /// watcher receives the position in the queue. Dropping the future leaves the queue.
    pub async fn acquire(
        &self,
        language: &str,
        client: &Client,
        watcher: Option<&mpsc::UnboundedSender<Event>>,
        arrived_at: Instant,
    ) -> Result<Sandbox, PoolError> {
        // Dropped after the state is unlocked.
        let mut ended = Vec::new();
        let (ticket, receiver, wait) = {
            let mut state = self.shared.lock();
            let wait = state.queue.settings.wait;
            if state.draining {
                return Err(PoolError::Draining);
            }
            let lane = state.lane(language)?;
            lane.note_request();
            let taken = lane.take(&mut ended);
            state.note_closing(&ended);
            if let Some(sandbox) = taken {
                self.shared.changed.notify_one();
                return Ok(sandbox);
            }
            state.lane(language)?.check_available()?;
            let (id, receiver) = state.queue.join(language, client)?;
            (Ticket { shared: &self.shared, id }, receiver, wait)
        };
        self.shared.changed.notify_one();
        let waited = tokio::select! {
            waited = tokio::time::timeout(wait.saturating_sub(arrived_at.elapsed()), receiver) => waited,
            never = ticket.report_position(watcher) => match never {},
        };
        drop(ticket);
        match waited {
            Ok(Ok(handed_over)) => handed_over,
            Ok(Err(_)) => Err(PoolError::Draining),
            Err(_) => Err(PoolError::QueueTimeout { waited: wait }),
        }
    }

    /// Sets the image from which sandboxes of a language are made, and discards ready sandboxes of another image.
    pub fn set_image(&self, language: &str, image: Image) {
        let Some(discarded) = self.shared.lock().set_image(language, image) else { return };
        drop(discarded);
        self.shared.changed.notify_one();
    }

    /// Changes the number of slots, the settings of the queue and the languages. Running jobs are not affected.
    pub fn reconfigure(&self, slots: u32, queue: QueueSettings, languages: &[Arc<Language>]) {
        let discarded = self.shared.lock().reconfigure(slots, queue, languages);
        drop(discarded);
        self.shared.engine.keep_only(languages);
        self.shared.changed.notify_one();
    }

    /// The id of the image that a language's sandboxes are made from, or why there is none.
    pub fn image(&self, language: &str) -> Result<String, PoolError> {
        let mut state = self.shared.lock();
        if state.draining {
            return Err(PoolError::Draining);
        }
        state.lane(language)?.image_id()
    }

    /// The status of a language.
    pub fn status(&self, language: &str) -> LanguageStatus {
        self.shared.lock().lane(language).map(|lane| lane.status()).unwrap_or_default()
    }

    /// The status of each language, the default one first.
    pub fn statuses(&self) -> Vec<(String, LanguageStatus)> {
        let mut state = self.shared.lock();
        let mut lanes: Vec<(&String, &mut Lane)> = state.lanes.iter_mut().collect();
        lanes.sort_by_key(|(_, lane)| lane.rank);
        lanes.into_iter().map(|(name, lane)| (name.clone(), lane.status())).collect()
    }

    /// Records that a sandbox of this language has just run a program to completion.
    pub fn note_completed_run(&self, language: &str) {
        if let Ok(lane) = self.shared.lock().lane(language) {
            lane.last_run_at = Some(Instant::now());
        }
    }

    /// How many requests wait for a sandbox.
    pub fn queue_length(&self) -> usize {
        self.shared.lock().queue.len()
    }

    /// Takes a ready sandbox of a language, if there is one and no request waits for any. This does not count as a
    /// request.
    pub fn take_idle(&self, language: &str) -> Option<Sandbox> {
        let mut ended = Vec::new();
        let mut state = self.shared.lock();
        if state.draining || !state.queue.is_empty() {
            return None;
        }
        let sandbox = state.lane(language).ok()?.take(&mut ended);
        state.note_closing(&ended);
        self.shared.changed.notify_one();
        sandbox
    }

    /// Shuts the pool down: refuses waiting requests, discards ready sandboxes and makes no more.
    pub fn drain(&self) {
        let discarded = self.shared.lock().drain();
        drop(discarded);
        self.shared.stop.cancel();
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.drain();
    }
}

/// A request in the queue; dropping the ticket leaves the queue.
struct Ticket<'a> {
    shared: &'a Shared,
    id: u64,
}

impl Ticket<'_> {
    /// Sends the watcher the number of requests before this one, now and whenever it changes.
    async fn report_position(&self, watcher: Option<&mpsc::UnboundedSender<Event>>) -> Infallible {
        let Some(watcher) = watcher else { return std::future::pending().await };
        let mut reported = None;
        loop {
            let position = self.shared.lock().queue.position(self.id);
            if let Some(position) = position.filter(|position| reported != Some(*position)) {
                reported = Some(position);
                let _ = watcher.send(Event::Queued(position));
            }
            tokio::time::sleep(POSITION_CHECK).await;
        }
    }
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        self.shared.lock().queue.leave(self.id);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;
    use crate::sandbox::fake;

    fn bash() -> Arc<Language> {
        Arc::new(crate::config::tests::language("bash"))
    }

    fn queue_settings() -> QueueSettings {
        QueueSettings { length: 10, wait: Duration::from_secs(30), fair: false }
    }

    /// A pool for bash, whose image is ready, and the starts of its fake engine.
    fn pool(slots: u32) -> (Arc<Pool>, mpsc::UnboundedReceiver<fake::Start>) {
        let (engine, starts) = fake::engine();
        let pool = Arc::new(Pool::new(engine, slots, queue_settings(), &[bash()]));
        pool.set_image("bash", Image::Ready("id".into()));
        (pool, starts)
    }

    #[test]
    fn the_manager_sleeps_while_a_retry_is_in_progress() {
        fake::on_paused_clock(|| async {
            let (pool, mut starts) = pool(1);
            drop(starts.recv().await.unwrap());
            let hangs = starts.recv().await.unwrap();
            tokio::time::sleep(Duration::from_secs(30)).await;
            let _init = hangs.succeed();
            let made = pool.acquire("bash", &Client::default(), None, Instant::now()).await;
            assert!(made.is_ok(), "{made:?}");
        });
    }

    #[test]
    fn waiters_fail_at_once_if_their_language_becomes_unavailable() {
        fake::on_paused_clock(|| async {
            for image_goes in [true, false] {
                let (pool, mut starts) = pool(1);
                let begun = Instant::now();
                let (waiter, client) = (Arc::clone(&pool), Client::default());
                let waiting = tokio::spawn(async move { waiter.acquire("bash", &client, None, begun).await });
                let _hangs = starts.recv().await.unwrap();
                while pool.queue_length() == 0 {
                    tokio::task::yield_now().await;
                }
                match image_goes {
                    true => pool.set_image("bash", Image::Missing("it was deleted".into())),
                    false => pool.reconfigure(1, queue_settings(), &[]),
                }
                let refusal = waiting.await.unwrap().unwrap_err();
                assert!(matches!(refusal, PoolError::Unavailable { .. }), "{refusal}");
                assert_eq!(begun.elapsed(), Duration::ZERO);
            }
        });
    }

    /// Waits until `count` sandboxes are ready.
    async fn wait_ready(pool: &Pool, count: usize) {
        while pool.status("bash").ready != count {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    #[test]
    fn ready_sandboxes_that_ended_are_skipped_and_their_slots_reused() {
        fake::on_paused_clock(|| async {
            let (pool, mut starts) = pool(3);
            let mut inits = VecDeque::new();
            for ready in 1..=3 {
                inits.push_back(starts.recv().await.unwrap().succeed());
                wait_ready(&pool, ready).await;
            }
            // The engine reports the end of a ready sandbox: its slot is used again.
            let ended = inits.remove(1).unwrap();
            let slot = ended.slot();
            drop(ended);
            let again = starts.recv().await.unwrap();
            assert_eq!(again.spec.slot.number, slot);
            inits.push_back(again.succeed());
            wait_ready(&pool, 3).await;
            // A sandbox that ended without a report is skipped and discarded by a request.
            let mut first = inits.pop_front().unwrap();
            first.close_channel();
            let given = pool.acquire("bash", &Client::default(), None, Instant::now()).await.unwrap();
            assert_eq!(given.number, inits[0].slot());
            first.released().await;
            // Without a request, the next periodic check discards it.
            inits[1].close_channel();
            inits[1].released().await;
        });
    }
}
