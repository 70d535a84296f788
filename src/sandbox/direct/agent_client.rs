//! The server's side of the agent: sends orders, and waits for them to be carried out.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::host::process::Passed;
use crate::sandbox::SandboxError;
use crate::sandbox::agent::VERB;
use crate::sandbox::agent::orders::{Action, Done, Order};
use crate::sandbox::channel::Channel;
use crate::sandbox::direct::oci_config::SandboxConfig;
use crate::sandbox::podman::Podman;

/// Longest that setting up a template, or killing a sandbox, may take: the kernel needs some ms, and more under load.
const ORDER_TIME: Duration = Duration::from_secs(10);

/// How long after the end of its channel its process may take to end.
const END_TIME: Duration = Duration::from_secs(2);

type Waiting = Arc<Mutex<HashMap<u64, oneshot::Sender<Result<(), String>>>>>;

/// The server's side of an agent.
pub(crate) struct Agent {
    channel: Arc<Channel>,
    waiting: Waiting,
    next: Mutex<u64>,
    /// Owns the process, too.
    reader: tokio::task::JoinHandle<()>,
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Agent {
    /// Enters podman's namespaces. `executable` is this program.
    pub fn enter(podman: &Podman, executable: &Path) -> Result<Agent, SandboxError> {
        let (channel, theirs) = Channel::pair()?;
        let mut process = podman.unshare(executable, &[VERB]).spawn(Passed::Stdin(theirs))?;
        let (channel, waiting) = (Arc::new(channel), Waiting::default());
        let (heard, answers) = (Arc::clone(&channel), Arc::clone(&waiting));
        let reader = tokio::spawn(async move {
            while let Ok(Some(Done { id, result })) = heard.receive().await {
                let waiter = answers.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
                // Fails where nobody waits any more.
                let _ = waiter.map(|waiter| waiter.send(result));
            }
            let ended = match timeout(END_TIME, process.end()).await {
                Ok(Err(reason)) => format!("it has ended: {reason}"),
                _ => "it has ended".to_owned(),
            };
            // Orders that are still waited for fail, with the reason of its end.
            for (_, waiter) in answers.lock().unwrap_or_else(PoisonError::into_inner).drain() {
                let _ = waiter.send(Err(ended.clone()));
            }
        });
        Ok(Agent { channel, waiting, next: Mutex::new(0), reader })
    }

    /// Whether it has ended.
    pub fn is_gone(&self) -> bool {
        self.reader.is_finished() || self.channel.is_closed()
    }

    /// Why the kernel does not let sandboxes be made here, if it does not. An agent that does not answer is an error.
    pub async fn preflight(&self) -> Result<Option<String>, SandboxError> {
        let done = self.order(Action::Preflight, &[])?.done;
        match timeout(ORDER_TIME, done).await.map_err(|_| late()) {
            Ok(Ok(())) => Ok(None),
            Ok(Err(reason)) if !self.is_gone() => Ok(Some(reason)),
            Ok(Err(reason)) | Err(reason) => Err(SandboxError::Agent(reason)),
        }
    }

    /// Sets up what the sandboxes of a template share.
    pub async fn prepare(&self, template: &str, config: SandboxConfig) -> Result<(), SandboxError> {
        let action = Action::Prepare { template: template.into(), config: Box::new(config) };
        in_time(self.order(action, &[])?.done).await.map_err(SandboxError::Agent)
    }

    /// Gives up what [`Agent::prepare`] set up; running sandboxes keep it.
    pub fn forget(&self, template: &str) {
        // Fails where the agent has ended: then nothing is left to give up.
        let _ = self.order(Action::Forget(template.into()), &[]);
    }

    /// Spawns a sandbox; `channel` goes to its init.
    pub fn spawn(
        &self,
        template: &str,
        job_dir: &Path,
        slot: u32,
        channel: OwnedFd,
        cgroup: Option<File>,
    ) -> Result<Ordered, SandboxError> {
        let action = Action::Spawn { template: template.into(), job_dir: job_dir.into(), slot };
        let fds: Vec<_> = std::iter::once(channel.as_fd()).chain(cgroup.iter().map(AsFd::as_fd)).collect();
        self.order(action, &fds)
    }

    /// Kills the sandbox that an order made, and waits until it is gone.
    pub async fn kill(&self, order: u64) -> Result<(), String> {
        in_time(self.order(Action::Kill(order), &[]).map_err(|error| error.to_string())?.done).await
    }

    fn order(&self, action: Action, fds: &[BorrowedFd<'_>]) -> Result<Ordered, SandboxError> {
        let id = {
            let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
            *next += 1;
            *next
        };
        let (waiter, done) = oneshot::channel();
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).insert(id, waiter);
        let sent = self.channel.send(&Order { id, action }, fds);
        if sent.is_err() || self.reader.is_finished() {
            self.waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
        }
        sent?;
        Ok(Ordered { id, done: Box::pin(async move { done.await.unwrap_or_else(|_| Err("it has ended".into())) }) })
    }
}

/// What was ordered.
pub(crate) struct Ordered {
    /// Its number.
    pub id: u64,
    /// Ends when it is done; that of a sandbox when it has ended.
    pub done: BoxFuture<'static, Result<(), String>>,
}

async fn in_time(done: BoxFuture<'static, Result<(), String>>) -> Result<(), String> {
    timeout(ORDER_TIME, done).await.unwrap_or_else(|_| Err(late()))
}

fn late() -> String {
    format!("no answer within {}", humantime::format_duration(ORDER_TIME))
}
