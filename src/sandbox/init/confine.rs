//! What a child gives up before it becomes a program, and the limits that it gets.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;

use nix::libc;
use nix::sys::prctl::set_no_new_privs;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::SigSet;
use nix::unistd::{Gid, Uid, chdir, setgroups, setresgid, setresuid, setsid};
use seccompiler::BpfProgram;

use crate::model::rootfs::WORK_DIR;
use crate::sandbox::init::landlock;
use crate::sandbox::init::standard_streams::set_standard_streams;
use crate::sandbox::init::tracers::{self, Listener};
use crate::sandbox::protocol::StageSpec;

/// Confines this process, which is about to become a program: pipes, limits, ids, signals, Landlock, seccomp.
pub(super) fn confine(
    pipes: &[OwnedFd; 3],
    (uid, gid): (Uid, Gid),
    groups: &[Gid],
    limits: &[(Resource, u64)],
    filter: &BpfProgram,
    rules: &landlock::Rules,
) -> io::Result<Option<Listener>> {
    set_standard_streams(pipes)?;
    chdir(WORK_DIR)?;
    // At the memory limit the kernel is to kill programs before init.
    fs::write("/proc/self/oom_score_adj", "1000")?;
    for &(resource, value) in limits {
        let higher =
            |error| format!("{resource:?} cannot be {value}: {error}; the server's own may be lower (ulimit -Ha)");
        setrlimit(resource, value, value).map_err(|error| io::Error::other(higher(error)))?;
    }
    setsid()?;
    // These groups only let programs read what the image lets its own user read: the root is read-only, the writable
    // directories are this sandbox's own, and all that is the server's or init's (the job directory, the channel, the pipes,
    // /proc/1, the cgroup) has group 0, which is never among them. Permission to signal and to trace goes by uid.
    setgroups(groups)?;
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)?;
    SigSet::empty().thread_set_mask()?;
    default_signals();
    rules.try_clone()?.restrict_self().map_err(io::Error::other)?;
    // Last, for the filter applies to all that follows.
    set_no_new_privs()?;
    tracers::apply(filter)
}

/// Resource limits of a program. `pids_limited` says whether a cgroup limits the number of processes.
pub(super) fn resource_limits(spec: &StageSpec, pids_limited: bool) -> Vec<(Resource, u64)> {
    let mut limits = vec![
        (Resource::RLIMIT_NOFILE, spec.open_files),
        (Resource::RLIMIT_FSIZE, spec.file_size),
        // Too small for any core file. A kernel that pipes core dumps to a program of the host does so at 0, but not at 1.
        (Resource::RLIMIT_CORE, 1),
        // Message queues and queued signals take memory of the kernel.
        (Resource::RLIMIT_MSGQUEUE, 0),
        (Resource::RLIMIT_SIGPENDING, 1024),
        (Resource::RLIMIT_MEMLOCK, 64 * 1024),
        // A second line behind the checks of init: the kernel counts per process, in whole seconds.
        (Resource::RLIMIT_CPU, spec.cpu_time_us.div_ceil(1_000_000) + 1),
    ];
    if !pids_limited {
        // Counted per uid, and the uid is this sandbox's alone. Not set beside a pids cgroup, for only that one counts the
        // forks that it refused.
        limits.push((Resource::RLIMIT_NPROC, spec.processes));
    }
    limits
}

/// Resets every signal to its default action, also 32 and 33: the C library reserves these, refuses to set them, and
/// leaves them ignored in what it spawns.
pub(in crate::sandbox) fn default_signals() {
    // The kernel's structure, whose zeros are the default action without flags.
    let default = [0_u64; 4];
    for signal in 1..=64_i32 {
        // SAFETY: the kernel reads 32 bytes that are there, and writes nothing. SIGKILL and SIGSTOP fail, as they
        // should.
        unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), std::ptr::null::<u64>(), 8_usize) };
    }
}
