//! Supervises the containers of all engines: waits until init is ready, and releases the container's resources when it
//! is gone.

use std::collections::HashSet;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use tempfile::TempDir;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::host::blocking::run_blocking;
use crate::host::cgroup::OwnCgroup;
use crate::model::language::Language;
use crate::sandbox::Observer;
use crate::sandbox::channel::Channel;
use crate::sandbox::protocol::{self, FromInit};
use crate::sandbox::{Sandbox, SandboxError, Slot};

/// Longest that creating a sandbox may take, including the wait for podman's locks.
const START_TIME: Duration = Duration::from_secs(30);

/// Longest that a released container may take to end by itself before it is removed by force.
const END_TIME: Duration = Duration::from_secs(10);

/// How long the engine may take to report why a container ended, after the channel of its init has closed.
const END_REASON_TIME: Duration = Duration::from_secs(2);

/// Settings of an engine.
#[derive(Debug, Clone)]
pub struct EngineSettings {
    /// Name of the instance, for labels.
    pub instance: String,
    /// Parent of the job directories. It is below the runtime directory, which podman's mount namespace can see.
    pub jobs: PathBuf,
    /// Path of this program, which is mounted into containers as init.
    pub executable: PathBuf,
    /// Whether to refuse a sandbox whose limits the kernel does not enforce.
    pub require_limits: bool,
    /// Runs the supervisors of sandboxes.
    pub supervisors: TaskTracker,
    /// Names of the containers that have a supervisor.
    pub supervised: Supervised,
    /// Receives the removal of containers.
    pub observer: Arc<dyn Observer>,
}

/// Names of the containers that have a supervisor. All other containers of the instance are orphans.
#[derive(Debug, Clone, Default)]
pub struct Supervised(Arc<Mutex<HashSet<String>>>);

impl Supervised {
    /// Registers a container before it is created. It counts as supervised until the guard is dropped.
    pub fn register(&self, name: &str) -> SupervisedGuard {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned());
        SupervisedGuard { supervised: self.clone(), name: name.to_owned() }
    }

    /// Whether a container has a supervisor.
    pub fn contains(&self, name: &str) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).contains(name)
    }

    /// Whether there is such a container.
    pub fn any(&self, is_wanted: impl Fn(&str) -> bool) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().any(|name| is_wanted(name))
    }
}

/// Keeps a container in [`Supervised`].
#[derive(Debug)]
pub struct SupervisedGuard {
    supervised: Supervised,
    name: String,
}

impl Drop for SupervisedGuard {
    fn drop(&mut self) {
        self.supervised.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.name);
    }
}

/// A container that was just started, with its resources.
pub(crate) struct Started {
    /// The server's end of the channel to init.
    pub channel: Channel,
    /// Directory for the sources of the job.
    pub job_dir: PathBuf,
    /// Content id of the image.
    pub image: String,
    /// The user that the image names, in the image's spelling.
    pub user: String,
    /// The slot that the container occupies.
    pub slot: Slot,
    /// Whether the container has a cgroup of its own.
    pub own_cgroup: bool,
    /// The container's own cgroup, if this process can read it.
    pub cgroup: Option<Arc<OwnCgroup>>,
    /// Completes when the container has ended and is removed. On an error it still has to be removed.
    pub ended: BoxFuture<'static, Result<(), String>>,
    /// Removes the container by force.
    pub remove: BoxFuture<'static, ()>,
    /// Dropped when the container is gone, before the slot is released.
    pub owned: Box<dyn Send>,
}

impl EngineSettings {
    /// Creates a directory for the sources of one job.
    pub(crate) fn job_directory(&self) -> Result<TempDir, SandboxError> {
        tempfile::Builder::new()
            .prefix("job-")
            // Programs have no access: init copies the sources for them.
            .permissions(std::fs::Permissions::from_mode(0o700))
            .tempdir_in(&self.jobs)
            .map_err(SandboxError::io("cannot make a job directory"))
    }

