//! Counters and limits of the sandbox's cgroup, and the usage of a stage that follows from them.

use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::host::cgroup::{Counters, field};
use crate::model::outcome::Usage;
use crate::sandbox::init::reap::Reaped;
use crate::sandbox::protocol::{Enforced, micros};

/// Where a container with cgroup v2 sees its own cgroup.
pub(super) const CGROUP: &str = "/sys/fs/cgroup";

/// The counters of the container's own cgroup, as far as there are any.
pub(super) struct Cgroup {
    /// Whether the cgroup that is seen here is the container's own.
    pub(super) own: bool,
}

impl Cgroup {
    /// Which limits are set.
    pub(super) fn enforced(&self) -> Enforced {
        let is_set = |name: &str| self.read(name).is_some_and(|text| !text.starts_with("max"));
        Enforced { memory: is_set("memory.max"), processes: is_set("pids.max"), cpu: is_set("cpu.max") }
    }

    /// The counters as they are now.
    pub(super) fn counters(&self) -> Counters {
        if self.own { Counters::read(Path::new(CGROUP)) } else { Counters::default() }
    }

    /// Memory that the kernel cannot reclaim: that of processes and of files in a tmpfs, but no cached pages of the image.
    pub(super) fn memory_in_use(&self) -> Option<u64> {
        Some(self.field("memory.stat", "anon")? + self.field("memory.stat", "shmem")?)
    }

    /// CPU time since then.
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

/// Usage of a stage, by the counters before and after it where there are any.
pub(super) fn usage(wall: Duration, before: &Counters, after: &Counters, reaped: &Reaped) -> Usage {
    let cpu = match (before.cpu, after.cpu) {
        (Some(before), Some(after)) => after.saturating_sub(before),
        // Each counts some processes that the other one misses.
        _ => reaped.cpu.max(reaped.samples.cpu()),
    };
    // The counter is the peak of the container's whole life: a stage that did not raise it stayed below.
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
