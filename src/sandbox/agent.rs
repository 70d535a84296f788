//! A process of ours inside podman's user and mount namespace, entered once by `podman unshare`.
//!
//! Only in there images are mounted and the subordinate ids can be used. The server stays outside; it has the
//! agent start the OCI runtime, each time with one descriptor, and hears when they have ended. When the server goes the
//! agent waits for what it has started, which then ends too, and goes.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use nix::libc;
use nix::sched::{CloneFlags, unshare};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::{dup2, dup3};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use tokio::time::timeout;
use tokio_util::task::TaskTracker;

use super::SandboxError;
use super::channel::Channel;
use super::podman::Podman;
use super::protocol::CHANNEL_FD;
use crate::process::{Cmd, Passed, ProcessError, Running};

/// The hidden verb that becomes the agent.
pub const VERB: &str = "agent";

/// The OCI runtime: what podman itself uses, found on the PATH.
const RUNTIME: &str = "crun";

/// Longest that what was started may take to end once the server has gone.
const LAST_TIME: Duration = Duration::from_secs(10);

/// From the server.
#[derive(Debug, Serialize, Deserialize)]
struct Order {
    id: u64,
    what: What,
}

#[derive(Debug, Serialize, Deserialize)]
enum What {
    /// Start the OCI runtime with these; the descriptor beside the order, if there is one, becomes the child's 3.
    Start(Vec<String>),
    /// Make an empty network namespace, its loopback down, and keep it.
    Network,
}

/// From the agent: what became of an order. That of a command comes with its end and is empty, that of a network is
/// the path by which a container joins it.
#[derive(Debug, Serialize, Deserialize)]
struct Done {
    id: u64,
    result: Result<String, String>,
}

/// The life of the agent.
pub fn main() -> ExitCode {
    let third = Third::reserve();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let served = runtime.and_then(|runtime| {
        // Where nobody is kept out, so that what is started needs no other place.
        std::env::set_current_dir("/")?;
        let channel = std::io::stdin().as_fd().try_clone_to_owned()?;
        runtime.block_on(serve(channel, third?))
    });
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("coderunner agent: {error}; it is started by the server, not by hand");
            ExitCode::FAILURE
        }
    }
}

async fn serve(channel: OwnedFd, mut third: Third) -> std::io::Result<()> {
    let channel = Arc::new(Channel::from_fd(channel)?);
    let started = TaskTracker::new();
    let runtime = Runtime::find();
    // They go when this process does.
    let mut networks = Vec::new();
    while let Some((Order { id, what }, fds)) = channel.receive_with_fds().await.map_err(std::io::Error::other)? {
        // The server may have gone.
        let done = move |channel: &Channel, result| drop(channel.send(&Done { id, result }, &[]));
        match what {
            What::Start(args) => {
                let child = third.spawn(&runtime.command(args), fds.into_iter().next());
                let channel = Arc::clone(&channel);
                started.spawn(async move {
                    let result = match child {
                        Ok(mut child) => child.end().await,
                        Err(error) => Err(error.to_string()),
                    };
                    done(&channel, result.map(|()| String::new()));
                });
            }
            What::Network => {
                let made = network().map(|network| {
                    let path = format!("/proc/{}/fd/{}", std::process::id(), network.as_raw_fd());
                    networks.push(network);
                    path
                });
                done(&channel, made.map_err(|error| format!("cannot make a network namespace: {error}")));
            }
        }
    }
    started.close();
    let _ = tokio::time::timeout(LAST_TIME, started.wait()).await;
    Ok(())
}

/// Descriptor 3, to be lent to what is started: what is there is inherited. To put something there in the child takes code
/// of ours between fork and exec, and for that a copy of our memory.
struct Third {
    nothing: File,
    /// None where it was taken when we came.
    kept: Option<OwnedFd>,
}

impl Third {
    /// To be called before anything else opens a descriptor.
    fn reserve() -> std::io::Result<Third> {
        let kept = OwnedFd::from(File::open("/dev/null")?);
        Ok(Third { nothing: File::open("/dev/null")?, kept: Some(kept).filter(|fd| fd.as_raw_fd() == CHANNEL_FD) })
    }

    /// Starts a command, which finds `fd` there. Nothing else is started meanwhile: the agent has one thread.
    fn spawn(&mut self, command: &Cmd, fd: Option<OwnedFd>) -> Result<Running, ProcessError> {
        match (&mut self.kept, fd) {
            (Some(kept), Some(fd)) => {
                let lent = dup2(&fd, kept);
                let started = command.spawn(Passed::Nothing);
                lent.and_then(|()| dup3(&self.nothing, kept, OFlag::O_CLOEXEC))
                    .map_err(|errno| ProcessError::Io { command: RUNTIME.into(), source: errno.into() })?;
                started
            }
            (None, Some(fd)) => command.spawn(Passed::Third(fd)),
            (_, None) => command.spawn(Passed::Nothing),
        }
    }
}

/// The OCI runtime as it is started again and again: a copy, or by its name where none can be had.
struct Runtime(Option<File>);

