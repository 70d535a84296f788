//! Templates: containers that are mounted but never started, and what sandboxes take from their configuration.

use std::path::Path;
use std::sync::Arc;

use futures_util::future::BoxFuture;
use oci_spec::runtime::{Mount, MountBuilder, Spec};
use tokio_util::task::TaskTracker;

use crate::model::language::Language;
use crate::model::rootfs::{JOB_DIR, WRITABLE};
use crate::sandbox::SandboxError;
use crate::sandbox::direct::agent_client::Agent;
use crate::sandbox::direct::oci_config::{CgroupLimits, SandboxConfig};
use crate::sandbox::podman::Podman;
use crate::sandbox::podman::args::container_args;
use crate::sandbox::supervisor::{EngineSettings, Mark};

/// Mounts of podman's own that no program needs.
const NOT_NEEDED: [&str; 5] = ["/dev/mqueue", "/etc/hostname", "/etc/hosts", "/etc/resolv.conf", "/run/.containerenv"];

/// A container that is mounted but not started, by whose configuration sandboxes are made.
pub(super) struct Template {
    pub(super) name: String,
    podman: Podman,
    agent: Arc<Agent>,
    pub(super) limits: CgroupLimits,
    /// The image's, as the image says it.
    pub(super) user: String,
    supervisors: TaskTracker,
    /// Kept as long as the container may exist.
    mark: Option<Mark>,
}

impl Template {
    /// Makes the container of this name, and has the agent set up what its sandboxes share.
    pub(super) async fn make(
        podman: &Podman,
        settings: &EngineSettings,
        agent: &Arc<Agent>,
        name: String,
        language: &Arc<Language>,
        image: &str,
        own_cgroup: bool,
    ) -> Result<Arc<Template>, SandboxError> {
        let mark = settings.living.mark(&name);
        let mut template = Template {
            name: name.clone(),
            podman: podman.clone(),
            agent: Arc::clone(agent),
            limits: CgroupLimits::default(),
            user: String::new(),
            supervisors: settings.supervisors.clone(),
            mark: Some(mark),
        };
        let config = podman.create(&name, container_args(&name, settings, language, image)).await?;
        template.user = podman.image_user(image).await?;
        let spec = Spec::load(&config).map_err(|error| SandboxError::Io {
            what: "cannot read podman's configuration of a template",
            source: std::io::Error::other(error),
        })?;
        let not_made = |reason| SandboxError::NotMade { language: language.name.clone(), reason };
        let config = sandbox_spec(spec, language).and_then(|spec| SandboxConfig::from_spec(&spec, own_cgroup));
        let config = config.map_err(not_made)?;
        template.limits = config.limits.clone();
        agent.prepare(&name, config).await?;
        Ok(Arc::new(template))
    }

    /// What removes it, once. The agent's mounts of the image go first.
    pub(super) fn removal(&mut self) -> Option<BoxFuture<'static, ()>> {
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
        // Its last sandbox has gone. Without a runtime the next sweep removes it.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            self.supervisors.spawn_on(removal, &runtime);
        }
    }
}

/// A template's configuration with the mounts of sandboxes, and without those that they do not need.
fn sandbox_spec(mut spec: Spec, language: &Language) -> Result<Spec, String> {
    let limits = &language.limits;
    let of_podman = spec.mounts().clone().unwrap_or_default().into_iter();
    let mut mounts: Vec<Mount> =
        of_podman.filter(|mount| !NOT_NEEDED.iter().any(|path| mount.destination() == Path::new(path))).collect();
    let mount = |path: &str, typ: &str, options: Vec<String>| {
        let mount = MountBuilder::default().destination(path).typ(typ).source(typ).options(options).build();
        mount.map_err(|error| format!("a mount cannot be described: {error}"))
    };
    for dir in WRITABLE {
        let options = dir.mount_options(limits.directory_size(), limits.inodes);
        mounts.push(mount(dir.path, "tmpfs", options.into())?);
    }
    mounts.push(mount(JOB_DIR, "bind", ["ro", "nosuid", "nodev", "noexec"].map(str::to_owned).into())?);
    spec.set_mounts(Some(mounts));
    Ok(spec)
}
