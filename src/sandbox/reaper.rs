//! Sweeps by label: what podman still lists of an instance, and directories nobody owns any more.

use std::collections::HashSet;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::podman::Podman;
use crate::metrics;
use crate::process::ProcessError;

/// Time between two sweeps of a running server.
const INTERVAL: Duration = Duration::from_secs(60);

/// Time after which a failed sweep is tried again, doubled up to [`INTERVAL`]: podman refuses to remove what is just ending.
const RETRY: Duration = Duration::from_secs(2);

/// The names of the containers that have a keeper. All others of the instance are left over.
#[derive(Debug, Clone, Default)]
pub struct Living(Arc<Mutex<HashSet<String>>>);

impl Living {
    /// A container is going to be made; it counts as kept until the mark is dropped.
    pub fn mark(&self, name: &str) -> Mark {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned());
        Mark { living: self.clone(), name: name.to_owned() }
    }

    fn is_living(&self, name: &str) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).contains(name)
    }
}

/// A container that has a keeper.
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

/// Removes the containers of an instance that have no keeper, and tells how many there were.
pub async fn sweep(podman: &Podman, instance: &str, living: &Living) -> Result<usize, ProcessError> {
    // Listed first: whatever is made later is not in the list, whatever was made before has its mark.
    let mut names = podman.list(instance).await?;
    names.retain(|name| !living.is_living(name));
    podman.remove(&names).await?;
    Ok(names.len())
}

/// Sweeps now and from time to time until `stop`.
pub async fn run(podman: Podman, instance: String, living: Living, stop: CancellationToken) {
    let mut retry = RETRY;
    loop {
        let round = async {
            let swept = sweep(&podman, &instance, &living).await;
            metrics::swept(&swept);
            let pause = match swept {
                Ok(removed) => {
                    if removed > 0 {
                        tracing::info!(removed, "containers without an owner are removed");
                    }
                    retry = RETRY;
                    INTERVAL
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot sweep; trying again");
                    let pause = retry;
                    retry = (retry * 2).min(INTERVAL);
                    pause
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
