//! Sandboxes: one container each, made ahead of time, used by one job, then deleted.
//!
//! Ownership: a [`Sandbox`] holds the server's end of the channel to init. Dropping it for any reason closes the
//! channel, so init exits and the container ends. The *supervisor* of the sandbox, a task of the engine, owns the rest
//! (the engine's process, the job directory, the [`Slot`]) and releases it when the container is gone.

pub mod agent;
pub mod artifacts;
mod channel;
pub mod direct;
pub mod engine;
mod error;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub mod fake;
pub mod health;
pub mod init;
mod orphans;
pub mod podman;
pub mod protocol;
pub mod retries;
mod seccomp;
mod slot;
mod stage_client;
mod stage_pipes;
pub mod supervisor;
pub mod sweep;

use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::host::cgroup::OwnCgroup;
use crate::model::job::{Job, Stage};
use crate::model::language::Language;
use crate::model::outcome::{Outcome, StageOutcome, Verdict};
use crate::model::output::Stream;
pub use artifacts::{Build, BuildBudget, BuildRequest};
use channel::{Channel, ChannelError};
pub use error::SandboxError;
pub use protocol::Enforced;
use protocol::ToInit;
pub use slot::{HEALTH_SLOT, Slot};

/// Label of every coderunner container; its value is 1.
pub const LABEL: &str = "io.coderunner";
/// Label with the name of the server instance that created a container.
pub const LABEL_INSTANCE: &str = "io.coderunner.instance";
/// Label with the language of a sandbox.
pub const LABEL_LANGUAGE: &str = "io.coderunner.language";

/// How long after its time limit a stage may take to report its end: init has to kill and reap its processes.
const STAGE_GRACE: Duration = Duration::from_secs(7);

/// Creates sandboxes.
pub trait Engine: Send + Sync {
    /// Creates a sandbox and waits until its init is ready. The slot is released when the container is gone, also if
    /// this fails or the future is dropped.
    fn start(&self, spec: SandboxSpec) -> BoxFuture<'_, Result<Sandbox, SandboxError>>;

    /// Releases what the engine keeps for further sandboxes of an image (of all images if `image` is `None`). After
    /// that only existing sandboxes keep the image from being deleted.
    fn release<'a>(&'a self, image: Option<&'a str>) -> BoxFuture<'a, ()>;

    /// Keeps resources for further sandboxes of these languages only. Those of other languages are released in the
    /// background, when their last sandbox is gone.
    fn keep_only(&self, languages: &[Arc<Language>]);
}

/// Describes a sandbox to create.
#[derive(Debug)]
pub struct SandboxSpec {
    /// The language that sets the limits and the label.
    pub language: Arc<Language>,
    /// Content id of the image, never its name.
    pub image: String,
    /// The slot that the sandbox occupies.
    pub slot: Slot,
}

/// Progress of a job, for clients that follow it live.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The job waits for a sandbox, behind this number of other jobs.
    Queued(usize),
    /// A stage has started.
    Started(Stage),
    /// A stage has printed this. Output beyond the output limit is not reported.
    Output(Stage, Stream, Bytes),
    /// A stage has ended.
    Ended(Arc<StageOutcome>),
}

/// Connections of a running job: events out, further input and signals in, and compiled files in either direction.
#[derive(Debug, Default)]
pub struct Live {
    /// Receives each event. Unbounded, because the output limits already bound what is sent.
    pub events: Option<mpsc::UnboundedSender<Event>>,
    /// Standard input that follows the job's own, until the channel closes.
    pub stdin: Option<mpsc::Receiver<Bytes>>,
    /// Signals for the running stage.
    pub signals: Option<mpsc::Receiver<i32>>,
    /// Requests a copy of the compiled files, for other sandboxes.
    pub build_request: Option<BuildRequest>,
    /// The same files compiled in another sandbox. Using it saves the compile stage and does not change the outcome.
    pub build: Option<Arc<Build>>,
}

impl Live {
    /// The build, if it can be used with this image in place of compiling.
    pub fn build_for(&self, image: &str) -> Option<&Arc<Build>> {
        self.build.as_ref().filter(|build| build.is_usable_on(image))
    }
}

/// Receives events about containers, for the metrics.
pub trait Observer: std::fmt::Debug + Send + Sync {
    /// A container is gone; `forced` if it did not end by itself and had to be removed.
    fn removed(&self, forced: bool);
    /// A sweep for containers without an owner has ended; `removed` is their number, or `None` if the sweep failed.
    fn swept(&self, removed: Option<usize>);
}

