//! Deleting images that are not used any more, once the last container made from them is gone.

use std::time::Duration;

use crate::host::process::ProcessError;
use crate::images::names;
use crate::images::updater::ImageUpdater;
use crate::model::backoff::Backoff;

/// How many times deleting a replaced image is tried while jobs still run on it, with the first and the longest pause
/// in between: half a minute together.
pub(super) const DELETE_TRIES: u32 = 6;
const DELETE_FIRST: Duration = Duration::from_secs(1);
const DELETE_LONGEST: Duration = Duration::from_secs(16);

impl ImageUpdater {
    /// Deletes replaced and broken images whose containers are gone, in at most so many attempts: containers may take a
    /// while.
    pub(super) async fn delete_old(&self, most: u32) {
        let ours = names::all_old(&self.instance);
        let mut backoff = Backoff::new(DELETE_FIRST, DELETE_LONGEST);
        for tries in 1..=most {
            let left = match self.podman.names(&ours).await {
                Ok(left) if left.is_empty() => return,
                Ok(left) => left,
                Err(error) => {
                    tracing::warn!(%error, "cannot list images that are to be deleted");
                    Vec::new()
                }
            };
            for name in left {
                let deleted = self.delete(&name).await;
                if let (Err(error), true) = (deleted, tries == most) {
                    tracing::info!(image = name, %error, "cannot delete an unused image; retrying at the next update");
                }
            }
            if tries < most {
                tokio::time::sleep(backoff.failed()).await;
            }
        }
    }

    async fn delete(&self, old_name: &str) -> Result<(), ProcessError> {
        let Some(id) = self.podman.image_id(old_name).await? else {
            return Ok(());
        };
        // In each attempt: a sandbox whose start began before the image was replaced may have made the engine keep it
        // again.
        self.engine.release(Some(&id)).await;
        let all_names = self.podman.names_of(&id).await?;
        if all_names.iter().any(|name| name != old_name) {
            // In use under another name: by another instance, or by this one again.
            return self.podman.untag(&id, old_name).await;
        }
        self.podman.remove_image(&id).await
    }
}
