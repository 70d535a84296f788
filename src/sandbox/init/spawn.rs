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
    /// The program is the cause: the kernel cannot execute it, or its sandbox is out of memory.
    Program(io::Error),
    /// The program is not the cause: init or the host failed.
    Init(io::Error),
}

impl SpawnError {
    /// Classifies an error of `execve`.
    fn exec(error: io::Error) -> SpawnError {
        match error.raw_os_error() {
            // The host as a whole has too many open files.
            Some(libc::ENFILE) => SpawnError::Init(error),
            _ => SpawnError::Program(error),
        }
    }

    /// Classifies an error before `execve`.
    fn before(error: impl Into<io::Error>) -> SpawnError {
        let error = error.into();
        match error.raw_os_error() {
            // The sandbox is out of memory. The files of its programs count as memory.
            Some(libc::ENOMEM) => SpawnError::Program(error),
            _ => SpawnError::Init(error),
        }
    }
}

/// Starts programs. Holds everything that can be created before a job arrives.
pub(super) struct ProgramStarter {
    filter: BpfProgram,
    streams: StandardStreams,
    rules: landlock::Rules,
    /// Supplementary groups of programs: the groups of the image's user.
    pub(super) groups: Vec<Gid>,
    /// Environment variables of every program.
    environment: Environment,
    stack: Stack,
}

impl ProgramStarter {
    /// `environment` has the variables that the image and podman set.
    pub(super) fn new(environment: Environment, filter: BpfProgram) -> io::Result<ProgramStarter> {
        let rules = landlock::rules(&WRITABLE_PATHS).map_err(io::Error::other)?;
        // podman adds these variables; they do not come from the image.
        let environment =
            environment.into_iter().filter(|(name, _)| name != "container" && name != "HOSTNAME" && name != "TERM");
        Ok(ProgramStarter {
            filter,
            streams: StandardStreams::save()?,
            rules,
            environment: environment.collect(),
            groups: Vec::new(),
            stack: Stack::new()?,
        })
    }

    /// Starts the stage's command as `ids`. Of init's descriptors the program gets only the three pipes.
    ///
    /// The child shares init's memory until `execve`, as with vfork, because copying the memory would double the cost.
    /// So init is suspended meanwhile, and the child must change nothing in the memory but the expected variables. The
    /// child also shares the table of descriptors: the filter's listener that it creates is open in init. It is closed
    /// in the program, which gets its own table at `execve`.
    pub(super) fn spawn(
        &mut self,
        spec: &StageSpec,
        pipes: &[OwnedFd; 3],
        ids: (Uid, Gid),
        pids_limited: bool,
    ) -> Result<(Pid, Option<Listener>), SpawnError> {
        let program = Program::new(spec, &self.environment).map_err(SpawnError::Program)?;
        let limits = resource_limits(spec, pids_limited);
        let ProgramStarter { filter, streams, rules, groups, stack, .. } = self;
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
        // SAFETY: the stack lives as long as the child uses it, because with CLONE_VFORK this call returns when the
        // child has called execve or has ended. No other code of init runs meanwhile: it has one thread. No process can
        // read the shared memory while the child already has the programs' uid: the child is not dumpable, and no
        // program runs yet.
        let pid = unsafe { clone(Box::new(child), stack.usable(), flags, Some(libc::SIGCHLD)) };
        streams.restore().map_err(SpawnError::before)?;
        let pid = pid.map_err(SpawnError::before)?;
        match (listener, failure) {
            (Some(listener), None) => Ok((pid, listener)),
            (_, failure) => {
                waitpid(pid, None).map_err(SpawnError::before)?;
                Err(failure.unwrap_or_else(|| SpawnError::Init(io::Error::other("the child ended before execve"))))
            }
        }
    }
}
