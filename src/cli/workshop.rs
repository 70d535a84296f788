//! What the verbs share that make sandboxes.

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

/// How long containers may take to exit at the end, before those that are left are removed by force.
const SUPERVISORS_TIME: Duration = Duration::from_secs(15);

/// How long the removal by force may take. Both times together have to be longer than a command that hangs may take until it
/// is killed, and with the drain shorter than the time that systemd gives a service to stop.
const SWEEP_TIME: Duration = Duration::from_secs(30);

/// What the verbs that make sandboxes share: an instance of their own, podman, an engine, and the clean-up.
pub(super) struct Workshop {
    /// The name and its directory.
    pub instance: Instance,
    /// The user's podman.
    pub podman: Podman,
    /// Makes sandboxes.
    pub engine: Arc<dyn Engine>,
    /// Whether its containers can be limited without podman's help.
    pub(super) delegated: bool,
    supervisors: TaskTracker,
    /// The containers that have a supervisor; a sweep removes all others.
    pub(super) supervised: Supervised,
}

impl Workshop {
    /// Takes the name of the instance and removes what an earlier process of this name left behind.
    pub fn open(settings: &Settings) -> anyhow::Result<Workshop> {
        account::refuse_root()?;
        let instance = Instance::take(&settings.instance)?;
        let jobs = instance.jobs();
        sweep::empty(&jobs).with_context(|| format!("cannot make {}", jobs.display()))?;
        let executable = std::env::current_exe().context("cannot find the path of this executable")?;
        instance::mountable(&executable)?;
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
        Ok(Workshop { instance, podman, engine, delegated, supervisors, supervised })
    }

    /// Waits until all containers have gone, then removes by label those that have not.
    pub async fn close(self) {
        let going = async {
            self.engine.release(None).await;
            self.supervisors.close();
            self.supervisors.wait().await;
        };
        if tokio::time::timeout(SUPERVISORS_TIME, going).await.is_err() {
            tracing::warn!(containers = self.supervisors.len(), "containers did not exit by themselves");
        }
        let supervised = Supervised::default();
        let sweep = sweep::sweep(&self.podman, &self.instance.name, &supervised);
        let late = |_| Err(ProcessError::TimedOut { command: "the sweep".into(), deadline: SWEEP_TIME });
        match tokio::time::timeout(SWEEP_TIME, sweep).await.unwrap_or_else(late) {
            Ok(0) => {}
            Ok(removed) => tracing::warn!(removed, "containers had to be removed by force"),
            Err(error) => tracing::error!(%error, "containers may be left; the next start removes them"),
        }
    }
}
