//! The only place that starts host processes: each has a deadline, a cap on its output, and is reaped.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{Child, Command};

/// Largest kept output of each stream of a host process, in bytes: `podman ps` of a thousand containers fits.
const OUTPUT_CAP: usize = 4 * 1024 * 1024;

/// How much is kept of the end of a long-running child's stderr, in bytes.
const TAIL_CAP: usize = 4 * 1024;

/// How long to read from pipes after the process itself has ended: a grandchild may hold them open.
const PIPE_GRACE: Duration = Duration::from_millis(500);

/// The directory for this user's sockets and locks: `XDG_RUNTIME_DIR`, or logind's if a service does not have it set.
pub fn xdg_runtime_dir() -> PathBuf {
    let of_logind = || format!("/run/user/{}", nix::unistd::getuid()).into();
    std::env::var_os("XDG_RUNTIME_DIR").map_or_else(of_logind, PathBuf::from)
}

/// Variables from systemd that are for this process alone.
const NOT_INHERITED: [&str; 6] =
    ["NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"];

/// Why a host process could not be started, or did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// The program does not exist or may not be executed.
    #[error("cannot start {program}: {source}; is it installed and on PATH?")]
    NotStarted {
        /// The program.
        program: String,
        /// The error of the kernel.
        source: std::io::Error,
    },
    /// The command exceeded its deadline and was killed.
    #[error("{command} did not end within {}: killed", humantime::format_duration(*.deadline))]
    TimedOut {
        /// The command's first words.
        command: String,
        /// The time that it had.
        deadline: Duration,
    },
    /// The command failed.
    #[error("{command} failed ({status}): {message}")]
    Failed {
        /// The command's first words.
        command: String,
        /// Exit code or signal.
        status: ExitStatus,
        /// The end of its stderr.
        message: String,
    },
    /// A system call around the command failed.
    #[error("{command}: {source}")]
    Io {
        /// The command's first words.
        command: String,
        /// The error of the kernel.
        source: std::io::Error,
    },
}

impl ProcessError {
    /// Whether the command failed with a message that contains this text.
    pub fn message_contains(&self, text: &str) -> bool {
        matches!(self, ProcessError::Failed { message, .. } if message.contains(text))
    }
}

/// A command: an argument vector, never a shell string.
#[derive(Debug, Clone)]
pub struct Cmd {
    program: PathBuf,
    args: Vec<OsString>,
}

impl Cmd {
    /// Makes a command from a program and its arguments.
    pub fn new(program: &Path, args: impl IntoIterator<Item = impl Into<OsString>>) -> Cmd {
        Cmd { program: program.to_owned(), args: args.into_iter().map(Into::into).collect() }
    }

    /// The program and its verb, for messages: further arguments may be long.
    fn name(&self) -> String {
        let verbs = self.args.iter().map(|arg| arg.to_string_lossy()).take_while(|arg| !arg.starts_with('-'));
        std::iter::once(self.program.to_string_lossy()).chain(verbs.take(2)).collect::<Vec<_>>().join(" ")
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.args);
        for name in NOT_INHERITED {
            command.env_remove(name);
        }
        command.env("XDG_RUNTIME_DIR", xdg_runtime_dir());
        // podman refuses to work in a directory that its subordinate ids cannot enter.
        if std::env::current_dir().is_ok_and(|here| here != Path::new("/")) {
            command.current_dir("/");
        }
        // In a process group of its own, so that Ctrl-C reaches only us, and a kill reaches podman's second process
        // too.
        command.process_group(0).stdin(Stdio::null());
        command
    }

    fn start(&self, command: &mut Command) -> Result<Child, ProcessError> {
        command
            .spawn()
            .map_err(|source| ProcessError::NotStarted { program: self.program.display().to_string(), source })
    }

    /// Runs the command to its end and returns its stdout. An exit code other than 0 is an error with the end of
    /// stderr. After `deadline`, or if the future is dropped, the whole process group is killed.
    pub async fn output(&self, deadline: Duration) -> Result<Vec<u8>, ProcessError> {
        self.output_with(deadline, |_| {}).await
    }

    /// Like [`Cmd::output`], and calls `on_line` with each line of stderr as it arrives.
    pub async fn output_with(&self, deadline: Duration, on_line: impl Fn(&str)) -> Result<Vec<u8>, ProcessError> {
        let mut command = self.command();
        let mut child = Group(self.start(command.stdout(Stdio::piped()).stderr(Stdio::piped()))?);
        let io = |source| ProcessError::Io { command: self.name(), source };
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let (out, err) = (child.0.stdout.take(), child.0.stderr.take());
        let status = tokio::time::timeout(deadline, async {
            let reading = async {
                tokio::join!(
                    read_capped(out, &mut stdout, OUTPUT_CAP, |_| {}),
                    read_capped(err, &mut stderr, OUTPUT_CAP, |chunk| {
                        String::from_utf8_lossy(chunk).lines().for_each(&on_line);
                    })
                )
            };
            tokio::pin!(reading);
            let status = tokio::select! {
                _ = &mut reading => None,
                status = child.0.wait() => Some(status),
            };
            match status {
                None => child.0.wait().await,
                Some(status) => {
                    let _ = tokio::time::timeout(PIPE_GRACE, reading).await;
                    status
                }
            }
        })
        .await
        .map_err(|_| ProcessError::TimedOut { command: self.name(), deadline })?
        .map_err(io)?;
        if status.success() {
            return Ok(stdout);
        }
        Err(ProcessError::Failed { command: self.name(), status, message: tail(&stderr) })
    }

    /// Starts a long-running child and passes a descriptor to it; discards its stdout.
    pub fn spawn(&self, passed: Passed) -> Result<Running, ProcessError> {
        let mut command = self.command();
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        match passed {
            Passed::Stdin(fd) => drop(command.stdin(Stdio::from(fd))),
            Passed::Third(fd) => {
                let mapping = vec![FdMapping { parent_fd: fd, child_fd: 3 }];
                let io = |error| ProcessError::Io { command: self.name(), source: std::io::Error::other(error) };
                command.fd_mappings(mapping).map_err(io)?;
            }
        }
        let mut child = self.start(&mut command)?;
        let messages = Arc::new(Mutex::new(Vec::new()));
        let (kept, stderr) = (Arc::clone(&messages), child.stderr.take());
        let reader = tokio::spawn(async move {
            let mut unused = Vec::new();
            read_capped(stderr, &mut unused, 0, |chunk| {
                let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                kept.extend_from_slice(chunk);
                let excess = kept.len().saturating_sub(TAIL_CAP);
                kept.drain(..excess);
            })
            .await;
        });
        Ok(Running { child: Group(child), messages, reader })
    }
}

