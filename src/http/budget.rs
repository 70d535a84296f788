//! Memory for answers that are on their way to their clients: bounded for the server, and for each client.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::http::error::ApiError;
use crate::model::client::Client;

/// How long an answer waits for memory. It is there and its client waits: as long as most clients wait for anything.
const WAIT: Duration = Duration::from_secs(10);

/// What is counted in: a permit is so many bytes.
const UNIT: usize = 1024;

/// Bytes that are leased at a time for what grows.
const STEP: usize = 64 * 1024;

/// The part of the memory that answers may take together that wait for their own. They are in memory meanwhile.
const WAITING_PART: u32 = 4;

/// Clients of which a share is known before those are forgotten that have no answer any more.
const FEW_CLIENTS: usize = 64;

/// Memory that answers in flight share.
#[derive(Debug)]
pub struct Budget {
    all: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
    /// What one client may take: half.
    share: u32,
    clients: Mutex<Shares>,
}

/// What a client may take of a budget.
#[derive(Debug, Clone)]
pub struct Allowance {
    budget: Arc<Budget>,
    client: Client,
}

/// What clients have left. A client without an answer has no entry of any worth.
#[derive(Debug, Default)]
struct Shares {
    left: HashMap<Client, Weak<Semaphore>>,
    forget_at: usize,
}

/// A part of the memory, given back when it is dropped.
#[derive(Debug)]
pub struct Lease {
    of_client: OwnedSemaphorePermit,
    of_all: OwnedSemaphorePermit,
}

/// Memory for what grows: leased in steps, beyond what is free.
#[derive(Debug)]
pub struct Growing {
    allowed: usize,
    lease: Option<Lease>,
}

impl Growing {
    /// Nothing is leased yet; so many bytes need no lease.
    pub const fn new(free: usize) -> Growing {
        Growing { allowed: free, lease: None }
    }

    /// Leases as much as these bytes, all that there are, need.
    pub fn cover(&mut self, bytes: usize, memory: &Allowance) -> Result<(), Exhausted> {
        while bytes > self.allowed {
            let more = memory.try_lease(STEP)?;
            match &mut self.lease {
                Some(lease) => lease.add(more),
                none => *none = Some(more),
            }
            self.allowed += STEP;
        }
        Ok(())
    }

    /// Whether nothing is leased.
    #[cfg(test)]
    pub fn is_free(&self) -> bool {
        self.lease.is_none()
    }
}

/// There is no memory left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the memory for requests and answers is used up")]
pub struct Exhausted;

impl From<Exhausted> for ApiError {
    fn from(exhausted: Exhausted) -> ApiError {
        ApiError::Overloaded(exhausted.to_string())
    }
}

impl Budget {
    /// A budget of so many bytes.
    pub fn new(bytes: usize) -> Budget {
        let units = u32::try_from(bytes / UNIT).unwrap_or(u32::MAX).max(WAITING_PART);
        let semaphore = |units: u32| Arc::new(Semaphore::new(units as usize));
        Budget {
            all: semaphore(units),
            waiting: semaphore(units / WAITING_PART),
            share: units / 2,
            clients: Mutex::default(),
        }
    }

    /// What a client may take of it.
    pub fn of(self: &Arc<Self>, client: &Client) -> Allowance {
        Allowance { budget: Arc::clone(self), client: client.clone() }
    }

    fn units(&self, bytes: usize) -> u32 {
        u32::try_from(bytes.div_ceil(UNIT)).unwrap_or(u32::MAX).min(self.share)
    }

    fn left(&self, client: &Client) -> Arc<Semaphore> {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(left) = clients.left.get(client).and_then(Weak::upgrade) {
            return left;
        }
        if clients.left.len() >= clients.forget_at {
            clients.left.retain(|_, left| left.strong_count() > 0);
            clients.forget_at = FEW_CLIENTS.max(clients.left.len() * 2);
        }
        let left = Arc::new(Semaphore::new(self.share as usize));
        clients.left.insert(client.clone(), Arc::downgrade(&left));
        left
    }
}

