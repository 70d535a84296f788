//! Parses the OCI configuration that podman wrote.
//!
//! podman decides on the isolation: a security setting, a mount or a kind of limit that is not supported here is an
//! error. Ignored are settings that are decided elsewhere (the program, its directory, the path of its cgroup, the
//! propagation of mounts, which is always off), and settings for memory and CPU that are no upper bound: reservations,
//! shares, the set of CPUs.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{self as oci, Capability, LinuxResources, Spec};
use rustix::mount::MountAttrFlags;
use rustix::thread::CapabilitySet;

use crate::model::rootfs::JOB_DIR;
use crate::sandbox::direct::oci_config::checks::{
    check_namespaces, check_settings, is_none_or_empty, is_plain, unsupported,
};
use crate::sandbox::direct::oci_config::{CgroupLimits, FsType, Mount, MountSource, SandboxConfig};
use crate::sandbox::seccomp::podman_profile;

impl SandboxConfig {
    /// Parses podman's configuration. The error names a setting that is not supported. A sandbox without a cgroup of
    /// its own gets no cgroup mount.
    pub fn from_spec(spec: &Spec, own_cgroup: bool) -> Result<SandboxConfig, String> {
        let missing = |what: &str| format!("podman's configuration of the container has no {what}");
        let root = spec.root().as_ref().ok_or_else(|| missing("root"))?;
        let process = spec.process().as_ref().ok_or_else(|| missing("process"))?;
        let linux = spec.linux().as_ref().ok_or_else(|| missing("Linux part"))?;
        let user = process.user();
        check_settings(spec, root, process, linux)?;
        check_namespaces(linux)?;
        let mut masked: Vec<PathBuf> = linux.masked_paths().iter().flatten().map(PathBuf::from).collect();
        let mut mounts = Vec::new();
        for mount in spec.mounts().iter().flatten() {
            let mount = parse_mount(mount)?;
            match mount.source {
                MountSource::New(FsType::Cgroup, _) if !own_cgroup => masked.push(mount.destination),
                _ => mounts.push(mount),
            }
        }
        let capabilities = process.capabilities().as_ref().ok_or_else(|| missing("capabilities"))?;
        let sets = [capabilities.bounding(), capabilities.effective(), capabilities.permitted()];
        let [bounding, effective, permitted] = sets.map(|set| set.iter().flatten().copied().collect::<Vec<_>>());
        let in_all_sets = bounding.iter().filter(|one| effective.contains(one) && permitted.contains(one));
        let seccomp = linux.seccomp().as_ref().ok_or_else(|| missing("seccomp profile"))?;
        let config = SandboxConfig {
            root: root.path().clone(),
            mounts,
            masked,
            readonly: linux.readonly_paths().iter().flatten().map(PathBuf::from).collect(),
            sysctls: linux
                .sysctl()
                .iter()
                .flatten()
                .map(|(name, value)| {
                    (Path::new("/proc/sys").join(name.replace('.', "/").trim_start_matches('/')), value.clone())
                })
                .collect(),
            hostname: spec.hostname().clone().unwrap_or_default(),
            environment: process.env().clone().unwrap_or_default(),
            umask: user.umask().unwrap_or(0o022),
            groups: user.additional_gids().clone().unwrap_or_default(),
            rlimits: process
                .rlimits()
                .iter()
                .flatten()
                .map(|limit| (limit.typ(), limit.soft(), limit.hard()))
                .collect(),
            capabilities: in_all_sets
                .map(|one| capability(*one))
                .try_fold(0, |set, one| one.map(|one| set | one.bits()))?,
            oom_score: process.oom_score_adj(),
            filter: podman_profile::compiled(seccomp)
                .ok_or_else(|| "podman's seccomp profile is not an allow-list".to_owned())?,
            limits: cgroup_limits(linux.resources().as_ref())?,
        };
        if let Some(path) = config.paths().find(|path| !is_plain(path)) {
            return Err(unsupported(&format!("the path {}, which is not absolute or contains ..", path.display())));
        }
        Ok(config)
    }
}

