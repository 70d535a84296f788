//! Spawns sandboxes from a template. This does the work of an OCI runtime without starting one.
//!
//! The mounts that all sandboxes of a template share are set up once, in a mount namespace of the template. A sandbox
//! is a copy of this process that copies this namespace, adds its own mounts, drops every privilege that init does not
//! need, and becomes init.

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

/// Process name of init.
const INIT_NAME: &CStr = c"coderunner-init";

/// The parts that all sandboxes of a template share.
pub(super) struct Template {
    config: SandboxConfig,
    /// podman's seccomp filter, for init.
    init_filter: BpfProgram,
    /// coderunner's seccomp filter, for programs.
    program_filter: BpfProgram,
    /// The mount namespace with the shared mounts.
    mounts: File,
    /// Device number of podman's mount of the image. When the template is deleted, the path has another device or is
    /// gone.
    device: u64,
}

/// The parts of a sandbox that it does not share.
pub(super) struct SandboxParts<'a> {
    /// The job directory, by its path in the agent's mount namespace.
    pub(super) job_dir: &'a Path,
    /// The network namespace.
    pub(super) network: &'a File,
    /// The cgroup, if there is one.
    pub(super) cgroup: Option<OwnedFd>,
    /// Init's end of the channel.
    pub(super) channel: OwnedFd,
}

impl Template {
    /// Sets up the shared mounts in a child. The template can be used when the child has ended without an error.
    pub(super) fn prepare(config: SandboxConfig) -> io::Result<(Template, Child)> {
        let (wait, go) = io::pipe()?;
        let mut go = Some(go);
        // An empty network namespace for its /sys, and a pid namespace for a /proc without processes.
        let namespaces = libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWNET;
        let child = Child::spawn(namespaces, None, || {
            drop(go.take());
            // Wait until the parent has opened the mount namespace: then it drops its end of the pipe.
            let _ = (&wait).read(&mut [0]);
            rootfs::set_up(&config)
        })?;
        let mounts = File::open(format!("/proc/{}/ns/mnt", child.pid))?;
        drop(go);
        let device = fs::metadata(&config.root)?.dev();
        let init_filter = config.filter.iter().map(|&(code, jt, jf, k)| sock_filter { code, jt, jf, k }).collect();
        Ok((Template { config, init_filter, program_filter: seccomp::filter(), mounts, device }, child))
    }

    /// Spawns a sandbox. Its init reports on its channel when it is ready.
    pub(super) fn spawn(&self, own: SandboxParts<'_>) -> io::Result<Child> {
        // The cgroup namespace comes later, because its root is the cgroup of the process that creates it.
        let namespaces = libc::CLONE_NEWPID | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
        let cgroup = own.cgroup.as_ref().map(AsRawFd::as_raw_fd);
        Child::spawn(namespaces, cgroup, || {
            self.enter(&own)?;
            self.drop_privileges()?;
            // Close it here, not at the end of the closure: its number may belong to another descriptor by then.
            let SandboxParts { channel, cgroup, .. } = own;
            drop(cgroup);
            // SAFETY: all other open descriptors belong to the agent's code, of which this process is a copy. It ends
            // by _exit, without returning to that code.
            unsafe { init::run(channel, environment(&self.config), self.program_filter.clone()) }
        })
    }

    /// Moves this process into its own namespaces, and mounts there the parts that are not shared.
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

    /// Drops all privileges that init does not need.
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

/// The environment variables of the configuration.
fn environment(config: &SandboxConfig) -> init::Environment {
    let split = |variable: &String| variable.split_once('=').map(|(name, value)| (name.into(), value.into()));
    config.environment.iter().filter_map(split).collect()
}
