//! What a request for a run gets in the end: an answer, or the reason why there is none.

use std::sync::Arc;
use std::time::Duration;

use crate::model::outcome::Outcome;
use crate::sandbox::SandboxError;
use crate::scheduler::PoolError;

/// The answer to a request.
#[derive(Debug, Clone)]
pub struct Answer {
    /// What became of its job.
    pub outcome: Arc<Outcome>,
    /// For how long the outcome has been kept, if it is one from the memo.
    pub cached: Option<Duration>,
    /// How long the run waited for its sandbox.
    pub queued: Duration,
}

/// Why a job has no outcome.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RunError {
    /// No sandbox could be had.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// The sandbox failed under the job.
    #[error(transparent)]
    Sandbox(Arc<SandboxError>),
    /// The server is going down and its time to drain is over.
    #[error("the server is shutting down")]
    ShuttingDown,
}