fn parse_mount(mount: &oci::Mount) -> Result<Mount, String> {
    let destination = mount.destination().clone();
    let unsupported = |what: &str| format!("podman wants {what} mounted at {}", destination.display());
    let fs_type = match mount.typ().as_deref().unwrap_or_default() {
        "proc" => Some(FsType::Proc),
        "sysfs" => Some(FsType::Sysfs),
        "tmpfs" => Some(FsType::Tmpfs),
        "devpts" => Some(FsType::Devpts),
        "cgroup" | "cgroup2" => Some(FsType::Cgroup),
        "bind" | "" => None,
        other => return Err(unsupported(other)),
    };
    let mut flags = match fs_type {
        // podman's configuration does not contain these flags.
        Some(FsType::Devpts) => MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC,
        _ => MountAttrFlags::empty(),
    };
    let mut parameters = Vec::new();
    for option in mount.options().iter().flatten() {
        flags |= match option.as_str() {
            "ro" => MountAttrFlags::MOUNT_ATTR_RDONLY,
            "nosuid" => MountAttrFlags::MOUNT_ATTR_NOSUID,
            "nodev" => MountAttrFlags::MOUNT_ATTR_NODEV,
            "noexec" => MountAttrFlags::MOUNT_ATTR_NOEXEC,
            // These have no effect, or are the default: all mounts are private, and relatime is the kernel's default.
            "rw" | "suid" | "dev" | "exec" | "bind" | "rbind" | "private" | "rprivate" | "relatime" | "strictatime" => {
                MountAttrFlags::empty()
            }
            other => match (fs_type, other.split_once('=')) {
                (Some(_), Some((name, value))) => {
                    parameters.push((name.to_owned(), value.to_owned()));
                    MountAttrFlags::empty()
                }
                _ => return Err(unsupported(&format!("a file system with the option {other:?}"))),
            },
        };
    }
    let source = match (fs_type, mount.source()) {
        (Some(fs_type), _) => MountSource::New(fs_type, parameters),
        (None, _) if destination == Path::new(JOB_DIR) => MountSource::JobDir,
        (None, Some(path)) => MountSource::Bind(path.clone()),
        (None, None) => return Err(unsupported("nothing")),
    };
    Ok(Mount { destination, source, flags: flags.bits() })
}

fn capability(of: Capability) -> Result<CapabilitySet, String> {
    CapabilitySet::from_name(&of.to_string()).ok_or_else(|| format!("podman wants a capability {of}"))
}

/// The values that the OCI runtime would write to the files of a cgroup. Rules for devices are left out: a sandbox has
/// [the devices of every container](crate::model::rootfs::DEVICES) and cannot create others.
fn cgroup_limits(resources: Option<&LinuxResources>) -> Result<CgroupLimits, String> {
    let Some(resources) = resources else { return Ok(CgroupLimits::default()) };
    let unsupported = |what: &str| Err(format!("podman wants a limit of {what}"));
    if resources.block_io().is_some() || resources.rdma().is_some() || resources.network().is_some() {
        return unsupported("blocks, network or RDMA");
    }
    if !is_none_or_empty(resources.hugepage_limits()) {
        return unsupported("huge pages");
    }
    if resources.unified().as_ref().is_some_and(|files| !files.is_empty()) {
        return unsupported("its own kind (--cgroup-conf)");
    }
    let mut files = Vec::new();
    let mut write = |name: &str, value: String| files.push((name.to_owned(), value));
    if let Some(memory) = resources.memory()
        && let Some(limit) = memory.limit()
    {
        write("memory.max", limit.to_string());
        // OCI limits the sum of memory and swap. The kernel limits each of them.
        if let Some(both) = memory.swap() {
            write("memory.swap.max", (both - limit).max(0).to_string());
        }
    }
    if let Some(pids) = resources.pids() {
        write("pids.max", pids.limit().to_string());
    }
    if let Some(cpu) = resources.cpu()
        && let Some(quota) = cpu.quota()
    {
        write("cpu.max", format!("{quota} {}", cpu.period().unwrap_or(100_000)));
    }
    Ok(CgroupLimits(files))
}
