//! The limits and isolation walls around a program, and the result of testing one.

use serde::{Deserialize, Serialize};

/// A limit of a program, or an isolation wall around it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)]
pub(super) enum Wall {
    Memory,
    Processes,
    Cpu,
    Time,
    CpuTime,
    Output,
    Disk,
    Inodes,
    OpenFiles,
    Network,
    Uid,
    Capabilities,
    NoNewPrivileges,
    Seccomp,
    Landlock,
    ReadOnlyRoot,
    MaskedPaths,
    Devices,
    Descriptors,
    Neighbour,
    Leftovers,
}

impl Wall {
    /// The walls that [`Probe::Walls`](super::probe::Probe::Walls) tests from inside a sandbox.
    pub const INSIDE: [Wall; 13] = [
        Wall::Disk,
        Wall::Inodes,
        Wall::OpenFiles,
        Wall::Network,
        Wall::Uid,
        Wall::Capabilities,
        Wall::NoNewPrivileges,
        Wall::Seccomp,
        Wall::Landlock,
        Wall::ReadOnlyRoot,
        Wall::MaskedPaths,
        Wall::Devices,
        Wall::Descriptors,
    ];

    /// Its name in the report.
    pub fn name(self) -> &'static str {
        match self {
            Wall::Memory => "memory",
            Wall::Processes => "processes",
            Wall::Cpu => "cpu",
            Wall::Time => "wall time",
            Wall::CpuTime => "cpu time",
            Wall::Output => "output",
            Wall::Disk => "disk",
            Wall::Inodes => "inodes",
            Wall::OpenFiles => "open files",
            Wall::Network => "network",
            Wall::Uid => "uid",
            Wall::Capabilities => "capabilities",
            Wall::NoNewPrivileges => "no-new-privileges",
            Wall::Seccomp => "seccomp",
            Wall::Landlock => "Landlock",
            Wall::ReadOnlyRoot => "read-only root",
            Wall::MaskedPaths => "masked paths",
            Wall::Devices => "devices",
            Wall::Descriptors => "descriptors",
            Wall::Neighbour => "neighbour",
            Wall::Leftovers => "leftovers",
        }
    }
}

/// The result of testing a wall.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct WallResult {
    /// The wall.
    pub wall: Wall,
    /// Whether it holds.
    pub holds: bool,
    /// The expected observation.
    pub expected: String,
    /// The observation.
    pub seen: String,
}

impl WallResult {
    /// A result with its observations in words.
    pub fn new(wall: Wall, holds: bool, expected: impl Into<String>, seen: impl Into<String>) -> WallResult {
        WallResult { wall, holds, expected: expected.into(), seen: seen.into() }
    }

    /// A result from the holes that were found: the wall holds if there are none.
    pub(super) fn from_holes(wall: Wall, expected: &str, holes: &[String]) -> WallResult {
        let seen = if holes.is_empty() { expected.to_owned() } else { holes.join(", ") };
        WallResult::new(wall, holes.is_empty(), expected, seen)
    }
}
