//! Pure data: what is asked for, what is known of languages, what came of it. Nothing here reads, writes or waits.

pub mod client;
pub mod job;
pub mod language;
pub mod size;
