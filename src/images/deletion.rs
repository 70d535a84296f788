//! Deletes unused images once the last container made from them is gone.

use std::time::Duration;

use crate::host::process::ProcessError;
use crate::images::names;
use crate::images::updater::ImageUpdater;
use crate::model::backoff::Backoff;

/// Attempts to delete a replaced image while jobs may still run on it, with the first and the longest pause between
/// them. The pauses take 31 s together.
pub(super) const DELETE_ATTEMPTS: u32 = 6;
const DELETE_FIRST: Duration = Duration::from_secs(1);
const DELETE_LONGEST: Duration = Duration::from_secs(16);

impl ImageUpdater {
    /// Deletes replaced and broken images whose containers are gone. Makes up to `max_attempts` attempts, since
    /// containers may still run.
    pub(super) async fn delete_old(&self, max_attempts: u32) {
        let prefix = names::all_old(&self.instance);
        let mut backoff = Backoff::new(DELETE_FIRST, DELETE_LONGEST);
        for attempt in 1..=max_attempts {
            let left = match self.podman.names(&prefix).await {
                Ok(left) if left.is_empty() => return,
                Ok(left) => left,
                Err(error) => {
                    tracing::warn!(%error, "cannot list images that are to be deleted");
                    Vec::new()
                }
            };
            for name in left {
                let deleted = self.delete(&name).await;
                if let (Err(error), true) = (deleted, attempt == max_attempts) {
                    tracing::info!(image = name, %error, "cannot delete an unused image; retrying at the next update");
                }
            }
            if attempt < max_attempts {
                tokio::time::sleep(backoff.failed()).await;
            }
        }
    }

    async fn delete(&self, old_name: &str) -> Result<(), ProcessError> {
        let Some(id) = self.podman.image_id(old_name).await? else {
            return Ok(());
        };
        // In each attempt: a sandbox whose start began before the image was replaced may have made the engine keep the
        // image again.
        self.engine.release(Some(&id)).await;
        let all_names = self.podman.names_of(&id).await?;
        if all_names.iter().any(|name| name != old_name) {
            // Another instance uses the image under another name, or this one uses it again.
            return self.podman.untag(&id, old_name).await;
        }
        self.podman.remove_image(&id).await
    }
}
