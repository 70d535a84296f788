//! Every message between the server and `init`, PID 1 of a sandbox.
//!
//! The channel is a `SOCK_SEQPACKET` socketpair: a message is one packet of JSON, and the pipes of a
//! stage travel beside it. The server speaks first only after [`FromInit::Ready`]; each
//! [`ToInit::Stage`] is answered by one [`FromInit::StageEnded`]. Where either side closes, the
//! other one gives up: that is how a killed server leaves nothing running.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use nix::cmsg_space;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recv, recvmsg, sendmsg};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::model::outcome::{Ended, Usage};

/// Changes with every change of a message, since an upgrade may replace the executable under a running server.
pub const VERSION: u32 = 6;

/// The descriptor on which init finds the channel: podman's `--preserve-fds=1` passes 3.
pub const CHANNEL_FD: RawFd = 3;

/// Largest packet in bytes; the kernel's default send buffer holds 212,992.
pub const MAX_MESSAGE: usize = 200 * 1024;

/// As many descriptors as the kernel passes beside one packet: a buffer for fewer would leave those that came open,
/// and unknown to us.
const MOST_FDS: usize = 253;

/// From the server to init.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToInit {
    /// Copy the job's files from the job directory to the working directory.
    Prepare {
        /// The uid and gid that programs of this sandbox run as.
        uid: u32,
        /// The image's user as the image says it, whose groups programs have besides; may be empty.
        user: String,
        /// Whether it has a cgroup of its own. One without sees that of whoever started it, whose limits and counters
        /// are others'.
        own_cgroup: bool,
        /// Relative paths, checked by the server.
        files: Vec<String>,
    },
    /// Run one stage; its stdin, stdout and stderr come beside the message.
    Stage(StageSpec),
    /// Write what the programs have left to the pipe beside the message.
    Pack {
        /// Most bytes that it may be.
        most: u64,
    },
    /// Make what a [`ToInit::Pack`] wrote, from the file beside the message. Others read it too.
    Unpack,
    /// Send a signal to the main process of the running stage.
    Signal(i32),
    /// End the running stage now.
    Kill,
}

/// One stage to run.
#[derive(Debug, Serialize, Deserialize)]
pub struct StageSpec {
    /// The command; the program is looked up in the image's PATH.
    pub argv: Vec<String>,
    /// Variables beside those of the image.
    pub env: Vec<(String, String)>,
    /// A file that must be there afterwards.
    pub artifact: Option<String>,
    /// Wall time in microseconds.
    pub time_us: u64,
    /// CPU time in microseconds, all processes together.
    pub cpu_time_us: u64,
    /// Bytes of memory that its processes and their files may use, where that is less than the container may.
    pub memory: Option<u64>,
    /// Open files of a process.
    pub open_files: u64,
    /// Largest file in bytes.
    pub file_size: u64,
    /// Processes at once, for hosts where no pids cgroup counts them.
    pub processes: u64,
}

/// From init to the server.
#[derive(Debug, Serialize, Deserialize)]
pub enum FromInit {
    /// The sandbox waits for its job.
    Ready {
        /// [`VERSION`] of the executable inside.
        version: u32,
        /// What init saw of its own cgroup.
        enforced: Enforced,
    },
    /// The files of [`ToInit::Prepare`] are in place.
    Prepared,
    /// All is in the pipe of [`ToInit::Pack`].
    Packed,
    /// What [`ToInit::Unpack`] brought is in place.
    Unpacked,
    /// Not so, and why: there is something that cannot be carried, or there was no time or room for it. It may be a
    /// program's fault. After [`ToInit::Unpack`] some of it may be there.
    NotCarried(String),
    /// The stage is over and everything that it started is dead.
    StageEnded {
        /// How the main process ended.
        ended: Ended,
        /// Whether the artifact is there; true where none was asked for.
        artifact: bool,
        /// What was used.
        usage: Usage,
    },
    /// The stage is over, and something of it was killed for memory that others used.
    HostMemory,
    /// Init could not do what it was told; never a program's fault.
    Failed(String),
}

/// Which limits the kernel keeps for a sandbox, as read inside it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Enforced {
    /// `memory.max` is set.
    pub memory: bool,
    /// `pids.max` is set.
    pub processes: bool,
    /// `cpu.max` is set.
    pub cpu: bool,
}

