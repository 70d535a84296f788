//! Samples of the CPU time of processes, for hosts without a cgroup that counts it.
//!
//! The CPU time of an ended process is added to that of the parent that waits for it, or counted by init where init does.
//! Where a parent ignores SIGCHLD nobody waits, and the time is lost. So init takes samples, every [`PAUSE`] and while
//! processes are being made every [`SOON`], and keeps the last one of each process. The sum is never more than what they
//! used, and misses only what each used after its last sample: for children that live shorter than [`SOON`], most. What
//! making these costs counts as their parent's; and the wall time bounds it all.

use std::collections::HashMap;
use std::fs;
use std::time::{Duration, Instant};

use nix::time::ClockId;
use nix::unistd::Pid;

/// Time between two samples.
const PAUSE: Duration = Duration::from_millis(20);

/// The same after processes or threads were made.
const SOON: Duration = Duration::from_millis(1);

/// After a sample, sampling pauses for at least this many times what it took, up to [`PAUSE`].
const SHARE: u32 = 10;

/// The samples of a stage.
#[derive(Default)]
pub struct CpuSamples {
    living: HashMap<Pid, Duration>,
    gone: Duration,
    /// The last process or thread that was made.
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
        let pause = if newest == self.newest { PAUSE } else { SOON };
        self.newest = newest;
        self.update(pids().filter_map(|pid| Some((pid, used(pid)?))).collect());
        let took = started.elapsed();
        self.next = Some(started + took + (took * SHARE).clamp(pause, PAUSE));
    }

    fn update(&mut self, now: HashMap<Pid, Duration>) {
        // One that used less than before is another one with its number.
        let is_gone = |pid: &Pid, used: Duration| now.get(pid).is_none_or(|more| *more < used);
        self.gone += self.living.iter().filter(|(pid, used)| is_gone(pid, **used)).map(|(_, used)| *used).sum();
        self.living = now;
    }

    /// When the next sample is due.
    pub fn next(&self) -> Option<Instant> {
        self.next
    }

    /// CPU time of all processes that were sampled, also of those that have ended.
    pub fn cpu(&self) -> Duration {
        self.gone + self.living.values().sum::<Duration>()
    }
}

/// CPU time of a running process: all of its threads together, also those that have ended.
fn used(pid: Pid) -> Option<Duration> {
    ClockId::pid_cpu_clock_id(pid).and_then(ClockId::now).ok().map(Duration::from)
}

/// Number of the process or thread that was made last in our pid namespace.
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
        // The number of one that has gone, again.
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
        assert_eq!(samples.cpu(), used, "of one that has gone");
    }
}
