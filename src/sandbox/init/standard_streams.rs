//! Standard input, output and error: a child that shares our descriptors replaces them by its pipes.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::unistd::{dup2_stderr, dup2_stdin, dup2_stdout};

/// Copies of our own standard streams, to restore them after a child has replaced them by its pipes.
pub(super) struct StandardStreams([OwnedFd; 3]);

impl StandardStreams {
    /// Keeps the streams as they are now.
    pub(super) fn keep() -> io::Result<StandardStreams> {
        let keep = |fd: BorrowedFd| fd.try_clone_to_owned();
        Ok(StandardStreams([keep(io::stdin().as_fd())?, keep(io::stdout().as_fd())?, keep(io::stderr().as_fd())?]))
    }

    /// Puts them back.
    pub(super) fn restore(&self) -> io::Result<()> {
        set_standard_streams(&self.0)
    }
}

/// Makes these our standard input, output and error.
pub(super) fn set_standard_streams([stdin, stdout, stderr]: &[OwnedFd; 3]) -> io::Result<()> {
    dup2_stdin(stdin)?;
    dup2_stdout(stdout)?;
    Ok(dup2_stderr(stderr)?)
}
