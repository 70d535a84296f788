//! The pool: a bounded number of slots for sandboxes, which are made ahead of time, and a queue for the requests that
//! find none ready.
//!
//! One task, the manager, makes sandboxes; everything else happens in the tasks of the callers. The state is behind one
//! lock that is never held across an await.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::model::client::Client;
use crate::model::language::Language;
use crate::sandbox::{Engine, Event, Sandbox};
use crate::scheduler::lane::{Image, Lane, Status};
use crate::scheduler::manager::{self, Shared};
use crate::scheduler::state::State;
use crate::scheduler::{PoolError, QueueSettings};

/// Time between two checks of the position of a request that is watched.
const POSITION_CHECK: Duration = Duration::from_millis(200);

/// Ready sandboxes of all languages.
pub struct Pool {
    shared: Arc<Shared>,
}

impl Pool {
    /// A pool of `slots` containers for these languages, none of which has an image yet.
    pub fn new(engine: Arc<dyn Engine>, slots: u32, queue: QueueSettings, languages: &[Arc<Language>]) -> Pool {
        Pool { shared: manager::spawn(engine, State::new(slots, queue, languages)) }
    }

    /// Takes a ready sandbox of a language, or waits for one in the queue, until `queue.wait` has passed since the
    /// request `came`; a watcher is told its place there. Dropping the future leaves the queue.
    pub async fn acquire(
        &self,
        language: &str,
        client: &Client,
        watcher: Option<&mpsc::UnboundedSender<Event>>,
        came: Instant,
    ) -> Result<Sandbox, PoolError> {
        // Dropped when the state is unlocked.
        let mut ended = Vec::new();
        let (place, turn, wait) = {
            let mut state = self.shared.lock();
            let wait = state.queue.settings.wait;
            if state.draining {
                return Err(PoolError::Draining);
            }
            let lane = state.lane(language)?;
            lane.note_use();
            let taken = lane.take(&mut ended);
            state.note_closing(&ended);
            if let Some(sandbox) = taken {
                self.shared.changed.notify_one();
                return Ok(sandbox);
            }
            state.lane(language)?.refusal()?;
            let (id, turn) = state.queue.join(language, client)?;
            (Place { shared: &self.shared, id }, turn, wait)
        };
        self.shared.changed.notify_one();
        let waited = tokio::select! {
            waited = tokio::time::timeout(wait.saturating_sub(came.elapsed()), turn) => waited,
            never = place.report_position(watcher) => match never {},
        };
        drop(place);
        match waited {
            Ok(Ok(handed_over)) => handed_over,
            Ok(Err(_)) => Err(PoolError::Draining),
            Err(_) => Err(PoolError::QueueTimeout { waited: wait }),
        }
    }

    /// Sets the image of a language: from now on sandboxes are made from it, and ready ones of another image are given
    /// up.
    pub fn set_image(&self, language: &str, image: Image) {
        let Some(given_up) = self.shared.lock().set_image(language, image) else { return };
        drop(given_up);
        self.shared.changed.notify_one();
    }

    /// Serves other languages, or the same with other limits, in other numbers. What runs is not disturbed.
    pub fn reconfigure(&self, slots: u32, queue: QueueSettings, languages: &[Arc<Language>]) {
        let given_up = self.shared.lock().reconfigure(slots, queue, languages);
        drop(given_up);
        self.shared.engine.keep_only(languages);
        self.shared.changed.notify_one();
    }

    /// The image that a language's sandboxes are made from, or why there is none.
    pub fn image(&self, language: &str) -> Result<String, PoolError> {
        let mut state = self.shared.lock();
        if state.draining {
            return Err(PoolError::Draining);
        }
        state.lane(language)?.image_id()
    }

    /// The status of a language.
    pub fn status(&self, language: &str) -> Status {
        self.shared.lock().lane(language).map(|lane| lane.status()).unwrap_or_default()
    }

    /// The status of each language, the default one first.
    pub fn statuses(&self) -> Vec<(String, Status)> {
        let mut state = self.shared.lock();
        let mut lanes: Vec<(&String, &mut Lane)> = state.lanes.iter_mut().collect();
        lanes.sort_by_key(|(_, lane)| lane.rank);
        lanes.into_iter().map(|(name, lane)| (name.clone(), lane.status())).collect()
    }

    /// Notes that a sandbox of this language has just run a program to its end.
    pub fn note_proof(&self, language: &str) {
        if let Ok(lane) = self.shared.lock().lane(language) {
            lane.proved_at = Some(Instant::now());
        }
    }

    /// How many requests wait for a sandbox.
    pub fn queue_length(&self) -> usize {
        self.shared.lock().queue.len()
    }

    /// Takes a ready sandbox of a language, if there is one and no request waits for any. It does not count as a use.
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

    /// Ends: requests that wait are refused, ready sandboxes are given up, nothing more is made.
    pub fn drain(&self) {
        let given_up = self.shared.lock().drain();
        drop(given_up);
        self.shared.stop.cancel();
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.drain();
    }
}

/// The place of a request in the queue; dropping it leaves the queue.
struct Place<'a> {
    shared: &'a Shared,
    id: u64,
}

impl Place<'_> {
    /// Tells the watcher how many requests wait before this one, now and whenever that changes.
    async fn report_position(&self, watcher: Option<&mpsc::UnboundedSender<Event>>) -> Infallible {
        let Some(watcher) = watcher else { return std::future::pending().await };
        let mut told = None;
        loop {
            let position = self.shared.lock().queue.position(self.id);
            if let Some(position) = position.filter(|position| told != Some(*position)) {
                told = Some(position);
                let _ = watcher.send(Event::Queued(position));
            }
            tokio::time::sleep(POSITION_CHECK).await;
        }
    }
}

impl Drop for Place<'_> {
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

    /// A pool for bash, whose image is ready, and the starts of its engine.
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
    fn waiting_requests_are_refused_at_once_when_their_language_becomes_unavailable() {
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

    /// Waits until so many sandboxes are ready.
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
            // The engine reports the end of one before any request comes.
            let told = inits.remove(1).unwrap();
            let slot = told.slot();
            drop(told);
            let again = starts.recv().await.unwrap();
            assert_eq!(again.spec.slot.number, slot);
            inits.push_back(again.succeed());
            wait_ready(&pool, 3).await;
            // One whose end nobody has noticed yet is skipped and given up when it would be next.
            let mut first = inits.pop_front().unwrap();
            first.close_channel();
            let given = pool.acquire("bash", &Client::default(), None, Instant::now()).await.unwrap();
            assert_eq!(given.number, inits[0].slot());
            first.released().await;
            // One whose end nobody reports is found by the next check.
            inits[1].close_channel();
            inits[1].released().await;
        });
    }
}
