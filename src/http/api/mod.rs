//! An adapter for each API that clients speak: wire types become jobs, outcomes become answers.

pub mod batch;
pub mod coderunner;
pub mod connect;
pub mod piston;
