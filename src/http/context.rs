//! The context of a request: who asks and under which id, passed to everything that acts on its behalf.

use std::sync::Arc;

use crate::http::error::ApiError;
use crate::model::client::Client;
use crate::run::{PoolError, RunError, SandboxError};

/// A request that is being answered.
#[derive(Debug, Clone)]
pub struct Context {
    /// The id that the answer, the log and error messages carry.
    pub id: Arc<str>,
    /// Who sent it.
    pub client: Client,
}

impl Context {
    /// What the client is told of a job without an outcome. The server's own faults go to the log under the request's id.
    pub fn refusal(&self, error: RunError) -> ApiError {
        match error {
            RunError::Pool(PoolError::QueueFull { .. } | PoolError::QueueTimeout { .. } | PoolError::Draining)
            | RunError::ShuttingDown => ApiError::Overloaded(error.to_string()),
            RunError::Pool(PoolError::Unavailable { .. } | PoolError::Broken { .. }) => {
                ApiError::Unavailable(error.to_string())
            }
            RunError::Sandbox(inner) if matches!(*inner, SandboxError::HostMemory) => {
                ApiError::Overloaded(inner.to_string())
            }
            RunError::Sandbox(inner) => {
                tracing::error!(error = %inner, "a request failed");
                ApiError::Internal(self.id.to_string())
            }
        }
    }
}
