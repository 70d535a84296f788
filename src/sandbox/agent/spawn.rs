//! A child of the agent: a copy of it in new namespaces.

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

/// Defined here because the libc crate's constant has a type that is too small for the value.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Most bytes to read from the stderr of a child.
const MAX_STDERR: usize = 4096;

/// A copy of this process, in new namespaces.
pub(super) struct Child {
    pub(super) pid: Pid,
    pidfd: AsyncFd<OwnedFd>,
    stderr: PipeReader,
}

impl Child {
    /// Copies this process into new namespaces and a cgroup. The copy runs `body` and exits. Its stderr is captured;
    /// its standard input and output are /dev/null.
    pub(super) fn spawn(
        namespaces: libc::c_int,
        cgroup: Option<RawFd>,
        body: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<Child> {
        let (stderr, child_stderr) = io::pipe()?;
        let null = File::options().read(true).write(true).open(NULL)?;
        let mut pidfd: RawFd = -1;
        let flags = namespaces | libc::CLONE_PIDFD;
        // SAFETY: all fields are integers, for which zero is valid and means "none".
        let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
        args.flags = u64::from(flags.cast_unsigned());
        args.pidfd = (&raw mut pidfd) as u64;
        args.exit_signal = u64::from(libc::SIGCHLD.cast_unsigned());
        if let Some(cgroup) = cgroup {
            args.flags |= CLONE_INTO_CGROUP;
            args.cgroup = u64::from(cgroup.cast_unsigned());
        }
        // SAFETY: this acts like fork(2). The child gets its own copy of the memory, in which no other thread holds a
        // lock, because the agent has only one thread. The kernel writes to `pidfd` and nothing else.
        let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<libc::clone_args>()) };
        match pid {
            -1 => Err(Errno::last().into()),
            0 => {
                let run = || {
                    dup2_stdin(&null)?;
                    dup2_stdout(&null)?;
                    dup2_stderr(&child_stderr)?;
                    body()
                };
                // The panic hook prints the message of a panic. The panic must not unwind into the agent's code.
                let ended = catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| Err(io::Error::other("a panic")));
                let code = ended.map_or_else(
                    |error| {
                        print::stderr_line(&error.to_string());
                        libc::EXIT_FAILURE
                    },
                    |()| libc::EXIT_SUCCESS,
                );
                // SAFETY: this ends the child, whose memory no other process or thread uses.
                unsafe { libc::_exit(code) }
            }
            pid => {
                let pid = Pid::from_raw(i32::try_from(pid).map_err(io::Error::other)?);
                // SAFETY: the kernel has just created this descriptor, and nothing else owns it. An OwnedFd refers to
                // the same descriptor until it is dropped.
                let pidfd = unsafe { AsyncFd::register(OwnedFd::from_raw_fd(pidfd)) }.inspect_err(|_| {
                    let _ = kill(pid, Signal::SIGKILL);
                })?;
                Ok(Child { pid, pidfd, stderr })
            }
        }
    }

    /// Kills the child and, as it is PID 1 of its namespace, its whole sandbox.
    pub(super) fn kill(&self) {
        // The pid cannot be reused before the child is reaped. The child may have ended already, which is no error.
        let _ = kill(self.pid, Signal::SIGKILL);
    }

    /// Waits until the child has ended. If it failed, the error contains its stderr and its status.
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
        // Does not block: the child, which held the other end, has ended.
        let mut message = Vec::new();
        let _ = (&self.stderr).take(MAX_STDERR as u64).read_to_end(&mut message);
        let message = String::from_utf8_lossy(&message);
        Err(format!("{} ({status})", message.trim()))
    }
}
