//! The context of a request: its client and its id, passed to everything that acts on its behalf.

use std::sync::Arc;

use crate::http::error::ApiError;
use crate::model::client::Client;
use crate::run::{PoolError, RunError, SandboxError};

/// The client and the id of a request.
#[derive(Debug, Clone)]
pub struct Context {
    /// The id, as in the response header, the log and error messages.
    pub id: Arc<str>,
    /// The client that sent the request.
    pub client: Client,
}

impl Context {
    /// Converts an error to the one for the client. Logs failures of the server, whose details clients do not see.
    pub fn api_error(&self, error: RunError) -> ApiError {
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
