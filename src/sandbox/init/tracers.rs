//! Limits processes that share the table of open files of another process without being one of its threads.
//!
//! A file lock belongs to such a table, but the kernel lists it under the process that created it. When that process
//! has ended and the table lives on, the lock is in no list of this sandbox, so a program could hide locks from the
//! check in `locks`. Only LeakSanitizer's tracer shares a table in this way, and it cannot be distinguished from other
//! processes. So the filter notifies init about each such clone, and init allows a few per stage: the locks that these
//! can hide are fewer than the locks that are allowed anyway. Without a listener the kernel refuses these clones.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use nix::libc;
use seccompiler::BpfProgram;

/// How many of these processes a stage may create: LeakSanitizer creates one at the end of each process.
const MAX_ALLOWED: u32 = 8;

/// Time between two checks of locks, after the first of these processes.
pub const LOCKS_CHECK_INTERVAL: Duration = Duration::from_millis(5);

const NAMESPACES: u64 = crate::sandbox::seccomp::NAMESPACES as u64;

nix::ioctl_readwrite!(receive, b'!', 0, libc::seccomp_notif);
nix::ioctl_readwrite!(answer, b'!', 1, libc::seccomp_notif_resp);

/// Receives the filter's notifications about calls that init decides on.
pub struct Listener {
    fd: OwnedFd,
    /// Number of calls that were allowed.
    allowed: u32,
}

/// Installs the filter in this process, which must have no_new_privs set. Returns `None` if the kernel grants no
/// listener: before Linux 5.0, or if an outer filter already has one. Calls that need a notification are then refused.
pub fn apply(filter: &BpfProgram) -> io::Result<Option<Listener>> {
    let length = u16::try_from(filter.len()).map_err(io::Error::other)?;
    let program = libc::sock_fprog { len: length, filter: filter.as_ptr().cast_mut().cast() };
    let (mode, flags) = (libc::SECCOMP_SET_MODE_FILTER, libc::SECCOMP_FILTER_FLAG_NEW_LISTENER);
    // SAFETY: the kernel reads `len` instructions, which have the same four fields in both structures, and keeps a
    // copy.
    let installed = unsafe { libc::syscall(libc::SYS_seccomp, mode, flags, &raw const program) };
    let Ok(listener @ 0..) = RawFd::try_from(installed) else {
        seccompiler::apply_filter(filter).map_err(io::Error::other)?;
        return Ok(None);
    };
    // SAFETY: the descriptor is new, and nothing else owns it. The kernel closes it at execve.
    Ok(Some(Listener { fd: unsafe { OwnedFd::from_raw_fd(listener) }, allowed: 0 }))
}

impl Listener {
    /// Answers one notification. Returns whether the call was allowed.
    pub fn answer(&mut self) -> bool {
        // SAFETY: all fields are integers, for which zero is valid.
        let mut notification: libc::seccomp_notif = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel writes to the structure, which outlives the call. Fails if the process is dead.
        if unsafe { receive(self.fd.as_raw_fd(), &raw mut notification) }.is_err() {
            return false;
        }
        // The flags are in a register, so no other thread of the program can change them after this check.
        let allow = self.allowed < MAX_ALLOWED && notification.data.args[0] & NAMESPACES == 0;
        let mut response = libc::seccomp_notif_resp { id: notification.id, val: 0, error: 0, flags: 0 };
        match allow {
            true => {
                self.allowed += 1;
                response.flags = CONTINUE;
            }
            false => response.error = -libc::ENOSYS,
        }
        // SAFETY: the kernel reads the structure, which outlives the call. Fails if the process is dead.
        let _ = unsafe { answer(self.fd.as_raw_fd(), &raw mut response) };
        allow
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// SECCOMP_USER_NOTIF_FLAG_CONTINUE: the kernel executes the call.
const CONTINUE: u32 = 1;

const _: () = assert!(size_of::<seccompiler::sock_filter>() == size_of::<libc::sock_filter>());
