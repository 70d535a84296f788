//! Saves and restores init's standard input, output and error, which a child that shares init's descriptors replaces by
//! its pipes.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::unistd::{dup2_stderr, dup2_stdin, dup2_stdout};

/// Copies of init's standard streams, to restore them after a child has replaced them.
pub(super) struct StandardStreams([OwnedFd; 3]);

impl StandardStreams {
    /// Copies the current streams.
    pub(super) fn save() -> io::Result<StandardStreams> {
        let copy = |fd: BorrowedFd| fd.try_clone_to_owned();
        Ok(StandardStreams([copy(io::stdin().as_fd())?, copy(io::stdout().as_fd())?, copy(io::stderr().as_fd())?]))
    }

    /// Restores the saved streams.
    pub(super) fn restore(&self) -> io::Result<()> {
        set_standard_streams(&self.0)
    }
}

/// Makes these descriptors the standard input, output and error of this process.
pub(super) fn set_standard_streams([stdin, stdout, stderr]: &[OwnedFd; 3]) -> io::Result<()> {
    dup2_stdin(stdin)?;
    dup2_stdout(stdout)?;
    Ok(dup2_stderr(stderr)?)
}
