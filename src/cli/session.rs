//! The engine session of a verb that makes sandboxes.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio_util::task::TaskTracker;

use crate::cli::account;
use crate::config::Settings;
use crate::host::instance::{self, Instance};
use crate::host::process::ProcessError;
use crate::metrics::{Counted, Measured};
use crate::sandbox::Engine;
use crate::sandbox::engine::SelectedEngine;
use crate::sandbox::podman::Podman;
use crate::sandbox::supervisor::{EngineSettings, Supervised};
use crate::sandbox::sweep;

/// How long containers may take to exit when a session closes, before the remaining ones are removed by force.
const SUPERVISORS_TIMEOUT: Duration = Duration::from_secs(15);

/// How long the removal by force may take. The sum of both timeouts has to be longer than the deadline of any podman
/// command. With the drain, the closing of connections and the end of the background tasks, 4.25 s in all, the sum has to be
/// shorter than the unit's `TimeoutStopSec`.
const SWEEP_TIMEOUT: Duration = Duration::from_secs(30);

/// The engine and all that sandboxes need: an instance name, podman, supervisors, and the clean-up at the end.
pub(super) struct EngineSession {
    /// The locked instance name and its directory.
    pub instance: Instance,
    /// The user's podman.
    pub podman: Podman,
    /// The engine that makes sandboxes.
    pub engine: Arc<dyn Engine>,
    /// Whether the engine can limit containers without podman, in a delegated cgroup.
    pub(super) delegated: bool,
    supervisors: TaskTracker,
    /// The containers that have a supervisor; a sweep removes all others.
    pub(super) supervised: Supervised,
}

impl EngineSession {
    /// Takes the instance name and removes the job directories that an earlier process of this name left behind.
    pub fn open(settings: &Settings) -> anyhow::Result<EngineSession> {
        account::refuse_root()?;
        let instance = Instance::take(&settings.instance)?;
        let jobs = instance.jobs();
        sweep::empty(&jobs).with_context(|| format!("cannot make {}", jobs.display()))?;
        let executable = std::env::current_exe().context("cannot find the path of this executable")?;
        instance::check_mountable(&executable)?;
        let podman = Podman::new(&settings.podman);
        let (supervisors, supervised) = (TaskTracker::new(), Supervised::default());
        let engine_settings = EngineSettings {
            instance: instance.name.clone(),
            jobs,
            executable,
            require_limits: settings.require_limits,
            supervisors: supervisors.clone(),
            supervised: supervised.clone(),
            observer: Arc::new(Counted),
        };
        let engine = SelectedEngine::new(settings.engine, podman.clone(), engine_settings);
        let delegated = engine.has_cgroup();
        let engine = Arc::new(Measured(Arc::new(engine)));
        Ok(EngineSession { instance, podman, engine, delegated, supervisors, supervised })
    }

    /// Waits until all containers have exited, then removes the remaining ones by label.
    pub async fn close(self) {
        let exits = async {
            self.engine.release(None).await;
            self.supervisors.close();
            self.supervisors.wait().await;
        };
        if tokio::time::timeout(SUPERVISORS_TIMEOUT, exits).await.is_err() {
            tracing::warn!(containers = self.supervisors.len(), "containers did not exit in time");
        }
        let supervised = Supervised::default();
        let sweep = sweep::sweep(&self.podman, &self.instance.name, &supervised);
        let late = |_| Err(ProcessError::TimedOut { command: "the sweep".into(), deadline: SWEEP_TIMEOUT });
        match tokio::time::timeout(SWEEP_TIMEOUT, sweep).await.unwrap_or_else(late) {
            Ok(0) => {}
            Ok(removed) => tracing::warn!(removed, "containers had to be removed by force"),
            Err(error) => tracing::error!(%error, "containers may be left; the next start removes them"),
        }
    }
}
