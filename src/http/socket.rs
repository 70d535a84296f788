//! The socket of a connection. Closes the connection when its client reads too slowly, and closes it in such a way that
//! the client still receives the last response.

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

use crate::http::server::ConnectionPermit;

/// How long a client may acknowledge nothing while data waits to be sent. A kernel reopens a closed receive window when
/// about a sixteenth of the receive buffer is free, 400 KB of Linux's 6 MB. A client that reads at [`MIN_RATE`] or
/// twice that therefore seems to read nothing for almost this long.
const STALL_TIMEOUT: Duration = Duration::from_secs(60);

/// Bytes per second that a client has to read on average over [`STALL_TIMEOUT`], about half the speed of a 56k modem: a
/// response of 6 MiB takes at most 26 minutes, and a client that reads single bytes is disconnected after little more
/// than a minute.
const MIN_RATE: f64 = 4096.0;

/// Time between two checks of the bytes that a client has acknowledged.
const CHECK_INTERVAL: Duration = Duration::from_secs(5);

/// Most unsent bytes that the kernel holds for a client: no budget counts this memory.
const MAX_UNSENT: u32 = 64 * 1024;

/// How long, and how many bytes, the server reads and discards after the last response. The kernel resets a connection
/// that is closed with unread data, and the client may then lose the response.
const LINGER_TIMEOUT: Duration = Duration::from_secs(5);
const LINGER_BYTES: usize = 4 << 20;

nix::ioctl_read_bad!(unacknowledged, libc::TIOCOUTQ, libc::c_int);

/// A connection's socket.
pub struct Socket {
    /// `None` only while the socket is dropped.
    stream: Option<TcpStream>,
    /// Bytes written to the kernel.
    accepted: u64,
    stall_timer: StallTimer,
    /// Timer of the next check, while a write waits for the client.
    next_check: Option<Pin<Box<Sleep>>>,
    /// Whether lingering is useless: the client has closed its side, or the connection failed.
    skip_linger: bool,
    close_context: CloseContext,
}

/// What a socket needs when it is closed.
#[derive(Debug, Clone)]
pub struct CloseContext {
    /// Tracks the tasks of closing sockets.
    pub tracker: TaskTracker,
    /// Stops lingering.
    pub stop_lingering: CancellationToken,
    /// Held until the socket is closed.
    pub permit: ConnectionPermit,
}

/// How long the server still waits for a client that reads slowly. Waiting uses the time up; acknowledged bytes restore
/// it.
#[derive(Debug, Clone, Copy, PartialEq)]
struct StallTimer {
    left: Duration,
    /// Time of the last check, and the bytes acknowledged by then; `None` while no write waits.
    waiting: Option<(Instant, u64)>,
}

impl StallTimer {
    /// Counts the time and the acknowledged bytes since the last check. Returns whether to wait any longer.
    fn check(&mut self, now: Instant, acknowledged: u64) -> bool {
        if let Some((since, before)) = self.waiting.replace((now, acknowledged)) {
            let earned = Duration::from_secs_f64(acknowledged.saturating_sub(before) as f64 / MIN_RATE);
            self.left = (self.left + earned).min(STALL_TIMEOUT).saturating_sub(now.saturating_duration_since(since));
        }
        !self.left.is_zero()
    }
}

impl Socket {
    /// Takes over a connection.
    pub fn new(stream: TcpStream, close_context: CloseContext) -> Socket {
        // Responses are small, and the client waits for them.
        let _ = stream.set_nodelay(true);
        let _ = SockRef::from(&stream).set_tcp_notsent_lowat(MAX_UNSENT);
        let stall_timer = StallTimer { left: STALL_TIMEOUT, waiting: None };
        Socket { stream: Some(stream), accepted: 0, stall_timer, next_check: None, skip_linger: false, close_context }
    }

    /// Bytes that the client's kernel has acknowledged.
    fn acknowledged(&self) -> u64 {
        let mut queued = 0;
        if let Some(stream) = &self.stream {
            // SAFETY: the descriptor is open, and the kernel writes one int to where the pointer leads.
            let _ = unsafe { unacknowledged(stream.as_raw_fd(), &raw mut queued) };
        }
        self.accepted.saturating_sub(u64::try_from(queued).unwrap_or(0))
    }

