//! The direct engine: has the agent spawn each sandbox from a template, which is created once.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::future::{BoxFuture, join_all};

use crate::host::blocking::run_blocking;
use crate::host::cgroup::Delegated;
use crate::model::language::Language;
use crate::sandbox::channel::Channel;
use crate::sandbox::direct::agent_client::Agent;
use crate::sandbox::direct::template::Template;
use crate::sandbox::direct::template_cache::TemplateCache;
use crate::sandbox::podman::Podman;
use crate::sandbox::supervisor::{EngineSettings, Started};
use crate::sandbox::{Engine, Sandbox, SandboxError, SandboxSpec, orphans};

/// Has the agent spawn each sandbox from a template.
pub struct DirectEngine {
    podman: Podman,
    settings: EngineSettings,
    cgroup: Option<Delegated>,
    next_number: AtomicU64,
    /// Replaced when it has ended.
    agent: Mutex<Option<Arc<Agent>>>,
    /// Locked while a template is looked up, but not while one is created.
    templates: Mutex<TemplateCache>,
}

impl DirectEngine {
    /// An engine that limits its containers with cgroups below `cgroup`. Without `cgroup` it cannot limit them.
    pub fn new(podman: Podman, settings: EngineSettings, cgroup: Option<Delegated>) -> DirectEngine {
        if let Some(cgroup) = &cgroup {
            cgroup.clear();
        }
        DirectEngine {
            podman,
            settings,
            cgroup,
            next_number: AtomicU64::new(0),
            agent: Mutex::new(None),
            templates: Mutex::default(),
        }
    }

    /// Checks whether this engine works on this host, and returns the reason if not. Creates the template of the first
    /// sandbox for that. Fails if the result says nothing about the engine: a full disk, a podman that does not work,
    /// or an agent that does not answer.
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

    async fn create(&self, spec: SandboxSpec) -> Result<Sandbox, SandboxError> {
        let SandboxSpec { language, image, slot } = spec;
        let agent = self.agent()?;
        let template = self.template(&agent, &language, &image).await?;
        let job_dir = self.settings.job_directory()?;
        let (cgroup, cgroup_dir) = match self.cgroup.clone() {
            Some(parent) => {
                let (name, limits) = (self.name("box"), template.limits.0.clone());
                let create = move || parent.make(&name, &limits).and_then(|own| Ok((own.open()?, Arc::new(own))));
                let created = run_blocking(create).await.and_then(|created| created);
                let (cgroup_dir, own) = created.map_err(SandboxError::io("cannot make a cgroup"))?;
                (Some(own), Some(cgroup_dir))
            }
            None => (None, None),
        };
        let cgroup_to_kill = cgroup.clone();
        let (channel, theirs) = Channel::pair()?;
        let spawned = agent.spawn(&template.name, job_dir.path(), slot.number, theirs, cgroup_dir)?;
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
                    // Without a cgroup init ends by itself, because the sandbox was dropped and its channel is closed.
                    if let Some(own) = cgroup_to_kill {
                        own.kill().await;
                    }
                }
            }),
            owned: Box::new((cgroup, job_dir, Arc::clone(&template))),
        };
        let sandbox = self.settings.supervise(started, &language).await;
        if sandbox.is_err() {
            // Something outside may have removed the template. If not, creating a new one does no harm.
            self.templates().discard(&template);
        }
        sandbox
    }

    /// The agent, or a new one if it has ended.
    fn agent(&self) -> Result<Arc<Agent>, SandboxError> {
        let mut agent = self.agent.lock().unwrap_or_else(PoisonError::into_inner);
        match agent.as_ref().filter(|agent| !agent.is_gone()) {
            Some(agent) => Ok(Arc::clone(agent)),
            None => Ok(Arc::clone(agent.insert(Arc::new(Agent::start(&self.podman, &self.settings.executable)?)))),
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
        let create = || {
            let (name, own_cgroup) = (self.name("template"), self.cgroup.is_some());
            Template::create(&self.podman, &self.settings, agent, name, language, image, own_cgroup)
        };
        entry.template.get_or_try_init(create).await.cloned()
    }

    fn name(&self, kind: &str) -> String {
        let number = self.next_number.fetch_add(1, Ordering::Relaxed);
        orphans::name(&self.settings.instance, kind, number)
    }
}

impl Engine for DirectEngine {
    fn start(&self, spec: SandboxSpec) -> BoxFuture<'_, Result<Sandbox, SandboxError>> {
        Box::pin(self.create(spec))
    }

    fn release<'a>(&'a self, image: Option<&'a str>) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            let released = self.templates().take_image(image);
            // A template in use is removed with its last sandbox.
            let unused = released.into_iter().filter_map(|entry| Arc::into_inner(entry)?.template.into_inner());
            let unused = unused.filter_map(|template| Arc::into_inner(template)?.removal());
            join_all(unused).await;
        })
    }

    fn keep_only(&self, languages: &[Arc<Language>]) {
        let released = self.templates().keep_only(languages);
        // Dropped when the lock is released.
        drop(released);
    }
}
