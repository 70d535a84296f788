//! The queue of requests that wait for a sandbox: in order of arrival, or fair, with clients taking turns.

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
    /// Most requests that may wait.
    pub length: usize,
    /// How long a request may wait.
    #[serde(with = "humantime_serde")]
    pub wait: Duration,
    /// Whether clients take turns.
    pub fair: bool,
}

/// On which a waiting request receives its sandbox or its refusal.
pub type SandboxReceiver = oneshot::Receiver<Result<Sandbox, PoolError>>;

/// Waiting requests, in the order in which they are served.
pub struct Queue {
    /// Changeable at any time; requests that already wait keep their position.
    pub settings: QueueSettings,
    waiters: VecDeque<Waiter>,
    next_id: u64,
    /// The latest round in which a request was served.
    round: u64,
}

struct Waiter {
    id: u64,
    language: String,
    client: Client,
    /// In a fair queue, a client is served at most once per round.
    round: u64,
    sender: oneshot::Sender<Result<Sandbox, PoolError>>,
}

impl Queue {
    /// An empty queue.
    pub fn new(settings: QueueSettings) -> Queue {
        Queue { settings, waiters: VecDeque::new(), next_id: 0, round: 0 }
    }

    /// Adds a request and returns its id. In a fair queue it comes one round after the last waiting request of its
    /// client, or in the next round if none waits; otherwise it goes to the end.
    pub fn join(&mut self, language: &str, client: &Client) -> Result<(u64, SandboxReceiver), PoolError> {
        if self.waiters.len() >= self.settings.length {
            self.make_room(client)?;
        }
        let latest = self.waiters.iter().filter(|waiter| waiter.client == *client).map(|waiter| waiter.round).max();
        let last = self.waiters.back().map_or(self.round, |waiter| waiter.round);
        // The queue may have been fair when the others joined.
        let round = if self.settings.fair { self.round.max(latest.unwrap_or(0)) + 1 } else { self.round.max(last) };
        let at = self.waiters.partition_point(|waiter| waiter.round <= round);
        let id = self.next_id;
        self.next_id += 1;
        let (sender, receiver) = oneshot::channel();
        self.waiters.insert(at, Waiter { id, language: language.to_owned(), client: client.clone(), round, sender });
        Ok((id, receiver))
    }

    /// Makes room in a full queue, if it is fair: refuses the last request of the client with the most waiting
    /// requests, if these are more than `client` would have with the new one.
    fn make_room(&mut self, client: &Client) -> Result<(), PoolError> {
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
                let _ = waiter.sender.send(Err(full));
                Ok(())
            }
            None => Err(full),
        }
    }

    /// Removes a request.
    pub fn leave(&mut self, id: u64) {
        self.waiters.retain(|waiter| waiter.id != id);
    }

    /// Number of requests before this one.
    pub fn position(&self, id: u64) -> Option<usize> {
        self.waiters.iter().position(|waiter| waiter.id == id)
    }

    /// Number of waiting requests.
    pub fn len(&self) -> usize {
        self.waiters.len()
    }

    /// Whether no request waits.
    pub fn is_empty(&self) -> bool {
        self.waiters.is_empty()
    }

    /// The languages of the waiting requests, in the order in which they are served.
    pub fn languages(&self) -> impl Iterator<Item = &str> {
        self.waiters.iter().filter(|waiter| !waiter.sender.is_closed()).map(|waiter| waiter.language.as_str())
    }

    /// Hands a sandbox to the first request that waits for its language. Returns the sandbox if there is none.
    pub fn serve(&mut self, language: &str, mut sandbox: Sandbox) -> Option<Sandbox> {
        while let Some(at) = self.waiters.iter().position(|waiter| waiter.language == language)
            && let Some(waiter) = self.waiters.remove(at)
        {
            self.round = waiter.round.max(self.round);
            // Sending to a request that has left returns the sandbox.
            sandbox = waiter.sender.send(Ok(sandbox)).err()?.ok()?;
        }
        Some(sandbox)
    }

    /// Refuses all requests that wait for a language.
    pub fn refuse(&mut self, language: &str, refusal: &PoolError) {
        let (refused, others) =
            std::mem::take(&mut self.waiters).into_iter().partition(|waiter| waiter.language == language);
        self.waiters = others;
        let refused: VecDeque<Waiter> = refused;
        for waiter in refused {
            let _ = waiter.sender.send(Err(refusal.clone()));
        }
    }

    /// Drops all requests, which the pool reports as [`PoolError::Draining`].
    pub fn clear(&mut self) {
        self.waiters.clear();
    }
}

#[cfg(test)]
impl Queue {
    /// Removes the first request as if it were served.
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

    /// Serves the first request and returns the name of its client.
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

    /// Adds a request for each character of `arrivals`, named after its client; returns the order in which they are
    /// served.
    fn served(queue: &mut Queue, arrivals: &str) -> String {
        let _turns: Vec<_> = arrivals.chars().map(|c| queue.join("a", &client(&c.to_string()))).collect();
        (0..queue.len()).map(|_| serve(queue)).collect()
    }

    #[test]
    fn fair_queue_serves_clients_in_turn() {
        let mut queue = queue();
        assert_eq!(served(&mut queue, "xxxxyyz"), "xyzxyxx");
        assert_eq!(served(&mut queue, "yyxx"), "yxyx", "earlier rounds do not count");
        assert_eq!(served(&mut queue, "xxx"), "xxx");
    }

    #[test]
    fn just_served_client_goes_behind_waiting_clients() {
        let mut queue = queue();
        let _turns: Vec<_> = "xxxy".chars().map(|c| queue.join("a", &client(&c.to_string()))).collect();
        assert_eq!((serve(&mut queue), serve(&mut queue)), ("x".into(), "y".into()));
        let _again = queue.join("a", &client("y"));
        let _new = queue.join("a", &client("z"));
        let rest: String = (0..4).map(|_| serve(&mut queue)).collect();
        assert_eq!(rest, "xyzx");
    }

    #[test]
    fn plain_queue_serves_in_order_of_arrival() {
        let mut queue = queue();
        queue.settings.fair = false;
        assert_eq!(served(&mut queue, "xxxxyyz"), "xxxxyyz");
        queue.settings.length = 2;
        let _turns = [client("x"), client("x")].map(|client| queue.join("a", &client).unwrap());
        assert!(matches!(queue.join("a", &client("y")), Err(PoolError::QueueFull { length: 2 })));
    }

    #[test]
    fn toggling_fairness_never_lets_newcomers_overtake() {
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
    fn full_fair_queue_evicts_from_the_largest_client() {
        let mut queue = queue();
        queue.settings.length = 3;
        let mut of_x: Vec<_> = (0..3).map(|_| queue.join("a", &client("x")).unwrap()).collect();
        assert!(matches!(queue.join("a", &client("x")), Err(PoolError::QueueFull { .. })));
        let _of_y = queue.join("a", &client("y")).unwrap();
        let refused = of_x.pop().unwrap().1.try_recv().unwrap();
        assert!(matches!(refused, Err(PoolError::QueueFull { .. })), "the last of x's");
        assert!(of_x.iter_mut().all(|(_, receiver)| receiver.try_recv().is_err()), "the others wait on");
        assert!(queue.join("a", &client("y")).is_err(), "two requests and one are a fair share");
        assert_eq!(queue.len(), 3);
    }
}
