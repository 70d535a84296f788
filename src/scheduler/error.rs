//! Errors of requests that get no sandbox.

use std::time::Duration;

/// Why a request gets no sandbox.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum PoolError {
    /// The language has no image yet, or none that works.
    #[error("{language} is not available: {reason}")]
    Unavailable {
        /// Which language.
        language: String,
        /// Why.
        reason: String,
    },
    /// Sandboxes cannot be made at present; the log has the reason.
    #[error("sandboxes for {language} cannot be made at present")]
    Broken {
        /// Which language.
        language: String,
    },
    /// The queue is at its limit.
    #[error("the queue is full: {length} requests are waiting")]
    QueueFull {
        /// How many requests wait.
        length: usize,
    },
    /// The request has waited for the longest allowed time.
    #[error("no container became free within {}", humantime::format_duration(*.waited))]
    QueueTimeout {
        /// The longest allowed time.
        waited: Duration,
    },
    /// The server is shutting down.
    #[error("the server is shutting down")]
    Draining,
}

impl PoolError {
    /// The error for a language that is not enabled.
    pub fn not_enabled(language: &str) -> PoolError {
        PoolError::Unavailable { language: language.to_owned(), reason: "it is not enabled".into() }
    }

    /// The kind of the error, for metrics.
    pub fn kind(&self) -> &'static str {
        match self {
            PoolError::Unavailable { .. } => "unavailable",
            PoolError::Broken { .. } => "broken",
            PoolError::QueueFull { .. } => "queue_full",
            PoolError::QueueTimeout { .. } => "queue_timeout",
            PoolError::Draining => "draining",
        }
    }
}
