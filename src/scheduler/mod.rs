//! Which request runs next, and in which sandbox: the queue of requests and the pool of ready sandboxes.
//!
//! ```text
//! pool      what the rest of the program calls
//!  └ manager   the background task that makes sandboxes
//!     └ state     behind the pool's one lock: slots, a lane for each language, the queue
//!        ├ step      the decision what the manager does next
//!        ├ lane      the sandboxes of one language
//!        └ queue     the requests that wait
//! ```

mod error;
mod lane;
mod manager;
mod pool;
mod queue;
mod state;
mod step;

pub use error::PoolError;
pub use lane::{Image, Status};
pub use pool::Pool;
pub use queue::QueueSettings;
