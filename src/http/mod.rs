//! The HTTP side: wire types become jobs, outcomes become answers, errors become statuses in one place.

pub mod api;
pub mod auth;
mod backlog;
mod body;
mod budget;
mod context;
mod docs;
mod error;
mod events;
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
pub use api::piston::{Answer as PistonAnswer, place};
pub use budget::Budget;
pub use context::Context;

use std::sync::Arc;

use crate::metrics::Export;
use crate::run::Runner;
use crate::run::readiness::Readiness;

/// What the routes of a configuration share.
pub struct Api {
    /// Runs jobs.
    pub runner: Arc<Runner>,
    /// Tells whether languages work.
    pub readiness: Readiness,
    /// All metrics.
    pub metrics: Export,
    /// Memory for answers on their way.
    pub answers: Arc<Budget>,
    /// Memory for bodies of requests on theirs.
    pub bodies: Arc<Budget>,
    /// Places for WebSockets.
    pub sockets: Arc<Sockets>,
    /// Largest body in bytes.
    pub body_limit: usize,
    /// Largest source in bytes.
    pub source_limit: usize,
    /// Whether there is a page at `/`, and `/embed.js`.
    pub playground: bool,
}