impl Allowance {
    /// Memory for an answer. What is more than a client's share takes the whole share.
    pub async fn lease(&self, bytes: usize) -> Result<Lease, Exhausted> {
        if let Ok(lease) = self.try_lease(bytes) {
            return Ok(lease);
        }
        let budget = &self.budget;
        let units = budget.units(bytes);
        let _waits = budget.waiting.try_acquire_many(units.min(budget.share / 2)).map_err(|_| Exhausted)?;
        let of_client = budget.left(&self.client);
        let leasing = async {
            // Its own share first: whoever waits for that keeps nobody else waiting.
            let of_client = of_client.acquire_many_owned(units).await.map_err(|_| Exhausted)?;
            let of_all = Arc::clone(&budget.all).acquire_many_owned(units).await.map_err(|_| Exhausted)?;
            Ok(Lease { of_client, of_all })
        };
        tokio::time::timeout(WAIT, leasing).await.unwrap_or(Err(Exhausted))
    }

    /// Like [`Allowance::lease`], without waiting.
    pub fn try_lease(&self, bytes: usize) -> Result<Lease, Exhausted> {
        let units = self.budget.units(bytes);
        let of_client = self.budget.left(&self.client).try_acquire_many_owned(units).map_err(|_| Exhausted)?;
        let of_all = Arc::clone(&self.budget.all).try_acquire_many_owned(units).map_err(|_| Exhausted)?;
        Ok(Lease { of_client, of_all })
    }
}

impl Lease {
    /// Takes another one of the same client in.
    pub fn add(&mut self, other: Lease) {
        self.of_client.merge(other.of_client);
        self.of_all.merge(other.of_all);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn budget() -> Arc<Budget> {
        Arc::new(Budget::new(100 * UNIT))
    }

    fn client(address: u8) -> Client {
        Client::at([192, 0, 2, address].into())
    }

    #[test]
    fn a_client_has_half_at_most_and_what_is_given_back_can_be_had_again() {
        let budget = budget();
        let first = budget.of(&client(1)).try_lease(50 * UNIT).unwrap();
        assert_eq!(budget.of(&client(1)).try_lease(1).err(), Some(Exhausted));
        let second = budget.of(&client(2)).try_lease(49 * UNIT).unwrap();
        drop(first);
        budget.of(&client(1)).try_lease(51 * UNIT).unwrap();
        drop(second);
        budget.of(&client(2)).try_lease(50 * UNIT).unwrap();
    }

    #[test]
    fn nobody_takes_more_than_there_is() {
        let budget = budget();
        let held: Vec<Lease> = (0..4).filter_map(|n| budget.of(&client(n)).try_lease(30 * UNIT).ok()).collect();
        assert_eq!(held.len(), 3);
        assert_eq!(budget.all.available_permits(), 10);
    }

    #[test]
    fn what_is_larger_than_a_share_is_taken_alone() {
        let budget = budget();
        let _whole = budget.of(&client(1)).try_lease(usize::MAX).unwrap();
        assert_eq!(budget.of(&client(1)).try_lease(1).err(), Some(Exhausted));
        assert!(budget.of(&client(2)).try_lease(1).is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_ends_with_memory_or_at_its_deadline() {
        let budget = budget().of(&client(1));
        let held = budget.lease(50 * UNIT).await.unwrap();
        let waits = tokio::spawn({
            let budget = budget.clone();
            async move { budget.lease(UNIT).await.map(drop) }
        });
        tokio::time::sleep(WAIT / 2).await;
        drop(held);
        assert_eq!(waits.await.unwrap(), Ok(()));
        let _held = budget.lease(50 * UNIT).await.unwrap();
        assert_eq!(budget.lease(UNIT).await.err(), Some(Exhausted));
    }

    #[tokio::test(start_paused = true)]
    async fn what_waits_is_bounded_too() {
        let budget = budget();
        let memory = budget.of(&client(1));
        let _held = memory.lease(50 * UNIT).await.unwrap();
        let began = tokio::time::Instant::now();
        let waiting = (0..10).map(|_| memory.lease(5 * UNIT));
        let refused = futures_util::future::join_all(waiting).await;
        assert!(refused.iter().all(Result::is_err));
        assert_eq!(began.elapsed(), WAIT);
        let clients: Vec<_> = (0..200).map(|n| budget.left(&Client::at([198, 51, 100, n].into()))).collect();
        drop(clients);
        budget.left(&Client::Ourselves);
        assert!(budget.clients.lock().unwrap().left.len() <= 300);
    }

    #[test]
    fn clients_that_have_no_answer_are_forgotten() {
        let budget = budget();
        (0..=255).for_each(|n| drop(budget.left(&Client::at([198, 51, 100, n].into()))));
        assert!(budget.clients.lock().unwrap().left.len() <= FEW_CLIENTS);
    }
}
