//! A process of ours inside podman's user and mount namespace, entered once by `podman unshare`.
//!
//! Only in there images are mounted and the subordinate ids can be used. The server stays outside; it has the agent
//! make sandboxes, and hears when they have ended. When the server goes their inits go, and the agent after them.

pub mod stamp;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::host::print;
use crate::sandbox::agent::stamp::{Child, Mould, Own, rehearse};
use crate::sandbox::channel::Channel;
use crate::sandbox::direct::oci_plan::Plan;

/// The hidden verb that becomes the agent.
pub const VERB: &str = "agent";

/// What programs see as the command line of PID 1, with [`VERB`]: no path of the host's.
const NAME: &str = "coderunner";

/// Longest that sandboxes may take to end once the server has gone, before they are killed.
const LAST_TIME: Duration = Duration::from_secs(10);

/// From the server.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Order {
    pub id: u64,
    pub what: What,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum What {
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
pub(crate) struct Done {
    pub id: u64,
    pub result: Result<(), String>,
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
