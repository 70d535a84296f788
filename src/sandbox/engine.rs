//! Which engine it is: the faster one where it works here and keeps limits as well as the other.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use tokio::sync::OnceCell;

use crate::host::aside::aside;
use crate::host::cgroup::Delegated;
use crate::model::language::Language;
use crate::sandbox::direct::DirectEngine;
use crate::sandbox::podman::{Podman, PodmanEngine};
use crate::sandbox::supervisor::EngineSettings;
use crate::sandbox::{Engine, Sandbox, SandboxError, SandboxSpec};
use serde::{Deserialize, Serialize};

/// Which way sandboxes are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum EngineKind {
    /// Direct where it works and limits can be kept that way, else podman.
    Auto,
    /// A template by podman, sandboxes by its configuration; once this was done by crun.
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

/// The engine that was asked for; `auto` is decided when the first sandbox is made, for podman may not work yet.
pub struct Chosen {
    kind: EngineKind,
    podman: Podman,
    settings: EngineSettings,
    /// The reason where there is none.
    cgroup: Result<Delegated, String>,
    engine: OnceCell<Arc<dyn Engine>>,
}

impl Chosen {
    /// Takes the delegated cgroup, which can only be done before this process has children.
    pub fn new(kind: EngineKind, podman: Podman, settings: EngineSettings) -> Chosen {
        let cgroup = match kind {
            EngineKind::Podman => Err("the podman engine needs none".into()),
            EngineKind::Auto | EngineKind::Direct => Delegated::take().map_err(|error| error.to_string()),
        };
        Chosen { kind, podman, settings, cgroup, engine: OnceCell::new() }
    }

    /// Whether containers can be limited without podman's help.
    pub fn limits_by_itself(&self) -> bool {
        self.cgroup.is_ok()
    }

    async fn engine(&self, first: &SandboxSpec) -> Result<&Arc<dyn Engine>, SandboxError> {
        self.engine.get_or_try_init(|| self.choose(first)).await
    }

    async fn choose(&self, first: &SandboxSpec) -> Result<Arc<dyn Engine>, SandboxError> {
        let podman = || Arc::new(PodmanEngine::new(self.podman.clone(), self.settings.clone()));
        if self.kind == EngineKind::Podman {
            return Ok(podman());
        }
        // Its failure is no reason for the one or the other: podman may come back.
        let info = self.podman.info().await?;
        let cgroup = self.cgroup.as_ref().ok().cloned();
        let limited = cgroup.is_some();
        let (of_podman, settings) = (self.podman.clone(), self.settings.clone());
        let direct = aside(move || DirectEngine::new(of_podman, settings, cgroup)).await;
        let direct = direct.map_err(SandboxError::io("cannot clear the cgroups of an earlier server"))?;
        let against = match (direct.preflight(&first.language, &first.image).await?, &self.cgroup) {
            (Some(reason), _) => Some(reason),
            // Where podman can keep limits, by the user's systemd, a faster engine that cannot is no gain.
            (None, Err(reason)) if info.missing_controllers().is_empty() => {
                Some(format!("its containers could not be limited: {reason}"))
            }
            (None, _) => None,
        };
        match against {
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

impl Engine for Chosen {
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
        // One that is not chosen yet has nothing.
        if let Some(engine) = self.engine.get() {
            engine.keep_only(languages);
        }
    }
}
