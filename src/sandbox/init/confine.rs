//! Confines a child before it becomes a program.

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

/// Confines this process, which is about to become a program. Sets its pipes, limits, ids, signals, Landlock rules and
/// seccomp filter.
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
    // Makes the kernel kill programs before init at the memory limit.
    fs::write("/proc/self/oom_score_adj", "1000")?;
    for &(resource, value) in limits {
        let message =
            |error| format!("cannot set {resource:?} to {value}: {error}; the server's own may be lower (ulimit -Ha)");
        setrlimit(resource, value, value).map_err(|error| io::Error::other(message(error)))?;
    }
    setsid()?;
    // These groups let programs read the files that the image's own user can read, and nothing more. The root is
    // read-only, and the writable directories belong to this sandbox. The objects of the server and of init (the job
    // directory, the channel, the pipes, /proc/1, the cgroup) have group 0, which is never among these groups. Signals
    // and tracing depend on the uid alone.
    setgroups(groups)?;
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)?;
    SigSet::empty().thread_set_mask()?;
    default_signals();
    rules.try_clone()?.restrict_self().map_err(io::Error::other)?;
    // Last, because the filter applies to all calls that follow.
    set_no_new_privs()?;
    tracers::apply(filter)
}

/// Resource limits of a program. `pids_limited`: whether a cgroup limits the number of processes.
pub(super) fn resource_limits(spec: &StageSpec, pids_limited: bool) -> Vec<(Resource, u64)> {
    let mut limits = vec![
        (Resource::RLIMIT_NOFILE, spec.open_files),
        (Resource::RLIMIT_FSIZE, spec.file_size),
        // Too small for any core file. A kernel that pipes core dumps to a handler of the host does so at 0 but not at
        // 1.
        (Resource::RLIMIT_CORE, 1),
        // Message queues and queued signals take kernel memory.
        (Resource::RLIMIT_MSGQUEUE, 0),
        (Resource::RLIMIT_SIGPENDING, 1024),
        (Resource::RLIMIT_MEMLOCK, 64 * 1024),
        // A backup for init's own checks, because the kernel counts per process and in whole seconds.
        (Resource::RLIMIT_CPU, spec.cpu_time_us.div_ceil(1_000_000) + 1),
    ];
    if !pids_limited {
        // Counted per uid, and no other sandbox has this uid. Not set together with a pids cgroup, because only the
        // cgroup counts refused forks.
        limits.push((Resource::RLIMIT_NPROC, spec.processes));
    }
    limits
}

/// Resets every signal to its default action, including 32 and 33. The C library reserves these two: it refuses to set
/// them, and leaves them ignored in the processes that it spawns.
pub(in crate::sandbox) fn default_signals() {
    // The kernel's `struct sigaction`. Zeros mean the default action without flags.
    let default = [0_u64; 4];
    for signal in 1..=64_i32 {
        // SAFETY: the kernel reads the 32 bytes of `default`, and writes nothing. The calls for SIGKILL and SIGSTOP
        // fail, as they should.
        unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), std::ptr::null::<u64>(), 8_usize) };
    }
}
