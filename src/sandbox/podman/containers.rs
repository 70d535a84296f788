//! podman verbs for containers.

use std::ffi::OsString;
use std::path::PathBuf;

use crate::host::blocking::run_blocking;
use crate::host::process::ProcessError;
use crate::sandbox::podman::Podman;
use crate::sandbox::podman::cli::VOLUME_UNKNOWN;
use crate::sandbox::{LABEL, LABEL_INSTANCE, orphans};

impl Podman {
    /// Names of all containers of an instance in any state, including those that podman no longer knows.
    pub async fn list(&self, instance: &str) -> Result<Vec<String>, ProcessError> {
        let filter = format!("label={LABEL_INSTANCE}={instance}");
        let ours = format!("label={LABEL}=1");
        let names =
            self.text(&["ps", "--all", "--format", "{{.Names}}", "--filter", &ours, "--filter", &filter]).await?;
        let mut names: Vec<String> = names.lines().map(str::to_owned).collect();
        let instance = instance.to_owned();
        names.extend(scan_proc(move || orphans::monitored(&instance)).await?);
        names.sort_unstable();
        names.dedup();
        Ok(names)
    }

    /// Removes containers with their volumes, running or not. A container that does not exist is no error.
    pub async fn remove(&self, names: &[String]) -> Result<(), ProcessError> {
        if names.is_empty() {
            return Ok(());
        }
        let fixed = ["rm", "--force", "--volumes", "--ignore", "--time", "0", "--"];
        let args = fixed.into_iter().chain(names.iter().map(String::as_str));
        let removed = self.verb(args).await;
        let names = names.to_vec();
        scan_proc(move || orphans::kill(&names)).await?;
        removed.map(drop)
    }

    /// Removes a container. Logs a failure; the next sweep tries again.
    pub async fn remove_or_warn(&self, name: &str) {
        if let Err(error) = self.remove(&[name.to_owned()]).await {
            tracing::warn!(container = name, %error, "cannot remove a container; retrying in the next sweep");
        }
    }

    /// Removes the volumes of containers that podman no longer knows: it leaves them if it is killed, or fails, while it
    /// creates or removes a container. `is_owned` says of the source of a volume whether its container may still exist.
    pub async fn remove_lost_volumes(
        &self,
        instance: &str,
        is_owned: impl Fn(&str) -> bool,
    ) -> Result<(), ProcessError> {
        // Calling podman takes much longer, and usually there is none.
        if std::fs::read_dir(&self.info().await?.volumes).is_ok_and(|mut volumes| volumes.next().is_none()) {
            return Ok(());
        }
        let format = "{{.Name}} {{index .Options \"device\"}}";
        let unused = self.text(&["volume", "ls", "--filter", "dangling=true", "--format", format]).await?;
        let is_lost = |source: &str| orphans::is_volume_of(instance, source) && !is_owned(source);
        let volumes = unused.lines().filter_map(|line| line.split_once(' '));
        let lost: Vec<&str> = volumes.filter(|(_, source)| is_lost(source)).map(|(name, _)| name).collect();
        if lost.is_empty() {
            return Ok(());
        }
        tracing::info!(volumes = lost.len(), "removing volumes without a container");
        match self.verb(["volume", "rm", "--"].into_iter().chain(lost)).await {
            // podman itself has removed one, with its container, and this call has removed the others.
            Err(error) if error.message_contains(VOLUME_UNKNOWN) => Ok(()),
            removed => removed.map(drop),
        }
    }

    /// Creates a container with all of its mounts, but does not start it. Returns the path of the OCI configuration
    /// that podman wrote for it.
    pub async fn create(&self, name: &str, args: Vec<OsString>) -> Result<PathBuf, ProcessError> {
        let args = std::iter::once("create".into()).chain(args);
        self.verb(args).await?;
        self.text(&["init", "--", name]).await?;
        self.text(&["container", "inspect", "--format", "{{.OCIConfigPath}}", "--", name]).await.map(PathBuf::from)
    }
}

/// Scans `/proc` in a thread of its own, because that takes long on a host with many processes.
async fn scan_proc<T: Send + 'static>(scan: impl FnOnce() -> T + Send + 'static) -> Result<T, ProcessError> {
    let failed = |source| ProcessError::Io { command: "looking for containers that podman lost".into(), source };
    run_blocking(scan).await.map_err(failed)
}
