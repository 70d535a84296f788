//! An end of a channel: to an init, or between the server and the agent.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixDatagram as StdSocket;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use serde::{Serialize, de::DeserializeOwned};
use tokio::io::Interest;
use tokio::net::UnixDatagram;

use crate::sandbox::protocol;

/// A message did not get through.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The other side has gone.
    #[error("its channel is closed")]
    Closed,
    /// The kernel refused.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        source: std::io::Error,
    },
}

impl ChannelError {
    fn io(what: &'static str) -> impl FnOnce(std::io::Error) -> ChannelError {
        move |source| ChannelError::Io { what, source }
    }
}

/// tokio has no seqpacket socket; its datagram socket waits for one just as well.
#[derive(Debug)]
pub(crate) struct Channel(UnixDatagram);

impl Channel {
    /// Our end, and the one to pass to init.
    pub fn pair() -> Result<(Channel, OwnedFd), ChannelError> {
        let make = || -> std::io::Result<(Channel, OwnedFd)> {
            let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
            // Only ours: init waits for its messages.
            Ok((Channel::from_fd(ours)?, theirs))
        };
        make().map_err(ChannelError::io("cannot make a channel"))
    }

    /// Whether init has gone.
    pub fn is_closed(&self) -> bool {
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::empty())];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// Whether most of the socket's buffer is free: that is when the kernel calls it writable.
    pub fn has_room(&self) -> bool {
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLOUT)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// The channel that a child finds at this descriptor.
    pub fn from_fd(fd: OwnedFd) -> std::io::Result<Channel> {
        let socket = StdSocket::from(fd);
        socket.set_nonblocking(true)?;
        Ok(Channel(UnixDatagram::from_std(socket)?))
    }

    /// Sends without waiting: a message or two always fit into the socket's buffer.
    pub fn send(&self, message: &impl Serialize, fds: &[BorrowedFd<'_>]) -> Result<(), ChannelError> {
        protocol::send(self.0.as_fd(), message, fds).map_err(|error| match error.kind() {
            // The latter where something was left unread.
            std::io::ErrorKind::BrokenPipe | std::io::ErrorKind::ConnectionReset => ChannelError::Closed,
            _ => ChannelError::Io { what: "cannot send on a channel", source: error },
        })
    }

    /// The next message; `None` when the other side has gone. Safe to cancel.
    pub async fn receive<T: DeserializeOwned>(&self) -> Result<Option<T>, ChannelError> {
        Ok(self.receive_with_fds().await?.map(|(message, _)| message))
    }

    /// The next message and the descriptors beside it.
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
    async fn what_is_sent_only_where_there_is_room_leaves_room_for_the_largest_message() {
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
    async fn who_leaves_without_having_read_all_is_gone() {
        let (channel, init) = Channel::pair().unwrap();
        channel.send(&ToInit::Signal(15), &[]).unwrap();
        drop(init);
        for _ in 0..2 {
            assert!(matches!(channel.send(&ToInit::Kill, &[]), Err(ChannelError::Closed)));
        }
    }
}
