//! Reaps ended processes, and kills the processes that a stage has left.

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

/// Longest wait for killed processes to die. A process may be stuck in the kernel; it then ends with the container.
const REAP_TIME: Duration = Duration::from_secs(5);

/// The usage of the reaped children of a stage, and how its main process ended.
#[derive(Default)]
pub(super) struct Reaped {
    pub(super) cpu: Duration,
    pub(super) max_rss: u64,
    /// Whether init has no children left.
    none_left: bool,
    main: Option<Pid>,
    /// How the main process ended; `None` while it runs.
    pub(super) main_ended: Option<Ended>,
    /// Used if no cgroup counts CPU time.
    pub(super) samples: CpuSamples,
}

impl Reaped {
    /// The empty usage of a stage with this main process.
    pub(super) fn of(main: Option<Pid>) -> Reaped {
        Reaped { main, ..Reaped::default() }
    }

    /// Reaps one ended child. Returns whether there was one.
    pub(super) fn reap(&mut self) -> io::Result<bool> {
        let mut status = 0;
        // SAFETY: rusage has integer fields, for which zero is valid. wait4 writes to `status` and `rusage` and nothing
        // else. nix has no wait4, and no other call returns the usage of one child.
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
                // The child asked to be traced by its parent. Init traces no process: let the child continue.
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
    /// Kills all other processes in this pid namespace, and waits for at most [`REAP_TIME`] until they are gone. A
    /// process that is stuck in the kernel for longer runs no program any more, so the end of the stage can still be
    /// reported.
    pub(super) fn kill_all(&mut self, reaped: &mut Reaped) -> io::Result<()> {
        let deadline = Instant::now() + REAP_TIME;
        loop {
            // For PID 1, -1 means all other processes.
            let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
            while reaped.reap()? {}
            if reaped.none_left {
                return Ok(());
            }
            if Instant::now() > deadline {
                self.has_stuck_process = true;
                return Ok(());
            }
            let mut fds = [PollFd::new(self.children.as_fd(), PollFlags::POLLIN)];
            let _ = poll(&mut fds, PollTimeout::from(10u8));
            while let Ok(Some(_)) = self.children.read_signal() {}
        }
    }
}
