//! Processes that share another one's table of open files, and are not its threads.
//!
//! Locks belong to such a table, and the kernel lists them under the process that made them: when that has ended, locks that
//! it made in a table which lives on are in no list of this sandbox any more. Nothing but LeakSanitizer's tracer shares a
//! table so. It cannot be told apart from others, so the filter asks init about each, and init allows a few: fewer locks can
//! be hidden then than are allowed anyway. Where nobody can be asked, the kernel refuses them.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use nix::libc;
use seccompiler::BpfProgram;

/// How many of them a stage may make: LeakSanitizer makes one at the end of each process.
const MOST: u32 = 8;

/// Time between two looks at locks once there is one of them.
pub const CHECK: Duration = Duration::from_millis(5);

const NAMESPACES: u64 = crate::sandbox::seccomp::NAMESPACES as u64;

nix::ioctl_readwrite!(receive, b'!', 0, libc::seccomp_notif);
nix::ioctl_readwrite!(answer, b'!', 1, libc::seccomp_notif_resp);

/// Where the kernel asks whether processes may do what the filter leaves to init.
pub struct Listener {
    fd: OwnedFd,
    allowed: u32,
}

/// Installs the filter in this process, which may gain no rights any more. Without a listener, which kernels before Linux 5.0
/// do not have, nor those where a filter around us has one already, what would be asked is refused.
pub fn apply(filter: &BpfProgram) -> io::Result<Option<Listener>> {
    let length = u16::try_from(filter.len()).map_err(io::Error::other)?;
    let program = libc::sock_fprog { len: length, filter: filter.as_ptr().cast_mut().cast() };
    let (mode, flags) = (libc::SECCOMP_SET_MODE_FILTER, libc::SECCOMP_FILTER_FLAG_NEW_LISTENER);
    // SAFETY: the kernel reads `len` steps of four fields each, which are the same in both structures, and keeps a copy.
    let installed = unsafe { libc::syscall(libc::SYS_seccomp, mode, flags, &raw const program) };
    let Ok(listener @ 0..) = RawFd::try_from(installed) else {
        seccompiler::apply_filter(filter).map_err(io::Error::other)?;
        return Ok(None);
    };
    // SAFETY: it is new, and nobody else knows it. The kernel closes it in what becomes a program.
    Ok(Some(Listener { fd: unsafe { OwnedFd::from_raw_fd(listener) }, allowed: 0 }))
}

impl Listener {
    /// Answers a process that waits. Whether one was allowed.
    pub fn answer(&mut self) -> bool {
        // SAFETY: a structure of integers.
        let mut asked: libc::seccomp_notif = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel fills the structure, which is there. It fails where the process is dead.
        if unsafe { receive(self.fd.as_raw_fd(), &raw mut asked) }.is_err() {
            return false;
        }
        // Flags are in a register: nobody can change them any more.
        let allow = self.allowed < MOST && asked.data.args[0] & NAMESPACES == 0;
        let mut verdict = libc::seccomp_notif_resp { id: asked.id, val: 0, error: 0, flags: 0 };
        match allow {
            true => {
                self.allowed += 1;
                verdict.flags = CONTINUE;
            }
            false => verdict.error = -libc::ENOSYS,
        }
        // SAFETY: the kernel reads the structure, which is there. It fails where the process is dead.
        let _ = unsafe { answer(self.fd.as_raw_fd(), &raw mut verdict) };
        allow
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// SECCOMP_USER_NOTIF_FLAG_CONTINUE: the kernel goes on with the call.
const CONTINUE: u32 = 1;

const _: () = assert!(size_of::<seccompiler::sock_filter>() == size_of::<libc::sock_filter>());
