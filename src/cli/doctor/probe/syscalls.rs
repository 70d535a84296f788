//! Tests whether the seccomp filter refuses system calls.

use std::io;

use nix::errno::Errno;
use nix::libc;
use nix::mount::{MsFlags, mount};

use crate::cli::doctor::probe::privileges::status;
use crate::cli::doctor::wall::{Wall, WallResult};

/// Calls that must be refused, with arguments with which none of them has an effect.
const CALLS: [(&str, libc::c_long, [usize; 3]); 13] = [
    ("unshare", libc::SYS_unshare, [libc::CLONE_NEWUSER as usize, 0, 0]),
    ("setns", libc::SYS_setns, [usize::MAX, 0, 0]),
    ("add_key", libc::SYS_add_key, [0; 3]),
    ("keyctl", libc::SYS_keyctl, [0; 3]),
    ("io_uring_setup", libc::SYS_io_uring_setup, [1, 0, 0]),
    ("bpf", libc::SYS_bpf, [0; 3]),
    ("perf_event_open", libc::SYS_perf_event_open, [0; 3]),
    ("userfaultfd", libc::SYS_userfaultfd, [0; 3]),
    ("ptrace of init", libc::SYS_ptrace, [libc::PTRACE_ATTACH as usize, 1, 0]),
    ("init_module", libc::SYS_init_module, [0; 3]),
    ("kexec_load", libc::SYS_kexec_load, [0; 3]),
    ("reboot", libc::SYS_reboot, [0; 3]),
    ("socket of AF_VSOCK", libc::SYS_socket, [libc::AF_VSOCK as usize, libc::SOCK_STREAM as usize, 0]),
];

/// Makes calls that the filter must refuse.
pub(super) fn seccomp() -> io::Result<WallResult> {
    let mode = status("Seccomp")?;
    let mut holes: Vec<String> = if mode == "2" { Vec::new() } else { vec![format!("Seccomp {mode}")] };
    for (name, number, args) in CALLS {
        match call(number, args) {
            Err(error) if is_refusal(error) => {}
            Err(error) => holes.push(format!("{name}: {error}")),
            Ok(_) => holes.push(format!("{name} worked")),
        }
    }
    // With valid arguments, since the kernel checks them before it refuses.
    match mount(Some("none"), "/tmp", Some("tmpfs"), MsFlags::empty(), None::<&str>) {
        Err(error) if is_refusal(error) => {}
        other => holes.push(format!("mount: {other:?}")),
    }
    Ok(WallResult::from_holes(Wall::Seccomp, &format!("a filter, and {} calls refused", CALLS.len() + 1), &holes))
}

/// Makes a system call by number.
pub(super) fn call(number: libc::c_long, [first, second, third]: [usize; 3]) -> Result<libc::c_long, Errno> {
    // SAFETY: all pointers among the arguments of [`CALLS`] and of the System V calls are null, so the kernel accesses
    // no memory of this process.
    Errno::result(unsafe { libc::syscall(number, first, second, third, 0_usize, 0_usize) })
}

/// Whether any wall refused the call. Any other error means that the kernel had started to execute it.
fn is_refusal(error: Errno) -> bool {
    matches!(error, Errno::EPERM | Errno::EACCES | Errno::ENOSYS | Errno::EAFNOSUPPORT)
}
