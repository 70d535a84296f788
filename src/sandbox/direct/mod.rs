//! The direct engine: podman decides, the agent stamps.
//!
//! Per language and image podman creates one labelled container with the same walls as in the podman engine, the
//! *template*, and initialises it without starting it. Its OCI configuration is the source of every security setting: read
//! once, as a [`Plan`], by which the [agent](crate::sandbox::agent) makes each sandbox with its own job directory, tmpfs, cgroup and
//! processes. Removing the template unmounts the image.

mod agent_client;
pub mod oci_plan;

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::future::{BoxFuture, join_all};
use oci_spec::runtime::{Mount, MountBuilder, Spec};
use tokio::sync::OnceCell;
use tokio_util::task::TaskTracker;

use crate::host::aside::aside;
use crate::host::cgroup::Delegated;
use crate::model::language::Language;
use crate::sandbox::channel::Channel;
use crate::sandbox::direct::agent_client::Agent;
use crate::sandbox::direct::oci_plan::{Limits, Plan};
use crate::sandbox::podman::{self, Podman, WRITABLE};
use crate::sandbox::protocol::JOB_DIR;
use crate::sandbox::supervisor::Mark;
use crate::sandbox::supervisor::{EngineSettings, Started};
use crate::sandbox::{Engine, Sandbox, SandboxError, SandboxSpec, orphans};

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
    /// The lock is held to look for one, never while one is made.
    places: Mutex<Places>,
}

/// The templates that are kept for further sandboxes.
#[derive(Default)]
struct Places {
    kept: Vec<Arc<Place>>,
    /// Languages whose templates are kept: of all, until somebody says which.
    wanted: Option<Vec<Arc<Language>>>,
}

/// Where the template of a language and an image is, once it is made. Who needs it first makes it, the others wait for it,
/// and nobody else does.
struct Place {
    agent: Arc<Agent>,
    language: Arc<Language>,
    image: String,
    template: OnceCell<Arc<Template>>,
}

/// A container that is mounted but not started, by whose configuration sandboxes are made.
struct Template {
    name: String,
    podman: Podman,
    agent: Arc<Agent>,
    limits: Limits,
    /// The image's, as the image says it.
    user: String,
    supervisors: TaskTracker,
    /// There as long as the container may be.
    mark: Option<Mark>,
}

impl Template {
    /// What removes it, once. The agent's mounts of the image go first.
    fn removal(&mut self) -> Option<BoxFuture<'static, ()>> {
        let mark = self.mark.take()?;
        let (agent, podman, name) = (Arc::clone(&self.agent), self.podman.clone(), self.name.clone());
        Some(Box::pin(async move {
            agent.forget(&name);
            podman.remove_or_warn(&name).await;
            drop(mark);
        }))
    }
}

