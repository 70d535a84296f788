//! Templates: containers that are mounted but never started, whose configuration all sandboxes use.

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
use crate::sandbox::supervisor::{EngineSettings, SupervisedGuard};

/// Mounts that podman adds and no program needs.
const NOT_NEEDED: [&str; 5] = ["/dev/mqueue", "/etc/hostname", "/etc/hosts", "/etc/resolv.conf", "/run/.containerenv"];

/// A container that is mounted but never started. Sandboxes are created from its configuration.
pub(super) struct Template {
    pub(super) name: String,
    podman: Podman,
    agent: Arc<Agent>,
    pub(super) limits: CgroupLimits,
    /// The user that the image names, in the image's spelling.
    pub(super) user: String,
    supervisors: TaskTracker,
    /// Protects the container from sweeps, as long as it may exist.
    guard: Option<SupervisedGuard>,
}

impl Template {
    /// Creates the container, and has the agent set up the mounts that its sandboxes share.
    pub(super) async fn create(
        podman: &Podman,
        settings: &EngineSettings,
        agent: &Arc<Agent>,
        name: String,
        language: &Arc<Language>,
        image: &str,
        own_cgroup: bool,
    ) -> Result<Arc<Template>, SandboxError> {
        let guard = settings.supervised.register(&name);
        let mut template = Template {
            name: name.clone(),
            podman: podman.clone(),
            agent: Arc::clone(agent),
            limits: CgroupLimits::default(),
            user: String::new(),
            supervisors: settings.supervisors.clone(),
            guard: Some(guard),
        };
        let config = podman.create(&name, container_args(&name, settings, language, image)).await?;
        template.user = podman.image_user(image).await?;
        let spec = Spec::load(&config).map_err(|error| SandboxError::Io {
            what: "cannot read podman's configuration of a template",
            source: std::io::Error::other(error),
        })?;
        let unsupported = |reason| SandboxError::NotMade { language: language.name.clone(), reason };
        let config = sandbox_spec(spec, language).and_then(|spec| SandboxConfig::from_spec(&spec, own_cgroup));
        let config = config.map_err(unsupported)?;
        template.limits = config.limits.clone();
        agent.prepare(&name, config).await?;
        Ok(Arc::new(template))
    }

    /// A future that removes the template; `None` from the second call on. The agent releases its mounts of the image
    /// first.
    pub(super) fn removal(&mut self) -> Option<BoxFuture<'static, ()>> {
        let guard = self.guard.take()?;
        let (agent, podman, name) = (Arc::clone(&self.agent), self.podman.clone(), self.name.clone());
        Some(Box::pin(async move {
            agent.forget(&name);
            podman.remove_or_warn(&name).await;
            drop(guard);
        }))
    }
}

impl Drop for Template {
    fn drop(&mut self) {
        let Some(removal) = self.removal() else { return };
        // The last sandbox of the template is gone. Without a runtime the next sweep removes the container.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            self.supervisors.spawn_on(removal, &runtime);
        }
    }
}

/// Adds the mounts of sandboxes to a template's configuration, and leaves out those that no program needs.
fn sandbox_spec(mut spec: Spec, language: &Language) -> Result<Spec, String> {
    let limits = &language.limits;
    let podman_mounts = spec.mounts().clone().unwrap_or_default().into_iter();
    let mut mounts: Vec<Mount> =
        podman_mounts.filter(|mount| !NOT_NEEDED.iter().any(|path| mount.destination() == Path::new(path))).collect();
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
