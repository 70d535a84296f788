//! A template, and the sandboxes that are spawned from it: what an OCI runtime does, without starting one.
//!
//! What all sandboxes of a template share is set up once, in a mount namespace that holds nothing else. A sandbox is a copy
//! of this process that takes a copy of that namespace, mounts there what is its own, gives up every privilege that init
//! does not need, and becomes init.

use std::ffi::CStr;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::libc;
use nix::mount::{MntFlags, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Gid, setgroups, sethostname, setsid};
use rustix::thread::{set_name, set_no_new_privs};
use seccompiler::{BpfProgram, sock_filter};

use crate::host::at;
use crate::sandbox::agent::spawn::Child;
use crate::sandbox::agent::{capabilities, mount, rlimits, rootfs};
use crate::sandbox::direct::oci_config::{FsType, MountSource, SandboxConfig};
use crate::sandbox::{init, seccomp};

/// The name of a sandbox's init among processes.
const INIT_NAME: &CStr = c"coderunner-init";

/// What all sandboxes of a template share.
pub(super) struct Template {
    config: SandboxConfig,
    /// podman's seccomp filter, for init.
    init_filter: BpfProgram,
    /// Our own seccomp filter, for programs.
    program_filter: BpfProgram,
    /// The mount namespace with the shared mounts.
    mounts: File,
    /// Device number of podman's mount of the image: it is another one, or gone, once somebody has deleted the template.
    device: u64,
}

/// What belongs to one sandbox.
pub(super) struct SandboxParts<'a> {
    /// Its job directory, as seen here.
    pub(super) job_dir: &'a Path,
    /// Its network namespace.
    pub(super) network: &'a File,
    /// Its cgroup.
    pub(super) cgroup: Option<OwnedFd>,
    /// Init's end of its channel.
    pub(super) channel: OwnedFd,
}

impl Template {
    /// Sets up what sandboxes share, in a child. The template can be used once the child has ended without an error.
    pub(super) fn prepare(config: SandboxConfig) -> io::Result<(Template, Child)> {
        let (wait, go) = io::pipe()?;
        let mut go = Some(go);
        // An empty network namespace for its /sys, and a pid namespace for a /proc without processes.
        let namespaces = libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWNET;
        let child = Child::spawn(namespaces, None, || {
            drop(go.take());
            // Until the parent has opened the mount namespace, and drops its end.
            let _ = (&wait).read(&mut [0]);
            rootfs::set_up(&config)
        })?;
        let mounts = File::open(format!("/proc/{}/ns/mnt", child.pid))?;
        drop(go);
        let device = fs::metadata(&config.root)?.dev();
        let init_filter = config.filter.iter().map(|&(code, jt, jf, k)| sock_filter { code, jt, jf, k }).collect();
        Ok((Template { config, init_filter, program_filter: seccomp::filter(), mounts, device }, child))
    }

    /// Spawns a sandbox. Its init reports the rest on its channel.
    pub(super) fn spawn(&self, own: SandboxParts<'_>) -> io::Result<Child> {
        // The cgroup namespace comes later: its root is the cgroup of the process that makes it.
        let namespaces = libc::CLONE_NEWPID | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
        let cgroup = own.cgroup.as_ref().map(AsRawFd::as_raw_fd);
        Child::spawn(namespaces, cgroup, || {
            self.enter(&own)?;
            self.drop_privileges()?;
            // Closed here, not when the closure ends: its number may be another descriptor's by then.
            let SandboxParts { channel, cgroup, .. } = own;
            drop(cgroup);
            // SAFETY: whatever else is open here is the agent's, copied with all of its memory. This process ends by _exit,
            // without going back to any of it.
            unsafe { init::run(channel, environment(&self.config), self.program_filter.clone()) }
        })
    }

    /// Moves this process into namespaces of its own, and mounts there what is not shared.
    fn enter(&self, own: &SandboxParts<'_>) -> io::Result<()> {
        let config = &self.config;
        if fs::metadata(&config.root).map_or(true, |root| root.dev() != self.device) {
            return Err(io::Error::other("its template or image was deleted"));
        }
        let job = at("the job directory", mount::clone_of(own.job_dir))?;
        at("its network", setns(own.network, CloneFlags::CLONE_NEWNET))?;
        at("its mounts", setns(&self.mounts, CloneFlags::CLONE_NEWNS))?;
        at("its namespaces", unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWCGROUP))?;
        for mount in config.mounts.iter().filter(|mount| mount.is_own()) {
            match &mount.source {
                MountSource::New(fs_type, parameters) => {
                    let made = at(fs_type.name(), mount::new(*fs_type, parameters, mount.flags))?;
                    if *fs_type == FsType::Proc {
                        at("the template's /proc", umount2(&mount.destination, MntFlags::MNT_DETACH))?;
                    }
                    mount::attach(&made, mount)?;
                }
                MountSource::JobDir => mount::attach(&job, mount)?,
                MountSource::Bind(_) => {}
            }
        }
        for (setting, value) in &config.sysctls {
            at(setting.display(), fs::write(setting, value))?;
        }
        rootfs::hide(config, rootfs::is_in_proc)?;
        at("its name", sethostname(&config.hostname))?;
        if let Some(score) = config.oom_score {
            at("its OOM score", fs::write("/proc/self/oom_score_adj", score.to_string()))?;
        }
        Ok(())
    }

    /// Gives up all privileges that init does not need.
    fn drop_privileges(&self) -> io::Result<()> {
        let config = &self.config;
        rlimits::set(&config.rlimits)?;
        umask(Mode::from_bits_truncate(config.umask));
        init::confine::default_signals();
        setsid()?;
        let groups: Vec<Gid> = config.groups.iter().copied().map(Gid::from_raw).collect();
        at("its groups", setgroups(&groups))?;
        capabilities::keep_only(config.capabilities)?;
        set_no_new_privs(true)?;
        set_name(INIT_NAME)?;
        seccompiler::apply_filter(&self.init_filter).map_err(io::Error::other)
    }
}

/// The variables of the configuration.
fn environment(config: &SandboxConfig) -> init::Environment {
    let split = |variable: &String| variable.split_once('=').map(|(name, value)| (name.into(), value.into()));
    config.environment.iter().filter_map(split).collect()
}
