//! The log, and all other messages of this process on stderr.
//!
//! The reader of stderr may be slow or gone, or its disk full: none of that may block or end the server. So a thread
//! writes the lines, and those that it cannot write, or not in time, are dropped and counted. `tracing-appender` has
//! such a thread too, but it bounds lines and not bytes, does not count failed writes, and prints to stdout when it
//! ends.

use std::io::{self, ErrorKind, Write};
use std::os::fd::AsFd;
use std::panic::PanicHookInfo;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use clap::ValueEnum;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tracing_subscriber::EnvFilter;

use crate::host::signals;

/// Most bytes that wait to be written: several times the lines of a thousand requests at the level `debug`.
const MAX_PENDING: usize = 1 << 20;

/// How long the process waits, before it ends, for lines that are not written yet.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// The format of the log.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Format {
    /// A line for people.
    Text,
    /// A JSON object per line.
    Json,
}

/// The lines of this process for its one stderr.
static STDERR: Lines = Lines::new();
static PANICS: AtomicU64 = AtomicU64::new(0);

/// Lines on their way to the thread that writes them.
struct Lines {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// Lines that the thread has not taken yet.
    pending: Vec<u8>,
    /// How many bytes the thread has taken and is writing.
    in_flight: usize,
    /// Whether the thread is writing.
    busy: bool,
    /// Whether the last line was written only in part.
    partial: bool,
    /// How many lines were dropped, and how many of these the log has reported.
    dropped: u64,
    reported: u64,
}

/// Calls [`flush`] when it is dropped.
pub struct Flush;

impl Drop for Flush {
    fn drop(&mut self) {
        flush();
    }
}

/// Starts the log, which includes panics.
pub fn start(filter: EnvFilter, format: Format, colours: bool) {
    std::panic::set_hook(Box::new(panic_hook));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(|| Writer)
        .with_ansi(colours)
        .with_target(false)
        // tracing would print its own errors to stderr directly, which may fail.
        .log_internal_errors(false);
    match format {
        Format::Text => log.init(),
        Format::Json => log.json().flatten_event(true).with_span_list(false).init(),
    }
}

/// Starts the thread that writes. Before that, lines are only collected.
pub fn start_writer() -> io::Result<Flush> {
    let report = |lines, total| {
        tracing::warn!(lines, ever = total, "dropped log lines that could not be written in time");
    };
    std::thread::Builder::new().name("log".into()).spawn(move || {
        loop {
            STDERR.write_pending(UnlockedStderr, report);
        }
    })?;
    Ok(Flush)
}

/// Prints a message that is not a log line to stderr, in order with the log lines.
pub fn print(message: &str) {
    STDERR.push(format!("{message}\n").as_bytes());
}

/// Waits until all lines are written, at most for `FLUSH_TIMEOUT`.
pub fn flush() {
    STDERR.flush(FLUSH_TIMEOUT);
}

/// Number of lines dropped since the start.
pub fn dropped() -> u64 {
    STDERR.lock().dropped
}

/// Number of panics since the start.
pub fn panics() -> u64 {
    PANICS.load(Ordering::Relaxed)
}

/// Logs a panic. Its message may contain client data, so it is logged at the level `debug` only.
fn panic_hook(panic: &PanicHookInfo) {
    let place = panic.location().map(ToString::to_string).unwrap_or_default();
    PANICS.fetch_add(1, Ordering::Relaxed);
    tracing::error!(place, "a panic: this is a bug in coderunner; the log level debug shows its message");
    tracing::debug!(place, words = panic.payload_as_str(), "the panic");
    signals::on_panic();
}

