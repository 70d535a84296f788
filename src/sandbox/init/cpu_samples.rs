//! Samples the CPU time of processes, for hosts without a cgroup that counts it.
//!
//! When a process is reaped, the kernel adds its CPU time to that of its parent, or init counts it if init is the
//! parent. If a parent ignores SIGCHLD nobody reaps its children, and their time is lost. So init takes samples every
//! [`INTERVAL`], or every [`SHORT_INTERVAL`] while processes are being created, and keeps the last sample of each
//! process. The sum is never more than the time that the processes used. It misses the time that each process used
//! after its last sample, which on a busy host is most of the time of a process that lives shorter than [`INTERVAL`]. The
//! time for creating such processes counts for their parent, and the wall time limit bounds the rest.

use std::collections::HashMap;
use std::fs;
use std::time::{Duration, Instant};

use nix::time::ClockId;
use nix::unistd::Pid;

/// Time between two samples. Samples every 20 ms cost 2 % of the CPU time of a compiler beside 16 others.
const INTERVAL: Duration = Duration::from_millis(50);

/// Time between two samples after processes or threads were created.
const SHORT_INTERVAL: Duration = Duration::from_millis(1);

/// The pause after a sample is at least this many times the time that the sample took, up to [`INTERVAL`].
const PAUSE_FACTOR: u32 = 10;

/// The samples of a stage.
#[derive(Default)]
pub struct CpuSamples {
    /// The last sample of each running process.
    running: HashMap<Pid, Duration>,
    /// Sum of the last samples of all ended processes.
    ended: Duration,
    /// Id of the process or thread that was created last.
    newest: Option<u64>,
    next: Option<Instant>,
}

impl CpuSamples {
    /// Takes a sample if one is due. `pids` are the running processes.
    pub fn sample<P: Iterator<Item = Pid>>(&mut self, pids: impl FnOnce() -> P) {
        let started = Instant::now();
        if self.next.is_some_and(|next| started < next) {
            return;
        }
        let newest = newest();
        let pause = if newest == self.newest { INTERVAL } else { SHORT_INTERVAL };
        self.newest = newest;
        self.update(pids().filter_map(|pid| Some((pid, cpu_time(pid)?))).collect());
        let took = started.elapsed();
        self.next = Some(started + took + (took * PAUSE_FACTOR).clamp(pause, INTERVAL));
    }

    fn update(&mut self, now: HashMap<Pid, Duration>) {
        // If a pid has less CPU time than before, it was reused by another process.
        let has_ended = |pid: &Pid, used: Duration| now.get(pid).is_none_or(|more| *more < used);
        self.ended += self.running.iter().filter(|(pid, used)| has_ended(pid, **used)).map(|(_, used)| *used).sum();
        self.running = now;
    }

    /// The time at which the next sample is due.
    pub fn next(&self) -> Option<Instant> {
        self.next
    }

    /// CPU time of all sampled processes, including ended ones.
    pub fn cpu(&self) -> Duration {
        self.ended + self.running.values().sum::<Duration>()
    }
}

/// CPU time of a running process: of all its threads together, including ended ones.
fn cpu_time(pid: Pid) -> Option<Duration> {
    ClockId::pid_cpu_clock_id(pid).and_then(ClockId::now).ok().map(Duration::from)
}

/// Id of the process or thread that was created last in init's pid namespace.
fn newest() -> Option<u64> {
    fs::read_to_string("/proc/loadavg").ok()?.split_whitespace().next_back()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    fn sampled(samples: &[&[(i32, u64)]]) -> Duration {
        let mut cpu = CpuSamples::default();
        for sample in samples {
            cpu.update(sample.iter().map(|&(pid, ms)| (Pid::from_raw(pid), Duration::from_millis(ms))).collect());
        }
        cpu.cpu()
    }

    #[test]
    fn the_time_of_an_ended_process_still_counts() {
        assert_eq!(sampled(&[]), Duration::ZERO);
        assert_eq!(sampled(&[&[(2, 10)], &[(2, 30), (3, 5)], &[(2, 40)], &[]]), Duration::from_millis(45));
        // The pid of an ended process, reused.
        assert_eq!(sampled(&[&[(2, 10)], &[(2, 3)], &[(2, 4)]]), Duration::from_millis(14));
    }

    #[test]
    fn a_sample_measures_a_running_process() {
        let mut child = Command::new("sh").args(["-c", "while :; do :; done"]).stdin(Stdio::null()).spawn().unwrap();
        let pid = Pid::from_raw(child.id().cast_signed());
        let mut samples = CpuSamples::default();
        let deadline = Instant::now() + Duration::from_secs(60);
        while samples.cpu() < Duration::from_millis(50) && Instant::now() < deadline {
            samples.sample(|| std::iter::once(pid));
            std::thread::sleep(Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let used = samples.cpu();
        assert!(used >= Duration::from_millis(50), "{used:?}");
        samples.next = None;
        samples.sample(|| std::iter::once(pid));
        assert_eq!(samples.cpu(), used, "of a process that has ended");
    }
}
