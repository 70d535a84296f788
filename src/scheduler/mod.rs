//! Assigns sandboxes to requests: the pool of ready sandboxes and the queue of requests that wait for one.
//!
//! ```text
//! pool      the interface for the rest of the program
//!  └ manager   the background task that makes sandboxes
//!     └ state     slots, a lane for each language, the queue: all behind one lock
//!        ├ step      decides what the manager does next
//!        ├ lane      the sandboxes of one language
//!        └ queue     the waiting requests
//! ```

mod error;
mod lane;
mod manager;
mod pool;
mod queue;
mod state;
mod step;

pub use error::PoolError;
pub use lane::{Image, LanguageStatus};
pub use pool::Pool;
pub use queue::QueueSettings;
