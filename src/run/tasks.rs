//! Tracks all runs of the server and ends them at shutdown.

use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::sandbox::BuildBudget;

/// The runs of all runners of this process: a reload makes a new runner, while the runs of the old one go on.
#[derive(Debug, Clone, Default)]
pub struct Tasks {
    pub(super) running: TaskTracker,
    /// Cancels all runs.
    pub(super) stop: CancellationToken,
    /// Memory budget for the compiled files of batches.
    pub(super) builds: BuildBudget,
}

impl Tasks {
    /// Number of runs, queued ones included.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Refuses new runs, waits up to `drain` for the others, then cancels them.
    pub async fn shut_down(&self, drain: Duration) {
        self.running.close();
        if tokio::time::timeout(drain, self.running.wait()).await.is_err() {
            tracing::warn!(running = self.running.len(), "cancelling the remaining runs");
        }
        self.stop.cancel();
        self.running.wait().await;
    }
}
