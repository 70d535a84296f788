//! The log, and whatever else this process says of itself on stderr.
//!
//! Who reads stderr may be slow or gone, and a disk behind it full: none of that may stop, hold up or end the server. So
//! lines are handed to a thread, and those that it cannot write, or not in time, are dropped and counted.
//! `tracing-appender` has such a thread too, but it bounds lines and not bytes, does not count what fails to be written,
//! and prints to stdout when it ends.

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

/// Most bytes that wait to be written: what a thousand requests say at the level `debug`, several times.
const MOST: usize = 1 << 20;

/// How long the end of the process waits for what is not written yet.
const LAST_TIME: Duration = Duration::from_secs(1);

/// How the log is written.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Format {
    /// A line for people.
    Text,
    /// A JSON object per line.
    Json,
}

/// The process has one stderr.
static STDERR: Lines = Lines::new();
static PANICS: AtomicU64 = AtomicU64::new(0);

/// Lines on their way to the thread that writes them.
struct Lines {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    waiting: Vec<u8>,
    /// How many bytes the thread has taken to write them.
    taken: usize,
    /// Whether the thread is at work.
    busy: bool,
    /// Whether the last line was written to a part.
    torn: bool,
    /// How many lines were dropped, and how many of them the log has told of.
    dropped: u64,
    told: u64,
}

/// Waits at its end, a while, until all is written.
pub struct Flush;

impl Drop for Flush {
    fn drop(&mut self) {
        flush();
    }
}

/// Starts the log: what passes the filter is written until the process ends. Panics are part of it.
pub fn start(filter: EnvFilter, format: Format, colours: bool) {
    std::panic::set_hook(Box::new(panicked));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(|| Writer)
        .with_ansi(colours)
        .with_target(false)
        // These would be printed, which may fail.
        .log_internal_errors(false);
    match format {
        Format::Text => log.init(),
        Format::Json => log.json().flatten_event(true).with_span_list(false).init(),
    }
}

/// Starts the thread that writes. Nothing is written before.
pub fn start_writing() -> io::Result<Flush> {
    let tell = |lines, ever| {
        tracing::warn!(lines, ever, "log lines were dropped here: they could not be written in time");
    };
    std::thread::Builder::new().name("log".into()).spawn(move || {
        loop {
            STDERR.write_some(Unlocked, tell);
        }
    })?;
    Ok(Flush)
}

/// Says something that is no line of the log, in order with those that are.
pub fn say(words: &str) {
    STDERR.push(format!("{words}\n").as_bytes());
}

/// Waits, a while, until all that was said is written.
pub fn flush() {
    STDERR.flush(LAST_TIME);
}

/// How many lines were dropped since the start.
pub fn dropped() -> u64 {
    STDERR.lock().dropped
}

/// How often anything panicked since the start.
pub fn panics() -> u64 {
    PANICS.load(Ordering::Relaxed)
}

/// A panic is a line of the log. What it says may be a part of what a client sent.
fn panicked(panic: &PanicHookInfo) {
    let place = panic.location().map(ToString::to_string).unwrap_or_default();
    PANICS.fetch_add(1, Ordering::Relaxed);
    tracing::error!(place, "a panic: this is a mistake in coderunner; the level debug has its words");
    tracing::debug!(place, words = panic.payload_as_str(), "the panic");
    signals::panicked();
}

