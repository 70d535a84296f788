//! The direct engine: podman decides, crun stamps.
//!
//! Per language and image podman creates one labelled container with the same walls as in the podman engine, the
//! *template*, and initialises it without starting it. Its OCI configuration is the source of every security
//! setting; each sandbox is a copy with its own job directory, tmpfs, cgroup and id, started by `crun run` through
//! the [agent](super::agent). Removing the template unmounts the image.

use std::collections::HashMap;
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures_util::future::BoxFuture;
use oci_spec::runtime::{
    LinuxNamespaceBuilder, LinuxNamespaceType, LinuxSeccompAction, LinuxSeccompBuilder, Mount, MountBuilder, Spec,
};
use tokio::sync::Mutex;
use tokio_util::task::TaskTracker;

use super::agent::Agent;
use super::channel::Channel;
use super::keeper::{EngineSettings, Started};
use super::podman::{self, Podman, WRITABLE};
use super::profile;
use super::protocol::JOB_DIR;
use super::reaper::Mark;
use super::{Engine, Sandbox, SandboxError, SandboxSpec};
use crate::cgroup::Delegated;
use crate::language::Language;

/// Places of podman's own that no program needs.
const NOT_NEEDED: [&str; 5] = ["/dev/mqueue", "/etc/hostname", "/etc/hosts", "/etc/resolv.conf", "/run/.containerenv"];

/// Makes each sandbox by `crun run` of a template's copy.
pub struct CrunEngine {
    podman: Podman,
    settings: EngineSettings,
    /// Where crun keeps its state, below the runtime directory.
    state: PathBuf,
    cgroup: Option<Delegated>,
    made: AtomicU64,
    /// Replaced when it has ended.
    agent: Mutex<Option<Arc<Agent>>>,
    /// By language. The lock is held while one is made: the others wait for it anyway.
    templates: Mutex<HashMap<String, Arc<Template>>>,
}

/// A container that is mounted but not started, from whose configuration sandboxes are copied.
struct Template {
    name: String,
    podman: Podman,
    language: Arc<Language>,
    image: String,
    spec: Spec,
    keepers: TaskTracker,
    /// There as long as the container may be.
    mark: Option<Mark>,
}

impl Drop for Template {
    fn drop(&mut self) {
        let Some(mark) = self.mark.take() else { return };
        // The last sandbox of it has gone. Where there is no runtime any more the sweep removes it.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let (podman, name) = (self.podman.clone(), self.name.clone());
            let removal = async move {
                podman.remove_or_warn(&name).await;
                drop(mark);
            };
            self.keepers.spawn_on(removal, &runtime);
        }
    }
}

impl CrunEngine {
    /// An engine that limits its containers by cgroups below `cgroup`; without one it cannot limit them.
    pub fn new(podman: Podman, settings: EngineSettings, state: PathBuf, cgroup: Option<Delegated>) -> CrunEngine {
        if let Some(cgroup) = &cgroup {
            cgroup.clear();
        }
        CrunEngine {
            podman,
            settings,
            state,
            cgroup,
            made: AtomicU64::new(0),
            agent: Mutex::new(None),
            templates: Mutex::new(HashMap::new()),
        }
    }

    /// Whether this way works here: the reason if not.
    pub async fn preflight(&self) -> Result<(), String> {
        let agent = self.agent().await.map_err(|error| error.to_string())?;
        let ended = agent.start(vec!["--version".into()], None).map_err(|error| error.to_string())?;
        tokio::time::timeout(std::time::Duration::from_secs(10), ended)
            .await
            .unwrap_or_else(|_| Err("podman's namespace cannot be entered within 10 s".into()))
    }

