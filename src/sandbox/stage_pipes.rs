//! The pipes of a stage: what is typed goes in, output comes out in pieces.

use std::io::PipeReader;
use std::os::fd::OwnedFd;
use std::time::Duration;

use bytes::Bytes;
use nix::libc::PIPE_BUF;
use nix::sys::stat::{Mode, fchmod};
use rustix::buffer::spare_capacity;
use rustix::io::ioctl_fionbio;
use tokio::io::unix::{AsyncFd, AsyncFdReadyGuard};
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::unix::pipe;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout_at};

use crate::model::job::Streams;
use crate::model::output::Stream;

/// Size of one read in bytes: that of a pipe.
const CHUNK: usize = 64 * 1024;

/// Pieces of a stream that are reported as they come. Further ones are at least [`PIECE_TIME`] apart, or as large as they can
/// be: each is an event that is kept for whoever watches, and takes more memory than its content.
const PIECES_AT_ONCE: usize = 1000;

/// Time for which further pieces are gathered: too short for anybody to notice.
const PIECE_TIME: Duration = Duration::from_millis(1);

/// Most that gathering a piece may cost, in reads. After that the rest of its time is waited out, and the pipe holds what
/// comes. In [`PIECE_TIME`] that is a quarter of a CPU; a program needs a whole one to cause it.
const PIECE_COST: usize = 256;

/// What a wake-up for a read costs, in reads that find something: about 15 us to 0.5 us.
const WAKE_COST: usize = 16;

/// The three pipes of a stage, both ends.
pub(super) struct Pipes {
    /// For the program.
    pub(super) theirs: [OwnedFd; 3],
    pub(super) stdin: pipe::Sender,
    pub(super) stdout: AsyncFd<OwnedFd>,
    /// `None` where both streams go to stdout.
    pub(super) stderr: Option<AsyncFd<OwnedFd>>,
}

impl Pipes {
    pub(super) fn new(streams: Streams) -> std::io::Result<Pipes> {
        // std makes them close-on-exec and blocking, as programs expect theirs; ours are non-blocking.
        let (in_reader, in_writer) = std::io::pipe()?;
        let (out_reader, out_writer) = std::io::pipe()?;
        let (stderr, err_writer) = match streams {
            Streams::Merged => (None, out_writer.try_clone()?),
            Streams::Separate => {
                let (reader, writer) = std::io::pipe()?;
                (Some(readable(reader)?), writer)
            }
        };
        let theirs: [OwnedFd; 3] = [in_reader.into(), out_writer.into(), err_writer.into()];
        // The programs run as another user than the owner of the pipes, and are to be able to open /dev/stdin, /dev/stdout
        // and /dev/stderr.
        theirs.iter().try_for_each(|pipe| fchmod(pipe, Mode::from_bits_truncate(0o666)))?;
        Ok(Pipes {
            theirs,
            stdin: pipe::Sender::from_owned_fd(in_writer.into())?,
            stdout: readable(out_reader)?,
            stderr,
        })
    }
}

fn readable(pipe: PipeReader) -> std::io::Result<AsyncFd<OwnedFd>> {
    ioctl_fionbio(&pipe, true)?;
    // SAFETY: an OwnedFd is one and the same descriptor until it is dropped.
    unsafe { AsyncFd::register_with_interest(OwnedFd::from(pipe), Interest::READABLE) }.map_err(Into::into)
}

/// Our end of an output pipe, until it ends.
pub(super) struct Reader {
    stream: Stream,
    pipe: Option<AsyncFd<OwnedFd>>,
    /// The piece that is being gathered.
    buffer: Vec<u8>,
    /// What that has cost, in reads.
    cost: usize,
    /// Number of pieces before it.
    pieces: usize,
    /// When it is due.
    due: Instant,
}

impl Reader {
    pub(super) fn new(stream: Stream, pipe: Option<AsyncFd<OwnedFd>>) -> Reader {
        Reader { stream, pipe, buffer: Vec::new(), cost: 0, pieces: 0, due: Instant::now() }
    }

    /// Whether more may come.
    pub(super) fn open(&self) -> bool {
        self.pipe.is_some()
    }

    /// The next piece; `None` at the end and ever after. Safe to cancel.
    pub(super) async fn next(&mut self) -> Option<Vec<u8>> {
        loop {
            let is_due = self.pieces < PIECES_AT_ONCE || Instant::now() >= self.due;
            if !self.buffer.is_empty() && (is_due || !has_room(&self.buffer) || !self.open()) {
                (self.cost, self.pieces, self.due) = (0, self.pieces + 1, Instant::now() + PIECE_TIME);
                return Some(std::mem::take(&mut self.buffer));
            }
            let pipe = self.pipe.as_ref()?;
            let ready = match self.buffer.is_empty() {
                true => pipe.readable().await,
                false if self.cost >= PIECE_COST => {
                    sleep_until(self.due).await;
                    continue;
                }
                false => match timeout_at(self.due, pipe.readable()).await {
                    Ok(ready) => ready,
                    Err(_) => continue,
                },
            };
            match ready.and_then(|ready| gather(ready, &mut self.buffer, &mut self.cost)) {
                Ok(true) => {}
                Ok(false) => self.pipe = None,
                Err(error) => {
                    tracing::warn!(stream = ?self.stream, %error, "cannot read a pipe");
                    self.pipe = None;
                }
            }
        }
    }
}

