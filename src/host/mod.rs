//! What the machine gives: cgroups, processes, signals, systemd, directories, the log.

pub mod aside;
pub mod cgroup;
pub mod instance;
pub mod log;
pub mod print;
pub mod process;
pub mod signals;
pub mod systemd;

use std::fmt::Display;
use std::io;

/// An error that names what it is of.
pub fn at<T, E: Into<io::Error>>(what: impl Display, result: Result<T, E>) -> io::Result<T> {
    result.map_err(|error| {
        let error = error.into();
        io::Error::new(error.kind(), format!("{what}: {error}"))
    })
}
