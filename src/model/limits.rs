//! Limits of a container and of the stages in it.

use std::time::Duration;

use bytesize::ByteSize;
use serde::{Deserialize, Serialize};

use crate::model::job::Stage;

/// Limits of a container and of the two stages in it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Memory of the container with its files; swap is the same, so none.
    #[serde(serialize_with = "crate::model::size::exact")]
    pub memory: ByteSize,
    /// Processes and threads at once.
    pub processes: u32,
    /// CPUs that may be kept busy.
    pub cpus: f64,
    /// Open files of a process.
    pub open_files: u64,
    /// Size of each writable directory; see [`Limits::directory_size`].
    #[serde(serialize_with = "crate::model::size::exact")]
    pub disk: ByteSize,
    /// Files in each writable directory.
    pub inodes: u64,
    /// Bytes kept of each output stream.
    #[serde(serialize_with = "crate::model::size::exact")]
    pub output: ByteSize,
    /// Bytes that a stage may print before it is killed.
    #[serde(serialize_with = "crate::model::size::exact")]
    pub output_total: ByteSize,
    /// Wall time of the compile stage.
    #[serde(with = "humantime_serde")]
    pub compile_time: Duration,
    /// CPU time of the compile stage, all its processes together.
    #[serde(with = "humantime_serde")]
    pub compile_cpu_time: Duration,
    /// Wall time of the run stage.
    #[serde(with = "humantime_serde")]
    pub run_time: Duration,
    /// CPU time of the run stage, all its processes together.
    #[serde(with = "humantime_serde")]
    pub run_cpu_time: Duration,
}

impl Limits {
    /// Bytes of each writable directory. There are three, and the memory that they are charged to has to
    /// suffice when all are full: at most a quarter of it.
    pub fn directory_size(&self) -> u64 {
        self.disk.as_u64().min(self.memory.as_u64() / 4)
    }

    /// Wall time of a stage.
    pub fn time(&self, stage: Stage) -> Duration {
        match stage {
            Stage::Compile => self.compile_time,
            Stage::Run => self.run_time,
        }
    }

    /// CPU time of a stage.
    pub fn cpu_time(&self, stage: Stage) -> Duration {
        match stage {
            Stage::Compile => self.compile_cpu_time,
            Stage::Run => self.run_cpu_time,
        }
    }
}

/// Memory that a stage may use, where the client asked for less than the container has. Init enforces these limits by
/// polling every few milliseconds; the kernel enforces the limit of the container.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StageMemory {
    /// Bytes for the compile stage.
    pub compile: Option<u64>,
    /// Bytes for the run stage.
    pub run: Option<u64>,
}

impl StageMemory {
    /// The memory limit of a stage, where the client asked for one.
    pub fn of(&self, stage: Stage) -> Option<u64> {
        match stage {
            Stage::Compile => self.compile,
            Stage::Run => self.run,
        }
    }
}