impl Enforced {
    /// The names of those that are not kept.
    pub fn missing(self) -> Vec<&'static str> {
        let all = [("memory", self.memory), ("processes", self.processes), ("cpu", self.cpu)];
        all.into_iter().filter(|(_, kept)| !kept).map(|(name, _)| name).collect()
    }
}

/// Sends a message in one packet, descriptors beside it. Fails with `InvalidInput` where it is too large.
pub fn send<T: Serialize>(channel: BorrowedFd<'_>, message: &T, fds: &[BorrowedFd<'_>]) -> std::io::Result<()> {
    let bytes = serde_json::to_vec(message)?;
    if bytes.len() > MAX_MESSAGE {
        return Err(std::io::Error::new(
            std::io::ErrorKind::InvalidInput,
            format!("a message of {} bytes; at most {MAX_MESSAGE} fit", bytes.len()),
        ));
    }
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &rights[..0] } else { &rights[..] };
    // MSG_NOSIGNAL: a peer that is gone is an error, not a SIGPIPE.
    sendmsg::<()>(channel.as_raw_fd(), &[IoSlice::new(&bytes)], control, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

/// Receives one message and the descriptors beside it; `None` when the other side has closed.
pub fn receive<T: DeserializeOwned>(channel: BorrowedFd<'_>) -> std::io::Result<Option<(T, Vec<OwnedFd>)>> {
    // Most are small, and clearing room for the largest each time costs more than the messages do.
    let length = recv(channel.as_raw_fd(), &mut [], MsgFlags::MSG_PEEK | MsgFlags::MSG_TRUNC)?;
    let mut buffer = vec![0; length.min(MAX_MESSAGE)];
    let mut control = cmsg_space!([RawFd; MOST_FDS]);
    let mut slices = [IoSliceMut::new(&mut buffer)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let packet = recvmsg::<()>(channel.as_raw_fd(), &mut slices, Some(&mut control), flags)?;
    let mut fds = Vec::new();
    for part in packet.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = part {
            // SAFETY: the kernel has just made these descriptors for us, and nobody else knows them.
            fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    if packet.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC) {
        return Err(std::io::Error::other("a packet larger than the protocol allows"));
    }
    let length = packet.bytes;
    if length == 0 {
        return Ok(None);
    }
    Ok(Some((serde_json::from_slice(&buffer[..length])?, fds)))
}

/// In microseconds, as times are told between server and init.
pub fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use std::os::fd::AsFd;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap()
    }

    #[test]
    fn a_message_and_its_pipes_arrive_together() {
        let (server, init) = pair();
        let (reader, writer) = std::io::pipe().unwrap();
        send(server.as_fd(), &ToInit::Kill, &[reader.as_fd(), writer.as_fd()]).unwrap();
        let (message, fds) = receive::<ToInit>(init.as_fd()).unwrap().unwrap();
        assert!(matches!(message, ToInit::Kill));
        assert_eq!(fds.len(), 2);
    }

    #[test]
    fn a_closed_channel_is_the_end() {
        let (server, init) = pair();
        drop(server);
        assert!(receive::<ToInit>(init.as_fd()).unwrap().is_none());
    }

    #[test]
    fn what_is_no_message_is_an_error() {
        let (server, init) = pair();
        nix::unistd::write(&server, b"{\"Stage\":{}}").unwrap();
        assert!(receive::<ToInit>(init.as_fd()).is_err());
    }

    #[test]
    fn a_message_too_large_is_refused_before_it_is_sent() {
        let (server, _init) = pair();
        let message =
            ToInit::Prepare { uid: 1, user: String::new(), own_cgroup: true, files: vec!["x".repeat(MAX_MESSAGE)] };
        assert_eq!(send(server.as_fd(), &message, &[]).unwrap_err().kind(), std::io::ErrorKind::InvalidInput);
    }

    #[test]
    fn the_largest_message_passes() {
        let (server, init) = pair();
        let message = ToInit::Prepare {
            uid: 1,
            user: String::new(),
            own_cgroup: true,
            files: vec!["x".repeat(MAX_MESSAGE - 80)],
        };
        send(server.as_fd(), &message, &[]).unwrap();
        assert!(receive::<ToInit>(init.as_fd()).unwrap().is_some());
    }
}
