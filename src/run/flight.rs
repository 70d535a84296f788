//! Single flight: identical requests that arrive while a job runs share that run.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::model::key::JobKey;
use crate::run::answer::{Answer, RunError};
use crate::run::runner::Reuse;

/// The result of a run; `None` while it goes on.
type Published = Option<Result<Answer, RunError>>;

/// A run that one or more requests wait for. When the last of them drops it, the run is cancelled.
pub(super) struct Flight {
    result: watch::Receiver<Published>,
    _cancel_when_dropped: DropGuard,
}

impl Flight {
    /// Waits for the end of the run.
    pub(super) async fn result(&self) -> Result<Answer, RunError> {
        let mut result = self.result.clone();
        match result.wait_for(Option::is_some).await {
            Ok(result) => result.clone().unwrap_or(Err(RunError::ShuttingDown)),
            Err(_) => Err(RunError::ShuttingDown),
        }
    }
}

/// The current flights, by the key of their job.
#[derive(Clone, Default)]
pub(super) struct Flights(Arc<Mutex<HashMap<JobKey, Weak<Flight>>>>);

impl Flights {
    /// Joins the flight of the same job, or starts a new one if there is none that may be joined. The caller then has
    /// to run the job of the new flight and publish the result with the [`Publisher`].
    pub(super) fn join_or_start(&self, key: JobKey, reuse: Reuse) -> (Arc<Flight>, Option<Publisher>) {
        let mut flights = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if reuse == Reuse::Allowed
            && let Some(flight) = flights.get(&key).and_then(Weak::upgrade)
        {
            return (flight, None);
        }
        let (sender, result) = watch::channel(None);
        let abandoned = CancellationToken::new();
        let flight = Arc::new(Flight { result, _cancel_when_dropped: abandoned.clone().drop_guard() });
        let own = Arc::downgrade(&flight);
        flights.insert(key, Weak::clone(&own));
        let publisher = Publisher { flights: self.clone(), key, own, sender, abandoned };
        (flight, Some(publisher))
    }
}

/// The side of a flight that runs the job.
pub(super) struct Publisher {
    flights: Flights,
    key: JobKey,
    own: Weak<Flight>,
    sender: watch::Sender<Published>,
    abandoned: CancellationToken,
}

impl Publisher {
    /// Returns when no request waits for the flight any more.
    pub(super) async fn abandoned(&self) {
        self.abandoned.cancelled().await;
    }

    /// Ends the flight: all waiting requests get this result, and no further request can join.
    pub(super) fn publish(self, result: Result<Answer, RunError>) {
        {
            let mut flights = self.flights.0.lock().unwrap_or_else(PoisonError::into_inner);
            // A later flight of the same job may have replaced this one: after it was abandoned, or because a request
            // refused to join it.
            if flights.get(&self.key).is_some_and(|flight| Weak::ptr_eq(flight, &self.own)) {
                flights.remove(&self.key);
            }
        }
        let _ = self.sender.send(Some(result));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::run::runner::tests::{begin, runner};
    use crate::sandbox::fake;

    #[test]
    fn a_run_that_ends_leaves_the_flight_of_a_later_run_of_the_same_job() {
        fake::on_paused_clock(|| async {
            let (runner, mut starts) = runner(3);
            let first = begin(&runner, Reuse::Allowed);
            let one = starts.recv().await.unwrap().succeed();
            one.begin().await;
            let anew = begin(&runner, Reuse::Refused);
            let two = starts.recv().await.unwrap().succeed();
            two.begin().await;
            one.end_well();
            first.await.unwrap().unwrap();
            let joins = begin(&runner, Reuse::Allowed);
            let spare = starts.recv().await.unwrap().succeed();
            // A request that did not join would take this sandbox.
            assert!(tokio::time::timeout(Duration::from_secs(1), spare.receive()).await.is_err());
            two.end_well();
            anew.await.unwrap().unwrap();
            joins.await.unwrap().unwrap();
            drop(spare);
        });
    }
}
