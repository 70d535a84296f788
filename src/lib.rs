//! coderunner compiles and runs untrusted code, each run in a fresh rootless container.
//!
//! A request passes through `http`, `run`, `scheduler` and `sandbox`, in this order; each of them uses only later ones,
//! `metrics`, `host` and `model`. `cli` starts everything and may use all modules; `config` and `images` may use those that
//! they configure or feed. `tests/layers.rs` holds the exact table.

pub mod cli; // one file per verb; `serve` builds the server from the settings
pub mod config; // settings: types, sources, checks
pub mod host; // the machine: cgroups, processes, signals, systemd, the log
pub mod http; // connections, routes, authentication, the client APIs in `http::api`
pub mod images; // container images: pull, check, replace, delete
pub mod metrics; // names and export of the metrics
pub mod model; // pure data: jobs, languages, limits, outcomes
pub mod run; // from a job to its outcome: cache, single flight, batches, readiness
pub mod sandbox; // one container for one job: engines, the agent, init, the seccomp filter
pub mod scheduler; // the queue of requests and the pool of ready sandboxes

#[cfg(any(test, fuzzing))]
#[allow(clippy::unwrap_used)]
pub mod fuzz;
