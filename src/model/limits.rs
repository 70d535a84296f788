//! Limits of a container and of the stages in it.

use std::time::Duration;

use bytesize::ByteSize;
use serde::{Deserialize, Serialize};

use crate::model::job::Stage;

/// Limits of a container and of the two stages in it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Memory of the container, files in writable directories included. No swap is allowed beyond it.
    #[serde(serialize_with = "crate::model::size::exact")]
    pub memory: ByteSize,
    /// Most processes and threads at the same time.
    pub processes: u32,
    /// CPUs that the container may use; may be a fraction.
    pub cpus: f64,
    /// Most open files of a process.
    pub open_files: u64,
    /// Largest size of each writable directory; see [`Limits::directory_size`].
    #[serde(serialize_with = "crate::model::size::exact")]
    pub disk: ByteSize,
    /// Most inodes of each writable directory.
    pub inodes: u64,
    /// Most bytes kept of each output stream.
    #[serde(serialize_with = "crate::model::size::exact")]
    pub output: ByteSize,
    /// Most bytes that a stage may print on both streams; beyond it, the stage is killed.
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
    /// Size of each writable directory in bytes: `disk`, but at most a quarter of the memory. There are three such
    /// directories, charged to the memory of the container, which has to suffice when all are full.
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

/// Memory limits of single stages, where the client asked for less than the container has. Init enforces these by
/// polling every few milliseconds; the kernel enforces the limit of the container.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StageMemory {
    /// Limit of the compile stage in bytes.
    pub compile: Option<u64>,
    /// Limit of the run stage in bytes.
    pub run: Option<u64>,
}

impl StageMemory {
    /// The memory limit of a stage in bytes, if the client asked for one.
    pub fn of(&self, stage: Stage) -> Option<u64> {
        match stage {
            Stage::Compile => self.compile,
            Stage::Run => self.run,
        }
    }
}
