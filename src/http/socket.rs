//! The socket of a connection: closed when its client takes too little, and in such a way that the last answer arrives.

use std::io::{self, IoSlice};
use std::os::fd::AsRawFd;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use nix::libc;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio::runtime::Handle;
use tokio::time::Sleep;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::http::server::Place;

/// How long a client may take nothing while something is to be sent. A kernel opens a window that was closed when about
/// a sixteenth of its receive buffer is free, 400 KB of Linux's 6 MB: who reads as slowly as [`FLOOR`] or twice that
/// seems to take nothing for almost as long.
const PATIENCE: Duration = Duration::from_secs(60);

/// Bytes that a client has to take in a second, on average over [`PATIENCE`], half of what a modem of 1998 did: an
/// answer of 6 MiB takes 26 minutes at most, and who takes a byte at a time is closed after little more than a minute.
const FLOOR: f64 = 4096.0;

/// Time between two looks at what a client has taken.
const LOOK: Duration = Duration::from_secs(5);

/// Bytes that the kernel holds for a client and has not sent: more would be memory that no budget counts.
const UNSENT: u32 = 64 * 1024;

/// How long after the last answer what the client still sends is read and dropped, and how much: a socket that is closed
/// with something unread is reset, which may take the answer away before the client has read it.
const LINGER_TIME: Duration = Duration::from_secs(5);
const LINGER_BYTES: usize = 4 << 20;

nix::ioctl_read_bad!(unacknowledged, libc::TIOCOUTQ, libc::c_int);

/// A connection's socket.
pub struct Socket {
    /// There until it is dropped.
    stream: Option<TcpStream>,
    /// Bytes that the kernel has accepted.
    accepted: u64,
    patience: Patience,
    /// When to look next, while the client is waited for.
    look: Option<Pin<Box<Sleep>>>,
    /// Whether the client sends no more, or nothing can be sent to it.
    over: bool,
    ends: Ends,
}

/// What becomes of sockets at their end.
#[derive(Debug, Clone)]
pub struct Ends {
    /// Who waits for all of them.
    pub tracker: TaskTracker,
    /// Ends waiting for clients.
    pub closing: CancellationToken,
    /// Held until the socket is closed.
    pub place: Place,
}

/// How long a client may still be waited for: what it takes adds to it, waiting takes from it.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Patience {
    left: Duration,
    /// Since when it is waited for, and what it had taken then.
    waiting: Option<(Instant, u64)>,
}

impl Patience {
    /// Counts the time since the last look, and what was taken since; whether the client may be waited for any longer.
    fn look(&mut self, now: Instant, taken: u64) -> bool {
        if let Some((since, before)) = self.waiting.replace((now, taken)) {
            let earned = Duration::from_secs_f64(taken.saturating_sub(before) as f64 / FLOOR);
            self.left = (self.left + earned).min(PATIENCE).saturating_sub(now.saturating_duration_since(since));
        }
        !self.left.is_zero()
    }
}

impl Socket {
    /// Takes a connection over.
    pub fn new(stream: TcpStream, ends: Ends) -> Socket {
        // Answers are small, and the client waits for them.
        let _ = stream.set_nodelay(true);
        let _ = SockRef::from(&stream).set_tcp_notsent_lowat(UNSENT);
        let patience = Patience { left: PATIENCE, waiting: None };
        Socket { stream: Some(stream), accepted: 0, patience, look: None, over: false, ends }
    }

    /// Bytes that the client's kernel has taken.
    fn taken(&self) -> u64 {
        let mut queued = 0;
        if let Some(stream) = &self.stream {
            // SAFETY: the descriptor is open, and the kernel writes one int to where the pointer leads.
            let _ = unsafe { unacknowledged(stream.as_raw_fd(), &raw mut queued) };
        }
        self.accepted.saturating_sub(u64::try_from(queued).unwrap_or(0))
    }

    /// What comes of an attempt to write.
    fn after(&mut self, context: &mut Context, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        match written {
            Poll::Ready(result) => {
                match &result {
                    Ok(length) => self.accepted += *length as u64,
                    Err(_) => self.over = true,
                }
                if self.patience.waiting.is_some() {
                    let taken = self.taken();
                    self.patience.look(Instant::now(), taken);
                    self.patience.waiting = None;
                }
                Poll::Ready(result)
            }
            Poll::Pending => self.wait(context),
        }
    }