    /// Handles the result of an attempt to write.
    fn after_write(&mut self, context: &mut Context, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        match written {
            Poll::Ready(result) => {
                match &result {
                    Ok(length) => self.accepted += *length as u64,
                    Err(_) => self.skip_linger = true,
                }
                if self.stall_timer.waiting.is_some() {
                    let acknowledged = self.acknowledged();
                    self.stall_timer.check(Instant::now(), acknowledged);
                    self.stall_timer.waiting = None;
                }
                Poll::Ready(result)
            }
            Poll::Pending => self.wait_writable(context),
        }
    }

    /// Waits until the client reads; an error if it reads too slowly.
    fn wait_writable(&mut self, context: &mut Context) -> Poll<io::Result<usize>> {
        let mut timer = self.next_check.take().unwrap_or_else(|| Box::pin(tokio::time::sleep(CHECK_INTERVAL)));
        if self.stall_timer.waiting.is_none() {
            let acknowledged = self.acknowledged();
            self.stall_timer.check(Instant::now(), acknowledged);
            timer.as_mut().reset(tokio::time::Instant::now() + CHECK_INTERVAL);
        }
        while timer.as_mut().poll(context).is_ready() {
            let acknowledged = self.acknowledged();
            if !self.stall_timer.check(Instant::now(), acknowledged) {
                tracing::debug!("connection closed: its client reads too slowly");
                self.skip_linger = true;
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
            timer.as_mut().reset(tokio::time::Instant::now() + CHECK_INTERVAL);
        }
        self.next_check = Some(timer);
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
        let read = read.and_then(|()| self.close_context.permit.inbox.received(length));
        self.skip_linger |= read.is_err() || (length == 0 && buffer.remaining() > 0);
        Poll::Ready(read)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = self.stream()?.poll_write(context, bytes);
        self.after_write(context, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = self.stream()?.poll_write_vectored(context, bytes);
        self.after_write(context, written)
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
        // The server no longer watches the client, so the kernel has to.
        let _ = SockRef::from(&stream).set_tcp_user_timeout(Some(STALL_TIMEOUT));
        if !self.skip_linger && Handle::try_current().is_ok() {
            let CloseContext { tracker, stop_lingering, permit } = self.close_context.clone();
            tracker.spawn(async move {
                stop_lingering.run_until_cancelled(linger(stream)).await;
                drop(permit);
            });
        }
    }
}

/// Closes the sending side, then reads until the client closes its side.
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
    // The connection is closed in any case.
    let _ = tokio::time::timeout(LINGER_TIMEOUT, closing).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: u64 = 60;

    /// Seconds until the server closes the connection of a client that reads `bytes` every `pause` seconds.
    fn closed_after(bytes: u64, pause: u64) -> Option<u64> {
        let start = Instant::now();
        let mut stall_timer = StallTimer { left: STALL_TIMEOUT, waiting: None };
        stall_timer.check(start, 0);
        let checks = (1..2000).map(|n| n * CHECK_INTERVAL.as_secs());
        checks.into_iter().find(|&at| !stall_timer.check(start + Duration::from_secs(at), at / pause * bytes))
    }

    #[test]
    fn clients_that_read_nothing_are_disconnected_after_a_minute() {
        assert_eq!(closed_after(0, 1), Some(MINUTE));
    }

    #[test]
    fn slow_but_steady_clients_are_not_disconnected() {
        assert_eq!(closed_after(60_000, 8), None);
        assert_eq!(closed_after(400_000, 55), None, "as when a closed receive window reopens");
        assert_eq!(closed_after(4096, 1), None);
    }

    #[test]
    fn clients_that_read_too_slowly_are_disconnected() {
        assert!(closed_after(1, 1).is_some_and(|at| at <= MINUTE + 5));
        assert!(closed_after(1000, 1).is_some_and(|at| at <= 2 * MINUTE));
    }

    #[test]
    fn idle_time_does_not_count_against_a_client() {
        let start = Instant::now();
        let mut stall_timer = StallTimer { left: STALL_TIMEOUT, waiting: None };
        stall_timer.check(start, 0);
        stall_timer.waiting = None;
        assert!(stall_timer.check(start + Duration::from_secs(600), 0));
        assert!(stall_timer.check(start + Duration::from_secs(630), 0));
    }
}
