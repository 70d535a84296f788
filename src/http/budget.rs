//! Memory budgets for requests and responses in flight, with a limit in total and per client.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::http::error::ApiError;
use crate::model::client::Client;

/// How long a finished response waits for memory: about as long as most clients wait for a response.
const MAX_WAIT: Duration = Duration::from_secs(10);

/// Bytes per permit of the semaphores.
const UNIT: usize = 1024;

/// Bytes that a [`GrowingLease`] leases at a time.
const STEP: usize = 64 * 1024;

/// Responses that wait for memory may take together the budget divided by this: they are in memory while they wait.
const WAITING_FRACTION: u32 = 4;

/// Number of clients from which on entries of clients without a lease are removed.
const MIN_CLEANUP_SIZE: usize = 64;

/// A memory budget, shared by all clients.
#[derive(Debug)]
pub struct Budget {
    total: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
    /// Permits of one client: half of the total.
    share: u32,
    clients: Mutex<ClientShares>,
}

/// The part of a budget that one client may use.
#[derive(Debug, Clone)]
pub struct Allowance {
    budget: Arc<Budget>,
    client: Client,
}

/// The semaphore of each client with a lease. Entries without one are removed once there are `forget_at`.
#[derive(Debug, Default)]
struct ClientShares {
    left: HashMap<Client, Weak<Semaphore>>,
    forget_at: usize,
}

/// Leased memory, returned to the budget on drop.
#[derive(Debug)]
pub struct Lease {
    client_permit: OwnedSemaphorePermit,
    total_permit: OwnedSemaphorePermit,
}

/// A lease for data that grows: leased in steps, beyond an amount that needs no lease.
#[derive(Debug)]
pub struct GrowingLease {
    allowed: usize,
    lease: Option<Lease>,
}

impl GrowingLease {
    /// Nothing is leased yet; the first `free` bytes need no lease.
    pub const fn new(free: usize) -> GrowingLease {
        GrowingLease { allowed: free, lease: None }
    }

    /// Extends the lease to cover `bytes` in total.
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

/// The budget has no memory left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the memory for requests and answers is used up")]
pub struct Exhausted;

impl From<Exhausted> for ApiError {
    fn from(exhausted: Exhausted) -> ApiError {
        ApiError::Overloaded(exhausted.to_string())
    }
}

impl Budget {
    /// A budget of `bytes`.
    pub fn new(bytes: usize) -> Budget {
        let units = u32::try_from(bytes / UNIT).unwrap_or(u32::MAX).max(WAITING_FRACTION);
        let semaphore = |units: u32| Arc::new(Semaphore::new(units as usize));
        Budget {
            total: semaphore(units),
            waiting: semaphore(units / WAITING_FRACTION),
            share: units / 2,
            clients: Mutex::default(),
        }
    }

    /// The part that a client may use.
    pub fn for_client(self: &Arc<Self>, client: &Client) -> Allowance {
        Allowance { budget: Arc::clone(self), client: client.clone() }
    }

    fn units(&self, bytes: usize) -> u32 {
        u32::try_from(bytes.div_ceil(UNIT)).unwrap_or(u32::MAX).min(self.share)
    }

    fn client_semaphore(&self, client: &Client) -> Arc<Semaphore> {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(left) = clients.left.get(client).and_then(Weak::upgrade) {
            return left;
        }
        if clients.left.len() >= clients.forget_at {
            clients.left.retain(|_, left| left.strong_count() > 0);
            clients.forget_at = MIN_CLEANUP_SIZE.max(clients.left.len() * 2);
        }
        let left = Arc::new(Semaphore::new(self.share as usize));
        clients.left.insert(client.clone(), Arc::downgrade(&left));
        left
    }
}

impl Allowance {
    /// Leases memory; waits for it up to `MAX_WAIT`. A request for more than the client's share takes the whole share.
    pub async fn lease(&self, bytes: usize) -> Result<Lease, Exhausted> {
        if let Ok(lease) = self.try_lease(bytes) {
            return Ok(lease);
        }
        let budget = &self.budget;
        let units = budget.units(bytes);
        let _waits = budget.waiting.try_acquire_many(units.min(budget.share / 2)).map_err(|_| Exhausted)?;
        let client_permit = budget.client_semaphore(&self.client);
        let leasing = async {
            // The share of the client first: waiting for that does not hold up other clients.
            let client_permit = client_permit.acquire_many_owned(units).await.map_err(|_| Exhausted)?;
            let total_permit = Arc::clone(&budget.total).acquire_many_owned(units).await.map_err(|_| Exhausted)?;
            Ok(Lease { client_permit, total_permit })
        };
        tokio::time::timeout(MAX_WAIT, leasing).await.unwrap_or(Err(Exhausted))
    }

