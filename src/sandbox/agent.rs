//! A process of ours inside podman's user and mount namespace, entered once by `podman unshare`.
//!
//! Only in there images are mounted and the subordinate ids can be used. The server stays outside; it has the agent
//! make sandboxes, and hears when they have ended. When the server goes their inits go, and the agent after them.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use nix::sched::{CloneFlags, unshare};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::SandboxError;
use super::channel::Channel;
use super::plan::Plan;
use super::podman::Podman;
use super::stamp::{Child, Mould, Own, rehearse};
use crate::print;
use crate::process::Passed;

/// The hidden verb that becomes the agent.
pub const VERB: &str = "agent";

/// What programs see as the command line of PID 1, with [`VERB`]: no path of the host's.
const NAME: &str = "coderunner";

/// Longest that sandboxes may take to end once the server has gone, before they are killed.
const LAST_TIME: Duration = Duration::from_secs(10);

/// From the server.
#[derive(Debug, Serialize, Deserialize)]
struct Order {
    id: u64,
    what: What,
}

#[derive(Debug, Serialize, Deserialize)]
enum What {
    /// Try whether sandboxes can be made at all.
    Rehearse,
    /// Lay out what the sandboxes of a template share.
    Prepare { template: String, plan: Box<Plan> },
    /// Make one. Beside the order are init's end of its channel and, where it has one, its cgroup.
    Stamp { template: String, job_dir: PathBuf, slot: u32 },
    /// Kill what an order has made, and wait for its end.
    Kill(u64),
    /// Give a template up.
    Forget(String),
}

/// From the agent: an order has been carried out; that of a sandbox when it has ended.
#[derive(Debug, Serialize, Deserialize)]
struct Done {
    id: u64,
    result: Result<(), String>,
}

/// The life of the agent.
pub fn main() -> ExitCode {
    // Sandboxes are copies of this process: without anything that is not theirs.
    if std::env::args_os().next().is_none_or(|name| name != NAME) || std::env::vars_os().next().is_some() {
        let error = Command::new("/proc/self/exe").arg0(NAME).arg(VERB).env_clear().exec();
        return failed(&error);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let served = runtime.and_then(|runtime| {
        // Where nobody is kept out.
        std::env::set_current_dir("/")?;
        let channel = std::io::stdin().as_fd().try_clone_to_owned()?;
        runtime.block_on(serve(channel))
    });
    served.map_or_else(|error| failed(&error), |()| ExitCode::SUCCESS)
}

fn failed(error: &std::io::Error) -> ExitCode {
    print::complain(&format!("coderunner agent: {error}; it is started by the server, not by hand"));
    ExitCode::FAILURE
}

async fn serve(channel: OwnedFd) -> std::io::Result<()> {
    let channel = Arc::new(Channel::from_fd(channel)?);
    let (mut workshop, children, sandboxes) = (Workshop::default(), TaskTracker::new(), Sandboxes::default());
    while let Some((Order { id, what }, fds)) = channel.receive_with_fds().await.map_err(std::io::Error::other)? {
        let channel = Arc::clone(&channel);
        // The server may have gone.
        let done = move |result| drop(channel.send(&Done { id, result }, &[]));
        let made = match what {
            What::Rehearse => rehearse(),
            What::Prepare { template, plan } => workshop.prepare(template, *plan),
            What::Stamp { template, job_dir, slot } => workshop.stamp(&template, &job_dir, slot, fds),
            What::Kill(order) => {
                let sandboxes = Arc::clone(&sandboxes);
                children.spawn(async move {
                    kill(&sandboxes, order).await;
                    done(Ok(()));
                });
                continue;
            }
            What::Forget(template) => {
                workshop.moulds.remove(&template);
                done(Ok(()));
                continue;
            }
        };
        let mut child = match made {
            Ok(child) => child,
            Err(error) => {
                done(Err(error.to_string()));
                continue;
            }
        };
        let life = Life::default();
        sandboxes.lock().unwrap_or_else(PoisonError::into_inner).insert(id, life.clone());
        let sandboxes = Arc::clone(&sandboxes);
        children.spawn(async move {
            let result = tokio::select! {
                result = child.end() => result,
                () = life.killed.cancelled() => {
                    child.kill();
                    child.end().await
                }
            };
            sandboxes.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
            life.over.cancel();
            done(result);
        });
    }
    children.close();
    if timeout(LAST_TIME, children.wait()).await.is_err() {
        sandboxes.lock().unwrap_or_else(PoisonError::into_inner).values().for_each(|life| life.killed.cancel());
        let _ = timeout(LAST_TIME, children.wait()).await;
    }
    Ok(())
}

/// By the order that made them.
type Sandboxes = Arc<Mutex<HashMap<u64, Life>>>;

#[derive(Clone, Default)]
struct Life {
    killed: CancellationToken,
    over: CancellationToken,
}

async fn kill(sandboxes: &Sandboxes, order: u64) {
    let life = sandboxes.lock().unwrap_or_else(PoisonError::into_inner).get(&order).cloned();
    if let Some(life) = life {
        life.killed.cancel();
        life.over.cancelled().await;
    }
}

/// What sandboxes are made with.
#[derive(Default)]
struct Workshop {
    moulds: HashMap<String, Mould>,
    /// By slot: a sandbox at a time is in each.
    networks: HashMap<u32, File>,
}

impl Workshop {
    fn prepare(&mut self, template: String, plan: Plan) -> std::io::Result<Child> {
        let (mould, child) = Mould::make(plan)?;
        self.moulds.insert(template, mould);
        Ok(child)
    }

    fn stamp(&mut self, template: &str, job_dir: &Path, slot: u32, fds: Vec<OwnedFd>) -> std::io::Result<Child> {
        let mould = self.moulds.get(template).ok_or_else(|| std::io::Error::other("its template is gone"))?;
        let network = match self.networks.entry(slot) {
            Entry::Occupied(made) => made.into_mut(),
            Entry::Vacant(place) => place.insert(network()?),
        };
        let mut fds = fds.into_iter();
        let channel = fds.next().ok_or_else(|| std::io::Error::other("an order without a channel"))?;
        mould.stamp(Own { job_dir, network, cgroup: fds.next(), channel })
    }
}

/// A new network namespace, empty, its loopback down: made by a thread of its own, which alone moves into it.
fn network() -> std::io::Result<File> {
    let make = || {
        unshare(CloneFlags::CLONE_NEWNET)?;
        File::open("/proc/thread-self/ns/net")
    };
    let made = std::thread::Builder::new().spawn(make)?.join();
    made.unwrap_or_else(|_| Err(std::io::Error::other("the thread that was to make it ended")))
}

/// Longest that laying out a template, or killing a sandbox, may take: the kernel needs some ms, and more under load.
const ORDER_TIME: Duration = Duration::from_secs(10);

/// How long after the end of its channel its process may take to end.
const WORDS_TIME: Duration = Duration::from_secs(2);

type Waiting = Arc<Mutex<HashMap<u64, oneshot::Sender<Result<(), String>>>>>;

/// The server's side of an agent.
pub(super) struct Agent {
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
pub(super) struct Ordered {
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
