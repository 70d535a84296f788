//! The server's side of the agent: orders, and whoever waits for them to be carried out.

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
use crate::sandbox::agent::{Done, Order, VERB, What};
use crate::sandbox::channel::Channel;
use crate::sandbox::direct::oci_plan::Plan;
use crate::sandbox::podman::Podman;

/// Longest that laying out a template, or killing a sandbox, may take: the kernel needs some ms, and more under load.
const ORDER_TIME: Duration = Duration::from_secs(10);

/// How long after the end of its channel its process may take to end.
const WORDS_TIME: Duration = Duration::from_secs(2);

type Waiting = Arc<Mutex<HashMap<u64, oneshot::Sender<Result<(), String>>>>>;

/// The server's side of an agent.
pub(crate) struct Agent {
    channel: Arc<Channel>,
    waiting: Waiting,
    next: Mutex<u64>,
    /// Has the process, too.
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
                // Who ordered it may not care any more.
                let _ = waiter.map(|waiter| waiter.send(result));
            }
            let ended = match timeout(WORDS_TIME, process.end()).await {
                Ok(Err(words)) => format!("it has ended: {words}"),
                _ => "it has ended".to_owned(),
            };
            // Whoever still waits hears that nobody will tell him, and why.
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

    /// Why the kernel does not let sandboxes be made here, if it does not. An agent that does not answer is no reason.
    pub async fn rehearse(&self) -> Result<Option<String>, SandboxError> {
        let done = self.order(What::Rehearse, &[])?.done;
        match timeout(ORDER_TIME, done).await.map_err(|_| late()) {
            Ok(Ok(())) => Ok(None),
            Ok(Err(reason)) if !self.is_gone() => Ok(Some(reason)),
            Ok(Err(reason)) | Err(reason) => Err(SandboxError::Agent(reason)),
        }
    }

    /// Lays out what the sandboxes of a template share.
    pub async fn prepare(&self, template: &str, plan: Plan) -> Result<(), SandboxError> {
        let what = What::Prepare { template: template.into(), plan: Box::new(plan) };
        in_time(self.order(what, &[])?.done).await.map_err(SandboxError::Agent)
    }

    /// Gives up what [`Agent::prepare`] laid out; sandboxes keep theirs.
    pub fn forget(&self, template: &str) {
        // Where it has ended nothing is left.
        let _ = self.order(What::Forget(template.into()), &[]);
    }

    /// Makes a sandbox; its end of the channel goes to its init.
    pub fn stamp(
        &self,
        template: &str,
        job_dir: &Path,
        slot: u32,
        channel: OwnedFd,
        cgroup: Option<File>,
    ) -> Result<Ordered, SandboxError> {
        let what = What::Stamp { template: template.into(), job_dir: job_dir.into(), slot };
        let fds: Vec<_> = std::iter::once(channel.as_fd()).chain(cgroup.iter().map(AsFd::as_fd)).collect();
        self.order(what, &fds)
    }

    /// Kills the sandbox that an order made, and waits until it is gone.
    pub async fn kill(&self, order: u64) -> Result<(), String> {
        in_time(self.order(What::Kill(order), &[]).map_err(|error| error.to_string())?.done).await
    }

    fn order(&self, what: What, fds: &[BorrowedFd<'_>]) -> Result<Ordered, SandboxError> {
        let id = {
            let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
            *next += 1;
            *next
        };
        let (waiter, done) = oneshot::channel();
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).insert(id, waiter);
        let sent = self.channel.send(&Order { id, what }, fds);
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
