//! Requests that wait for a sandbox: in order of arrival, or a turn for each client.

use std::collections::{HashMap, VecDeque};

use tokio::sync::oneshot;

use crate::model::client::Client;
use crate::sandbox::Sandbox;
use crate::scheduler::PoolError;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// `[queue]`
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueSettings {
    /// Jobs that may wait.
    pub length: usize,
    /// How long each may wait.
    #[serde(with = "humantime_serde")]
    pub wait: Duration,
    /// Whether clients take turns.
    pub fair: bool,
}

/// What a waiting request is told in the end.
pub type Turn = oneshot::Receiver<Result<Sandbox, PoolError>>;

/// Those who wait, in the order in which they are served.
pub struct Queue {
    /// How many may wait, how long, and whether each client has its turn.
    pub settings: QueueSettings,
    waiters: VecDeque<Waiter>,
    next: u64,
    /// The latest round in which anybody was served.
    round: u64,
}

struct Waiter {
    id: u64,
    language: String,
    /// Whose turn it is.
    client: Client,
    /// In each round every client is served once.
    round: u64,
    hand_over: oneshot::Sender<Result<Sandbox, PoolError>>,
}

impl Queue {
    /// An empty one.
    pub fn new(settings: QueueSettings) -> Queue {
        Queue { settings, waiters: VecDeque::new(), next: 0, round: 0 }
    }

    /// Gives a request its place, and the number of that. Where the queue is fair, it is behind those of each client's
    /// that were served as often as this one's; else, and among those of one client, at the end.
    pub fn join(&mut self, language: &str, client: &Client) -> Result<(u64, Turn), PoolError> {
        if self.waiters.len() >= self.settings.length {
            self.make_place(client)?;
        }
        let latest = self.waiters.iter().filter(|waiter| waiter.client == *client).map(|waiter| waiter.round).max();
        let last = self.waiters.back().map_or(self.round, |waiter| waiter.round);
        // It may have been fair when the others came.
        let round = if self.settings.fair { self.round.max(latest.unwrap_or(0)) + 1 } else { self.round.max(last) };
        let at = self.waiters.partition_point(|waiter| waiter.round <= round);
        let id = self.next;
        self.next += 1;
        let (hand_over, turn) = oneshot::channel();
        self.waiters.insert(at, Waiter { id, language: language.to_owned(), client: client.clone(), round, hand_over });
        Ok((id, turn))
    }

    /// Makes a place in a full queue, if it is fair: the last one of the client who has most gives way to one who
    /// has less than that even with it.
    fn make_place(&mut self, client: &Client) -> Result<(), PoolError> {
        let full = PoolError::QueueFull { length: self.waiters.len() };
        if !self.settings.fair {
            return Err(full);
        }
        let mut counts: HashMap<&Client, usize> = HashMap::new();
        self.waiters.iter().for_each(|waiter| *counts.entry(&waiter.client).or_default() += 1);
        let own = counts.get(client).copied().unwrap_or(0);
        let most = counts.into_iter().max_by_key(|(_, count)| *count).filter(|(_, count)| *count > own + 1);
        let last = most.and_then(|(most, _)| self.waiters.iter().rposition(|waiter| waiter.client == *most));
        match last.and_then(|at| self.waiters.remove(at)) {
            Some(waiter) => {
                let _ = waiter.hand_over.send(Err(full));
                Ok(())
            }
            None => Err(full),
        }
    }

    /// Gives a place up.
    pub fn leave(&mut self, id: u64) {
        self.waiters.retain(|waiter| waiter.id != id);
    }

    /// How many wait before this one.
    pub fn position(&self, id: u64) -> Option<usize> {
        self.waiters.iter().position(|waiter| waiter.id == id)
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.waiters.len()
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.waiters.is_empty()
    }

    /// The languages that are waited for, of the first first.
    pub fn languages(&self) -> impl Iterator<Item = &str> {
        self.waiters.iter().filter(|waiter| !waiter.hand_over.is_closed()).map(|waiter| waiter.language.as_str())
    }

    /// Hands a sandbox to the first who waits for its language, or back where nobody does.
    pub fn serve(&mut self, language: &str, mut sandbox: Sandbox) -> Option<Sandbox> {
        while let Some(at) = self.waiters.iter().position(|waiter| waiter.language == language)
            && let Some(waiter) = self.waiters.remove(at)
        {
            self.round = waiter.round.max(self.round);
            // One that has left meanwhile hands it back.
            sandbox = waiter.hand_over.send(Ok(sandbox)).err()?.ok()?;
        }
        Some(sandbox)
    }

