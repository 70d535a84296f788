//! Sandboxes: one container each, made ahead of time, used by one job, then deleted.
//!
//! Who owns what: a [`Sandbox`] holds our end of the channel to init. Dropping it, whatever the reason,
//! closes the channel; init exits, and the container with it. Its *supervisor*, a task of the engine, owns the
//! rest (the engine's process, the job directory, the [`Slot`]) and gives it back when the container is gone.

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
pub use artifacts::{Builds, Built, Wanted};
use channel::{Channel, ChannelError};
pub use error::SandboxError;
pub use protocol::Enforced;
use protocol::ToInit;
pub use slot::{HEALTH_SLOT, Slot};

/// Label of every container of ours; its value is 1.
pub const LABEL: &str = "io.coderunner";
/// Label with the name of the server that made a container.
pub const LABEL_INSTANCE: &str = "io.coderunner.instance";
/// Label with the language of a sandbox.
pub const LABEL_LANGUAGE: &str = "io.coderunner.language";

/// How long after its time limit a stage's end may reach us, killing and reaping included.
const STAGE_GRACE: Duration = Duration::from_secs(7);

/// Makes sandboxes.
pub trait Engine: Send + Sync {
    /// Makes one and waits until its init is ready. The slot is given back when the container is gone,
    /// also where this fails or is dropped.
    fn start(&self, spec: SandboxSpec) -> BoxFuture<'_, Result<Sandbox, SandboxError>>;

    /// Gives up what is kept for further sandboxes of an image (of all images where none is named), so that
    /// nothing but sandboxes keeps it from being deleted.
    fn release<'a>(&'a self, image: Option<&'a str>) -> BoxFuture<'a, ()>;

    /// From now on sandboxes of these languages are made: gives up what is kept for others, and keeps nothing for them any
    /// more. It goes in the background, with the last of their sandboxes.
    fn keep_only(&self, languages: &[Arc<Language>]);
}

/// What a sandbox is made of.
#[derive(Debug)]
pub struct SandboxSpec {
    /// Whose limits and label it gets.
    pub language: Arc<Language>,
    /// Content id of the image, never its name.
    pub image: String,
    /// The place it takes.
    pub slot: Slot,
}

/// What happens in a sandbox while a job runs, for those who watch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The job waits for a sandbox; so many wait before it.
    Queued(usize),
    /// A stage begins.
    Started(Stage),
    /// A stage printed this; what is beyond the limits never comes.
    Output(Stage, Stream, Bytes),
    /// A stage is over.
    Ended(Arc<StageOutcome>),
}

/// The live side of a run: who watches it, and what is typed into it.
#[derive(Debug, Default)]
pub struct Live {
    /// Gets each event. Bounded by the output limits, so it needs no bound of its own.
    pub events: Option<mpsc::UnboundedSender<Event>>,
    /// Standard input beyond the job's own, until it closes.
    pub stdin: Option<mpsc::Receiver<Bytes>>,
    /// Signals for the running stage.
    pub signals: Option<mpsc::Receiver<i32>>,
    /// Who wants what compiling makes.
    pub built: Option<Wanted>,
    /// What compiling the same files has made elsewhere: a short cut, which changes no outcome.
    pub compiled: Option<Arc<Built>>,
}

impl Live {
    /// What need not be compiled on this image.
    pub fn compiled_on(&self, image: &str) -> Option<&Arc<Built>> {
        self.compiled.as_ref().filter(|built| built.is_of_use(image))
    }
}

/// Hears of what happens to containers.
pub trait Observer: std::fmt::Debug + Send + Sync {
    /// A container is gone; by force, where it did not go by itself.
    fn removed(&self, forced: bool);
    /// Somebody looked for containers without an owner; how many were removed, where that worked.
    fn swept(&self, removed: Option<usize>);
}

/// A container with init waiting in it. Used once: [`Sandbox::run`] consumes it.
#[derive(Debug)]
pub struct Sandbox {
    channel: Channel,
    job_dir: PathBuf,
    uid: u32,
    /// As its image says it.
    user: String,
    /// The number of its slot.
    pub(crate) number: u32,
    /// Content id of its image.
    pub image: String,
    /// What its init saw of the limits.
    pub enforced: Enforced,
    own_cgroup: bool,
    /// That, where this process can see it: what was counted there outlives init.
    cgroup: Option<Arc<OwnCgroup>>,
    /// CPU time of the stages before, in microseconds.
    spent_us: u64,
    /// Whether init has placed the files of a job.
    prepared: bool,
    pub(crate) gone: CancellationToken,
    _released: DropGuard,
}

impl Sandbox {
    /// Whether its container has ended before it was used. Its init goes first, the rest takes podman a moment.
    pub fn is_gone(&self) -> bool {
        self.gone.is_cancelled() || self.channel.is_closed()
    }

    /// Compiles and runs a job, then gives the container up.
    pub async fn run(mut self, language: &Language, job: &Job, live: &mut Live) -> Result<Outcome, SandboxError> {
        let compile = match live.compiled_on(&self.image).cloned() {
            Some(built) => {
                self.place(Vec::new())?;
                self.unpack(&built).await?;
                Some(built.compile.clone())
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

    /// Places the files and compiles them, where the language has that.
    async fn compile(
        &mut self,
        language: &Language,
        job: &Job,
        live: &mut Live,
    ) -> Result<Option<StageOutcome>, SandboxError> {
        // The directory goes with the container.
        self.write_files(job).map_err(|error| if self.is_gone() { SandboxError::Lost } else { error })?;
        self.place(job.files.iter().map(|file| file.name.clone()).collect())?;
        let compile = match language.command(Stage::Compile) {
            Some(_) => Some(self.stage(Stage::Compile, language, job, live).await?),
            None => None,
        };
        let compiled = compile.as_ref().is_none_or(|stage| stage.verdict() == Verdict::Ok);
        if let Some(wanted) = live.built.take_if(|_| compiled) {
            self.hand_on(compile.as_ref(), wanted).await?;
        }
        Ok(compile)
    }

    /// Has init place the files. What comes next hears of its answer: waiting for it here would cost two changes
    /// between processes.
    fn place(&self, files: Vec<String>) -> Result<(), SandboxError> {
        let order = ToInit::Prepare { uid: self.uid, user: self.user.clone(), own_cgroup: self.own_cgroup, files };
        self.channel.send(&order, &[]).map_err(|_| SandboxError::Lost)
    }

    /// Tells init what to do, with what it takes.
    fn order(&self, order: &ToInit, fds: &[BorrowedFd<'_>]) -> Result<(), SandboxError> {
        self.channel.send(order, fds).map_err(|error| match error {
            ChannelError::Closed => self.ended(&error.to_string()),
            other => other.into(),
        })
    }

    /// What it means that init cannot do something. Where that is to place the files, nothing of the job has run: the image
    /// or the directory may have been deleted while it waited.
    fn failed(&self, reason: String) -> SandboxError {
        if self.prepared {
            return SandboxError::Init(reason);
        }
        tracing::warn!(reason, "discarded an unusable sandbox");
        SandboxError::Lost
    }

    /// What it means that the container is no longer there. One that was killed while it waited is found out when the
    /// files are to be placed, and nothing of the job has run: its channel may be open still, for podman holds the
    /// other end until it has cleaned up.
    fn ended(&self, seen: &str) -> SandboxError {
        if self.prepared { SandboxError::Gone(seen.into()) } else { SandboxError::Lost }
    }

    /// The names were checked where the job was made, and nobody but us writes to this directory.
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