    /// Hands a container to a new supervisor, and returns it as a sandbox when its init is ready. On any failure the
    /// supervisor cleans up.
    pub(crate) async fn supervise(&self, started: Started, language: &Language) -> Result<Sandbox, SandboxError> {
        let Started { channel, job_dir, image, user, slot, own_cgroup, cgroup, ended, remove, owned } = started;
        let (uid, number) = (slot.uid(&self.instance), slot.number);
        let (released, gone) = (CancellationToken::new(), CancellationToken::new());
        let end_reason = Arc::new(OnceLock::new());
        let (on_release, set_gone, reason_slot) = (released.clone(), gone.clone(), Arc::clone(&end_reason));
        let observer = Arc::clone(&self.observer);
        self.supervisors.spawn(async move {
            // Dropped in reverse order: the slot is released after all other resources.
            let _slot = slot;
            let owned = owned;
            await_end(ended, remove, &on_release, &reason_slot, set_gone, observer).await;
            if let Err(error) = run_blocking(move || drop(owned)).await {
                tracing::warn!(%error, "the job directory or the cgroup of a sandbox may be left behind");
            }
        });
        let mut sandbox = Sandbox {
            channel,
            job_dir,
            uid,
            user,
            number,
            image,
            enforced: protocol::Enforced::default(),
            own_cgroup,
            cgroup,
            earlier_cpu_us: 0,
            prepared: false,
            gone,
            _released: released.drop_guard(),
        };
        let not_made = |reason: String| SandboxError::NotMade { language: language.name.clone(), reason };
        let ended_early = || {
            not_made(end_reason.get().cloned().unwrap_or_else(|| "the container exited before init was ready".into()))
        };
        let ready = tokio::select! {
            message = timeout(START_TIME, sandbox.channel.receive()) => message,
            () = sandbox.gone.cancelled() => return Err(ended_early()),
        };
        match ready {
            Ok(Ok(Some(FromInit::Ready { version: protocol::VERSION, enforced }))) => {
                if own_cgroup {
                    sandbox.enforced = enforced;
                }
                match sandbox.enforced.missing() {
                    missing if self.require_limits && !missing.is_empty() => {
                        Err(SandboxError::Unlimited(missing.join(", ")))
                    }
                    _ => Ok(sandbox),
                }
            }
            Ok(Ok(Some(FromInit::Ready { version, .. }))) => Err(not_made(format!(
                "init has protocol version {version}, the server {}: the executable was replaced, restart the server",
                protocol::VERSION
            ))),
            Ok(Ok(Some(_))) => Err(not_made("unexpected message from init while it started".into())),
            Ok(Ok(None)) => {
                // The engine reports the reason a moment later.
                let _ = timeout(END_REASON_TIME, sandbox.gone.cancelled()).await;
                Err(ended_early())
            }
            Ok(Err(error)) => Err(error.into()),
            Err(_) => Err(not_made(format!("init was not ready within {}", humantime::format_duration(START_TIME)))),
        }
    }
}

/// Waits until the container has ended, by itself or because it was released, and removes it by force if it has not
/// ended as it should. Stores the reason of such an end in `end_reason`, and cancels `gone`.
async fn await_end(
    mut ended: BoxFuture<'static, Result<(), String>>,
    remove: BoxFuture<'static, ()>,
    released: &CancellationToken,
    end_reason: &OnceLock<String>,
    gone: CancellationToken,
    observer: Arc<dyn Observer>,
) {
    let end = tokio::select! {
        end = &mut ended => end,
        () = released.cancelled() => {
            let late = || format!("the container did not end within {}", humantime::format_duration(END_TIME));
            timeout(END_TIME, &mut ended).await.unwrap_or_else(|_| Err(late()))
        }
    };
    let failed = end.map_err(|reason| end_reason.set(reason)).is_err();
    gone.cancel();
    if failed {
        remove.await;
    }
    observer.removed(failed);
}