/// A container with init waiting in it. Used once: [`Sandbox::run`] consumes it.
#[derive(Debug)]
pub struct Sandbox {
    channel: Channel,
    job_dir: PathBuf,
    uid: u32,
    /// The user that the image names, in the image's spelling.
    user: String,
    /// Number of the slot.
    pub(crate) number: u32,
    /// Content id of the image.
    pub image: String,
    /// The limits that init found enforced.
    pub enforced: Enforced,
    own_cgroup: bool,
    /// The sandbox's own cgroup, if this process can read it: its counters can still be read when init is dead.
    cgroup: Option<Arc<OwnCgroup>>,
    /// CPU time of the earlier stages, in microseconds.
    earlier_cpu_us: u64,
    /// Whether init has confirmed that the job's files are in place.
    prepared: bool,
    pub(crate) gone: CancellationToken,
    _released: DropGuard,
}

impl Sandbox {
    /// Whether the container has ended before it was used. The channel closes as soon as init exits; podman reports the
    /// end of the container a moment later.
    pub fn is_gone(&self) -> bool {
        self.gone.is_cancelled() || self.channel.is_closed()
    }

    /// Compiles and runs a job, then releases the container.
    pub async fn run(mut self, language: &Language, job: &Job, live: &mut Live) -> Result<Outcome, SandboxError> {
        let compile = match live.build_for(&self.image).cloned() {
            Some(build) => {
                self.send_prepare(Vec::new())?;
                self.unpack(&build).await?;
                Some(build.compile.clone())
            }
            None => self.compile(language, job, live).await?,
        };
        let failed = compile.as_ref().is_some_and(|stage| stage.verdict() != Verdict::Ok);
        let run = match failed {
            true => None,
            false => Some(self.stage(Stage::Run, language, job, live).await?),
        };
        Ok(Outcome { compile, run })
    }

    /// Puts the job's files into the sandbox, and compiles them if the language has a compile stage.
    async fn compile(
        &mut self,
        language: &Language,
        job: &Job,
        live: &mut Live,
    ) -> Result<Option<StageOutcome>, SandboxError> {
        // The job directory is deleted when the container ends, so writing to it may fail for that reason.
        self.write_files(job).map_err(|error| if self.is_gone() { SandboxError::Lost } else { error })?;
        self.send_prepare(job.files.iter().map(|file| file.name.clone()).collect())?;
        let compile = match language.command(Stage::Compile) {
            Some(_) => Some(self.stage(Stage::Compile, language, job, live).await?),
            None => None,
        };
        let compiled = compile.as_ref().is_none_or(|stage| stage.verdict() == Verdict::Ok);
        if let Some(request) = live.build_request.take_if(|_| compiled) {
            self.share_build(compile.as_ref(), request).await?;
        }
        Ok(compile)
    }

    /// Tells init to put the files in place. Does not wait for init's reply, which would cost two context switches: the
    /// next step receives it.
    fn send_prepare(&self, files: Vec<String>) -> Result<(), SandboxError> {
        let message = ToInit::Prepare { uid: self.uid, user: self.user.clone(), own_cgroup: self.own_cgroup, files };
        self.channel.send(&message, &[]).map_err(|_| SandboxError::Lost)
    }

    /// Sends init a message, with the descriptors that it needs.
    fn send(&self, message: &ToInit, fds: &[BorrowedFd<'_>]) -> Result<(), SandboxError> {
        self.channel.send(message, fds).map_err(|error| match error {
            ChannelError::Closed => self.container_ended(&error.to_string()),
            other => other.into(),
        })
    }

    /// The error for a failure that init reports. If init could not put the files in place, nothing of the job has run:
    /// the image or the job directory may have been deleted while the sandbox waited for a job.
    fn init_failure(&self, reason: String) -> SandboxError {
        if self.prepared {
            return SandboxError::Init(reason);
        }
        tracing::warn!(reason, "discarded an unusable sandbox");
        SandboxError::Lost
    }

    /// The error for a container that has ended. If it was killed while it waited for a job, that may be noticed only
    /// when the files are to be put in place: podman holds the other end of the channel open until it has cleaned up.
    /// Nothing of the job has run then.
    fn container_ended(&self, cause: &str) -> SandboxError {
        if self.prepared { SandboxError::Gone(cause.into()) } else { SandboxError::Lost }
    }

    /// Writes the job's files to the job directory. Their names were checked when the job was created, and only the
    /// server writes to this directory.
    fn write_files(&self, job: &Job) -> Result<(), SandboxError> {
        job.files
            .iter()
            .try_for_each(|file| {
                let path = self.job_dir.join(&file.name);
                path.parent().map_or(Ok(()), std::fs::create_dir_all)?;
                std::fs::write(path, &file.content)
            })
            .map_err(SandboxError::io("cannot write the sources to the job directory"))
    }
}
