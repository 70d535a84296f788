//! Starts the program of a stage in a child that shares init's memory, as with vfork.

use std::io;
use std::os::fd::OwnedFd;

use nix::libc;
use nix::sched::{CloneFlags, clone};
use nix::sys::wait::waitpid;
use nix::unistd::{Gid, Pid, Uid};
use seccompiler::BpfProgram;

use crate::model::rootfs::WRITABLE_PATHS;
use crate::sandbox::init::Environment;
use crate::sandbox::init::confine::{confine, resource_limits};
use crate::sandbox::init::landlock;
use crate::sandbox::init::program::Program;
use crate::sandbox::init::stack::Stack;
use crate::sandbox::init::standard_streams::StandardStreams;
use crate::sandbox::init::tracers::Listener;
use crate::sandbox::protocol::StageSpec;

/// Why a program was not started.
#[derive(Debug)]
pub(super) enum SpawnError {
    /// The program's fault: the kernel cannot execute it, or there is not enough memory in its sandbox.
    Program(io::Error),
    /// Not the program's fault: it could not be prepared.
    Init(io::Error),
}

impl SpawnError {
    /// Of an error of `execve`.
    fn exec(error: io::Error) -> SpawnError {
        match error.raw_os_error() {
            // The whole host has too many open files.
            Some(libc::ENFILE) => SpawnError::Init(error),
            _ => SpawnError::Program(error),
        }
    }

    /// Of an error before `execve`.
    fn before(error: impl Into<io::Error>) -> SpawnError {
        let error = error.into();
        match error.raw_os_error() {
            // The sandbox is out of memory, to which the files that programs leave behind count.
            Some(libc::ENOMEM) => SpawnError::Program(error),
            _ => SpawnError::Init(error),
        }
    }
}

/// All that programs are started with, made before there is a job.
pub(super) struct Spawner {
    filter: BpfProgram,
    streams: StandardStreams,
    rules: landlock::Rules,
    /// Supplementary groups of programs: those of the image's user.
    pub(super) groups: Vec<Gid>,
    /// What every program gets.
    environment: Environment,
    stack: Stack,
}

impl Spawner {
    /// `environment` is what the image sets, and podman for it.
    pub(super) fn new(environment: Environment, filter: BpfProgram) -> io::Result<Spawner> {
        let rules = landlock::rules(&WRITABLE_PATHS).map_err(io::Error::other)?;
        // podman sets these by itself: they are not the image's.
        let environment =
            environment.into_iter().filter(|(name, _)| name != "container" && name != "HOSTNAME" && name != "TERM");
        Ok(Spawner {
            filter,
            streams: StandardStreams::keep()?,
            rules,
            environment: environment.collect(),
            groups: Vec::new(),
            stack: Stack::new()?,
        })
    }

    /// Starts the stage's command as `ids`, without anything of ours but the three pipes.
    ///
    /// The child shares our memory until it is the program, as with vfork: a copy of it would cost as much as all else. So
    /// it must leave nothing behind that we do not expect, and we are suspended meanwhile. It also shares our descriptors: the
    /// filter's listener that it makes is then open here, and closed in the program, which gets a table of its own.
    pub(super) fn spawn(
        &mut self,
        spec: &StageSpec,
        pipes: &[OwnedFd; 3],
        ids: (Uid, Gid),
        pids_limited: bool,
    ) -> Result<(Pid, Option<Listener>), SpawnError> {
        let program = Program::new(spec, &self.environment).map_err(SpawnError::Program)?;
        let limits = resource_limits(spec, pids_limited);
        let Spawner { filter, streams, rules, groups, stack, .. } = self;
        let (mut listener, mut failure) = (None, None);
        let child = || {
            failure = Some(match confine(pipes, ids, groups, &limits, filter, rules) {
                Ok(confined) => {
                    listener = Some(confined);
                    SpawnError::exec(program.exec())
                }
                Err(error) => SpawnError::before(error),
            });
            libc::EXIT_FAILURE as isize
        };
        let flags = CloneFlags::CLONE_VM | CloneFlags::CLONE_FILES | CloneFlags::CLONE_VFORK;
        // SAFETY: the stack lives as long as the child uses it, for CLONE_VFORK returns when the child is the program or
        // has ended. Nothing else of ours runs meanwhile: this process has one thread. Nobody may look into the memory that
        // the child shares while it is already the programs' uid: it is not dumpable, and no program runs yet.
        let pid = unsafe { clone(Box::new(child), stack.usable(), flags, Some(libc::SIGCHLD)) };
        streams.restore().map_err(SpawnError::before)?;
        let pid = pid.map_err(SpawnError::before)?;
        match (listener, failure) {
            (Some(listener), None) => Ok((pid, listener)),
            (_, failure) => {
                waitpid(pid, None).map_err(SpawnError::before)?;
                Err(failure
                    .unwrap_or_else(|| SpawnError::Init(io::Error::other("a child ended before it was a program"))))
            }
        }
    }
}
