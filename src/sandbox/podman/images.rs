//! podman verbs for images.

use std::ffi::OsString;
use std::path::Path;
use std::sync::PoisonError;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::host::process::ProcessError;
use crate::sandbox::podman::Podman;

/// Longest user of an image (`USER:GROUP`) in bytes: Linux allows names of 32 bytes.
const MAX_USER: usize = 256;

/// Part of podman's error for an image that does not exist.
const IMAGE_UNKNOWN: &str = "image not known";

/// Most images whose facts are kept: more than a server uses.
const MAX_KNOWN: usize = 1000;

/// What an image says of itself.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct ImageFacts {
    /// Its content id.
    id: String,
    /// When it was built.
    created: SystemTime,
    /// The user that it names, in its spelling; empty if it names none.
    user: String,
}

impl ImageFacts {
    /// Parses an id, a time in seconds since 1970, and a user, separated by spaces.
    fn parse(line: &str) -> ImageFacts {
        let mut words = line.splitn(3, ' ');
        let mut word = || words.next().unwrap_or_default().trim().to_owned();
        let (id, seconds, user) = (word(), word(), word());
        // A time before 1970 cannot be parsed and counts as 0, which is also the time of reproducible builds.
        let created = UNIX_EPOCH + Duration::from_secs(seconds.parse().unwrap_or_default());
        // A longer user is no valid name.
        ImageFacts { id, created, user: if user.len() <= MAX_USER { user } else { String::new() } }
    }
}

impl Podman {
    /// Content id of an image; `None` if no image has this name.
    pub async fn image_id(&self, name: &str) -> Result<Option<String>, ProcessError> {
        match self.inspect_image(name).await {
            Ok(image) => Ok(Some(image.id)),
            Err(error) if error.message_contains(IMAGE_UNKNOWN) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Asks podman about an image, by its name or id, and remembers the answer by the id.
    async fn inspect_image(&self, name: &str) -> Result<ImageFacts, ProcessError> {
        // An image need not say when it was built.
        let format = "{{.Id}} {{if .Created}}{{.Created.Unix}}{{else}}0{{end}} {{.Config.User}}";
        let facts = ImageFacts::parse(&self.text(&["image", "inspect", "--format", format, "--", name]).await?);
        let mut known = self.images.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MAX_KNOWN {
            known.clear();
        }
        known.insert(facts.id.clone(), facts.clone());
        Ok(facts)
    }

    /// The facts about the image with this content id. They never change, so podman is asked once.
    async fn image_facts(&self, id: &str) -> Result<ImageFacts, ProcessError> {
        let known = self.images.lock().unwrap_or_else(PoisonError::into_inner).get(id).cloned();
        match known {
            Some(facts) => Ok(facts),
            None => self.inspect_image(id).await,
        }
    }

    /// Pulls an image and returns its content id. Passes podman's progress lines to `on_line`.
    pub async fn pull(&self, name: &str, deadline: Duration, on_line: impl Fn(&str)) -> Result<String, ProcessError> {
        let output = self.cmd(["pull", "--", name]).output_with(deadline, on_line).await?;
        let id = String::from_utf8_lossy(&output).lines().last().unwrap_or_default().trim().to_owned();
        match id.is_empty() {
            false => Ok(id),
            true => Ok(self.inspect_image(name).await?.id),
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
        Ok(self.image_facts(id).await?.user)
    }

    /// The time when an image was built.
    pub async fn image_created(&self, id: &str) -> Result<SystemTime, ProcessError> {
        Ok(self.image_facts(id).await?.created)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn image_facts_are_parsed_from_one_line() {
        let facts = |id: &str, seconds, user: &str| {
            let created = UNIX_EPOCH + Duration::from_secs(seconds);
            ImageFacts { id: id.into(), created, user: user.into() }
        };
        assert_eq!(ImageFacts::parse("0a1b 1764000000 app:users"), facts("0a1b", 1_764_000_000, "app:users"));
        assert_eq!(ImageFacts::parse("0a1b 0 a user"), facts("0a1b", 0, "a user"));
        // Output is trimmed, so that the space before an empty user is missing.
        assert_eq!(ImageFacts::parse("0a1b -62135596800"), facts("0a1b", 0, ""));
        assert_eq!(ImageFacts::parse(&format!("0a1b 5 {}", "x".repeat(MAX_USER + 1))), facts("0a1b", 5, ""));
    }
}
