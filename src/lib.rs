//! coderunner compiles and runs code of strangers, each run in a fresh rootless container.
//!
//! The way of a request, from the outside to the inside. Each module uses those below it and `model`, and none above;
//! `tests/layers.rs` says which.

pub mod cli; // a file for each verb; what is started, and with which settings
pub mod config; // settings: types, sources, checks
pub mod host; // what the machine gives: cgroups, processes, signals, systemd, the log
pub mod http; // connections, routes, authentication, the client APIs in `http::api`
pub mod images; // pulled, checked, replaced, deleted
pub mod metrics; // names of what is measured, and its export
pub mod model;
pub mod run; // from a job to its outcome: memo, single flight, batches, readiness
pub mod sandbox; // one container for one job: engines, the agent, init, the filter
pub mod scheduler; // the queue and the pool of ready sandboxes // pure data: jobs, languages, outcomes

#[cfg(any(test, fuzzing))]
#[allow(clippy::unwrap_used)]
pub mod fuzz;
