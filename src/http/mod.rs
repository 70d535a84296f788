//! HTTP: turns requests into jobs, outcomes into responses, and, in `error`, errors into statuses.

pub mod api;
pub mod auth;
mod backlog;
mod body;
mod budget;
mod context;
mod docs;
mod error;
mod events;
mod headers;
mod health;
mod inbox;
mod json;
pub mod middleware;
mod openapi;
pub mod origin;
mod page;
mod request;
pub mod routes;
pub mod server;
mod socket;
mod text;

pub use api::connect::Sockets;
pub use api::piston::{ExecuteResponse, job_files};
pub use budget::Budget;
pub use context::Context;

use std::sync::Arc;

use crate::metrics::Export;
use crate::run::Runner;
use crate::run::readiness::Readiness;

/// What all routes share; built anew at each reload.
pub struct Api {
    /// Runs jobs.
    pub runner: Arc<Runner>,
    /// Checks whether languages work.
    pub readiness: Readiness,
    /// Exports the metrics.
    pub metrics: Export,
    /// Memory budget for responses until they are sent.
    pub answers: Arc<Budget>,
    /// Memory budget for request bodies and WebSocket messages while they arrive.
    pub bodies: Arc<Budget>,
    /// Limits the number of WebSockets.
    pub sockets: Arc<Sockets>,
    /// Largest request body in bytes.
    pub body_limit: usize,
    /// Largest source, all files together, in bytes.
    pub source_limit: usize,
    /// Whether to serve the playground at `/`, and `/embed.js`.
    pub playground: bool,
}
