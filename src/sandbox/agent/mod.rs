//! The agent: a coderunner process in podman's user and mount namespace, which it enters once by `podman unshare`.
//!
//! Images are mounted and subordinate ids can be used only inside these namespaces. The server stays outside: it orders
//! sandboxes from the agent, and the agent reports their ends. When the server exits, the inits of its sandboxes exit,
//! and the agent after them.

mod capabilities; // drops capabilities
mod mount; // mounts with the kernel's newer calls
pub(super) mod orders; // messages between the server and the agent
mod rlimits;
mod rootfs; // the mounts that the sandboxes of a template share
mod spawn; // spawns a copy of this process in new namespaces
mod template;
mod templates; // all templates and network namespaces // a template and its sandboxes

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::host::print;
use crate::sandbox::agent::orders::{Action, Done, Order};
use crate::sandbox::agent::templates::Templates;
use crate::sandbox::channel::Channel;

/// The hidden verb that runs the agent.
pub const VERB: &str = "agent";

/// The null device. Children read from it, and it is mounted over masked files.
const NULL: &str = "/dev/null";

/// Argument 0 of the agent. Programs see it, with [`VERB`], as the command line of PID 1; it contains no path of the
/// host.
const NAME: &str = "coderunner";

/// How long sandboxes may take to end after the server has exited, before the agent kills them.
const END_TIME: Duration = Duration::from_secs(10);

/// Entry point of the agent process.
pub fn main() -> ExitCode {
    // Sandboxes are copies of this process, so it must hold no arguments or environment variables of the server.
    if std::env::args_os().next().is_none_or(|name| name != NAME) || std::env::vars_os().next().is_some() {
        let error = Command::new("/proc/self/exe").arg0(NAME).arg(VERB).env_clear().exec();
        return failed(&error);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let served = runtime.and_then(|runtime| {
        // The root directory is accessible to every user.
        std::env::set_current_dir("/")?;
        let channel = std::io::stdin().as_fd().try_clone_to_owned()?;
        runtime.block_on(serve(channel))
    });
    served.map_or_else(|error| failed(&error), |()| ExitCode::SUCCESS)
}

fn failed(error: &std::io::Error) -> ExitCode {
    print::stderr_line(&format!("coderunner agent: {error}; it is started by the server, not by hand"));
    ExitCode::FAILURE
}

async fn serve(channel: OwnedFd) -> std::io::Result<()> {
    let channel = Arc::new(Channel::from_fd(channel)?);
    let (mut templates, children, sandboxes) = (Templates::default(), TaskTracker::new(), Sandboxes::default());
    while let Some((Order { id, action }, fds)) = channel.receive_with_fds().await.map_err(std::io::Error::other)? {
        let channel = Arc::clone(&channel);
        // Fails if the server has exited.
        let done = move |result| drop(channel.send(&Done { id, result }, &[]));
        let spawned = match action {
            Action::Preflight => rootfs::preflight(),
            Action::Prepare { template, config } => templates.prepare(template, *config),
            Action::Spawn { template, job_dir, slot } => templates.spawn(&template, &job_dir, slot, fds),
            Action::Kill(order) => {
                let sandboxes = Arc::clone(&sandboxes);
                children.spawn(async move {
                    kill(&sandboxes, order).await;
                    done(Ok(()));
                });
                continue;
            }
            Action::Forget(template) => {
                templates.forget(&template);
                done(Ok(()));
                continue;
            }
        };
        let mut child = match spawned {
            Ok(child) => child,
            Err(error) => {
                done(Err(error.to_string()));
                continue;
            }
        };
        let running = Running::default();
        sandboxes.lock().unwrap_or_else(PoisonError::into_inner).insert(id, running.clone());
        let sandboxes = Arc::clone(&sandboxes);
        children.spawn(async move {
            let result = tokio::select! {
                result = child.end() => result,
                () = running.kill.cancelled() => {
                    child.kill();
                    child.end().await
                }
            };
            sandboxes.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
            running.ended.cancel();
            done(result);
        });
    }
    children.close();
    if timeout(END_TIME, children.wait()).await.is_err() {
        sandboxes.lock().unwrap_or_else(PoisonError::into_inner).values().for_each(|running| running.kill.cancel());
        let _ = timeout(END_TIME, children.wait()).await;
    }
    Ok(())
}

/// The running sandboxes, by the ids of the orders that spawned them.
type Sandboxes = Arc<Mutex<HashMap<u64, Running>>>;

/// A running sandbox.
#[derive(Clone, Default)]
struct Running {
    /// Cancel it to kill the sandbox.
    kill: CancellationToken,
    /// Cancelled when the sandbox has ended.
    ended: CancellationToken,
}

/// Kills a sandbox and waits until it has ended.
async fn kill(sandboxes: &Sandboxes, order: u64) {
    let running = sandboxes.lock().unwrap_or_else(PoisonError::into_inner).get(&order).cloned();
    if let Some(running) = running {
        running.kill.cancel();
        running.ended.cancelled().await;
    }
}
