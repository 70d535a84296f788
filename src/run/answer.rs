//! Why a job has an outcome or none: [`Answer`] and [`RunError`].

use std::sync::Arc;
use std::time::Duration;

use crate::model::outcome::Outcome;
use crate::sandbox::SandboxError;
use crate::scheduler::PoolError;

/// The outcome of a job, and how it was obtained.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The outcome of the job.
    pub outcome: Arc<Outcome>,
    /// Age of the outcome if it comes from the cache.
    pub cached: Option<Duration>,
    /// How long the run waited for its sandbox.
    pub queued: Duration,
}

/// Why a job has no outcome.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RunError {
    /// The pool had no sandbox for the job.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// The sandbox failed while it ran the job.
    #[error(transparent)]
    Sandbox(Arc<SandboxError>),
    /// The server is shutting down.
    #[error("the server is shutting down")]
    ShuttingDown,
}
