//! What processes were seen to use, for hosts without a cgroup that counts it.
//!
//! A process's times are added to its parent's when that waits for it, and to init's reckoning when init does. Where a parent
//! ignores SIGCHLD nobody waits, and they are lost. So init looks, every [`PAUSE`] and while processes are being made every
//! [`SOON`], and keeps what it saw last of each. That is never more than they used, and exact but for what each used after
//! the last look at it: of children that live shorter than [`SOON`], most. What making these costs is their parent's, and
//! counted; and the wall time bounds it all.

use std::collections::HashMap;
use std::fs;
use std::time::{Duration, Instant};

use nix::time::ClockId;
use nix::unistd::Pid;

/// Time between two looks.
const PAUSE: Duration = Duration::from_millis(20);

/// The same after processes or threads were made.
const SOON: Duration = Duration::from_millis(1);

/// A look is taken no sooner than after as many times what the last one took.
const SHARE: u32 = 10;

/// Since a stage began.
#[derive(Default)]
pub struct Seen {
    living: HashMap<Pid, Duration>,
    gone: Duration,
    /// The last process or thread that was made.
    newest: Option<u64>,
    next: Option<Instant>,
}

impl Seen {
    /// Looks, if it is time to. `pids` are those that live.
    pub fn look<P: Iterator<Item = Pid>>(&mut self, pids: impl FnOnce() -> P) {
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

    /// When to look again.
    pub fn next(&self) -> Option<Instant> {
        self.next
    }

    /// CPU time of all processes that were seen.
    pub fn cpu(&self) -> Duration {
        self.gone + self.living.values().sum::<Duration>()
    }
}

/// CPU time of a process that lives, all of its threads together, those that have ended too.
fn used(pid: Pid) -> Option<Duration> {
    ClockId::pid_cpu_clock_id(pid).and_then(ClockId::now).ok().map(Duration::from)
}

/// The number of the process or thread that was made last in our namespace.
fn newest() -> Option<u64> {
    fs::read_to_string("/proc/loadavg").ok()?.split_whitespace().next_back()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    fn seen(looks: &[&[(i32, u64)]]) -> Duration {
        let mut seen = Seen::default();
        for look in looks {
            seen.update(look.iter().map(|&(pid, ms)| (Pid::from_raw(pid), Duration::from_millis(ms))).collect());
        }
        seen.cpu()
    }

    #[test]
    fn what_was_seen_of_a_process_stays_when_it_has_gone() {
        assert_eq!(seen(&[]), Duration::ZERO);
        assert_eq!(seen(&[&[(2, 10)], &[(2, 30), (3, 5)], &[(2, 40)], &[]]), Duration::from_millis(45));
        // The number of one that has gone, again.
        assert_eq!(seen(&[&[(2, 10)], &[(2, 3)], &[(2, 4)]]), Duration::from_millis(14));
    }

    #[test]
    fn a_look_sees_what_a_process_uses() {
        let mut child = Command::new("sh").args(["-c", "while :; do :; done"]).stdin(Stdio::null()).spawn().unwrap();
        let pid = Pid::from_raw(child.id().cast_signed());
        let mut seen = Seen::default();
        let deadline = Instant::now() + Duration::from_secs(60);
        while seen.cpu() < Duration::from_millis(50) && Instant::now() < deadline {
            seen.look(|| std::iter::once(pid));
            std::thread::sleep(Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let used = seen.cpu();
        assert!(used >= Duration::from_millis(50), "{used:?}");
        seen.next = None;
        seen.look(|| std::iter::once(pid));
        assert_eq!(seen.cpu(), used, "of one that has gone");
    }
}
