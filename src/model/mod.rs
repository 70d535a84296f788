//! Pure data: jobs, their limits and outcomes, and the languages. Nothing here does I/O or waits.

pub mod backoff;
pub mod client;
pub mod job;
pub mod key;
pub mod language;
pub mod limits;
pub mod outcome;
pub mod output;
pub mod rootfs;
pub mod size;