impl Lines {
    const fn new() -> Lines {
        let state = State { pending: Vec::new(), in_flight: 0, busy: false, partial: false, dropped: 0, reported: 0 };
        Lines { state: Mutex::new(state), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds whole lines, or drops and counts them if there is no room.
    fn push(&self, lines: &[u8]) {
        let mut state = self.lock();
        if state.pending.len() + state.in_flight + lines.len() > MAX_PENDING {
            state.dropped += count_lines(lines);
            return;
        }
        state.pending.extend_from_slice(lines);
        self.changed.notify_all();
    }

    /// Waits for lines and writes them. Once a write succeeds after lines were dropped, calls `report` with the number
    /// of lines dropped since its last call and since the start.
    fn write_pending(&self, mut to: impl Write, report: impl Fn(u64, u64)) {
        let waits = |state: &mut State| state.pending.is_empty();
        let mut state = self.changed.wait_while(self.lock(), waits).unwrap_or_else(PoisonError::into_inner);
        let lines = std::mem::take(&mut state.pending);
        (state.in_flight, state.busy) = (lines.len(), true);
        let partial = state.partial;
        drop(state);
        // After a partial line, a line break keeps the next line from looking like the rest of it.
        let written = if partial && write_prefix(&mut to, b"\n") == 0 { 0 } else { write_prefix(&mut to, &lines) };
        let (done, lost) = lines.split_at(written);
        let mut state = self.lock();
        state.partial = done.last().map_or(partial, |last| *last != b'\n');
        state.in_flight = 0;
        state.dropped += count_lines(lost);
        let unreported = state.dropped - state.reported;
        if lost.is_empty() && unreported > 0 {
            let total = state.dropped;
            state.reported = total;
            drop(state);
            report(unreported, total);
            state = self.lock();
        }
        state.busy = false;
        self.changed.notify_all();
    }

    fn flush(&self, deadline: Duration) {
        let unwritten = |state: &mut State| state.busy || !state.pending.is_empty();
        drop(self.changed.wait_timeout_while(self.lock(), deadline, unwritten));
    }
}

/// The number of lines; a partial line counts as one.
fn count_lines(lines: &[u8]) -> u64 {
    let ends = lines.iter().filter(|byte| **byte == b'\n').count();
    (ends + usize::from(lines.last().is_some_and(|last| *last != b'\n'))) as u64
}

/// Writes until an error, and returns the number of bytes written.
fn write_prefix(to: &mut impl Write, lines: &[u8]) -> usize {
    let mut written = 0;
    while let Some(rest) = lines.get(written..).filter(|rest| !rest.is_empty()) {
        match to.write(rest) {
            Ok(0) => break,
            Ok(length) => written += length,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    written
}

/// Adds log lines to `STDERR`. `tracing` writes each event by one call.
struct Writer;

impl Write for Writer {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        STDERR.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// stderr without the standard library's lock, which would be held as long as a write takes.
struct UnlockedStderr;

impl Write for UnlockedStderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let stderr = io::stderr();
        loop {
            match nix::unistd::write(&stderr, bytes) {
                // Another process that shares stderr with us has made it non-blocking.
                Err(nix::Error::EAGAIN) => {
                    let mut ready = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
                    poll(&mut ready, PollTimeout::NONE)?;
                }
                written => return Ok(written?),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// A disk with a limited number of free bytes.
    struct Disk {
        room: usize,
        has: Vec<u8>,
    }

    impl Write for &mut Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let length = bytes.len().min(self.room);
            if length == 0 {
                return Err(ErrorKind::StorageFull.into());
            }
            self.room -= length;
            self.has.extend_from_slice(&bytes[..length]);
            Ok(length)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn unwritable_lines_are_counted_and_reported_later() {
        let (lines, reported) = (Lines::new(), Cell::new(None));
        let mut disk = Disk { room: 10, has: Vec::new() };
        let mut write = |line: &str, more: usize| {
            disk.room += more;
            lines.push(line.as_bytes());
            lines.write_pending(&mut disk, |unreported, total| reported.set(Some((unreported, total))));
            reported.take()
        };
        assert_eq!(write("one\n", 0), None);
        assert_eq!(write("long\nand longer\n", 0), None, "it does not work yet");
        assert_eq!(write("lost\n", 0), None);
        assert_eq!(write("two\n", 100), Some((2, 2)));
        assert_eq!(write("three\n", 0), None);
        assert_eq!(String::from_utf8(disk.has).unwrap(), "one\nlong\na\ntwo\nthree\n");
    }

    #[test]
    fn pending_lines_are_bounded_and_never_cut() {
        let (lines, reported) = (Lines::new(), Cell::new(None));
        let line = [&[b'x'; 999][..], b"\n"].concat();
        for _ in 0..2 * MAX_PENDING / line.len() {
            lines.push(&line);
        }
        let dropped = lines.lock().dropped;
        assert!(dropped >= 1000, "{dropped}");
        let mut disk = Disk { room: usize::MAX, has: Vec::new() };
        lines.write_pending(&mut disk, |unreported, total| reported.set(Some((unreported, total))));
        assert_eq!(reported.take(), Some((dropped, dropped)));
        assert!(disk.has.len() <= MAX_PENDING && disk.has.len() > MAX_PENDING - line.len());
        assert!(disk.has.chunks(line.len()).all(|one| one == line));
        lines.push(&vec![b'y'; MAX_PENDING + 1]);
        assert_eq!(lines.lock().dropped, dropped + 1, "one that is longer than all that may wait");
        lines.flush(Duration::from_secs(60));
    }
}
