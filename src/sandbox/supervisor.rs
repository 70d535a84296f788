//! What every engine does with a container that it has just started: keep it, wait until its init is ready,
//! and give back what it is made of when it is gone.

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

use crate::host::aside::aside;
use crate::host::cgroup::OwnCgroup;
use crate::model::language::Language;
use crate::sandbox::Observer;
use crate::sandbox::channel::Channel;
use crate::sandbox::protocol::{self, FromInit};
use crate::sandbox::{Sandbox, SandboxError, Slot};

/// Longest that making a sandbox may take, the wait for podman's locks included.
const START_TIME: Duration = Duration::from_secs(30);

/// Longest that a released container may take to end by itself before it is removed by force.
const END_TIME: Duration = Duration::from_secs(10);

/// How long after the end of its channel a container's engine may take to say why it ended.
const WORDS_TIME: Duration = Duration::from_secs(2);

/// What an engine needs to know.
#[derive(Debug, Clone)]
pub struct EngineSettings {
    /// Name of the instance, for labels.
    pub instance: String,
    /// Where job directories are made, below the runtime directory: podman's mount namespace sees it.
    pub jobs: PathBuf,
    /// This program, as mounted for init.
    pub executable: PathBuf,
    /// Whether a sandbox whose limits the kernel does not keep is refused.
    pub require_limits: bool,
    /// Where the supervisors of sandboxes run.
    pub supervisors: TaskTracker,
    /// Where they tell what they keep.
    pub living: Living,
    /// Who hears of what becomes of it.
    pub observer: Arc<dyn Observer>,
}

/// The names of the containers that have a supervisor. All others of the instance are left over.
#[derive(Debug, Clone, Default)]
pub struct Living(Arc<Mutex<HashSet<String>>>);

impl Living {
    /// A container is going to be made; it counts as kept until the mark is dropped.
    pub fn mark(&self, name: &str) -> Mark {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned());
        Mark { living: self.clone(), name: name.to_owned() }
    }

    /// Whether a container has a supervisor.
    pub fn is_living(&self, name: &str) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).contains(name)
    }
}

/// A container that has a supervisor.
#[derive(Debug)]
pub struct Mark {
    living: Living,
    name: String,
}

impl Drop for Mark {
    fn drop(&mut self) {
        self.living.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.name);
    }
}

/// A container that was started, and all that there is of it.
pub(crate) struct Started {
    /// Our end of the channel to its init.
    pub channel: Channel,
    /// Where the sources of its job go.
    pub job_dir: PathBuf,
    /// Content id of its image.
    pub image: String,
    /// The image's user, as the image says it.
    pub user: String,
    /// The place it takes.
    pub slot: Slot,
    /// Whether it has a cgroup of its own.
    pub own_cgroup: bool,
    /// That, where this process can see it.
    pub cgroup: Option<Arc<OwnCgroup>>,
    /// Ends when the container has ended and is removed; an error says what was not as it should be.
    pub ended: BoxFuture<'static, Result<(), String>>,
    /// Removes it by force.
    pub remove: BoxFuture<'static, ()>,
    /// What goes with it, before the slot is given back.
    pub owned: Box<dyn Send>,
}

impl EngineSettings {
    /// A directory for the sources of one job.
    pub(crate) fn job_directory(&self) -> Result<TempDir, SandboxError> {
        tempfile::Builder::new()
            .prefix("job-")
            // Not for the programs: these see what init copies.
            .permissions(std::fs::Permissions::from_mode(0o700))
            .tempdir_in(&self.jobs)
            .map_err(SandboxError::io("cannot make a job directory"))
    }

    /// Hands a container to a supervisor, and returns it as a sandbox once its init is ready. Whatever fails, the
    /// supervisor cleans up.
    pub(crate) async fn raise(&self, started: Started, language: &Language) -> Result<Sandbox, SandboxError> {
        let Started { channel, job_dir, image, user, slot, own_cgroup, cgroup, ended, remove, owned } = started;
        let (uid, number) = (slot.uid(&self.instance), slot.number);
        let (released, gone) = (CancellationToken::new(), CancellationToken::new());
        let last_words = Arc::new(OnceLock::new());
        let (told, over, words) = (released.clone(), gone.clone(), Arc::clone(&last_words));
        let observer = Arc::clone(&self.observer);
        self.supervisors.spawn(async move {
            // Dropped in reverse: nothing else takes the place before all of this is gone.
            let _slot = slot;
            let owned = owned;
            keep(ended, remove, &told, &words, over, observer).await;
            if let Err(error) = aside(move || drop(owned)).await {
                tracing::warn!(%error, "the directory or the cgroup of a sandbox may be left");
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
            spent_us: 0,
            prepared: false,
            gone,
            _released: released.drop_guard(),
        };
        let not_made = |reason: String| SandboxError::NotMade { language: language.name.clone(), reason };
        let why = || {
            not_made(last_words.get().cloned().unwrap_or_else(|| "the container exited before init was ready".into()))
        };
        let ready = tokio::select! {
            message = timeout(START_TIME, sandbox.channel.receive()) => message,
            () = sandbox.gone.cancelled() => return Err(why()),
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
                "the executable speaks protocol {version}, this server {}: it was replaced, restart the server",
                protocol::VERSION
            ))),
            Ok(Ok(Some(_))) => Err(not_made("unexpected message from init while it started".into())),
            Ok(Ok(None)) => {
                // The engine knows more than that, a moment later.
                let _ = timeout(WORDS_TIME, sandbox.gone.cancelled()).await;
                Err(why())
            }
            Ok(Err(error)) => Err(error.into()),
            Err(_) => Err(not_made(format!("not ready within {}", humantime::format_duration(START_TIME)))),
        }
    }
}

/// Waits until the container has ended, by itself or because it was released, and sees it removed.
async fn keep(
    mut ended: BoxFuture<'static, Result<(), String>>,
    remove: BoxFuture<'static, ()>,
    released: &CancellationToken,
    words: &OnceLock<String>,
    over: CancellationToken,
    observer: Arc<dyn Observer>,
) {
    let end = tokio::select! {
        end = &mut ended => end,
        () = released.cancelled() => {
            let late = || format!("not gone within {}", humantime::format_duration(END_TIME));
            timeout(END_TIME, &mut ended).await.unwrap_or_else(|_| Err(late()))
        }
    };
    let failed = end.map_err(|reason| words.set(reason)).is_err();
    over.cancel();
    if failed {
        remove.await;
    }
    observer.removed(failed);
}
