//! The error of a request that gets no sandbox.

use std::time::Duration;

/// Why no sandbox could be had.
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
    /// No more requests may wait.
    #[error("the queue is full: {length} requests are waiting")]
    QueueFull {
        /// How many wait.
        length: usize,
    },
    /// The request has waited as long as it may.
    #[error("no container became free within {}", humantime::format_duration(*.waited))]
    QueueTimeout {
        /// How long that is.
        waited: Duration,
    },
    /// The server is going down.
    #[error("the server is shutting down")]
    Draining,
}

impl PoolError {
    /// There are no sandboxes for this language.
    pub fn not_enabled(language: &str) -> PoolError {
        PoolError::Unavailable { language: language.to_owned(), reason: "it is not enabled".into() }
    }

    /// Which failure it is, in a word.
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
