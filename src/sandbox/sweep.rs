//! Sweeps: remove the containers of an instance that have no supervisor, found by their label, and old job directories.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::host::process::ProcessError;
use crate::model::backoff::Backoff;
use crate::sandbox::podman::Podman;
use crate::sandbox::supervisor::Supervised;
use crate::sandbox::{Observer, orphans};

/// Time between two sweeps of a running server.
const INTERVAL: Duration = Duration::from_secs(60);

/// Time after which a failed sweep is retried, doubled up to [`INTERVAL`]: podman refuses to remove a container that is
/// just ending.
const RETRY: Duration = Duration::from_secs(2);

/// Removes the containers of an instance that have no supervisor, with their volumes, and returns how many containers
/// there were.
pub async fn sweep(podman: &Podman, instance: &str, supervised: &Supervised) -> Result<usize, ProcessError> {
    // The list comes first: a container that is created later is not in it, and one created earlier is already
    // registered.
    let mut names = podman.list(instance).await?;
    names.retain(|name| !supervised.contains(name));
    podman.remove(&names).await?;
    let is_owned = |source: &str| supervised.any(|name| orphans::volume_source(instance, name) == source);
    podman.remove_lost_volumes(instance, is_owned).await?;
    Ok(names.len())
}

/// Sweeps at once and then every [`INTERVAL`], until `stop` is cancelled.
pub async fn run(
    podman: Podman,
    instance: String,
    supervised: Supervised,
    observer: Arc<dyn Observer>,
    stop: CancellationToken,
) {
    let mut backoff = Backoff::new(RETRY, INTERVAL);
    loop {
        let round = async {
            let swept = sweep(&podman, &instance, &supervised).await;
            observer.swept(swept.as_ref().ok().copied());
            let pause = match swept {
                Ok(removed) => {
                    if removed > 0 {
                        tracing::info!(removed, "removed containers without an owner");
                    }
                    backoff.reset();
                    INTERVAL
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot remove containers without an owner; retrying");
                    backoff.failed()
                }
            };
            tokio::time::sleep(pause).await;
        };
        tokio::select! {
            () = round => {}
            () = stop.cancelled() => return,
        }
    }
}

/// Empties the parent of an instance's job directories. Only for use when no server of the instance runs.
pub fn empty(jobs: &Path) -> std::io::Result<()> {
    match std::fs::remove_dir_all(jobs) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => std::fs::create_dir_all(jobs),
    }
}
