//! Sweeps by label: what podman still lists of an instance, and directories nobody owns any more.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::host::process::ProcessError;
use crate::model::backoff::Backoff;
use crate::sandbox::Observer;
use crate::sandbox::podman::Podman;
use crate::sandbox::supervisor::Living;

/// Time between two sweeps of a running server.
const INTERVAL: Duration = Duration::from_secs(60);

/// Time after which a failed sweep is tried again, doubled up to [`INTERVAL`]: podman refuses to remove what is just ending.
const RETRY: Duration = Duration::from_secs(2);

/// Removes the containers of an instance that have no supervisor, and tells how many there were.
pub async fn sweep(podman: &Podman, instance: &str, living: &Living) -> Result<usize, ProcessError> {
    // Listed first: whatever is made later is not in the list, whatever was made before has its mark.
    let mut names = podman.list(instance).await?;
    names.retain(|name| !living.is_living(name));
    podman.remove(&names).await?;
    Ok(names.len())
}

/// Sweeps now and from time to time until `stop`.
pub async fn run(
    podman: Podman,
    instance: String,
    living: Living,
    observer: Arc<dyn Observer>,
    stop: CancellationToken,
) {
    let mut backoff = Backoff::new(RETRY, INTERVAL);
    loop {
        let round = async {
            let swept = sweep(&podman, &instance, &living).await;
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

/// Empties the directory of an instance's jobs; for when none of its servers runs.
pub fn empty(jobs: &Path) -> std::io::Result<()> {
    match std::fs::remove_dir_all(jobs) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => std::fs::create_dir_all(jobs),
    }
}
