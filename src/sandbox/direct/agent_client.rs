//! The server's side of the agent: sends orders, and waits until they are done.

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

/// Deadline for setting up a template or killing a sandbox: the kernel needs some milliseconds, and more under load.
const ORDER_TIME: Duration = Duration::from_secs(10);

/// How long the agent's process may take to end after its channel has closed.
const END_TIME: Duration = Duration::from_secs(2);

/// Receivers of the results of pending orders, by id.
type Pending = Arc<Mutex<HashMap<u64, oneshot::Sender<Result<(), String>>>>>;

/// The server's side of an agent.
pub(crate) struct Agent {
    channel: Arc<Channel>,
    pending: Pending,
    last_id: Mutex<u64>,
    /// Receives the agent's replies, and owns its process.
    reader: tokio::task::JoinHandle<()>,
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Agent {
    /// Starts an agent in podman's namespaces. `executable` is this program.
    pub fn start(podman: &Podman, executable: &Path) -> Result<Agent, SandboxError> {
        let (channel, theirs) = Channel::pair()?;
        let mut process = podman.unshare(executable, &[VERB]).spawn(Passed::Stdin(theirs))?;
        Ok(Agent::new(channel, async move { process.end().await }))
    }

    /// The client of an agent at the other end of this channel. `end` completes when the agent's process has ended.
    fn new(channel: Channel, end: impl Future<Output = Result<(), String>> + Send + 'static) -> Agent {
        let (channel, pending) = (Arc::new(channel), Pending::default());
        let (replies, waiters) = (Arc::clone(&channel), Arc::clone(&pending));
        let reader = tokio::spawn(async move {
            while let Ok(Some(Done { id, result })) = replies.receive().await {
                let waiter = waiters.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
                // Fails if the waiting task was cancelled.
                let _ = waiter.map(|waiter| waiter.send(result));
            }
            let ended = match timeout(END_TIME, end).await {
                Ok(Err(reason)) => format!("it has ended: {reason}"),
                _ => "it has ended".to_owned(),
            };
            // Pending orders fail with the reason why the agent ended.
            for (_, waiter) in waiters.lock().unwrap_or_else(PoisonError::into_inner).drain() {
                let _ = waiter.send(Err(ended.clone()));
            }
        });
        Agent { channel, pending, last_id: Mutex::new(0), reader }
    }

    /// Whether the agent has ended.
    pub fn is_gone(&self) -> bool {
        self.reader.is_finished() || self.channel.is_closed()
    }

    /// Checks whether the kernel lets the agent create sandboxes on this host, and returns the reason if not. Fails if
    /// the agent does not answer.
    pub async fn preflight(&self) -> Result<Option<String>, SandboxError> {
        let done = self.order(Action::Preflight, &[])?.done;
        match timeout(ORDER_TIME, done).await.map_err(|_| timed_out()) {
            Ok(Ok(())) => Ok(None),
            Ok(Err(reason)) if !self.is_gone() => Ok(Some(reason)),
            Ok(Err(reason)) | Err(reason) => Err(SandboxError::Agent(reason)),
        }
    }

    /// Sets up the mounts that the sandboxes of a template share.
    pub async fn prepare(&self, template: &str, config: SandboxConfig) -> Result<(), SandboxError> {
        let action = Action::Prepare { template: template.into(), config: Box::new(config) };
        with_deadline(self.order(action, &[])?.done).await.map_err(SandboxError::Agent)
    }

    /// Releases the mounts that [`Agent::prepare`] set up. Running sandboxes keep them.
    pub fn forget(&self, template: &str) {
        // Fails if the agent has ended: the mounts are gone then.
        let _ = self.order(Action::Forget(template.into()), &[]);
    }

    /// Spawns a sandbox. Its init gets `channel`.
    pub fn spawn(
        &self,
        template: &str,
        job_dir: &Path,
        slot: u32,
        channel: OwnedFd,
        cgroup: Option<File>,
    ) -> Result<PendingOrder, SandboxError> {
        let action = Action::Spawn { template: template.into(), job_dir: job_dir.into(), slot };
        let fds: Vec<_> = std::iter::once(channel.as_fd()).chain(cgroup.iter().map(AsFd::as_fd)).collect();
        self.order(action, &fds)
    }

    /// Kills the sandbox that an order has spawned, and waits until it is gone.
    pub async fn kill(&self, order: u64) -> Result<(), String> {
        with_deadline(self.order(Action::Kill(order), &[]).map_err(|error| error.to_string())?.done).await
    }

    fn order(&self, action: Action, fds: &[BorrowedFd<'_>]) -> Result<PendingOrder, SandboxError> {
        let id = {
            let mut last_id = self.last_id.lock().unwrap_or_else(PoisonError::into_inner);
            *last_id += 1;
            *last_id
        };
        let (waiter, done) = oneshot::channel();
        self.pending.lock().unwrap_or_else(PoisonError::into_inner).insert(id, waiter);
        let sent = self.channel.send(&Order { id, action }, fds);
        if sent.is_err() || self.reader.is_finished() {
            self.pending.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
        }
        sent?;
        let done = Box::pin(async move { done.await.unwrap_or_else(|_| Err("it has ended".into())) });
        Ok(PendingOrder { id, done })
    }
}

/// An order that was sent to the agent.
pub(crate) struct PendingOrder {
    /// Id of the order.
    pub id: u64,
    /// Completes when the order is done; for a spawned sandbox, when the sandbox has ended.
    pub done: BoxFuture<'static, Result<(), String>>,
}

async fn with_deadline(done: BoxFuture<'static, Result<(), String>>) -> Result<(), String> {
    timeout(ORDER_TIME, done).await.unwrap_or_else(|_| Err(timed_out()))
}

fn timed_out() -> String {
    format!("no answer within {}", humantime::format_duration(ORDER_TIME))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::fake::on_paused_clock;

    /// A client, and the agent's end of its channel. The agent's process exits with this message.
    fn agent(message: &'static str) -> (Agent, Channel) {
        let (channel, theirs) = Channel::pair().unwrap();
        let client = Agent::new(channel, std::future::ready(Err(message.to_owned())));
        (client, Channel::from_fd(theirs).unwrap())
    }

    fn spawn(client: &Agent) -> PendingOrder {
        let (_, channel) = Channel::pair().unwrap();
        client.spawn("template", Path::new("/job"), 0, channel, None).unwrap()
    }

    async fn next_order(agent: &Channel) -> Order {
        agent.receive().await.unwrap().unwrap()
    }

    #[test]
    fn each_reply_completes_its_own_order() {
        on_paused_clock(|| async {
            let (client, agent) = agent("");
            let (first, second) = (spawn(&client), spawn(&client));
            assert_eq!((next_order(&agent).await.id, next_order(&agent).await.id), (first.id, second.id));
            let failed = Done { id: second.id, result: Err("no memory".into()) };
            agent.send(&failed, &[]).unwrap();
            assert_eq!(second.done.await, Err("no memory".into()));
            agent.send(&Done { id: first.id, result: Ok(()) }, &[]).unwrap();
            assert_eq!(first.done.await, Ok(()));
        });
    }

    #[test]
    fn replies_to_unknown_and_dropped_orders_are_ignored() {
        on_paused_clock(|| async {
            let (client, agent) = agent("");
            let (dropped, waits) = (spawn(&client).id, spawn(&client));
            for id in [dropped, 999, waits.id] {
                agent.send(&Done { id, result: Ok(()) }, &[]).unwrap();
            }
            assert_eq!(waits.done.await, Ok(()));
            assert!(!client.is_gone());
        });
    }

    #[test]
    fn pending_and_later_orders_fail_when_the_agent_ends() {
        on_paused_clock(|| async {
            let (client, agent) = agent("killed by signal 9");
            let pending = spawn(&client);
            drop(agent);
            assert_eq!(pending.done.await, Err("it has ended: killed by signal 9".into()));
            assert!(client.is_gone());
            assert!(client.kill(1).await.is_err());
            assert!(client.pending.lock().unwrap().is_empty());
        });
    }

    #[test]
    fn orders_have_a_deadline() {
        on_paused_clock(|| async {
            let (client, _agent) = agent("");
            let started = tokio::time::Instant::now();
            assert!(matches!(client.preflight().await, Err(SandboxError::Agent(_))));
            assert!(client.kill(1).await.unwrap_err().contains("no answer within"));
            assert_eq!(started.elapsed(), 2 * ORDER_TIME);
        });
    }
}
