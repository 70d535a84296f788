//! All messages between the server and `init`, PID 1 of a sandbox.
//!
//! The channel is a `SOCK_SEQPACKET` socketpair: a message is one packet of JSON, and descriptors, such as the pipes of
//! a stage, are passed with it. The server sends nothing before [`FromInit::Ready`]. Init answers each
//! [`ToInit::Stage`] with one [`FromInit::StageEnded`]. If one side closes the channel, the other one gives up: so a
//! killed server leaves nothing running.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use nix::cmsg_space;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recv, recvmsg, sendmsg};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::model::outcome::{Ended, Usage};

/// Version of the messages, increased with every change of them: an upgrade may replace the executable, and with it
/// init, while a server runs.
pub const VERSION: u32 = 6;

/// The descriptor of the channel in init: podman's `--preserve-fds=1` passes descriptor 3.
pub const CHANNEL_FD: RawFd = 3;

/// Largest packet in bytes; the kernel's default send buffer holds 212,992.
pub const MAX_MESSAGE: usize = 200 * 1024;

/// Most descriptors that the kernel passes with one packet. With a smaller buffer some received descriptors could stay
/// open without anyone knowing their numbers.
const MAX_FDS: usize = 253;

/// From the server to init.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToInit {
    /// Copy the job's files from the job directory to the working directory.
    Prepare {
        /// The uid and gid that programs of this sandbox run as.
        uid: u32,
        /// The user that the image names, in the image's spelling; may be empty. Programs get the groups of this user
        /// as supplementary groups.
        user: String,
        /// Whether the sandbox has a cgroup of its own. Without one, init sees the cgroup of the process that started
        /// it, whose limits and counters do not apply to the sandbox.
        own_cgroup: bool,
        /// Relative paths, checked by the server.
        files: Vec<String>,
    },
    /// Run one stage. Its stdin, stdout and stderr are passed with the message.
    Stage(StageSpec),
    /// Pack the files that the programs have left, into the pipe that is passed with the message.
    Pack {
        /// Largest size of the packed files in bytes.
        most: u64,
    },
    /// Unpack the output of a [`ToInit::Pack`] from the file that is passed with the message. Other inits may read the
    /// same file at the same time.
    Unpack,
    /// Send a signal to the main process of the running stage.
    Signal(i32),
    /// End the running stage now.
    Kill,
}

/// One stage to run.
#[derive(Debug, Serialize, Deserialize)]
pub struct StageSpec {
    /// The command. The program is looked up in the image's PATH.
    pub argv: Vec<String>,
    /// Environment variables, in addition to those of the image.
    pub env: Vec<(String, String)>,
    /// A file that the stage must create.
    pub artifact: Option<String>,
    /// Limit of wall time in microseconds.
    pub time_us: u64,
    /// Limit of CPU time in microseconds, for all processes together.
    pub cpu_time_us: u64,
    /// Limit of memory in bytes, for the processes and their files together, if it is lower than the container's limit.
    pub memory: Option<u64>,
    /// Limit of open files per process.
    pub open_files: u64,
    /// Limit of the size of a file in bytes.
    pub file_size: u64,
    /// Limit of processes at a time, for hosts where no pids cgroup counts them.
    pub processes: u64,
}

/// From init to the server.
#[derive(Debug, Serialize, Deserialize)]
pub enum FromInit {
    /// The sandbox is ready for a job.
    Ready {
        /// [`VERSION`] of the executable in the sandbox.
        version: u32,
        /// The limits that init found in its own cgroup.
        enforced: Enforced,
    },
    /// The files of [`ToInit::Prepare`] are in place.
    Prepared,
    /// Everything was written to the pipe of [`ToInit::Pack`].
    Packed,
    /// The files of [`ToInit::Unpack`] are in place.
    Unpacked,
    /// Packing or unpacking failed, and why: a file cannot be packed, or time or space was not enough. A program may be
    /// the cause. After [`ToInit::Unpack`] some of the files may exist.
    NotCarried(String),
    /// The stage has ended and all of its processes are dead.
    StageEnded {
        /// How the main process ended.
        ended: Ended,
        /// Whether the artifact exists; true if none was asked for.
        artifact: bool,
        /// Resources that the stage used.
        usage: Usage,
    },
    /// The stage has ended, and the kernel killed a process of it although the sandbox was below its memory limit.
    HostMemory,
    /// Init could not carry out a message. A program is never the cause.
    Failed(String),
}