impl Runtime {
    /// Lest a container changes it, crun starts anew from a read-only mount or a copy of itself, with all its libraries
    /// loaded again. One that finds itself in a sealed file does not.
    fn find() -> Runtime {
        let paths = std::env::var_os("PATH").unwrap_or_default();
        let program = std::env::split_paths(&paths).map(|dir| dir.join(RUNTIME)).find(|path| path.is_file());
        let copy = || -> std::io::Result<File> {
            let program = std::fs::read(program.ok_or(std::io::ErrorKind::NotFound)?)?;
            let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
            // Kernels before 6.3 do not know the flag, and need none.
            let executable = flags | MFdFlags::from_bits_retain(libc::MFD_EXEC);
            let copy = memfd_create(RUNTIME, executable).or_else(|_| memfd_create(RUNTIME, flags))?;
            let mut copy = File::from(copy);
            // A script's interpreter would not find it, and a host may let no such file be executed.
            if !program.starts_with(b"\x7fELF") || copy.metadata()?.mode() & 0o100 == 0 {
                return Err(std::io::ErrorKind::Unsupported.into());
            }
            copy.write_all(&program)?;
            let seals = [SealFlag::F_SEAL_SEAL, SealFlag::F_SEAL_SHRINK, SealFlag::F_SEAL_GROW, SealFlag::F_SEAL_WRITE];
            fcntl(&copy, FcntlArg::F_ADD_SEALS(seals.into_iter().collect()))?;
            Ok(copy)
        };
        Runtime(copy().ok())
    }

    fn command(&self, args: Vec<String>) -> Cmd {
        let command = Cmd::new(Path::new(RUNTIME), args);
        match &self.0 {
            Some(copy) => command.of_file(format!("/proc/self/fd/{}", copy.as_raw_fd()).into()),
            None => command,
        }
    }
}

/// A new network namespace: made by a thread of its own, which alone moves into it.
fn network() -> std::io::Result<File> {
    let make = || {
        unshare(CloneFlags::CLONE_NEWNET)?;
        File::open("/proc/thread-self/ns/net")
    };
    let made = std::thread::Builder::new().spawn(make)?.join();
    made.unwrap_or_else(|_| Err(std::io::Error::other("the thread that was to make it ended")))
}

/// Longest that making a network namespace may take: the kernel needs some ms, and more under load.
const NETWORK_TIME: Duration = Duration::from_secs(10);

type Waiting = Arc<Mutex<HashMap<u64, oneshot::Sender<Result<String, String>>>>>;

/// The server's side of an agent.
pub(super) struct Agent {
    channel: Arc<Channel>,
    waiting: Waiting,
    next: Mutex<u64>,
    /// By slot: a container at a time is in each.
    networks: tokio::sync::Mutex<HashMap<u32, String>>,
    _process: Running,
    reader: tokio::task::JoinHandle<()>,
}

impl Agent {
    /// Enters podman's namespaces. `executable` is this program.
    pub fn enter(podman: &Podman, executable: &Path) -> Result<Agent, SandboxError> {
        let (channel, theirs) = Channel::pair()?;
        let process = podman.unshare(executable, &[VERB]).spawn(Passed::Stdin(theirs))?;
        let (channel, waiting) = (Arc::new(channel), Waiting::default());
        let (heard, answers) = (Arc::clone(&channel), Arc::clone(&waiting));
        let reader = tokio::spawn(async move {
            while let Ok(Some(Done { id, result })) = heard.receive().await {
                let waiter = answers.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
                // Who started it may not care any more.
                let _ = waiter.map(|waiter| waiter.send(result));
            }
            // Whoever still waits hears that nobody will tell him.
            answers.lock().unwrap_or_else(PoisonError::into_inner).clear();
        });
        Ok(Agent { channel, waiting, next: Mutex::new(0), networks: Default::default(), _process: process, reader })
    }

    /// Whether it has ended.
    pub fn is_gone(&self) -> bool {
        self.reader.is_finished() || self.channel.is_closed()
    }

    /// Starts the OCI runtime inside; the future ends with it.
    pub fn start(
        &self,
        args: Vec<String>,
        fd: Option<OwnedFd>,
    ) -> Result<impl Future<Output = Result<(), String>> + Send + use<>, SandboxError> {
        let ended = self.order(What::Start(args), fd)?;
        Ok(async move { ended.await.map(drop) })
    }

    /// The path of a slot's network namespace, which is made when it is first asked for.
    pub async fn network(&self, slot: u32) -> Result<String, SandboxError> {
        let mut networks = self.networks.lock().await;
        if let Some(path) = networks.get(&slot) {
            return Ok(path.clone());
        }
        let made = timeout(NETWORK_TIME, self.order(What::Network, None)?).await;
        let late = |_| Err(format!("no answer within {}", humantime::format_duration(NETWORK_TIME)));
        let path = made.unwrap_or_else(late).map_err(SandboxError::Agent)?;
        networks.insert(slot, path.clone());
        Ok(path)
    }

    fn order(
        &self,
        what: What,
        fd: Option<OwnedFd>,
    ) -> Result<impl Future<Output = Result<String, String>> + Send + use<>, SandboxError> {
        let id = {
            let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
            *next += 1;
            *next
        };
        let (waiter, done) = oneshot::channel();
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).insert(id, waiter);
        let fds: Vec<_> = fd.iter().map(AsFd::as_fd).collect();
        let sent = self.channel.send(&Order { id, what }, &fds);
        if sent.is_err() || self.reader.is_finished() {
            self.waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
        }
        sent?;
        Ok(async move { done.await.unwrap_or_else(|_| Err("it has ended".into())) })
    }
}
