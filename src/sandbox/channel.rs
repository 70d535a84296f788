//! The server's end of the channel to init.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixDatagram as StdSocket;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use tokio::io::Interest;
use tokio::net::UnixDatagram;

use super::SandboxError;
use super::protocol::{self, FromInit, ToInit};

/// tokio has no seqpacket socket; its datagram socket waits for one just as well.
#[derive(Debug)]
pub(super) struct Channel(UnixDatagram);

impl Channel {
    /// Our end, and the one to pass to init.
    pub fn pair() -> Result<(Channel, OwnedFd), SandboxError> {
        let make = || -> std::io::Result<(Channel, OwnedFd)> {
            let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
            // Only ours: init waits for its messages.
            let ours = StdSocket::from(ours);
            ours.set_nonblocking(true)?;
            Ok((Channel(UnixDatagram::from_std(ours)?), theirs))
        };
        make().map_err(SandboxError::io("cannot make a channel"))
    }

    /// Whether init has gone.
    pub fn is_closed(&self) -> bool {
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::empty())];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// Sends without waiting: a message or two always fit into the socket's buffer.
    pub fn send(&self, message: &ToInit, fds: &[BorrowedFd<'_>]) -> Result<(), SandboxError> {
        protocol::send(self.0.as_fd(), message, fds).map_err(|error| match error.kind() {
            std::io::ErrorKind::BrokenPipe => SandboxError::Gone("its channel is closed".into()),
            _ => SandboxError::Io { what: "cannot speak to init", source: error },
        })
    }

    /// The next message; `None` when init has gone. Safe to cancel.
    pub async fn receive(&self) -> Result<Option<FromInit>, SandboxError> {
        let message = self.0.async_io(Interest::READABLE, || protocol::receive(self.0.as_fd())).await;
        match message {
            Ok(message) => Ok(message.map(|(message, _)| message)),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => Ok(None),
            Err(source) => Err(SandboxError::Io { what: "cannot hear init", source }),
        }
    }
}
