//! From a job to its outcome.
//!
//! ```text
//! runner       answers a job from the cache, from a run of the same job in flight, or by a run of its own
//!  ├ cache        outcomes of earlier runs
//!  ├ flight       single flight: identical requests share one run
//!  ├ execute      runs a job in a sandbox, and again in another one if the sandbox was lost
//!  └ batch        runs one program, compiled once, on many inputs
//! answer       the result of a request, and its errors
//! tasks        tracks all runs of the server and ends them at shutdown
//! readiness    checks whether a language works
//! ```

mod answer;
mod batch;
pub mod cache;
mod execute;
mod flight;
pub mod readiness;
mod runner;
mod tasks;

pub use crate::sandbox::{Event, Live, SandboxError};
pub use crate::scheduler::PoolError;
pub use answer::{Answer, RunError};
pub use runner::{Reuse, Runner};
pub use tasks::Tasks;
