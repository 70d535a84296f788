//! Spawns a copy of the agent in new namespaces, kills it, and waits for its end.

use std::fs::File;
use std::io::{self, PipeReader, Read};
use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};

use nix::errno::Errno;
use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::{Pid, dup2_stderr, dup2_stdin, dup2_stdout};
use tokio::io::unix::AsyncFd;

use crate::host::print;
use crate::sandbox::agent::NULL;

/// The libc crate's constant is of a type that is too small for its value.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Most that is read of the stderr of a child, in bytes.
const MOST_STDERR: usize = 4096;

/// A copy of this process, until it has ended.
pub(super) struct Child {
    pub(super) pid: Pid,
    pidfd: AsyncFd<OwnedFd>,
    stderr: PipeReader,
}

impl Child {
    /// Makes a copy of this process in new namespaces, and in a cgroup. It runs `body` and ends. Its stderr is kept, its
    /// standard input and output are /dev/null.
    pub(super) fn spawn(
        namespaces: libc::c_int,
        cgroup: Option<RawFd>,
        body: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<Child> {
        let (stderr, child_stderr) = io::pipe()?;
        let null = File::options().read(true).write(true).open(NULL)?;
        let mut pidfd: RawFd = -1;
        let flags = namespaces | libc::CLONE_PIDFD;
        // SAFETY: these are numbers, for which zero is a value: none.
        let mut how: libc::clone_args = unsafe { std::mem::zeroed() };
        how.flags = u64::from(flags.cast_unsigned());
        how.pidfd = (&raw mut pidfd) as u64;
        how.exit_signal = u64::from(libc::SIGCHLD.cast_unsigned());
        if let Some(cgroup) = cgroup {
            how.flags |= CLONE_INTO_CGROUP;
            how.cgroup = u64::from(cgroup.cast_unsigned());
        }
        // SAFETY: as fork(2): the copy has all of our memory to itself, and there is no lock in it that another thread
        // holds, for the agent has no other thread. The kernel writes to `pidfd` and nothing else.
        let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut how, size_of::<libc::clone_args>()) };
        match pid {
            -1 => Err(Errno::last().into()),
            0 => {
                let run = || {
                    dup2_stdin(&null)?;
                    dup2_stdout(&null)?;
                    dup2_stderr(&child_stderr)?;
                    body()
                };
                // A panic has printed its message. It must not unwind into the code of the agent, of which this is a copy.
                let ended = catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| Err(io::Error::other("a panic")));
                let code = ended.map_or_else(
                    |error| {
                        print::complain(&error.to_string());
                        libc::EXIT_FAILURE
                    },
                    |()| libc::EXIT_SUCCESS,
                );
                // SAFETY: it ends this process, whose memory nobody else uses.
                unsafe { libc::_exit(code) }
            }
            pid => {
                let pid = Pid::from_raw(i32::try_from(pid).map_err(io::Error::other)?);
                // SAFETY: the kernel has just made it for us, and nobody else knows it. An OwnedFd is one and the same
                // descriptor until it is dropped.
                let pidfd = unsafe { AsyncFd::register(OwnedFd::from_raw_fd(pidfd)) }.inspect_err(|_| {
                    let _ = kill(pid, Signal::SIGKILL);
                })?;
                Ok(Child { pid, pidfd, stderr })
            }
        }
    }

    /// Kills it, and with it all of its sandbox.
    pub(super) fn kill(&self) {
        // Its number cannot be reused before it is reaped. It may have ended already, which is no error.
        let _ = kill(self.pid, Signal::SIGKILL);
    }

    /// Waits for its end; an error is what it wrote to stderr, and its status.
    pub(super) async fn end(&mut self) -> Result<(), String> {
        let status = loop {
            let mut ready = self.pidfd.readable().await.map_err(|error| error.to_string())?;
            match waitid(Id::PIDFd(self.pidfd.get_ref().as_fd()), WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG) {
                Ok(WaitStatus::StillAlive) | Err(Errno::EINTR) => ready.clear_ready(),
                Ok(status) => break status,
                Err(error) => return Err(format!("cannot wait for it: {error}")),
            }
        };
        let status = match status {
            WaitStatus::Exited(_, 0) => return Ok(()),
            WaitStatus::Exited(_, code) => format!("exit status: {code}"),
            WaitStatus::Signaled(_, signal, _) => format!("signal: {signal}"),
            other => format!("{other:?}"),
        };
        // Nobody writes to it any more.
        let mut message = Vec::new();
        let _ = (&self.stderr).take(MOST_STDERR as u64).read_to_end(&mut message);
        let message = String::from_utf8_lossy(&message);
        Err(format!("{} ({status})", message.trim()))
    }
}