/// A descriptor that is passed to a child.
pub enum Passed {
    /// As its stdin.
    Stdin(OwnedFd),
    /// As its descriptor 3.
    Third(OwnedFd),
}

/// A long-running child. Dropping it kills its process group.
pub struct Running {
    child: Group,
    messages: Arc<Mutex<Vec<u8>>>,
    reader: tokio::task::JoinHandle<()>,
}

impl Running {
    /// Waits until it exits. The error is the end of its stderr and its status.
    pub async fn end(&mut self) -> Result<(), String> {
        let status = self.child.0.wait().await;
        let _ = tokio::time::timeout(PIPE_GRACE, &mut self.reader).await;
        let message = tail(&self.messages.lock().unwrap_or_else(PoisonError::into_inner));
        match status {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(format!("{message} ({status})")),
            Err(error) => Err(format!("{message} ({error})")),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

/// A child whose process group is killed on drop, unless the child has exited.
struct Group(Child);

impl Drop for Group {
    fn drop(&mut self) {
        // `id` is None once tokio has reaped the leader: another process may have its number by then.
        if let Some(id) = self.0.id() {
            let _ = killpg(Pid::from_raw(id.cast_signed()), Signal::SIGKILL);
        }
    }
}

async fn read_capped(
    pipe: Option<impl AsyncRead + Unpin>,
    kept: &mut Vec<u8>,
    cap: usize,
    mut on_chunk: impl FnMut(&[u8]),
) {
    let Some(mut pipe) = pipe else { return };
    let mut chunk = [0; 8192];
    // A read error counts as the end of the stream.
    while let Ok(length @ 1..) = pipe.read(&mut chunk).await {
        on_chunk(&chunk[..length]);
        kept.extend_from_slice(&chunk[..length.min(cap.saturating_sub(kept.len()))]);
    }
}

/// The last lines, joined to one line for an error message.
fn tail(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(TAIL_CAP)..]).into_owned();
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let last = &lines[lines.len().saturating_sub(4)..];
    if last.is_empty() { "no message".into() } else { last.join("; ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str) -> Cmd {
        Cmd::new(Path::new("/bin/sh"), ["-c", script])
    }

    #[tokio::test]
    async fn output_returns_stdout_only() {
        assert_eq!(sh("echo out; echo err >&2").output(Duration::from_secs(5)).await.unwrap(), b"out\n");
    }

    #[tokio::test]
    async fn failure_message_includes_stderr() {
        let error = sh("echo no such thing >&2; exit 7").output(Duration::from_secs(5)).await.unwrap_err();
        assert!(error.to_string().contains("no such thing"), "{error}");
        assert!(error.to_string().contains('7'), "{error}");
    }

    #[tokio::test]
    async fn timeout_kills_the_process_group() {
        let dir = tempfile::tempdir().unwrap();
        let alive = dir.path().join("alive");
        let script = format!("(sleep 1; touch {}) & sleep 60", alive.display());
        let error = sh(&script).output(Duration::from_millis(100)).await.unwrap_err();
        assert!(matches!(error, ProcessError::TimedOut { .. }), "{error}");
        tokio::time::sleep(Duration::from_millis(1500)).await;
        assert!(!alive.exists());
    }

    #[tokio::test]
    async fn grandchild_holding_the_pipes_does_not_delay_output() {
        let before = std::time::Instant::now();
        assert_eq!(sh("sleep 30 & echo done").output(Duration::from_secs(20)).await.unwrap(), b"done\n");
        assert!(before.elapsed() < Duration::from_secs(10));
    }

    #[tokio::test]
    async fn error_names_the_missing_program() {
        let error =
            Cmd::new(Path::new("/nonexistent/podman"), ["ps"]).output(Duration::from_secs(5)).await.unwrap_err();
        assert!(error.to_string().contains("/nonexistent/podman"), "{error}");
    }

    #[tokio::test]
    async fn output_beyond_the_cap_is_drained() {
        let length = OUTPUT_CAP + 100_000;
        let kept = sh(&format!("head -c {length} /dev/zero")).output(Duration::from_secs(20)).await.unwrap();
        assert_eq!(kept.len(), OUTPUT_CAP);
    }
}
