//! From a job to its outcome.
//!
//! ```text
//! runner       the way of a job: the memo, then a run of the same job in flight, then a run of its own
//!  ├ cache        the memo: outcomes of earlier runs
//!  ├ flight       single flight: identical requests share one run
//!  ├ execute      a run: a job in a sandbox of its own, and in another one if that was lost
//!  └ batch        one program and many inputs: compiled once
//! answer       what a request gets in the end
//! tasks        all runs of the server, and their end at shutdown
//! readiness    whether a language works
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
