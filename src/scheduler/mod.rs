//! Who runs next, and in what: the queue of requests and the pool of ready sandboxes.

pub mod backoff;
pub mod pool;
mod queue;

pub use queue::QueueSettings;
