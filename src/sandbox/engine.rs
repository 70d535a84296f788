//! Selects the engine: the direct engine, which is faster, if it works on this host and enforces limits as well as the
//! podman engine.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use tokio::sync::OnceCell;

use crate::host::blocking::run_blocking;
use crate::host::cgroup::Delegated;
use crate::model::language::Language;
use crate::sandbox::direct::DirectEngine;
use crate::sandbox::podman::{Podman, PodmanEngine};
use crate::sandbox::supervisor::EngineSettings;
use crate::sandbox::{Engine, Sandbox, SandboxError, SandboxSpec};
use serde::{Deserialize, Serialize};

/// How sandboxes are created.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum EngineKind {
    /// Direct if it works and can enforce limits, else podman.
    Auto,
    /// podman creates a template; the agent spawns sandboxes from its configuration. `crun` is the former name.
    #[serde(alias = "crun")]
    #[value(alias = "crun")]
    Direct,
    /// `podman run` per sandbox.
    Podman,
}

impl std::fmt::Display for EngineKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            EngineKind::Auto => "auto",
            EngineKind::Direct => "direct",
            EngineKind::Podman => "podman",
        })
    }
}

/// The configured engine. It is selected when the first sandbox is created, because podman may not work before.
pub struct SelectedEngine {
    kind: EngineKind,
    podman: Podman,
    settings: EngineSettings,
    /// The delegated cgroup, or why there is none.
    cgroup: Result<Delegated, String>,
    engine: OnceCell<Arc<dyn Engine>>,
}

impl SelectedEngine {
    /// Takes over the delegated cgroup. This works only before this process has children.
    pub fn new(kind: EngineKind, podman: Podman, settings: EngineSettings) -> SelectedEngine {
        let cgroup = match kind {
            EngineKind::Podman => Err("the podman engine needs no cgroup".into()),
            EngineKind::Auto | EngineKind::Direct => Delegated::take().map_err(|error| error.to_string()),
        };
        SelectedEngine { kind, podman, settings, cgroup, engine: OnceCell::new() }
    }

    /// Whether this process has a delegated cgroup, and can limit containers without podman.
    pub fn has_cgroup(&self) -> bool {
        self.cgroup.is_ok()
    }

    async fn engine(&self, first: &SandboxSpec) -> Result<&Arc<dyn Engine>, SandboxError> {
        self.engine.get_or_try_init(|| self.select(first)).await
    }

    async fn select(&self, first: &SandboxSpec) -> Result<Arc<dyn Engine>, SandboxError> {
        let podman = || Arc::new(PodmanEngine::new(self.podman.clone(), self.settings.clone()));
        if self.kind == EngineKind::Podman {
            return Ok(podman());
        }
        // If podman fails here, no engine is selected yet: the failure may be temporary.
        let info = self.podman.info().await?;
        let cgroup = self.cgroup.as_ref().ok().cloned();
        let limited = cgroup.is_some();
        let (podman_command, settings) = (self.podman.clone(), self.settings.clone());
        let direct = run_blocking(move || DirectEngine::new(podman_command, settings, cgroup)).await;
        let direct = direct.map_err(SandboxError::io("cannot clear the cgroups of an earlier server"))?;
        let objection = match (direct.preflight(&first.language, &first.image).await?, &self.cgroup) {
            (Some(reason), _) => Some(reason),
            // podman can enforce limits through the user's systemd. Limits matter more than speed.
            (None, Err(reason)) if info.missing_controllers().is_empty() => {
                Some(format!("its containers could not be limited: {reason}"))
            }
            (None, _) => None,
        };
        match objection {
            Some(reason) if self.kind == EngineKind::Auto => {
                direct.release(None).await;
                tracing::info!(reason, "engine: podman, since the direct engine cannot be used");
                Ok(podman())
            }
            Some(reason) => {
                tracing::warn!(reason, "engine: direct, as configured, although the check of the host failed");
                Ok(Arc::new(direct))
            }
            None => {
                tracing::info!(limited, "engine: direct");
                Ok(Arc::new(direct))
            }
        }
    }
}

impl Engine for SelectedEngine {
    fn start(&self, spec: SandboxSpec) -> BoxFuture<'_, Result<Sandbox, SandboxError>> {
        Box::pin(async { self.engine(&spec).await?.start(spec).await })
    }

    fn release<'a>(&'a self, image: Option<&'a str>) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            if let Some(engine) = self.engine.get() {
                engine.release(image).await;
            }
        })
    }

    fn keep_only(&self, languages: &[Arc<Language>]) {
        // Before an engine is selected nothing is kept.
        if let Some(engine) = self.engine.get() {
            engine.keep_only(languages);
        }
    }
}
