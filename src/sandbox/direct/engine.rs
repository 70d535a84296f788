//! The direct engine: spawns each sandbox by the agent, from a template that is made once.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::future::{BoxFuture, join_all};

use crate::host::aside::aside;
use crate::host::cgroup::Delegated;
use crate::model::language::Language;
use crate::sandbox::channel::Channel;
use crate::sandbox::direct::agent_client::Agent;
use crate::sandbox::direct::template::Template;
use crate::sandbox::direct::template_cache::TemplateCache;
use crate::sandbox::podman::Podman;
use crate::sandbox::supervisor::{EngineSettings, Started};
use crate::sandbox::{Engine, Sandbox, SandboxError, SandboxSpec, orphans};

/// Makes each sandbox in the agent, from a template.
pub struct DirectEngine {
    podman: Podman,
    settings: EngineSettings,
    cgroup: Option<Delegated>,
    made: AtomicU64,
    /// Replaced when it has ended.
    agent: Mutex<Option<Arc<Agent>>>,
    /// Locked to look for a template, never while one is made.
    templates: Mutex<TemplateCache>,
}

impl DirectEngine {
    /// An engine that limits its containers by cgroups below `cgroup`; without one it cannot limit them.
    pub fn new(podman: Podman, settings: EngineSettings, cgroup: Option<Delegated>) -> DirectEngine {
        if let Some(cgroup) = &cgroup {
            cgroup.clear();
        }
        DirectEngine {
            podman,
            settings,
            cgroup,
            made: AtomicU64::new(0),
            agent: Mutex::new(None),
            templates: Mutex::default(),
        }
    }

    /// Why this engine does not work here, if it does not: tried with the sandbox that is to be made first. Fails where that
    /// says nothing about the engine, as with a full disk, a podman that does not work, or an agent that does not answer.
    pub async fn preflight(&self, language: &Arc<Language>, image: &str) -> Result<Option<String>, SandboxError> {
        let agent = self.agent()?;
        if let Some(reason) = agent.preflight().await? {
            return Ok(Some(reason));
        }
        match self.template(&agent, language, image).await {
            Ok(_) => Ok(None),
            Err(error @ SandboxError::NotMade { .. }) => Ok(Some(error.to_string())),
            Err(error) => Err(error),
        }
    }

    async fn make(&self, spec: SandboxSpec) -> Result<Sandbox, SandboxError> {
        let SandboxSpec { language, image, slot } = spec;
        let agent = self.agent()?;
        let template = self.template(&agent, &language, &image).await?;
        let job_dir = self.settings.job_directory()?;
        let (cgroup, opened) = match self.cgroup.clone() {
            Some(below) => {
                let (name, limits) = (self.name("box"), template.limits.0.clone());
                let make = move || below.make(&name, &limits).and_then(|own| Ok((own.open()?, Arc::new(own))));
                let made = aside(make).await.and_then(|made| made);
                let (opened, own) = made.map_err(SandboxError::io("cannot make a cgroup"))?;
                (Some(own), Some(opened))
            }
            None => (None, None),
        };
        let killed = cgroup.clone();
        let (channel, theirs) = Channel::pair()?;
        let spawned = agent.spawn(&template.name, job_dir.path(), slot.number, theirs, opened)?;
        let started = Started {
            channel,
            job_dir: job_dir.path().to_owned(),
            image,
            user: template.user.clone(),
            slot,
            own_cgroup: cgroup.is_some(),
            cgroup: cgroup.clone(),
            ended: spawned.done,
            remove: Box::pin(async move {
                if let Err(reason) = agent.kill(spawned.id).await {
                    tracing::debug!(reason, "the agent cannot kill a sandbox");
                    // Without a cgroup init ends by itself: the sandbox is given up, and its channel with it.
                    if let Some(own) = killed {
                        own.kill().await;
                    }
                }
            }),
            owned: Box::new((cgroup, job_dir, Arc::clone(&template))),
        };
        let made = self.settings.raise(started, &language).await;
        if made.is_err() {
            // Somebody may have removed the template. If not, a new one does no harm.
            self.templates().discard(&template);
        }
        made
    }

    /// The agent, or a new one where it has ended.
    fn agent(&self) -> Result<Arc<Agent>, SandboxError> {
        let mut agent = self.agent.lock().unwrap_or_else(PoisonError::into_inner);
        match agent.as_ref().filter(|agent| !agent.is_gone()) {
            Some(agent) => Ok(Arc::clone(agent)),
            None => Ok(Arc::clone(agent.insert(Arc::new(Agent::enter(&self.podman, &self.settings.executable)?)))),
        }
    }

    fn templates(&self) -> MutexGuard<'_, TemplateCache> {
        self.templates.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn template(
        &self,
        agent: &Arc<Agent>,
        language: &Arc<Language>,
        image: &str,
    ) -> Result<Arc<Template>, SandboxError> {
        let entry = self.templates().entry(agent, language, image);
        let make = || {
            let (name, own_cgroup) = (self.name("template"), self.cgroup.is_some());
            Template::make(&self.podman, &self.settings, agent, name, language, image, own_cgroup)
        };
        entry.template.get_or_try_init(make).await.cloned()
    }

    fn name(&self, kind: &str) -> String {
        let number = self.made.fetch_add(1, Ordering::Relaxed);
        orphans::name(&self.settings.instance, kind, number)
    }
}

impl Engine for DirectEngine {
    fn start(&self, spec: SandboxSpec) -> BoxFuture<'_, Result<Sandbox, SandboxError>> {
        Box::pin(self.make(spec))
    }

    fn release<'a>(&'a self, image: Option<&'a str>) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            let released = self.templates().take_image(image);
            // One that is in use is removed with its last sandbox.
            let unused = released.into_iter().filter_map(|entry| Arc::into_inner(entry)?.template.into_inner());
            let unused = unused.filter_map(|template| Arc::into_inner(template)?.removal());
            join_all(unused).await;
        })
    }

    fn keep_only(&self, languages: &[Arc<Language>]) {
        let given_up = self.templates().keep_only(languages);
        // Without the lock.
        drop(given_up);
    }
}
