//! What verbs print on stdout, which may be a pipe whose reader has left, or a full disk.

use std::io::{self, Write};

/// Exit code where the reader of our output has left: what a shell tells of a program that SIGPIPE ended.
pub const CODE_UNREAD: u8 = 128 + 13;

/// Output cannot be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write {stream}: {error}")]
pub struct Unprinted {
    stream: &'static str,
    error: io::Error,
}

impl Unprinted {
    /// For what somebody else has printed.
    pub fn on_stdout(error: io::Error) -> Unprinted {
        Unprinted { stream: "to stdout", error }
    }

    /// Whether nobody reads it any more. That is no failure: as with other programs it is the end.
    pub fn is_unread(&self) -> bool {
        self.error.kind() == io::ErrorKind::BrokenPipe
    }
}

/// Prints to stdout.
pub fn stdout(bytes: impl AsRef<[u8]>) -> Result<(), Unprinted> {
    write(io::stdout().lock(), bytes.as_ref()).map_err(Unprinted::on_stdout)
}

/// Prints to stderr what is not ours, as what a program prints there; for our own words there is `log::say`.
pub fn stderr(bytes: impl AsRef<[u8]>) -> Result<(), Unprinted> {
    write(io::stderr().lock(), bytes.as_ref()).map_err(|error| Unprinted { stream: "to stderr", error })
}

/// Says something on stderr where there is no log: in the agent, in init, before the log has begun. Nobody may hear it.
pub fn complain(words: &str) {
    let _ = writeln!(io::stderr(), "{words}");
}

fn write(mut to: impl Write, bytes: &[u8]) -> io::Result<()> {
    to.write_all(bytes)?;
    to.flush()
}
