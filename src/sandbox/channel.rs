//! One end of a message channel: between the server and an init, or between the server and the agent.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixDatagram as StdSocket;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use serde::{Serialize, de::DeserializeOwned};
use tokio::io::Interest;
use tokio::net::UnixDatagram;

use crate::sandbox::protocol;

/// Why a message was not sent or received.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The peer has closed its end.
    #[error("its channel is closed")]
    Closed,
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        /// The operation that failed.
        what: &'static str,
        /// The kernel's error.
        source: std::io::Error,
    },
}

impl ChannelError {
    fn io(what: &'static str) -> impl FnOnce(std::io::Error) -> ChannelError {
        move |source| ChannelError::Io { what, source }
    }
}

/// A `SOCK_SEQPACKET` socket. tokio has no type for these; its datagram socket can wait for one just as well.
#[derive(Debug)]
pub(crate) struct Channel(UnixDatagram);

impl Channel {
    /// Creates a channel: the server's end, and the descriptor to pass to the child.
    pub fn pair() -> Result<(Channel, OwnedFd), ChannelError> {
        let make = || -> std::io::Result<(Channel, OwnedFd)> {
            let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
            // Only the server's end is non-blocking: init blocks while it waits for messages.
            Ok((Channel::from_fd(ours)?, theirs))
        };
        make().map_err(ChannelError::io("cannot make a channel"))
    }

    /// Whether the peer has closed its end.
    pub fn is_closed(&self) -> bool {
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::empty())];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// Whether most of the socket's buffer is free: only then does the kernel report it as writable.
    pub fn has_room(&self) -> bool {
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLOUT)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// The channel of this descriptor, which becomes non-blocking.
    pub fn from_fd(fd: OwnedFd) -> std::io::Result<Channel> {
        let socket = StdSocket::from(fd);
        socket.set_nonblocking(true)?;
        Ok(Channel(UnixDatagram::from_std(socket)?))
    }

    /// Sends without waiting: the socket's buffer always has room for a message or two.
    pub fn send(&self, message: &impl Serialize, fds: &[BorrowedFd<'_>]) -> Result<(), ChannelError> {
        protocol::send(self.0.as_fd(), message, fds).map_err(|error| match error.kind() {
            // ECONNRESET if the peer closed its end with unread messages.
            std::io::ErrorKind::BrokenPipe | std::io::ErrorKind::ConnectionReset => ChannelError::Closed,
            _ => ChannelError::Io { what: "cannot send on a channel", source: error },
        })
    }

    /// The next message; `None` when the peer has closed its end. Safe to cancel.
    pub async fn receive<T: DeserializeOwned>(&self) -> Result<Option<T>, ChannelError> {
        Ok(self.receive_with_fds().await?.map(|(message, _)| message))
    }

    /// Like [`Channel::receive`], with the descriptors that came with the message.
    pub async fn receive_with_fds<T: DeserializeOwned>(&self) -> Result<Option<(T, Vec<OwnedFd>)>, ChannelError> {
        match self.0.async_io(Interest::READABLE, || protocol::receive(self.0.as_fd())).await {
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => Ok(None),
            received => received.map_err(ChannelError::io("cannot receive on a channel")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::{MAX_MESSAGE, ToInit};

    #[tokio::test]
    async fn optional_messages_leave_room_for_the_largest_message() {
        let (channel, _init) = Channel::pair().unwrap();
        let mut signals = 0;
        while channel.has_room() {
            channel.send(&ToInit::Signal(15), &[]).unwrap();
            signals += 1;
        }
        assert!((8..1000).contains(&signals), "{signals}");
        let message = ToInit::Prepare {
            uid: 1,
            user: String::new(),
            own_cgroup: true,
            files: vec!["x".repeat(MAX_MESSAGE - 80)],
        };
        channel.send(&ToInit::Kill, &[]).unwrap();
        channel.send(&message, &[]).unwrap();
    }

    #[tokio::test]
    async fn send_reports_closed_if_init_exits_with_unread_messages() {
        let (channel, init) = Channel::pair().unwrap();
        channel.send(&ToInit::Signal(15), &[]).unwrap();
        drop(init);
        for _ in 0..2 {
            assert!(matches!(channel.send(&ToInit::Kill, &[]), Err(ChannelError::Closed)));
        }
    }
}
