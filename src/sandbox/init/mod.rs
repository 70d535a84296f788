//! PID 1 of a sandbox: runs stages as another uid, keeps their limits, reaps, measures.
//!
//! One thread and one `poll`: the channel, SIGCHLD and the next deadline. It trusts the server and
//! nothing else; programs run as a uid that can neither signal it nor read its memory. When the channel
//! closes it exits, and the kernel kills what is left in its pid namespace.
//!
//! Here is the loop over the server's messages; the loop of a running stage is in `stage`.

pub mod carry; // packs and unpacks what was compiled
pub(super) mod confine; // what a child gives up before it is a program
mod counters; // usage and limits by the cgroup
mod cpu_samples; // CPU times of running processes
mod groups; // the groups of the image's user
mod landlock;
mod locks; // limits locks on files
mod processes; // usage by /proc
mod program; // argv, environment, PATH
mod reap; // reaps, and kills what is left
mod spawn; // starts a program
mod stack; // of a child
mod stage; // one stage from start to end
mod standard_streams;
mod tracers; // answers the filter about tracers
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
use crate::sandbox::init::spawn::Spawner;
use crate::sandbox::protocol::{self, CHANNEL_FD, FromInit, ToInit, VERSION};
use crate::sandbox::seccomp;

/// Variables, by name.
pub type Environment = Vec<(OsString, OsString)>;

/// Init as a program of its own, whose descriptor 3 is the channel.
pub fn main() -> ExitCode {
    // SAFETY: first thing in a process of one thread: it is what the server passed, and nobody else knows it.
    let channel = unsafe { OwnedFd::from_raw_fd(CHANNEL_FD) };
    // SAFETY: of what this process has open nobody owns anything but the channel.
    let ended = unsafe { run(channel, std::env::vars_os().collect(), seccomp::filter()) };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            print::complain(&format!("coderunner init: {error}; it is started by the server, not by hand"));
            ExitCode::FAILURE
        }
    }
}

/// Serves the channel until it closes. `environment` is what the image sets, and podman for it; `filter` is that of
/// [`seccomp::filter`]. Closes whatever else this process has open.
///
/// # Safety
///
/// Whoever owns a descriptor besides the channel and the three standard ones must neither use nor drop it after this: its
/// number may be another descriptor's by then. A copy of another process must end without returning to the code of that one.
pub unsafe fn run(channel: OwnedFd, environment: Environment, filter: BpfProgram) -> io::Result<()> {
    let kept = channel.as_raw_fd().cast_unsigned();
    for (first, last) in [(3, kept - 1), (kept + 1, u32::MAX)] {
        if first <= last {
            // SAFETY: nobody uses or closes these descriptors any more, as our callers promise.
            unsafe { libc::close_range(first, last, 0) };
        }
    }
    Init::new(channel, environment, filter)?.serve()
}

struct Init {
    channel: OwnedFd,
    children: SignalFd,
    cgroup: Cgroup,
    spawner: Spawner,
    /// Uid and gid of the programs, once they are known.
    ids: Option<(Uid, Gid)>,
    /// Whether a process that was killed is still stuck in the kernel.
    dying: bool,
}

impl Init {
    fn new(channel: OwnedFd, environment: Environment, filter: BpfProgram) -> io::Result<Init> {
        nix::fcntl::fcntl(&channel, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))?;
        // Nobody reads our memory or descriptors through /proc/1.
        nix::sys::prctl::set_dumpable(false)?;
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGCHLD);
        mask.thread_block()?;
        let children = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        let cgroup = Cgroup { own: true };
        let spawner = Spawner::new(environment, filter)?;
        Ok(Init { channel, children, cgroup, spawner, ids: None, dying: false })
    }

    /// Does what the server says, one message after the other, until the channel closes.
    fn serve(mut self) -> io::Result<()> {
        self.send(&FromInit::Ready { version: VERSION, enforced: self.cgroup.enforced() })?;
        while let Some((message, pipes)) = protocol::receive(self.channel.as_fd())? {
            let answer = match message {
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
                        Some(answer) => answer,
                        None => return Ok(()),
                    },
                    Err(_) => FromInit::Failed("a stage without its three pipes".into()),
                },
                ToInit::Pack { most } => match self.pack(most, pipes) {
                    Ok(()) => FromInit::Packed,
                    Err(error) => FromInit::NotCarried(format!("cannot pack what is there: {error}")),
                },
                ToInit::Unpack => match self.unpack(pipes) {
                    Ok(()) => FromInit::Unpacked,
                    Err(error) => FromInit::NotCarried(format!("cannot unpack what was made: {error}")),
                },
                // Meant for a stage that has just ended.
                ToInit::Signal(_) | ToInit::Kill => continue,
            };
            self.send(&answer)?;
        }
        Ok(())
    }

    fn send(&self, message: &FromInit) -> io::Result<()> {
        protocol::send(self.channel.as_fd(), message, &[])
    }
}
