//! Reads the counters and limits of the sandbox's cgroup, and computes the usage of a stage.

use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::host::cgroup::{Counters, field};
use crate::model::outcome::Usage;
use crate::sandbox::init::reap::Reaped;
use crate::sandbox::protocol::{Enforced, micros};

/// Path of a container's own cgroup, with cgroup v2.
pub(super) const CGROUP: &str = "/sys/fs/cgroup";

/// The cgroup of the container.
pub(super) struct Cgroup {
    /// Whether the cgroup at [`CGROUP`] is the container's own. If not, nothing is read from it.
    pub(super) own: bool,
}

impl Cgroup {
    /// The limits that are set.
    pub(super) fn enforced(&self) -> Enforced {
        let is_set = |name: &str| self.read(name).is_some_and(|text| !text.starts_with("max"));
        Enforced { memory: is_set("memory.max"), processes: is_set("pids.max"), cpu: is_set("cpu.max") }
    }

    /// The current counters.
    pub(super) fn counters(&self) -> Counters {
        if self.own { Counters::read(Path::new(CGROUP)) } else { Counters::default() }
    }

    /// Memory that the kernel cannot reclaim, in bytes: of processes and of files in a tmpfs, without cached pages of
    /// the image.
    pub(super) fn memory_in_use(&self) -> Option<u64> {
        Some(self.field("memory.stat", "anon")? + self.field("memory.stat", "shmem")?)
    }

    /// CPU time used since these counters were read.
    pub(super) fn cpu_since(&self, before: &Counters) -> Option<Duration> {
        Some(Duration::from_micros(self.field("cpu.stat", "usage_usec")?).saturating_sub(before.cpu?))
    }

    fn read(&self, name: &str) -> Option<String> {
        self.own.then(|| fs::read_to_string(Path::new(CGROUP).join(name)).ok())?
    }

    fn field(&self, file: &str, name: &str) -> Option<u64> {
        field(&self.read(file)?, name)
    }
}

/// Usage of a stage, from the counters before and after it or, without counters, from its reaped processes.
pub(super) fn usage(wall: Duration, before: &Counters, after: &Counters, reaped: &Reaped) -> Usage {
    let cpu = match (before.cpu, after.cpu) {
        (Some(before), Some(after)) => after.saturating_sub(before),
        // Each of the two counts some processes that the other one misses.
        _ => reaped.cpu.max(reaped.samples.cpu()),
    };
    // The counter is the peak since the container was created. A stage that did not raise it used less.
    let memory = match (before.peak, after.peak) {
        (Some(before), Some(after)) if after > before => after,
        _ => reaped.max_rss,
    };
    Usage {
        wall_us: micros(wall),
        cpu_us: micros(cpu),
        memory,
        oom_kills: after.oom_kills.saturating_sub(before.oom_kills),
        forks_refused: after.forks_refused.saturating_sub(before.forks_refused),
    }
}
