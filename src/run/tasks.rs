//! All runs of the server, and their end at shutdown.

use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::sandbox::BuildBudget;

/// The runs of all runners there have been since the start: a reload makes a new runner, and the runs of
/// the old one go on.
#[derive(Debug, Clone, Default)]
pub struct Tasks {
    pub(super) running: TaskTracker,
    /// Ends all runs.
    pub(super) stop: CancellationToken,
    /// Memory budget of compiled files of all batches.
    pub(super) builds: BuildBudget,
}

impl Tasks {
    /// How many runs there are, those in the queue included.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Refuses new runs, lets the others go on until `drain` is over, then ends them.
    pub async fn shut_down(&self, drain: Duration) {
        self.running.close();
        if tokio::time::timeout(drain, self.running.wait()).await.is_err() {
            tracing::warn!(running = self.running.len(), "cancelling requests: the drain time is over");
        }
        self.stop.cancel();
        self.running.wait().await;
    }
}