    /// Waits for a client that does not take what is written.
    fn wait(&mut self, context: &mut Context) -> Poll<io::Result<usize>> {
        let mut look = self.look.take().unwrap_or_else(|| Box::pin(tokio::time::sleep(LOOK)));
        if self.patience.waiting.is_none() {
            let taken = self.taken();
            self.patience.look(Instant::now(), taken);
            look.as_mut().reset(tokio::time::Instant::now() + LOOK);
        }
        while look.as_mut().poll(context).is_ready() {
            let taken = self.taken();
            if !self.patience.look(Instant::now(), taken) {
                tracing::debug!("a connection is closed: its client takes too little");
                self.over = true;
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
            look.as_mut().reset(tokio::time::Instant::now() + LOOK);
        }
        self.look = Some(look);
        Poll::Pending
    }

    fn stream(&mut self) -> io::Result<Pin<&mut TcpStream>> {
        self.stream.as_mut().map(Pin::new).ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = ready!(self.stream()?.poll_read(context, buffer));
        let length = buffer.filled().len() - before;
        let read = read.and_then(|()| self.ends.place.inbox.received(length));
        self.over |= read.is_err() || (length == 0 && buffer.remaining() > 0);
        Poll::Ready(read)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = self.stream()?.poll_write(context, bytes);
        self.after(context, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = self.stream()?.poll_write_vectored(context, bytes);
        self.after(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream()?.poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream()?.poll_shutdown(context)
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let Some(stream) = self.stream.take() else { return };
        // From now on the kernel alone waits for the client.
        let _ = SockRef::from(&stream).set_tcp_user_timeout(Some(PATIENCE));
        if !self.over && Handle::try_current().is_ok() {
            let Ends { tracker, closing, place } = self.ends.clone();
            tracker.spawn(async move {
                closing.run_until_cancelled(linger(stream)).await;
                drop(place);
            });
        }
    }
}

/// Says that nothing more comes, and reads until the client says so too.
async fn linger(mut stream: TcpStream) {
    let closing = async {
        stream.shutdown().await?;
        let mut dropped = 0;
        let mut buffer = vec![0; 16 * 1024];
        while dropped < LINGER_BYTES {
            match stream.read(&mut buffer).await? {
                0 => break,
                length => dropped += length,
            }
        }
        io::Result::Ok(())
    };
    // Whatever comes of it, the connection is closed.
    let _ = tokio::time::timeout(LINGER_TIME, closing).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: u64 = 60;

    /// Seconds until a client is given up that takes so many bytes each time so many seconds have passed.
    fn given_up(bytes: u64, pause: u64) -> Option<u64> {
        let start = Instant::now();
        let mut patience = Patience { left: PATIENCE, waiting: None };
        patience.look(start, 0);
        let looks = (1..2000).map(|n| n * LOOK.as_secs());
        looks.into_iter().find(|&at| !patience.look(start + Duration::from_secs(at), at / pause * bytes))
    }

    #[test]
    fn who_takes_nothing_is_given_up_after_its_time() {
        assert_eq!(given_up(0, 1), Some(MINUTE));
    }

    #[test]
    fn who_takes_a_little_each_time_is_not_given_up() {
        assert_eq!(given_up(60_000, 8), None);
        assert_eq!(given_up(400_000, 55), None, "as a window opens that was closed");
        assert_eq!(given_up(4096, 1), None);
    }

    #[test]
    fn who_trickles_is_given_up() {
        assert!(given_up(1, 1).is_some_and(|at| at <= MINUTE + 5));
        assert!(given_up(1000, 1).is_some_and(|at| at <= 2 * MINUTE));
    }

    #[test]
    fn time_in_which_there_was_nothing_to_send_does_not_count() {
        let start = Instant::now();
        let mut patience = Patience { left: PATIENCE, waiting: None };
        patience.look(start, 0);
        patience.waiting = None;
        assert!(patience.look(start + Duration::from_secs(600), 0));
        assert!(patience.look(start + Duration::from_secs(630), 0));
    }
}
