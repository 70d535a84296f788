//! Output of verbs on stdout and stderr, which may be a pipe whose reader has closed it, or a full disk.

use std::io::{self, Write};

/// Exit code if the reader has closed our output: the code that shells report for a program killed by SIGPIPE.
pub const CODE_BROKEN_PIPE: u8 = 128 + 13;

/// Writing to stdout or stderr failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot write {stream}: {error}")]
pub struct PrintError {
    stream: &'static str,
    error: io::Error,
}

impl PrintError {
    /// The error of a write to stdout by other code.
    pub fn on_stdout(error: io::Error) -> PrintError {
        PrintError { stream: "to stdout", error }
    }

    /// Whether the reader has closed the pipe. Like other programs, a verb then ends without a message.
    pub fn is_broken_pipe(&self) -> bool {
        self.error.kind() == io::ErrorKind::BrokenPipe
    }
}

/// Prints to stdout.
pub fn stdout(bytes: impl AsRef<[u8]>) -> Result<(), PrintError> {
    write(io::stdout().lock(), bytes.as_ref()).map_err(PrintError::on_stdout)
}

/// Prints the output of a program to stderr. Messages of this process go through [`log::print`](super::log::print).
pub fn stderr(bytes: impl AsRef<[u8]>) -> Result<(), PrintError> {
    write(io::stderr().lock(), bytes.as_ref()).map_err(|error| PrintError { stream: "to stderr", error })
}

/// Prints a line to stderr where there is no log: in the agent, in init, before the log has started. Ignores errors.
pub fn stderr_line(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

fn write(mut to: impl Write, bytes: &[u8]) -> io::Result<()> {
    to.write_all(bytes)?;
    to.flush()
}
