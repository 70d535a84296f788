//! The configuration of a sandbox in terms of the kernel, parsed from the OCI configuration that podman wrote.

mod checks;
mod parse;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use oci_spec::runtime::PosixRlimitType;
use serde::{Deserialize, Serialize};

use crate::model::rootfs::DEV;
use crate::sandbox::seccomp::podman_profile;

/// The configuration of a sandbox, except for its job directory, its network namespace and its cgroup.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SandboxConfig {
    /// Path at which podman has mounted the image.
    pub root: PathBuf,
    /// The mounts, in the order in which they are made.
    pub mounts: Vec<Mount>,
    /// Paths to hide.
    pub masked: Vec<PathBuf>,
    /// Paths to make read-only.
    pub readonly: Vec<PathBuf>,
    /// Sysctls by their full paths below `/proc/sys`.
    pub sysctls: BTreeMap<PathBuf, String>,
    /// Host name in the sandbox's UTS namespace.
    pub hostname: String,
    /// Environment variables as `NAME=VALUE`.
    pub environment: Vec<String>,
    /// Umask of init.
    pub umask: u32,
    /// Supplementary groups of init.
    pub groups: Vec<u32>,
    /// Resource limits of init: type, soft limit, hard limit.
    pub rlimits: Vec<(PosixRlimitType, u64, u64)>,
    /// Capabilities of init. Programs have none.
    pub capabilities: u64,
    /// OOM score adjustment of init; `None` keeps that of the server.
    pub oom_score: Option<i32>,
    /// podman's seccomp profile, compiled.
    pub filter: Vec<podman_profile::Step>,
    /// Limits of the sandbox's cgroup.
    pub limits: CgroupLimits,
}

/// A mount of a sandbox.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Mount {
    /// Path in the sandbox.
    pub destination: PathBuf,
    /// What is mounted there.
    pub source: MountSource,
    /// Flags of `mount_setattr(2)`.
    pub flags: u32,
}

/// The source of a mount.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum MountSource {
    /// A new file system of this type, with these parameters.
    New(FsType, Vec<(String, String)>),
    /// An existing file or directory.
    Bind(PathBuf),
    /// The job directory.
    JobDir,
}

/// Types of file systems.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FsType {
    /// `/proc`
    Proc,
    /// `/sys`
    Sysfs,
    /// `/dev`, and the writable directories.
    Tmpfs,
    /// Pseudo-terminals.
    Devpts,
    /// The cgroup file system.
    Cgroup,
}

impl FsType {
    /// The kernel's name of the type.
    pub fn name(self) -> &'static str {
        match self {
            FsType::Proc => "proc",
            FsType::Sysfs => "sysfs",
            FsType::Tmpfs => "tmpfs",
            FsType::Devpts => "devpts",
            FsType::Cgroup => "cgroup2",
        }
    }
}

impl Mount {
    /// Whether each sandbox needs its own mount. Mounts that nobody can write to, and that show nothing of a particular
    /// sandbox, are shared by all sandboxes of a template.
    pub fn is_own(&self) -> bool {
        match &self.source {
            MountSource::New(FsType::Proc | FsType::Cgroup, _) | MountSource::JobDir => true,
            MountSource::New(FsType::Tmpfs, _) => self.destination != Path::new(DEV),
            MountSource::New(FsType::Sysfs | FsType::Devpts, _) | MountSource::Bind(_) => false,
        }
    }
}

/// Files of a sandbox's cgroup, with the values to write to them.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct CgroupLimits(pub Vec<(String, String)>);

impl SandboxConfig {
    /// All paths in the configuration: those in the sandbox, and that of its root.
    fn paths(&self) -> impl Iterator<Item = &Path> {
        let mounts = self.mounts.iter().map(|mount| &mount.destination);
        let lists = [&self.masked, &self.readonly].into_iter().flatten();
        mounts.chain(lists).chain(self.sysctls.keys()).chain([&self.root]).map(PathBuf::as_path)
    }
}

#[cfg(test)]
pub mod tests;
