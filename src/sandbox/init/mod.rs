//! PID 1 of a sandbox: runs stages as another uid, enforces their limits, reaps processes and measures usage.
//!
//! Init has one thread with one `poll` on the channel, SIGCHLD and the next deadline. It trusts the server and nothing
//! else. Programs run as a uid that can neither signal init nor read its memory. When the channel closes init exits,
//! and the kernel kills all other processes in its pid namespace.
//!
//! This file has the loop over the server's messages. The loop of a running stage is in `stage`.

pub mod carry; // packs and unpacks compiled files
pub(super) mod confine; // confines a child before it becomes a program
mod counters; // usage and limits from the cgroup
mod cpu_samples; // CPU times of running processes
mod groups; // the groups of the image's user
mod landlock;
mod locks; // limits locks on files
mod processes; // usage from /proc
mod program; // argv, environment, PATH
mod reap; // reaps and kills processes
mod spawn; // starts a program
mod stack; // the stack of a child
mod stage; // one stage from start to end
mod standard_streams;
mod tracers; // answers the filter's notifications about tracers
mod workdir; // files of the programs

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::process::ExitCode;

use nix::libc;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::{Gid, Uid};
use seccompiler::BpfProgram;

use crate::host::print;
use crate::sandbox::init::counters::Cgroup;
use crate::sandbox::init::spawn::ProgramStarter;
use crate::sandbox::protocol::{self, CHANNEL_FD, FromInit, ToInit, VERSION};
use crate::sandbox::seccomp;

/// Environment variables: names and values.
pub type Environment = Vec<(OsString, OsString)>;

/// Entry point of init as a program. Descriptor 3 is its channel.
pub fn main() -> ExitCode {
    // SAFETY: the server passed this descriptor. Nothing else owns it, because this is the first action of a process
    // with one thread.
    let channel = unsafe { OwnedFd::from_raw_fd(CHANNEL_FD) };
    // SAFETY: no other code of this process owns a descriptor.
    let ended = unsafe { run(channel, std::env::vars_os().collect(), seccomp::filter()) };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            print::stderr_line(&format!("coderunner init: {error}; it is started by the server, not by hand"));
            ExitCode::FAILURE
        }
    }
}

/// Serves the channel until it closes. `environment` has the variables that the image and podman set; `filter` is the
/// result of [`seccomp::filter`]. Closes all other descriptors of this process, except for the three standard streams.
///
/// # Safety
///
/// The owner of any descriptor other than the channel and the three standard streams must neither use nor drop it after
/// this call: its number may belong to another descriptor by then. If this process is a copy of another one, it must
/// end without returning to that process's code.
pub unsafe fn run(channel: OwnedFd, environment: Environment, filter: BpfProgram) -> io::Result<()> {
    let kept = channel.as_raw_fd().cast_unsigned();
    for (first, last) in [(3, kept - 1), (kept + 1, u32::MAX)] {
        if first <= last {
            // SAFETY: callers promise that nothing uses or closes these descriptors any more.
            unsafe { libc::close_range(first, last, 0) };
        }
    }
    Init::new(channel, environment, filter)?.serve()
}

struct Init {
    channel: OwnedFd,
    children: SignalFd,
    cgroup: Cgroup,
    spawner: ProgramStarter,
    /// Uid and gid of the programs, known after [`ToInit::Prepare`].
    ids: Option<(Uid, Gid)>,
    /// Whether a killed process has not died, because it is stuck in the kernel.
    has_stuck_process: bool,
}

impl Init {
    fn new(channel: OwnedFd, environment: Environment, filter: BpfProgram) -> io::Result<Init> {
        nix::fcntl::fcntl(&channel, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))?;
        // Keeps other processes from reading init's memory or descriptors through /proc/1.
        nix::sys::prctl::set_dumpable(false)?;
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGCHLD);
        mask.thread_block()?;
        let children = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        let cgroup = Cgroup { own: true };
        let spawner = ProgramStarter::new(environment, filter)?;
        Ok(Init { channel, children, cgroup, spawner, ids: None, has_stuck_process: false })
    }

    /// Handles the server's messages one after the other, until the channel closes.
    fn serve(mut self) -> io::Result<()> {
        self.send(&FromInit::Ready { version: VERSION, enforced: self.cgroup.enforced() })?;
        while let Some((message, pipes)) = protocol::receive(self.channel.as_fd())? {
            let reply = match message {
                ToInit::Prepare { uid, user, own_cgroup, files } => {
                    self.cgroup.own = own_cgroup;
                    self.spawner.groups = groups::of_user(&user, Path::new("/"));
                    match self.place_files(uid, &files) {
                        Ok(()) => FromInit::Prepared,
                        Err(error) => FromInit::Failed(format!("cannot place the sources: {error}")),
                    }
                }
                ToInit::Stage(spec) => match <[OwnedFd; 3]>::try_from(pipes) {
                    Ok(pipes) => match self.run_stage(&spec, pipes)? {
                        Some(reply) => reply,
                        None => return Ok(()),
                    },
                    Err(_) => FromInit::Failed("a stage message came without three pipes".into()),
                },
                ToInit::Pack { most } => match self.pack(most, pipes) {
                    Ok(()) => FromInit::Packed,
                    Err(error) => FromInit::NotCarried(format!("cannot pack the compiled files: {error}")),
                },
                ToInit::Unpack => match self.unpack(pipes) {
                    Ok(()) => FromInit::Unpacked,
                    Err(error) => FromInit::NotCarried(format!("cannot unpack the compiled files: {error}")),
                },
                // Sent for a stage that had just ended.
                ToInit::Signal(_) | ToInit::Kill => continue,
            };
            self.send(&reply)?;
        }
        Ok(())
    }

    fn send(&self, message: &FromInit) -> io::Result<()> {
        protocol::send(self.channel.as_fd(), message, &[])
    }
}
