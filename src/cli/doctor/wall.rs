//! The limits and walls around a program, and the result of trying one.

use serde::{Deserialize, Serialize};

/// A limit of a program, or a wall around it.
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
    /// Those that a probe tries from inside.
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

/// The result of trying a wall.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Tried {
    /// Which wall.
    pub wall: Wall,
    /// Whether it holds.
    pub holds: bool,
    /// What should have been seen.
    pub expected: String,
    /// What was seen.
    pub seen: String,
}

impl Tried {
    /// A result, in words.
    pub fn new(wall: Wall, holds: bool, expected: impl Into<String>, seen: impl Into<String>) -> Tried {
        Tried { wall, holds, expected: expected.into(), seen: seen.into() }
    }

    /// A result by the holes that were found: the wall holds if there are none.
    pub(super) fn without(wall: Wall, expected: &str, holes: &[String]) -> Tried {
        let seen = if holes.is_empty() { expected.to_owned() } else { holes.join(", ") };
        Tried::new(wall, holes.is_empty(), expected, seen)
    }
}
