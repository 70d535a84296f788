//! The templates and network namespaces that sandboxes are spawned from.

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

/// What sandboxes are spawned from.
#[derive(Default)]
pub(super) struct Spawner {
    templates: HashMap<String, Template>,
    /// By slot: there is one sandbox at a time in each.
    networks: HashMap<u32, File>,
}

impl Spawner {
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
            Entry::Occupied(made) => made.into_mut(),
            Entry::Vacant(place) => place.insert(network()?),
        };
        let mut fds = fds.into_iter();
        let channel = fds.next().ok_or_else(|| io::Error::other("an order without a channel"))?;
        template.spawn(SandboxParts { job_dir, network, cgroup: fds.next(), channel })
    }

    /// Gives a template up.
    pub(super) fn forget(&mut self, name: &str) {
        self.templates.remove(name);
    }
}

/// Makes a network namespace, empty, with its loopback down: in a thread of its own, which alone moves into it.
fn network() -> io::Result<File> {
    let make = || {
        unshare(CloneFlags::CLONE_NEWNET)?;
        File::open("/proc/thread-self/ns/net")
    };
    let made = std::thread::Builder::new().spawn(make)?.join();
    made.unwrap_or_else(|_| Err(io::Error::other("the thread that was to make it ended")))
}