    /// Like [`Allowance::lease`], without waiting.
    pub fn try_lease(&self, bytes: usize) -> Result<Lease, Exhausted> {
        let units = self.budget.units(bytes);
        let client_permit =
            self.budget.client_semaphore(&self.client).try_acquire_many_owned(units).map_err(|_| Exhausted)?;
        let total_permit = Arc::clone(&self.budget.total).try_acquire_many_owned(units).map_err(|_| Exhausted)?;
        Ok(Lease { client_permit, total_permit })
    }
}

impl Lease {
    /// Merges another lease of the same client.
    pub fn add(&mut self, other: Lease) {
        self.client_permit.merge(other.client_permit);
        self.total_permit.merge(other.total_permit);
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
    fn client_gets_at_most_half_and_can_reuse_returned_memory() {
        let budget = budget();
        let first = budget.for_client(&client(1)).try_lease(50 * UNIT).unwrap();
        assert_eq!(budget.for_client(&client(1)).try_lease(1).err(), Some(Exhausted));
        let second = budget.for_client(&client(2)).try_lease(49 * UNIT).unwrap();
        drop(first);
        budget.for_client(&client(1)).try_lease(51 * UNIT).unwrap();
        drop(second);
        budget.for_client(&client(2)).try_lease(50 * UNIT).unwrap();
    }

    #[test]
    fn leases_never_exceed_the_budget() {
        let budget = budget();
        let held: Vec<Lease> = (0..4).filter_map(|n| budget.for_client(&client(n)).try_lease(30 * UNIT).ok()).collect();
        assert_eq!(held.len(), 3);
        assert_eq!(budget.total.available_permits(), 10);
    }

    #[test]
    fn oversized_lease_takes_the_whole_share() {
        let budget = budget();
        let _whole = budget.for_client(&client(1)).try_lease(usize::MAX).unwrap();
        assert_eq!(budget.for_client(&client(1)).try_lease(1).err(), Some(Exhausted));
        assert!(budget.for_client(&client(2)).try_lease(1).is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn wait_for_memory_ends_with_memory_or_at_its_deadline() {
        let budget = budget().for_client(&client(1));
        let held = budget.lease(50 * UNIT).await.unwrap();
        let waits = tokio::spawn({
            let budget = budget.clone();
            async move { budget.lease(UNIT).await.map(drop) }
        });
        tokio::time::sleep(MAX_WAIT / 2).await;
        drop(held);
        assert_eq!(waits.await.unwrap(), Ok(()));
        let _held = budget.lease(50 * UNIT).await.unwrap();
        assert_eq!(budget.lease(UNIT).await.err(), Some(Exhausted));
    }

    #[tokio::test(start_paused = true)]
    async fn concurrent_waits_for_memory_time_out_together() {
        let budget = budget();
        let memory = budget.for_client(&client(1));
        let _held = memory.lease(50 * UNIT).await.unwrap();
        let began = tokio::time::Instant::now();
        let waiting = (0..10).map(|_| memory.lease(5 * UNIT));
        let refused = futures_util::future::join_all(waiting).await;
        assert!(refused.iter().all(Result::is_err));
        assert_eq!(began.elapsed(), MAX_WAIT);
        let clients: Vec<_> =
            (0..200).map(|n| budget.client_semaphore(&Client::at([198, 51, 100, n].into()))).collect();
        drop(clients);
        budget.client_semaphore(&Client::Unidentified);
        assert!(budget.clients.lock().unwrap().left.len() <= 300);
    }

    #[test]
    fn clients_without_leases_are_forgotten() {
        let budget = budget();
        (0..=255).for_each(|n| drop(budget.client_semaphore(&Client::at([198, 51, 100, n].into()))));
        assert!(budget.clients.lock().unwrap().left.len() <= MIN_CLEANUP_SIZE);
    }
}
