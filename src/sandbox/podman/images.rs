//! podman verbs for images.

use std::ffi::OsString;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::host::process::ProcessError;
use crate::sandbox::podman::Podman;

/// Longest user of an image (`USER:GROUP`) in bytes: Linux allows names of 32 bytes.
const MAX_USER: usize = 256;

impl Podman {
    /// Content id of an image; `None` if no image has this name.
    pub async fn image_id(&self, name: &str) -> Result<Option<String>, ProcessError> {
        match self.text(&["image", "inspect", "--format", "{{.Id}}", "--", name]).await {
            Ok(id) => Ok(Some(id)),
            // Exit code 125 stands for any failure. `exists` distinguishes a missing image from other failures.
            Err(error @ ProcessError::Failed { .. }) => match self.text(&["image", "exists", "--", name]).await {
                Err(ProcessError::Failed { status, .. }) if status.code() == Some(1) => Ok(None),
                _ => Err(error),
            },
            Err(error) => Err(error),
        }
    }

    /// Pulls an image and returns its content id. Passes podman's progress lines to `on_line`.
    pub async fn pull(&self, name: &str, deadline: Duration, on_line: impl Fn(&str)) -> Result<String, ProcessError> {
        let output = self.cmd(["pull", "--", name]).output_with(deadline, on_line).await?;
        let id = String::from_utf8_lossy(&output).lines().last().unwrap_or_default().trim().to_owned();
        match id.is_empty() {
            false => Ok(id),
            true => self.text(&["image", "inspect", "--format", "{{.Id}}", "--", name]).await,
        }
    }

    /// Creates an image of this name from an archive of files.
    pub async fn import(&self, archive: &Path, name: &str) -> Result<(), ProcessError> {
        let fixed = ["import", "--quiet", "--"].map(OsString::from);
        self.rename(fixed.into_iter().chain([archive.into(), name.into()])).await
    }

    /// Adds a name to an image.
    pub async fn tag(&self, id: &str, name: &str) -> Result<(), ProcessError> {
        self.rename(["tag", "--", id, name]).await
    }

    /// Removes a name from an image.
    pub async fn untag(&self, id: &str, name: &str) -> Result<(), ProcessError> {
        self.rename(["untag", "--", id, name]).await
    }

    /// Removes an image unless a container or a name still uses it.
    pub async fn remove_image(&self, id: &str) -> Result<(), ProcessError> {
        self.rename(["rmi", "--", id]).await
    }

    /// The user that an image names, in the image's spelling; empty if it names none.
    pub async fn image_user(&self, id: &str) -> Result<String, ProcessError> {
        let user = self.text(&["image", "inspect", "--format", "{{.Config.User}}", "--", id]).await?;
        // A longer one is no valid name.
        Ok(if user.len() <= MAX_USER { user } else { String::new() })
    }

    /// The time when an image was built.
    pub async fn image_created(&self, id: &str) -> Result<SystemTime, ProcessError> {
        let seconds = self.text(&["image", "inspect", "--format", "{{.Created.Unix}}", "--", id]).await?;
        // A time before 1970 cannot be parsed and counts as 0, which is also the time of reproducible builds.
        Ok(UNIX_EPOCH + Duration::from_secs(seconds.parse().unwrap_or_default()))
    }

    /// Names of images that start with `prefix`.
    pub async fn names(&self, prefix: &str) -> Result<Vec<String>, ProcessError> {
        let names = self.text(&["images", "--format", "{{.Repository}}:{{.Tag}}"]).await?;
        Ok(names.lines().filter(|name| name.starts_with(prefix)).map(str::to_owned).collect())
    }

    /// All names of an image.
    pub async fn names_of(&self, id: &str) -> Result<Vec<String>, ProcessError> {
        let names =
            self.text(&["image", "inspect", "--format", "{{range .RepoTags}}{{println .}}{{end}}", "--", id]).await?;
        Ok(names.lines().map(str::to_owned).filter(|name| !name.is_empty()).collect())
    }
}
