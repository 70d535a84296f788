//! The pipes of a stage: writes its input, and reads its output in pieces.

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

/// Largest piece in bytes: the size of a pipe.
const CHUNK: usize = 64 * 1024;

/// How many pieces of a stream are reported without delay. Later pieces are at least [`PIECE_TIME`] apart or of the
/// largest size: each piece is an event in memory, which takes more space than its content.
const PIECES_AT_ONCE: usize = 1000;

/// How long output is gathered for a later piece: too short for anybody to notice.
const PIECE_TIME: Duration = Duration::from_millis(1);

/// Most that gathering one piece may cost, in units of a read. After that the server stops reading until the piece is
/// due, and the pipe holds the output. Within [`PIECE_TIME`] the limit is a quarter of a CPU; a program needs a whole
/// CPU to cause it.
const PIECE_COST: usize = 256;

/// Cost of a wake-up, in units of a read that returns data: about 15 us against 0.5 us.
const WAKE_COST: usize = 16;

/// Both ends of the three pipes of a stage.
pub(super) struct Pipes {
    /// The program's ends: stdin, stdout, stderr.
    pub(super) program_ends: [OwnedFd; 3],
    pub(super) stdin: pipe::Sender,
    pub(super) stdout: AsyncFd<OwnedFd>,
    /// `None` if stderr is merged into stdout.
    pub(super) stderr: Option<AsyncFd<OwnedFd>>,
}

impl Pipes {
    pub(super) fn new(streams: Streams) -> std::io::Result<Pipes> {
        // std creates pipes that are close-on-exec and blocking. Programs expect blocking ends; the server's ends
        // become non-blocking.
        let (in_reader, in_writer) = std::io::pipe()?;
        let (out_reader, out_writer) = std::io::pipe()?;
        let (stderr, err_writer) = match streams {
            Streams::Merged => (None, out_writer.try_clone()?),
            Streams::Separate => {
                let (reader, writer) = std::io::pipe()?;
                (Some(readable(reader)?), writer)
            }
        };
        let program_ends: [OwnedFd; 3] = [in_reader.into(), out_writer.into(), err_writer.into()];
        // Programs do not run as the owner of the pipes, and must be able to open /dev/stdin, /dev/stdout and
        // /dev/stderr.
        program_ends.iter().try_for_each(|pipe| fchmod(pipe, Mode::from_bits_truncate(0o666)))?;
        Ok(Pipes {
            program_ends,
            stdin: pipe::Sender::from_owned_fd(in_writer.into())?,
            stdout: readable(out_reader)?,
            stderr,
        })
    }
}

fn readable(pipe: PipeReader) -> std::io::Result<AsyncFd<OwnedFd>> {
    ioctl_fionbio(&pipe, true)?;
    // SAFETY: an OwnedFd refers to the same descriptor until it is dropped.
    unsafe { AsyncFd::register_with_interest(OwnedFd::from(pipe), Interest::READABLE) }.map_err(Into::into)
}

/// Reads an output pipe to its end.
pub(super) struct Reader {
    stream: Stream,
    /// `None` at the end of the pipe.
    pipe: Option<AsyncFd<OwnedFd>>,
    /// The piece that is being gathered.
    buffer: Vec<u8>,
    /// The cost of gathering it so far, in units of a read.
    cost: usize,
    /// Number of earlier pieces.
    pieces: usize,
    /// When the piece is due.
    due: Instant,
}

impl Reader {
    pub(super) fn new(stream: Stream, pipe: Option<AsyncFd<OwnedFd>>) -> Reader {
        Reader { stream, pipe, buffer: Vec::new(), cost: 0, pieces: 0, due: Instant::now() }
    }

    /// Whether the pipe has not ended yet.
    pub(super) fn is_open(&self) -> bool {
        self.pipe.is_some()
    }

    /// The next piece; `None` at the end of the pipe, also when called again. Safe to cancel.
    pub(super) async fn next(&mut self) -> Option<Vec<u8>> {
        loop {
            let is_due = self.pieces < PIECES_AT_ONCE || Instant::now() >= self.due;
            if !self.buffer.is_empty() && (is_due || !has_room(&self.buffer) || !self.is_open()) {
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

/// Whether the buffer has room for a whole packet. A read from a pipe in packet mode returns one packet, and discards
/// the part that does not fit.
fn has_room(buffer: &[u8]) -> bool {
    buffer.len() + PIPE_BUF <= CHUNK
}

/// Reads from a pipe until it is empty, the buffer is full or the cost limit is reached. Returns false at the end of
/// the pipe.
fn gather(mut ready: AsyncFdReadyGuard<'_, OwnedFd>, buffer: &mut Vec<u8>, cost: &mut usize) -> std::io::Result<bool> {
    buffer.reserve_exact(CHUNK - buffer.len());
    // Wake-ups before the first data of a piece do not add up.
    *cost = if buffer.is_empty() { WAKE_COST } else { *cost + WAKE_COST };
    // Reads until EAGAIN. tokio's pipe type takes a pipe for empty after any read that does not fill the buffer: in
    // packet mode it would wait after each packet.
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

/// Writes the job's input and then the live input to stdin, and closes it. A program that does not read is no error.
pub(super) async fn write_stdin(
    mut stdin: pipe::Sender,
    job_input: Bytes,
    live_input: Option<&mut mpsc::Receiver<Bytes>>,
) {
    if stdin.write_all(&job_input).await.is_err() {
        return;
    }
    let Some(live_input) = live_input else { return };
    while let Some(bytes) = live_input.recv().await {
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
