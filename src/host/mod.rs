//! Interfaces to the host: cgroups, processes, signals, systemd, the runtime directory, the log.

pub mod blocking;
pub mod cgroup;
pub mod instance;
pub mod log;
pub mod print;
pub mod process;
pub mod signals;
pub mod systemd;

use std::fmt::Display;
use std::io;

/// Prefixes the error with the path or object that it is about.
pub fn at<T, E: Into<io::Error>>(what: impl Display, result: Result<T, E>) -> io::Result<T> {
    result.map_err(|error| {
        let error = error.into();
        io::Error::new(error.kind(), format!("{what}: {error}"))
    })
}
