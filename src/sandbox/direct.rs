//! The direct engine: podman decides, the agent stamps.
//!
//! Per language and image podman creates one labelled container with the same walls as in the podman engine, the
//! *template*, and initialises it without starting it. Its OCI configuration is the source of every security setting: read
//! once, as a [`Plan`], by which the [agent](super::agent) makes each sandbox with its own job directory, tmpfs, cgroup and
//! processes. Removing the template unmounts the image.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures_util::future::BoxFuture;
use oci_spec::runtime::{Mount, MountBuilder, Spec};
use tokio::sync::Mutex;
use tokio_util::task::TaskTracker;

use super::agent::Agent;
use super::channel::Channel;
use super::keeper::{EngineSettings, Started};
use super::plan::{Limits, Plan};
use super::podman::{self, Podman, WRITABLE};
use super::protocol::JOB_DIR;
use super::reaper::Mark;
use super::{Engine, Sandbox, SandboxError, SandboxSpec, forgotten};
use crate::cgroup::Delegated;
use crate::language::Language;

/// Places of podman's own that no program needs.
const NOT_NEEDED: [&str; 5] = ["/dev/mqueue", "/etc/hostname", "/etc/hosts", "/etc/resolv.conf", "/run/.containerenv"];

/// Makes each sandbox in the agent, by a template's plan.
pub struct DirectEngine {
    podman: Podman,
    settings: EngineSettings,
    cgroup: Option<Delegated>,
    made: AtomicU64,
    /// Replaced when it has ended.
    agent: Mutex<Option<Arc<Agent>>>,
    /// By language. The lock is held while one is made: the others wait for it anyway.
    templates: Mutex<HashMap<String, Arc<Template>>>,
}

/// A container that is mounted but not started, by whose configuration sandboxes are made.
struct Template {
    name: String,
    podman: Podman,
    agent: Arc<Agent>,
    language: Arc<Language>,
    image: String,
    limits: Limits,
    keepers: TaskTracker,
    /// There as long as the container may be.
    mark: Option<Mark>,
}

impl Template {
    /// The agent's mounts of the image go first.
    async fn remove(agent: Arc<Agent>, podman: Podman, name: String) {
        agent.forget(&name);
        podman.remove_or_warn(&name).await;
    }
}

impl Drop for Template {
    fn drop(&mut self) {
        let Some(mark) = self.mark.take() else { return };
        // The last sandbox of it has gone. Where there is no runtime any more the sweep removes it.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let removal = Template::remove(Arc::clone(&self.agent), self.podman.clone(), self.name.clone());
            let removal = async move {
                removal.await;
                drop(mark);
            };
            self.keepers.spawn_on(removal, &runtime);
        }
    }
}

/// A sandbox's cgroup, which goes with it.
struct OwnCgroup {
    below: Delegated,
    name: String,
}

