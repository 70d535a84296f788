//! Why an image cannot be used.

use crate::host::process::ProcessError;
use crate::sandbox::SandboxError;

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// podman failed.
    #[error(transparent)]
    Podman(#[from] ProcessError),
    /// The pull failed: the registry has no such image, the registry is down, or the disk is full.
    #[error("it cannot be pulled: {0}")]
    Pull(ProcessError),
    /// The image has a local name and is not on this host.
    #[error("there is no image {0}; a name under localhost/ is never pulled: build it")]
    NoLocal(String),
    /// No sandbox could be made from the image, or the sandbox failed while it ran the health program.
    #[error("its health program could not be run: {0}")]
    Sandbox(#[from] SandboxError),
    /// The health program did not print the expected output.
    #[error("the health program of {language} fails: {failure}")]
    Unhealthy {
        /// The language of the health program.
        language: String,
        /// The verdict and the output.
        failure: String,
    },
}

impl ImageError {
    /// The reason for clients; the log has the details.
    fn reason(&self) -> &'static str {
        match self {
            ImageError::Podman(_) => "podman fails",
            ImageError::Pull(_) => "its image cannot be pulled",
            ImageError::NoLocal(_) => "its image is not installed",
            ImageError::Sandbox(_) | ImageError::Unhealthy { .. } => "its image failed its health check",
        }
    }

    /// The reason for clients, with the note that the server tries again.
    pub(super) fn trying_again(&self) -> String {
        format!("{}; trying again", self.reason())
    }
}
