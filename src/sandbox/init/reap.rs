//! Reaps ended processes, and kills those that a stage has left.

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::ptrace;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::model::outcome::Ended;
use crate::sandbox::init::Init;
use crate::sandbox::init::cpu_samples::CpuSamples;

/// Longest wait for killed processes to die: some are stuck in the kernel, and end with the container.
const REAP_TIME: Duration = Duration::from_secs(5);

/// What the ended children of a stage used, and how its main process ended.
#[derive(Default)]
pub(super) struct Reaped {
    pub(super) cpu: Duration,
    pub(super) max_rss: u64,
    /// Whether init has no child left.
    none_left: bool,
    main: Option<Pid>,
    /// How the main process ended, once it has.
    pub(super) main_ended: Option<Ended>,
    /// Where no cgroup counts.
    pub(super) samples: CpuSamples,
}

impl Reaped {
    /// Of a stage with this main process.
    pub(super) fn of(main: Option<Pid>) -> Reaped {
        Reaped { main, ..Reaped::default() }
    }

    /// Reaps one child that has ended, and returns whether there was one.
    pub(super) fn reap(&mut self) -> io::Result<bool> {
        let mut status = 0;
        // SAFETY: rusage is plain numbers, for which zero is a value; wait4 writes to these two and
        // nothing else. nix has no wait4, and no other call returns the usage of one child.
        let (pid, rusage) = unsafe {
            let mut rusage: libc::rusage = std::mem::zeroed();
            (libc::wait4(-1, &raw mut status, libc::WNOHANG, &raw mut rusage), rusage)
        };
        match pid {
            0 => Ok(false),
            -1 => match Errno::last() {
                Errno::ECHILD => {
                    self.none_left = true;
                    Ok(false)
                }
                Errno::EINTR => self.reap(),
                error => Err(error.into()),
            },
            pid if libc::WIFSTOPPED(status) => {
                // It asked to be traced by its parent. Init traces nobody: let it go on.
                let signal = Signal::try_from(libc::WSTOPSIG(status)).ok().filter(|signal| *signal != Signal::SIGTRAP);
                let _ = ptrace::detach(Pid::from_raw(pid), signal);
                Ok(true)
            }
            pid => {
                let time = |t: libc::timeval| {
                    Duration::new(t.tv_sec.unsigned_abs(), u32::try_from(t.tv_usec).unwrap_or(0) * 1000)
                };
                self.cpu += time(rusage.ru_utime) + time(rusage.ru_stime);
                self.max_rss = self.max_rss.max(rusage.ru_maxrss.unsigned_abs() * 1024);
                if self.main == Some(Pid::from_raw(pid)) {
                    self.main_ended = Some(match libc::WIFSIGNALED(status) {
                        true => Ended::Signalled(libc::WTERMSIG(status)),
                        false => Ended::Exited(libc::WEXITSTATUS(status)),
                    });
                }
                Ok(true)
            }
        }
    }
}

impl Init {
    /// Kills everything else in this pid namespace and waits until it is gone. A process that is stuck in the kernel for
    /// longer runs no program any more, and is no reason to withhold how the stage ended.
    pub(super) fn kill_all(&mut self, reaped: &mut Reaped) -> io::Result<()> {
        let deadline = Instant::now() + REAP_TIME;
        loop {
            // As PID 1, -1 is everything but ourselves.
            let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
            while reaped.reap()? {}
            if reaped.none_left {
                return Ok(());
            }
            if Instant::now() > deadline {
                self.dying = true;
                return Ok(());
            }
            let mut fds = [PollFd::new(self.children.as_fd(), PollFlags::POLLIN)];
            let _ = poll(&mut fds, PollTimeout::from(10u8));
            while let Ok(Some(_)) = self.children.read_signal() {}
        }
    }
}