impl Drop for Template {
    fn drop(&mut self) {
        let Some(removal) = self.removal() else { return };
        // The last sandbox of it has gone. Where there is no runtime any more the sweep removes it.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            self.supervisors.spawn_on(removal, &runtime);
        }
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
            places: Mutex::default(),
        }
    }

    /// Whether this way works here, tried with what is to be made first: the reason if not. Fails where that is no
    /// reason, as with a full disk, a podman that does not work, or an agent that does not answer.
    pub async fn preflight(&self, language: &Arc<Language>, image: &str) -> Result<Option<String>, SandboxError> {
        let agent = self.agent()?;
        if let Some(reason) = agent.rehearse().await? {
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
        let ordered = agent.stamp(&template.name, job_dir.path(), slot.number, theirs, opened)?;
        let started = Started {
            channel,
            job_dir: job_dir.path().to_owned(),
            image,
            user: template.user.clone(),
            slot,
            own_cgroup: cgroup.is_some(),
            cgroup: cgroup.clone(),
            ended: ordered.done,
            remove: Box::pin(async move {
                if let Err(reason) = agent.kill(ordered.id).await {
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
            // Somebody may have removed the template. If not, another one is as good.
            self.places().kept.retain(|place| !place.template.get().is_some_and(|kept| Arc::ptr_eq(kept, &template)));
        }
        made
    }

    fn agent(&self) -> Result<Arc<Agent>, SandboxError> {
        let mut agent = self.agent.lock().unwrap_or_else(PoisonError::into_inner);
        match agent.as_ref().filter(|agent| !agent.is_gone()) {
            Some(agent) => Ok(Arc::clone(agent)),
            None => Ok(Arc::clone(agent.insert(Arc::new(Agent::enter(&self.podman, &self.settings.executable)?)))),
        }
    }

    fn places(&self) -> MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn place(&self, agent: &Arc<Agent>, language: &Arc<Language>, image: &str) -> Arc<Place> {
        let mut places = self.places();
        let is_it = |place: &&Arc<Place>| {
            place.image == image && place.language == *language && Arc::ptr_eq(&place.agent, agent)
        };
        if let Some(place) = places.kept.iter().find(is_it) {
            return Arc::clone(place);
        }
        // Nobody asks again for those of a language as it was before. Mounts are the namespace's: templates of another one
        // would be copied in vain.
        let is_past = |past: &Language| past.name == language.name && *past != **language;
        places.kept.retain(|place| !is_past(&place.language) && !place.agent.is_gone());
        let place = Arc::new(Place {
            agent: Arc::clone(agent),
            language: Arc::clone(language),
            image: image.to_owned(),
            template: OnceCell::new(),
        });
        // Whoever asks for one that is no longer wanted began before that was said: his sandbox is the only one of it.
        if places.wanted.as_ref().is_none_or(|wanted| wanted.contains(language)) {
            places.kept.push(Arc::clone(&place));
        }
        place
    }

    async fn template(
        &self,
        agent: &Arc<Agent>,
        language: &Arc<Language>,
        image: &str,
    ) -> Result<Arc<Template>, SandboxError> {
        let place = self.place(agent, language, image);
        place.template.get_or_try_init(|| self.make_template(agent, language, image)).await.cloned()
    }

    async fn make_template(
        &self,
        agent: &Arc<Agent>,
        language: &Arc<Language>,
        image: &str,
    ) -> Result<Arc<Template>, SandboxError> {
        let name = self.name("template");
        let mark = self.settings.living.mark(&name);
        let mut template = Template {
            name: name.clone(),
            podman: self.podman.clone(),
            agent: Arc::clone(agent),
            limits: Limits::default(),
            user: String::new(),
            supervisors: self.settings.supervisors.clone(),
            mark: Some(mark),
        };
        let config = self.podman.create(&name, podman::walls(&name, &self.settings, language, image)).await?;
        template.user = self.podman.image_user(image).await?;
        let spec = Spec::load(&config).map_err(|error| SandboxError::Io {
            what: "cannot read podman's configuration of a template",
            source: std::io::Error::other(error),
        })?;
        let not_made = |reason| SandboxError::NotMade { language: language.name.clone(), reason };
        let plan = for_sandboxes(spec, language).and_then(|spec| Plan::of(&spec, self.cgroup.is_some()));
        let plan = plan.map_err(not_made)?;
        template.limits = plan.limits.clone();
        agent.prepare(&name, plan).await?;
        Ok(Arc::new(template))
    }

    fn name(&self, kind: &str) -> String {
        let number = self.made.fetch_add(1, Ordering::Relaxed);
        orphans::name(&self.settings.instance, kind, number)
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
            let is_meant = |place: &mut Arc<Place>| image.is_none_or(|image| place.image == image);
            let released: Vec<Arc<Place>> = self.places().kept.extract_if(.., is_meant).collect();
            // Of one that is in use the last sandbox removes it.
            let unused = released.into_iter().filter_map(|place| Arc::into_inner(place)?.template.into_inner());
            let unused = unused.filter_map(|template| Arc::into_inner(template)?.removal());
            join_all(unused).await;
        })
    }

    fn keep_only(&self, languages: &[Arc<Language>]) {
        let is_other = |place: &mut Arc<Place>| !languages.contains(&place.language);
        let given_up: Vec<Arc<Place>> = {
            let mut places = self.places();
            places.wanted = Some(languages.to_vec());
            places.kept.extract_if(.., is_other).collect()
        };
        drop(given_up);
    }
}