/// Whether a whole packet fits. A pipe in packet mode returns one packet per read, and discards what does not fit.
fn has_room(buffer: &[u8]) -> bool {
    buffer.len() + PIPE_BUF <= CHUNK
}

/// Reads what a pipe holds, as far as there is room and it does not cost too much; false at its end.
fn gather(mut ready: AsyncFdReadyGuard<'_, OwnedFd>, buffer: &mut Vec<u8>, cost: &mut usize) -> std::io::Result<bool> {
    buffer.reserve_exact(CHUNK - buffer.len());
    // As long as nothing was read, waiting costs the piece nothing.
    *cost = if buffer.is_empty() { WAKE_COST } else { *cost + WAKE_COST };
    // Until it is empty: tokio's own pipe takes it for empty after any read that does not fill the buffer, and with a writer
    // of packets would wait after each of them.
    while has_room(buffer) && *cost < PIECE_COST {
        match rustix::io::read(ready.get_inner(), spare_capacity(buffer)) {
            Ok(0) => return Ok(false),
            Ok(_) => *cost += 1,
            Err(rustix::io::Errno::AGAIN) => {
                ready.clear_ready();
                break;
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(true)
}

/// Writes what is to be read on stdin, then closes it. A program that does not read is no error.
pub(super) async fn feed(mut stdin: pipe::Sender, first: Bytes, typing: Option<&mut mpsc::Receiver<Bytes>>) {
    if stdin.write_all(&first).await.is_err() {
        return;
    }
    let Some(typing) = typing else { return };
    while let Some(bytes) = typing.recv().await {
        if stdin.write_all(&bytes).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{PipeWriter, Write};

    use nix::fcntl::{FcntlArg, OFlag, fcntl};

    use super::*;

    fn pipe() -> (Reader, PipeWriter) {
        let (reader, writer) = std::io::pipe().unwrap();
        (Reader::new(Stream::Stdout, Some(readable(reader).unwrap())), writer)
    }

    async fn next(reader: &mut Reader) -> Option<Vec<u8>> {
        tokio::time::timeout(Duration::from_secs(60), reader.next()).await.unwrap()
    }

    #[tokio::test]
    async fn all_packets_in_a_pipe_become_one_piece() {
        let (mut reader, mut writer) = pipe();
        fcntl(&writer, FcntlArg::F_SETFL(OFlag::O_WRONLY | OFlag::O_DIRECT)).unwrap();
        for round in 0..PIECES_AT_ONCE + 10 {
            (0..10).for_each(|_| writer.write_all(b"x").unwrap());
            assert_eq!(next(&mut reader).await.unwrap(), b"xxxxxxxxxx", "{round}");
        }
        drop(writer);
        assert!(next(&mut reader).await.is_none());
        assert!(next(&mut reader).await.is_none());
    }

    #[tokio::test]
    async fn small_pieces_are_reported_one_by_one_and_later_gathered() {
        let (mut reader, mut writer) = pipe();
        let writes = 20_000;
        let mut read = 0;
        for _ in 0..PIECES_AT_ONCE {
            writer.write_all(b"x").unwrap();
            assert_eq!(next(&mut reader).await.unwrap(), b"x");
        }
        let started = Instant::now();
        let writing = std::thread::spawn(move || (0..writes).for_each(|_| writer.write_all(b"y").unwrap()));
        let mut pieces = 0;
        while let Some(piece) = next(&mut reader).await {
            read += piece.len();
            pieces += 1;
        }
        writing.join().unwrap();
        assert_eq!(read, writes);
        // Pieces of the largest size and the last one are not delayed.
        assert!(pieces <= started.elapsed().as_millis() + 3, "{pieces} in {:?}", started.elapsed());
    }

    #[tokio::test]
    async fn a_cancelled_read_loses_nothing() {
        let (mut reader, mut writer) = pipe();
        reader.pieces = PIECES_AT_ONCE;
        reader.due = Instant::now() + Duration::from_secs(1000);
        writer.write_all(b"kept").unwrap();
        assert!(tokio::time::timeout(Duration::from_millis(50), reader.next()).await.is_err());
        writer.write_all(b" all").unwrap();
        drop(writer);
        assert_eq!(next(&mut reader).await.unwrap(), b"kept all");
        assert!(next(&mut reader).await.is_none());
    }
}
