//! One adapter per client API: each turns its wire types into jobs, and outcomes into its wire types.

pub mod batch;
pub mod coderunner;
pub mod connect;
pub mod piston;
