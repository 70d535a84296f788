//! A process of ours inside podman's user and mount namespace, entered once by `podman unshare`.
//!
//! Only in there images are mounted and the subordinate ids can be used. The server stays outside; it has the
//! agent start commands, each with one descriptor, and hears when they have ended. When the server goes the
//! agent waits for what it has started, which then ends too, and goes.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use tokio_util::task::TaskTracker;

use super::SandboxError;
use super::channel::Channel;
use super::podman::Podman;
use crate::process::{Cmd, Passed, Running};

/// The hidden verb that becomes the agent.
pub const VERB: &str = "agent";

/// Longest that what was started may take to end once the server has gone.
const LAST_TIME: Duration = Duration::from_secs(10);

/// From the server: start this; the descriptor beside it, if there is one, becomes the child's 3. The channel is the agent's stdin.
#[derive(Debug, Serialize, Deserialize)]
struct Start {
    id: u64,
    program: String,
    args: Vec<String>,
}

/// From the agent: it has ended.
#[derive(Debug, Serialize, Deserialize)]
struct Ended {
    id: u64,
    result: Result<(), String>,
}

/// The life of the agent.
pub fn main() -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let served = runtime.and_then(|runtime| {
        let channel = std::io::stdin().as_fd().try_clone_to_owned()?;
        runtime.block_on(serve(channel))
    });
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("coderunner agent: {error}; it is started by the server, not by hand");
            ExitCode::FAILURE
        }
    }
}

async fn serve(channel: OwnedFd) -> std::io::Result<()> {
    let channel = Arc::new(Channel::from_fd(channel)?);
    let started = TaskTracker::new();
    while let Some((Start { id, program, args }, fds)) =
        channel.receive_with_fds().await.map_err(std::io::Error::other)?
    {
        let child =
            Cmd::new(Path::new(&program), args).spawn(fds.into_iter().next().map_or(Passed::Nothing, Passed::Third));
        let channel = Arc::clone(&channel);
        started.spawn(async move {
            let result = match child {
                Ok(mut child) => child.end().await,
                Err(error) => Err(error.to_string()),
            };
            // The server may have gone.
            let _ = channel.send(&Ended { id, result }, &[]);
        });
    }
    started.close();
    let _ = tokio::time::timeout(LAST_TIME, started.wait()).await;
    Ok(())
}

type Waiting = Arc<Mutex<HashMap<u64, oneshot::Sender<Result<(), String>>>>>;

/// The server's side of an agent.
pub(super) struct Agent {
    channel: Arc<Channel>,
    waiting: Waiting,
    next: Mutex<u64>,
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
            while let Ok(Some(Ended { id, result })) = heard.receive().await {
                let waiter = answers.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
                // Who started it may not care any more.
                let _ = waiter.map(|waiter| waiter.send(result));
            }
            // Whoever still waits hears that nobody will tell him.
            answers.lock().unwrap_or_else(PoisonError::into_inner).clear();
        });
        Ok(Agent { channel, waiting, next: Mutex::new(0), _process: process, reader })
    }

    /// Whether it has ended.
    pub fn is_gone(&self) -> bool {
        self.reader.is_finished() || self.channel.is_closed()
    }

    /// Starts a command inside; the future ends with it.
    pub fn start(
        &self,
        program: &str,
        args: Vec<String>,
        fd: Option<OwnedFd>,
    ) -> Result<impl Future<Output = Result<(), String>> + Send + use<>, SandboxError> {
        let id = {
            let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
            *next += 1;
            *next
        };
        let (waiter, ended) = oneshot::channel();
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).insert(id, waiter);
        let fds: Vec<_> = fd.iter().map(AsFd::as_fd).collect();
        let sent = self.channel.send(&Start { id, program: program.to_owned(), args }, &fds);
        if sent.is_err() || self.reader.is_finished() {
            self.waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
        }
        sent?;
        Ok(async move { ended.await.unwrap_or_else(|_| Err("the agent in podman's namespace has ended".into())) })
    }
}