/// The limits that the kernel enforces for a sandbox, as read inside it.
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
    /// Names of the limits that are not enforced.
    pub fn missing(self) -> Vec<&'static str> {
        let all = [("memory", self.memory), ("processes", self.processes), ("cpu", self.cpu)];
        all.into_iter().filter(|(_, enforced)| !enforced).map(|(name, _)| name).collect()
    }
}

/// Sends a message in one packet, with descriptors. Fails with `InvalidInput` if the message is too large.
pub fn send<T: Serialize>(channel: BorrowedFd<'_>, message: &T, fds: &[BorrowedFd<'_>]) -> std::io::Result<()> {
    let bytes = serde_json::to_vec(message)?;
    if bytes.len() > MAX_MESSAGE {
        return Err(std::io::Error::new(
            std::io::ErrorKind::InvalidInput,
            format!("the message has {} bytes, more than {MAX_MESSAGE}", bytes.len()),
        ));
    }
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &rights[..0] } else { &rights[..] };
    // MSG_NOSIGNAL: a closed peer causes an error, not a SIGPIPE.
    sendmsg::<()>(channel.as_raw_fd(), &[IoSlice::new(&bytes)], control, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

/// Receives one message and its descriptors; `None` when the peer has closed the channel.
pub fn receive<T: DeserializeOwned>(channel: BorrowedFd<'_>) -> std::io::Result<Option<(T, Vec<OwnedFd>)>> {
    // Size the buffer to the packet: most are small, and clearing a buffer for the largest one would cost more than the
    // message itself.
    let length = recv(channel.as_raw_fd(), &mut [], MsgFlags::MSG_PEEK | MsgFlags::MSG_TRUNC)?;
    let mut buffer = vec![0; length.min(MAX_MESSAGE)];
    let mut control = cmsg_space!([RawFd; MAX_FDS]);
    let mut slices = [IoSliceMut::new(&mut buffer)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let packet = recvmsg::<()>(channel.as_raw_fd(), &mut slices, Some(&mut control), flags)?;
    let mut fds = Vec::new();
    for part in packet.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = part {
            // SAFETY: the kernel has just created these descriptors in this process, and nothing else owns them.
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

/// A time in microseconds, the unit of the messages.
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
    fn message_and_descriptors_arrive_together() {
        let (server, init) = pair();
        let (reader, writer) = std::io::pipe().unwrap();
        send(server.as_fd(), &ToInit::Kill, &[reader.as_fd(), writer.as_fd()]).unwrap();
        let (message, fds) = receive::<ToInit>(init.as_fd()).unwrap().unwrap();
        assert!(matches!(message, ToInit::Kill));
        assert_eq!(fds.len(), 2);
    }

    #[test]
    fn receive_returns_none_on_a_closed_channel() {
        let (server, init) = pair();
        drop(server);
        assert!(receive::<ToInit>(init.as_fd()).unwrap().is_none());
    }

    #[test]
    fn malformed_messages_are_errors() {
        let (server, init) = pair();
        nix::unistd::write(&server, b"{\"Stage\":{}}").unwrap();
        assert!(receive::<ToInit>(init.as_fd()).is_err());
    }

    #[test]
    fn oversized_messages_are_rejected_before_sending() {
        let (server, _init) = pair();
        let message =
            ToInit::Prepare { uid: 1, user: String::new(), own_cgroup: true, files: vec!["x".repeat(MAX_MESSAGE)] };
        assert_eq!(send(server.as_fd(), &message, &[]).unwrap_err().kind(), std::io::ErrorKind::InvalidInput);
    }

    #[test]
    fn largest_message_is_delivered() {
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