    /// Refuses all who wait for a language.
    pub fn refuse(&mut self, language: &str, refusal: &PoolError) {
        let (refused, others) =
            std::mem::take(&mut self.waiters).into_iter().partition(|waiter| waiter.language == language);
        self.waiters = others;
        let refused: VecDeque<Waiter> = refused;
        for waiter in refused {
            let _ = waiter.hand_over.send(Err(refusal.clone()));
        }
    }

    /// Refuses all who wait, as the server is going down.
    pub fn clear(&mut self) {
        self.waiters.clear();
    }
}

#[cfg(test)]
impl Queue {
    /// Takes the first out, as if it were served.
    pub fn take_first(&mut self) -> Option<Client> {
        let waiter = self.waiters.pop_front()?;
        self.round = waiter.round.max(self.round);
        Some(waiter.client)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn queue() -> Queue {
        Queue::new(QueueSettings { length: 10, wait: Duration::from_secs(1), fair: true })
    }

    /// Serves the first in the queue; the name of its client.
    fn serve(queue: &mut Queue) -> String {
        name(&queue.take_first().unwrap())
    }

    fn client(name: &str) -> Client {
        Client::Key(name.into())
    }

    fn name(client: &Client) -> String {
        match client {
            Client::Key(name) => name.to_string(),
            other => format!("{other:?}"),
        }
    }

    /// Who waits, in order of arrival; who is served, in that order.
    fn served(queue: &mut Queue, arrivals: &str) -> String {
        let _turns: Vec<_> = arrivals.chars().map(|c| queue.join("a", &client(&c.to_string()))).collect();
        (0..queue.len()).map(|_| serve(queue)).collect()
    }

    #[test]
    fn a_fair_queue_serves_one_of_each_client_in_turn() {
        let mut queue = queue();
        assert_eq!(served(&mut queue, "xxxxyyz"), "xyzxyxx");
        assert_eq!(served(&mut queue, "yyxx"), "yxyx", "and has forgotten who came before");
        assert_eq!(served(&mut queue, "xxx"), "xxx");
    }

    #[test]
    fn who_was_just_served_comes_after_those_who_wait() {
        let mut queue = queue();
        let _turns: Vec<_> = "xxxy".chars().map(|c| queue.join("a", &client(&c.to_string()))).collect();
        assert_eq!((serve(&mut queue), serve(&mut queue)), ("x".into(), "y".into()));
        let _again = queue.join("a", &client("y"));
        let _new = queue.join("a", &client("z"));
        let rest: String = (0..4).map(|_| serve(&mut queue)).collect();
        assert_eq!(rest, "xyzx");
    }

    #[test]
    fn a_queue_that_is_not_fair_is_one_of_arrival() {
        let mut queue = queue();
        queue.settings.fair = false;
        assert_eq!(served(&mut queue, "xxxxyyz"), "xxxxyyz");
        queue.settings.length = 2;
        let _turns = [client("x"), client("x")].map(|client| queue.join("a", &client).unwrap());
        assert!(matches!(queue.join("a", &client("y")), Err(PoolError::QueueFull { length: 2 })));
    }

    #[test]
    fn newcomers_overtake_nobody_once_a_queue_is_fair_no_more() {
        let mut queue = queue();
        let turns = |queue: &mut Queue, arrivals: &str| -> Vec<_> {
            arrivals.chars().map(|c| queue.join("a", &client(&c.to_string())).unwrap()).collect()
        };
        let _waiting = turns(&mut queue, "xxx");
        queue.settings.fair = false;
        let _newcomers = turns(&mut queue, "yz");
        queue.settings.fair = true;
        let _last = turns(&mut queue, "z");
        assert_eq!((0..6).map(|_| serve(&mut queue)).collect::<String>(), "xxxyzz");
    }

    #[test]
    fn who_fills_a_fair_queue_gives_way() {
        let mut queue = queue();
        queue.settings.length = 3;
        let mut of_x: Vec<_> = (0..3).map(|_| queue.join("a", &client("x")).unwrap()).collect();
        assert!(matches!(queue.join("a", &client("x")), Err(PoolError::QueueFull { .. })));
        let _of_y = queue.join("a", &client("y")).unwrap();
        let told = of_x.pop().unwrap().1.try_recv().unwrap();
        assert!(matches!(told, Err(PoolError::QueueFull { .. })), "the last of x's");
        assert!(of_x.iter_mut().all(|(_, turn)| turn.try_recv().is_err()), "the others wait on");
        assert!(queue.join("a", &client("y")).is_err(), "two and one are as equal as can be");
        assert_eq!(queue.len(), 3);
    }
}
