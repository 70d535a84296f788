//! Errors of sandboxes and engines.

use std::time::Duration;

use crate::host::process::ProcessError;
use crate::sandbox::channel::ChannelError;

/// Why a job has no outcome. The program that was run is never the cause.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The engine could not create a sandbox.
    #[error("cannot make a sandbox for {language}: {reason}")]
    NotMade {
        /// The language of the sandbox.
        language: String,
        /// The engine's message.
        reason: String,
    },
    /// `require_limits` is set, and the kernel does not enforce the limits of the sandbox.
    #[error("require_limits is set and the kernel does not limit the {0} of sandboxes; see `coderunner doctor`")]
    Unlimited(String),
    /// A command of the engine failed.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// The agent, which runs in podman's namespaces, failed.
    #[error("the agent in podman's namespaces: {0}")]
    Agent(String),
    /// The container had ended before anything of the job ran in it. The job can run in another sandbox.
    #[error("the sandbox had ended while it waited for a job")]
    Lost,
    /// The files compiled in another sandbox could not be unpacked in this one. Nothing of the job has run in it: the
    /// job can be compiled in another sandbox.
    #[error("the files compiled in another sandbox cannot be used")]
    NotCarried,
    /// The container ended while a job ran in it.
    #[error("the sandbox ended by itself: {0}")]
    Gone(String),
    /// Init reported a failure.
    #[error("init failed: {0}")]
    Init(String),
    /// The kernel killed the program although it was below its own memory limit: others used the memory.
    #[error("the host, or the service, ran out of memory")]
    HostMemory,
    /// Init did not answer in time.
    #[error("init did not answer within {}", humantime::format_duration(*.0))]
    Silent(Duration),
    /// An operation on a file or a pipe of the host failed.
    #[error("{what}: {source}")]
    Io {
        /// The operation that failed.
        what: &'static str,
        /// The kernel's error.
        source: std::io::Error,
    },
}

impl SandboxError {
    /// Name of the failure, for metrics.
    pub fn kind(&self) -> &'static str {
        match self {
            SandboxError::NotMade { .. } => "sandbox_not_made",
            SandboxError::Unlimited(_) => "sandbox_not_limited",
            SandboxError::Process(_) => "process",
            SandboxError::Lost => "sandbox_lost",
            SandboxError::NotCarried => "not_carried",
            SandboxError::Gone(_) => "sandbox_gone",
            SandboxError::Init(_) => "init",
            SandboxError::HostMemory => "host_memory",
            SandboxError::Silent(_) => "init_silent",
            SandboxError::Agent(_) => "agent",
            SandboxError::Io { .. } => "io",
        }
    }

    pub(super) fn io(what: &'static str) -> impl FnOnce(std::io::Error) -> SandboxError {
        move |source| SandboxError::Io { what, source }
    }
}

impl From<ChannelError> for SandboxError {
    fn from(error: ChannelError) -> SandboxError {
        match error {
            ChannelError::Closed => SandboxError::Gone(error.to_string()),
            ChannelError::Io { what, source } => SandboxError::Io { what, source },
        }
    }
}
