//! Why there is no outcome of a job.

use std::time::Duration;

use crate::host::process::ProcessError;
use crate::sandbox::channel::ChannelError;

/// Why there is no outcome: never the program's doing.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The engine could not make one.
    #[error("cannot make a sandbox for {language}: {reason}")]
    NotMade {
        /// For which language.
        language: String,
        /// What the engine said.
        reason: String,
    },
    /// The kernel does not keep its limits, and that is required.
    #[error("require_limits is set and the kernel does not limit the {0} of sandboxes; see `coderunner doctor`")]
    Unlimited(String),
    /// An engine's command failed.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// The process in podman's namespaces failed.
    #[error("the agent in podman's namespaces: {0}")]
    Agent(String),
    /// The container had ended before anything of the job ran in it: another one will do.
    #[error("the sandbox had ended while it waited for a job")]
    Lost,
    /// What was compiled elsewhere could not be put into this one, where nothing of the job has run: the job can be
    /// compiled in another one.
    #[error("what was compiled elsewhere cannot be used")]
    NotCarried,
    /// The container ended under a job.
    #[error("the sandbox ended by itself: {0}")]
    Gone(String),
    /// Init said that it cannot go on.
    #[error("init failed: {0}")]
    Init(String),
    /// The kernel killed the program for the memory that others use: it was below its own limit.
    #[error("the host, or the service, ran out of memory")]
    HostMemory,
    /// Init did not answer in time.
    #[error("init did not answer within {}", humantime::format_duration(*.0))]
    Silent(Duration),
    /// The host refused a file or a pipe.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        source: std::io::Error,
    },
}

impl SandboxError {
    /// Which failure it is, in a word.
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
