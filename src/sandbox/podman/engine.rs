//! The podman engine: creates each sandbox with `podman run`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures_util::future::BoxFuture;

use crate::host::process::Passed;
use crate::model::language::Language;
use crate::sandbox::channel::Channel;
use crate::sandbox::podman::Podman;
use crate::sandbox::podman::args::run_args;
use crate::sandbox::podman::dev::make_dev;
use crate::sandbox::supervisor::{EngineSettings, Started};
use crate::sandbox::{Engine, Sandbox, SandboxError, SandboxSpec, orphans};

/// Creates each sandbox with `podman run`, which stays a child of the server until its container is removed.
pub struct PodmanEngine {
    podman: Podman,
    settings: EngineSettings,
    next_number: AtomicU64,
}

impl PodmanEngine {
    /// An engine that uses this podman.
    pub fn new(podman: Podman, settings: EngineSettings) -> PodmanEngine {
        PodmanEngine { podman, settings, next_number: AtomicU64::new(0) }
    }

    async fn create(&self, spec: SandboxSpec) -> Result<Sandbox, SandboxError> {
        let SandboxSpec { language, image, slot } = spec;
        let user = self.podman.image_user(&image).await?;
        let job_dir = self.settings.job_directory()?;
        let number = self.next_number.fetch_add(1, Ordering::Relaxed);
        let name = orphans::name(&self.settings.instance, "box", number);
        let guard = self.settings.supervised.register(&name);
        let dev = self.settings.jobs.with_file_name("dev");
        make_dev(&dev).map_err(SandboxError::io("cannot make the directory of a container's devices"))?;
        let args = run_args(&name, &self.settings, &language, &image, job_dir.path(), &dev);
        let (channel, theirs) = Channel::pair()?;
        let mut running = self.podman.cmd(args).spawn(Passed::Third(theirs))?;
        let podman = self.podman.clone();
        let started = Started {
            channel,
            job_dir: job_dir.path().to_owned(),
            image,
            user,
            slot,
            own_cgroup: true,
            cgroup: None,
            // podman removes the container itself (--rm), unless it fails half-way or is killed.
            ended: Box::pin(async move { running.end().await }),
            remove: Box::pin(async move { podman.remove_or_warn(&name).await }),
            owned: Box::new((job_dir, guard)),
        };
        self.settings.supervise(started, &language).await
    }
}

impl Engine for PodmanEngine {
    fn start(&self, spec: SandboxSpec) -> BoxFuture<'_, Result<Sandbox, SandboxError>> {
        Box::pin(self.create(spec))
    }

    /// Does nothing: this engine keeps no resources per language.
    fn keep_only(&self, _: &[Arc<Language>]) {}

    /// Does nothing, for the same reason.
    fn release<'a>(&'a self, _: Option<&'a str>) -> BoxFuture<'a, ()> {
        Box::pin(std::future::ready(()))
    }
}
