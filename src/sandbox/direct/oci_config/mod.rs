//! The configuration of a sandbox in terms of the kernel, as the OCI configuration that podman wrote asks for it.

mod checks;
mod parse;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use oci_spec::runtime::PosixRlimitType;
use serde::{Deserialize, Serialize};

use crate::model::rootfs::DEV;
use crate::sandbox::seccomp::podman_profile;

/// All that makes a sandbox but its job directory, its network namespace, and its cgroup.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SandboxConfig {
    /// Where the image is mounted.
    pub root: PathBuf,
    /// In this order.
    pub mounts: Vec<Mount>,
    /// Paths that are hidden.
    pub masked: Vec<PathBuf>,
    /// Paths that are made read-only.
    pub readonly: Vec<PathBuf>,
    /// By their paths below `/proc/sys`.
    pub sysctls: BTreeMap<PathBuf, String>,
    /// In the sandbox's own UTS namespace.
    pub hostname: String,
    /// As `NAME=VALUE`.
    pub environment: Vec<String>,
    /// Of init.
    pub umask: u32,
    /// Supplementary groups of init.
    pub groups: Vec<u32>,
    /// Soft and hard.
    pub rlimits: Vec<(PosixRlimitType, u64, u64)>,
    /// Capabilities of init; programs have none.
    pub capabilities: u64,
    /// `None` leaves the server's own.
    pub oom_score: Option<i32>,
    /// podman's seccomp profile, compiled.
    pub filter: Vec<podman_profile::Step>,
    /// Limits of the sandbox's cgroup.
    pub limits: CgroupLimits,
}

/// Something that is mounted in a sandbox.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Mount {
    /// Path in the sandbox.
    pub destination: PathBuf,
    /// What is mounted there.
    pub source: MountSource,
    /// Flags of `mount_setattr(2)`.
    pub flags: u32,
}

/// What is mounted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum MountSource {
    /// A new file system of this type, with these parameters.
    New(FsType, Vec<(String, String)>),
    /// A file or directory that exists already.
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
    /// A cgroup's counters.
    Cgroup,
}

impl FsType {
    /// The kernel's name of it.
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
    /// Whether each sandbox needs its own. What nobody can write to, and belongs to no sandbox, is shared by all.
    pub fn is_own(&self) -> bool {
        match &self.source {
            MountSource::New(FsType::Proc | FsType::Cgroup, _) | MountSource::JobDir => true,
            MountSource::New(FsType::Tmpfs, _) => self.destination != Path::new(DEV),
            MountSource::New(FsType::Sysfs | FsType::Devpts, _) | MountSource::Bind(_) => false,
        }
    }
}

/// Files of a sandbox's cgroup, and what is written to them.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct CgroupLimits(pub Vec<(String, String)>);

impl SandboxConfig {
    /// All paths in it: those in a sandbox, and that of its root.
    fn paths(&self) -> impl Iterator<Item = &Path> {
        let mounts = self.mounts.iter().map(|mount| &mount.destination);
        let lists = [&self.masked, &self.readonly].into_iter().flatten();
        mounts.chain(lists).chain(self.sysctls.keys()).chain([&self.root]).map(PathBuf::as_path)
    }
}

#[cfg(test)]
pub mod tests;