impl Drop for OwnCgroup {
    fn drop(&mut self) {
        self.below.remove(&self.name);
    }
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
            templates: Mutex::new(HashMap::new()),
        }
    }

    /// Whether this way works here, tried with what is to be made first: the reason if not. Fails where that is no
    /// reason, as with a full disk or a podman that does not work.
    pub async fn preflight(&self, language: &Arc<Language>, image: &str) -> Result<Option<String>, SandboxError> {
        let agent = self.agent().await?;
        if let Err(error) = agent.rehearse().await {
            return Ok(Some(error.to_string()));
        }
        match self.template(&agent, language, image).await {
            Ok(_) => Ok(None),
            Err(error @ SandboxError::NotMade { .. }) => Ok(Some(error.to_string())),
            Err(error) => Err(error),
        }
    }

    async fn make(&self, spec: SandboxSpec) -> Result<Sandbox, SandboxError> {
        let SandboxSpec { language, image, slot } = spec;
        let agent = self.agent().await?;
        let template = self.template(&agent, &language, &image).await?;
        let job_dir = self.settings.job_directory()?;
        let name = self.name("box");
        let io = SandboxError::io;
        let (cgroup, own) = match &self.cgroup {
            Some(below) => {
                let made = below.make(&name, &template.limits.0).map_err(io("cannot make a cgroup"))?;
                (Some(made), Some(OwnCgroup { below: below.clone(), name }))
            }
            None => (None, None),
        };
        let (channel, theirs) = Channel::pair()?;
        let ordered = agent.stamp(&template.name, job_dir.path(), slot.number, theirs, cgroup)?;
        let started = Started {
            channel,
            job_dir: job_dir.path().to_owned(),
            image,
            slot,
            own_cgroup: own.is_some(),
            ended: ordered.done,
            remove: Box::pin(async move {
                if let Err(reason) = agent.kill(ordered.id).await {
                    tracing::debug!(reason, "a sandbox cannot be killed");
                }
            }),
            owned: Box::new((own, job_dir, Arc::clone(&template))),
        };
        let made = self.settings.raise(started, &language).await;
        if made.is_err() {
            // Somebody may have removed the template. If not, another one is as good.
            let mut templates = self.templates.lock().await;
            if templates.get(&language.name).is_some_and(|kept| Arc::ptr_eq(kept, &template)) {
                templates.remove(&language.name);
            }
        }
        made
    }

    async fn agent(&self) -> Result<Arc<Agent>, SandboxError> {
        let mut agent = self.agent.lock().await;
        match agent.as_ref().filter(|agent| !agent.is_gone()) {
            Some(agent) => Ok(Arc::clone(agent)),
            None => {
                // Mounts are the namespace's: templates of another one would be copied in vain.
                self.templates.lock().await.clear();
                Ok(Arc::clone(agent.insert(Arc::new(Agent::enter(&self.podman, &self.settings.executable)?))))
            }
        }
    }

    async fn template(
        &self,
        agent: &Arc<Agent>,
        language: &Arc<Language>,
        image: &str,
    ) -> Result<Arc<Template>, SandboxError> {
        let mut templates = self.templates.lock().await;
        let same = |template: &&Arc<Template>| {
            template.image == image && template.language == *language && Arc::ptr_eq(&template.agent, agent)
        };
        if let Some(template) = templates.get(&language.name).filter(same) {
            return Ok(Arc::clone(template));
        }
        let name = self.name("template");
        let mark = self.settings.living.mark(&name);
        let mut template = Template {
            name: name.clone(),
            podman: self.podman.clone(),
            agent: Arc::clone(agent),
            language: Arc::clone(language),
            image: image.to_owned(),
            limits: Limits::default(),
            keepers: self.settings.keepers.clone(),
            mark: Some(mark),
        };
        let config = self.podman.create(&name, podman::walls(&name, &self.settings, language, image)).await?;
        let spec = Spec::load(&config).map_err(|error| SandboxError::Io {
            what: "cannot read podman's configuration of a template",
            source: std::io::Error::other(error),
        })?;
        let not_made = |reason| SandboxError::NotMade { language: language.name.clone(), reason };
        let plan = for_sandboxes(spec, language).and_then(|spec| Plan::of(&spec, self.cgroup.is_some()));
        let plan = plan.map_err(not_made)?;
        template.limits = plan.limits.clone();
        agent.prepare(&name, plan).await?;
        let template = Arc::new(template);
        templates.insert(language.name.clone(), Arc::clone(&template));
        Ok(template)
    }

    fn name(&self, kind: &str) -> String {
        let number = self.made.fetch_add(1, Ordering::Relaxed);
        forgotten::name(&self.settings.instance, kind, number)
    }
}

/// A template's configuration with what sandboxes have besides, and without what they do not need.
fn for_sandboxes(mut spec: Spec, language: &Language) -> Result<Spec, String> {
    let limits = &language.limits;
    let of_podman = spec.mounts().clone().unwrap_or_default().into_iter();
    let mut mounts: Vec<Mount> =
        of_podman.filter(|mount| !NOT_NEEDED.iter().any(|place| mount.destination() == Path::new(place))).collect();
    let mount = |place: &str, typ: &str, options: Vec<String>| {
        let mount = MountBuilder::default().destination(place).typ(typ).source(typ).options(options).build();
        mount.map_err(|error| format!("a mount cannot be described: {error}"))
    };
    for (place, options) in WRITABLE {
        let sizes = format!("size={}", limits.directory_size());
        let inodes = format!("nr_inodes={}", limits.inodes);
        let options = ["nosuid", "nodev", options, "mode=1777", &sizes, &inodes].map(str::to_owned);
        mounts.push(mount(place, "tmpfs", options.into())?);
    }
    mounts.push(mount(JOB_DIR, "bind", ["ro", "nosuid", "nodev", "noexec"].map(str::to_owned).into())?);
    spec.set_mounts(Some(mounts));
    Ok(spec)
}

impl Engine for DirectEngine {
    fn start(&self, spec: SandboxSpec) -> BoxFuture<'_, Result<Sandbox, SandboxError>> {
        Box::pin(self.make(spec))
    }

    fn release<'a>(&'a self, image: Option<&'a str>) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            let mut templates = self.templates.lock().await;
            let released: Vec<String> = templates
                .iter()
                .filter(|(_, template)| image.is_none_or(|image| template.image == image))
                .map(|(language, _)| language.clone())
                .collect();
            for language in released {
                // Otherwise its last sandbox removes it.
                if let Some(mut template) = templates.remove(&language).and_then(Arc::into_inner) {
                    let mark = template.mark.take();
                    Template::remove(Arc::clone(&template.agent), template.podman.clone(), template.name.clone()).await;
                    drop(mark);
                }
            }
        })
    }
}