    async fn make(&self, spec: SandboxSpec) -> Result<Sandbox, SandboxError> {
        let SandboxSpec { language, image, slot } = spec;
        let agent = self.agent().await?;
        let template = self.template(&language, &image).await?;
        let id = self.name("box");
        let directory = self.settings.job_directory()?;
        let (job_dir, bundle) = (directory.path().join("job"), directory.path().join("bundle"));
        let io = SandboxError::io;
        for made in [&job_dir, &bundle] {
            DirBuilder::new().mode(0o700).create(made).map_err(io("cannot make a job directory"))?;
        }
        let network = agent.network(slot.number).await?;
        let copy = self.copy(&template, &job_dir, &id, network.as_ref())?;
        let json = serde_json::to_vec(&copy).map_err(|error| io("cannot write a bundle")(error.into()))?;
        std::fs::write(bundle.join("config.json"), json).map_err(io("cannot write a bundle"))?;

        let (channel, theirs) = Channel::pair()?;
        let text = |path: &Path| path.display().to_string();
        let run = ["run", "--preserve-fds=1", "--no-new-keyring", "--bundle"].map(str::to_owned);
        let args = self.global_args().into_iter().chain(run).chain([text(&bundle), id.clone()]);
        let ended = agent.start(args.collect(), Some(theirs))?;
        let delete = self.global_args().into_iter().chain(["delete".into(), "--force".into(), id.clone()]).collect();
        let cgroup = self.cgroup.clone();
        let started = Started {
            channel,
            job_dir,
            image,
            slot,
            own_cgroup: cgroup.is_some(),
            ended: Box::pin(ended),
            remove: Box::pin(async move {
                let removed = match agent.start(delete, None) {
                    Ok(ended) => ended.await,
                    Err(error) => Err(error.to_string()),
                };
                if let Err(error) = removed {
                    tracing::debug!(container = id, error, "nothing to remove");
                }
                if let Some(cgroup) = cgroup {
                    cgroup.remove(&id);
                }
            }),
            owned: Box::new((directory, Arc::clone(&template))),
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

    async fn template(&self, language: &Arc<Language>, image: &str) -> Result<Arc<Template>, SandboxError> {
        let mut templates = self.templates.lock().await;
        let same = |template: &&Arc<Template>| template.image == image && template.language == *language;
        if let Some(template) = templates.get(&language.name).filter(same) {
            return Ok(Arc::clone(template));
        }
        let name = self.name("template");
        let mark = self.settings.living.mark(&name);
        let mut template = Template {
            name: name.clone(),
            podman: self.podman.clone(),
            language: Arc::clone(language),
            image: image.to_owned(),
            spec: Spec::default(),
            keepers: self.settings.keepers.clone(),
            mark: Some(mark),
        };
        let config = self.podman.create(&name, podman::walls(&name, &self.settings, language, image)).await?;
        template.spec = Spec::load(&config).map_err(|error| SandboxError::NotMade {
            language: language.name.clone(),
            reason: format!("cannot read podman's {}: {error}", config.display()),
        })?;
        compile_profile(&mut template.spec);
        let template = Arc::new(template);
        templates.insert(language.name.clone(), Arc::clone(&template));
        Ok(template)
    }

    /// The template's configuration for one sandbox.
    fn copy(&self, template: &Template, job_dir: &Path, id: &str, network: &Path) -> Result<Spec, SandboxError> {
        let limits = &template.language.limits;
        let mut spec = template.spec.clone();
        let of_podman = spec.mounts().clone().unwrap_or_default().into_iter();
        let mut mounts: Vec<Mount> =
            of_podman.filter(|mount| !NOT_NEEDED.iter().any(|place| mount.destination() == Path::new(place))).collect();
        let wrong = |error: oci_spec::OciSpecError| SandboxError::NotMade {
            language: template.language.name.clone(),
            reason: format!("a mount or namespace cannot be described: {error}"),
        };
        for (place, options) in WRITABLE {
            let sizes = format!("size={}", limits.directory_size());
            let inodes = format!("nr_inodes={}", limits.inodes);
            let options: Vec<String> =
                ["nosuid", "nodev", options, "mode=1777", &sizes, &inodes].map(str::to_owned).into();
            mounts.push(
                MountBuilder::default()
                    .destination(place)
                    .typ("tmpfs")
                    .source("tmpfs")
                    .options(options)
                    .build()
                    .map_err(wrong)?,
            );
        }
        mounts.push(
            MountBuilder::default()
                .destination(JOB_DIR)
                .typ("bind")
                .source(job_dir)
                .options(["ro", "rprivate", "rbind", "nosuid", "nodev", "noexec"].map(str::to_owned).to_vec())
                .build()
                .map_err(wrong)?,
        );
        spec.set_mounts(Some(mounts));
        if let Some(linux) = spec.linux_mut() {
            linux.set_cgroups_path(self.cgroup.as_ref().map(|cgroup| cgroup.of(id)));
            // A new one is what a container costs most, in the kernel, where no cgroup counts it.
            let mut namespaces = linux.namespaces().clone().unwrap_or_default();
            namespaces.retain(|namespace| namespace.typ() != LinuxNamespaceType::Network);
            let joined = LinuxNamespaceBuilder::default().typ(LinuxNamespaceType::Network).path(network);
            namespaces.push(joined.build().map_err(wrong)?);
            linux.set_namespaces(Some(namespaces));
        }
        Ok(spec)
    }

    /// What stands before crun's verb.
    fn global_args(&self) -> [String; 2] {
        let manager = if self.cgroup.is_some() { "cgroupfs" } else { "disabled" };
        [format!("--root={}", self.state.display()), format!("--cgroup-manager={manager}")]
    }

    fn name(&self, kind: &str) -> String {
        let number = self.made.fetch_add(1, Ordering::Relaxed);
        format!("coderunner-{}-{}-{kind}-{number}", self.settings.instance, std::process::id())
    }
}

/// Has crun take podman's seccomp profile as a filter that is compiled already, where that can be had. What stays in the
/// profile's place refuses every call: a runtime that does not know the annotation starts nothing.
fn compile_profile(spec: &mut Spec) {
    let Some(linux) = spec.linux_mut() else { return };
    let Some(filter) = linux.seccomp().as_ref().and_then(profile::compiled) else { return };
    let nothing = LinuxSeccompBuilder::default().default_action(LinuxSeccompAction::ScmpActErrno).build();
    let Ok(nothing) = nothing else { return };
    linux.set_seccomp(Some(nothing));
    let mut annotations = spec.annotations().clone().unwrap_or_default();
    annotations.insert(profile::ANNOTATION.to_owned(), filter);
    spec.set_annotations(Some(annotations));
}

impl Engine for CrunEngine {
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
                    template.podman.remove_or_warn(&template.name).await;
                    template.mark = None;
                }
            }
        })
    }
}
