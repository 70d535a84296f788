//! Keeps the templates and network namespaces, and spawns sandboxes with them.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use nix::sched::{CloneFlags, unshare};

use crate::sandbox::agent::spawn::Child;
use crate::sandbox::agent::template::{SandboxParts, Template};
use crate::sandbox::direct::oci_config::SandboxConfig;

/// The templates and network namespaces for sandboxes.
#[derive(Default)]
pub(super) struct Templates {
    templates: HashMap<String, Template>,
    /// Network namespaces by slot. Each is used by one sandbox at a time.
    networks: HashMap<u32, File>,
}

impl Templates {
    /// Sets up a template of this name.
    pub(super) fn prepare(&mut self, name: String, config: SandboxConfig) -> io::Result<Child> {
        let (template, child) = Template::prepare(config)?;
        self.templates.insert(name, template);
        Ok(child)
    }

    /// Spawns a sandbox of a template.
    pub(super) fn spawn(&mut self, name: &str, job_dir: &Path, slot: u32, fds: Vec<OwnedFd>) -> io::Result<Child> {
        let template = self.templates.get(name).ok_or_else(|| io::Error::other("its template is gone"))?;
        let network = match self.networks.entry(slot) {
            Entry::Occupied(existing) => existing.into_mut(),
            Entry::Vacant(vacant) => vacant.insert(new_network()?),
        };
        let mut fds = fds.into_iter();
        let channel = fds.next().ok_or_else(|| io::Error::other("the order came without a channel"))?;
        template.spawn(SandboxParts { job_dir, network, cgroup: fds.next(), channel })
    }

    /// Releases a template.
    pub(super) fn forget(&mut self, name: &str) {
        self.templates.remove(name);
    }
}

/// Creates an empty network namespace, whose loopback is down. Uses a short-lived thread, so that only this thread
/// moves into the namespace.
fn new_network() -> io::Result<File> {
    let create = || {
        unshare(CloneFlags::CLONE_NEWNET)?;
        File::open("/proc/thread-self/ns/net")
    };
    let joined = std::thread::Builder::new().spawn(create)?.join();
    joined.unwrap_or_else(|_| Err(io::Error::other("the thread that creates network namespaces panicked")))
}