impl Lines {
    const fn new() -> Lines {
        let state = State { waiting: Vec::new(), taken: 0, busy: false, torn: false, dropped: 0, told: 0 };
        Lines { state: Mutex::new(state), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes whole lines, if there is room for them.
    fn push(&self, lines: &[u8]) {
        let mut state = self.lock();
        if state.waiting.len() + state.taken + lines.len() > MOST {
            state.dropped += count(lines);
            return;
        }
        state.waiting.extend_from_slice(lines);
        self.changed.notify_all();
    }

    /// Waits for lines and writes them. When that works again, `tell` hears how many were dropped since it last heard,
    /// and how many ever.
    fn write_some(&self, mut to: impl Write, tell: impl Fn(u64, u64)) {
        let waits = |state: &mut State| state.waiting.is_empty();
        let mut state = self.changed.wait_while(self.lock(), waits).unwrap_or_else(PoisonError::into_inner);
        let lines = std::mem::take(&mut state.waiting);
        (state.taken, state.busy) = (lines.len(), true);
        let torn = state.torn;
        drop(state);
        // What comes after a part of a line is not to be taken for the rest of it.
        let written = if torn && write_all(&mut to, b"\n") == 0 { 0 } else { write_all(&mut to, &lines) };
        let (done, lost) = lines.split_at(written);
        let mut state = self.lock();
        state.torn = done.last().map_or(torn, |last| *last != b'\n');
        state.taken = 0;
        state.dropped += count(lost);
        let untold = state.dropped - state.told;
        if lost.is_empty() && untold > 0 {
            let ever = state.dropped;
            state.told = ever;
            drop(state);
            tell(untold, ever);
            state = self.lock();
        }
        state.busy = false;
        self.changed.notify_all();
    }

    fn flush(&self, deadline: Duration) {
        let unwritten = |state: &mut State| state.busy || !state.waiting.is_empty();
        drop(self.changed.wait_timeout_while(self.lock(), deadline, unwritten));
    }
}

/// How many lines these are; half of one is one.
fn count(lines: &[u8]) -> u64 {
    let ends = lines.iter().filter(|byte| **byte == b'\n').count();
    (ends + usize::from(lines.last().is_some_and(|last| *last != b'\n'))) as u64
}

/// Writes what can be written, and tells how much that was.
fn write_all(to: &mut impl Write, lines: &[u8]) -> usize {
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

/// Hands lines over; each event of the log is written at once.
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

/// stderr without the lock of the standard library's: it would be held for as long as a write may take.
struct Unlocked;

impl Write for Unlocked {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let stderr = io::stderr();
        loop {
            match nix::unistd::write(&stderr, bytes) {
                // Whoever we share it with has made it so.
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

    /// A disk with so much room.
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
    fn lines_that_a_full_disk_does_not_take_are_counted_and_told_of_once_it_does() {
        let (lines, told) = (Lines::new(), Cell::new(None));
        let mut disk = Disk { room: 10, has: Vec::new() };
        let mut write = |line: &str, more: usize| {
            disk.room += more;
            lines.push(line.as_bytes());
            lines.write_some(&mut disk, |untold, ever| told.set(Some((untold, ever))));
            told.take()
        };
        assert_eq!(write("one\n", 0), None);
        assert_eq!(write("long\nand longer\n", 0), None, "it does not work yet");
        assert_eq!(write("lost\n", 0), None);
        assert_eq!(write("two\n", 100), Some((2, 2)));
        assert_eq!(write("three\n", 0), None);
        assert_eq!(String::from_utf8(disk.has).unwrap(), "one\nlong\na\ntwo\nthree\n");
    }

    #[test]
    fn lines_wait_within_a_bound_of_bytes_and_none_is_cut() {
        let (lines, told) = (Lines::new(), Cell::new(None));
        let line = [&[b'x'; 999][..], b"\n"].concat();
        for _ in 0..2 * MOST / line.len() {
            lines.push(&line);
        }
        let dropped = lines.lock().dropped;
        assert!(dropped >= 1000, "{dropped}");
        let mut disk = Disk { room: usize::MAX, has: Vec::new() };
        lines.write_some(&mut disk, |untold, ever| told.set(Some((untold, ever))));
        assert_eq!(told.take(), Some((dropped, dropped)));
        assert!(disk.has.len() <= MOST && disk.has.len() > MOST - line.len());
        assert!(disk.has.chunks(line.len()).all(|one| one == line));
        lines.push(&vec![b'y'; MOST + 1]);
        assert_eq!(lines.lock().dropped, dropped + 1, "one that is longer than all that may wait");
        lines.flush(Duration::from_secs(60));
    }
}
