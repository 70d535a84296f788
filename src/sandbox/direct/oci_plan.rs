//! What an OCI configuration asks of a sandbox, in the kernel's words.
//!
//! podman's word is law: a wall, a mount or a kind of limit that is not known here is refused. Left out is what is decided
//! elsewhere, as the program, its directory, its cgroup's place and how mounts spread (they do not), and of the limits of
//! memory and CPU whatever is no bound: reservations, shares, which CPUs.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::{Capability, LinuxNamespaceType, LinuxResources, Mount, PosixRlimitType, Spec};
use rustix::mount::MountAttrFlags;
use rustix::thread::CapabilitySet;
use serde::{Deserialize, Serialize};

use crate::sandbox::protocol::JOB_DIR;
use crate::sandbox::seccomp::podman_profile;

/// All that makes a sandbox but its job directory, its place in the network, and its cgroup.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Where the image is mounted.
    pub root: PathBuf,
    /// In this order.
    pub mounts: Vec<Place>,
    /// Of which nothing is to be seen.
    pub masked: Vec<PathBuf>,
    /// Which may be read only.
    pub readonly: Vec<PathBuf>,
    /// By their place below `/proc/sys`.
    pub sysctls: BTreeMap<PathBuf, String>,
    /// Of the sandbox's own.
    pub hostname: String,
    /// As `NAME=VALUE`.
    pub environment: Vec<String>,
    /// Of init.
    pub umask: u32,
    /// Its further groups.
    pub groups: Vec<u32>,
    /// Soft and hard.
    pub rlimits: Vec<(PosixRlimitType, u64, u64)>,
    /// What init may do; programs may nothing.
    pub capabilities: u64,
    /// None leaves the server's own.
    pub oom_score: Option<i32>,
    /// podman's seccomp profile, compiled.
    pub filter: Vec<podman_profile::Step>,
    /// What the kernel is to count.
    pub limits: Limits,
}

/// A place where something is mounted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Place {
    /// Below the sandbox's root.
    pub at: PathBuf,
    /// What.
    pub what: What,
    /// Flags of `mount_setattr(2)`.
    pub flags: u32,
}

/// What is mounted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum What {
    /// A new one of this kind, with these parameters.
    New(Kind, Vec<(String, String)>),
    /// A file or directory that is there.
    Bound(PathBuf),
    /// The job directory.
    Job,
}

/// Kinds of file systems.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// `/proc`
    Proc,
    /// `/sys`
    Sysfs,
    /// `/dev`, and what programs write to.
    Tmpfs,
    /// Pseudo-terminals.
    Devpts,
    /// A cgroup's counters.
    Cgroup,
}

impl Kind {
    /// As the kernel has it.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Proc => "proc",
            Kind::Sysfs => "sysfs",
            Kind::Tmpfs => "tmpfs",
            Kind::Devpts => "devpts",
            Kind::Cgroup => "cgroup2",
        }
    }
}

/// Files of a sandbox's cgroup, and what is written to them.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Limits(pub Vec<(String, String)>);

impl Place {
    /// Whether each sandbox needs its own. What nobody can write to, and is no sandbox's, is the same for all.
    pub fn is_own(&self) -> bool {
        match &self.what {
            What::New(Kind::Proc | Kind::Cgroup, _) | What::Job => true,
            What::New(Kind::Tmpfs, _) => self.at != Path::new(DEV),
            What::New(Kind::Sysfs | Kind::Devpts, _) | What::Bound(_) => false,
        }
    }
}

/// The devices that every container has.
pub const DEVICES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];

/// Names below [`DEV`] that stand for others.
pub const LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

/// Where devices are.
pub const DEV: &str = "/dev";

impl Plan {
    /// Reads podman's configuration; the error names what is not known here. Without a cgroup of its own a sandbox sees
    /// none.
    pub fn of(spec: &Spec, own_cgroup: bool) -> Result<Plan, String> {
        let unknown = |what: &str| Err(format!("its configuration by podman has {what}"));
        let missing = |what: &str| format!("its configuration by podman has no {what}");
        let root = spec.root().as_ref().ok_or_else(|| missing("root"))?;
        let process = spec.process().as_ref().ok_or_else(|| missing("process"))?;
        let linux = spec.linux().as_ref().ok_or_else(|| missing("Linux part"))?;
        let user = process.user();
        // The walls are to be podman's, all of them.
        let asked = [
            (root.readonly() == Some(true), "a root that can be written to"),
            ((user.uid(), user.gid()) == (0, 0), "another user than 0"),
            (process.no_new_privileges() == Some(true), "new privileges"),
            (is_empty(process.apparmor_profile()), "an AppArmor profile"),
            (is_empty(process.selinux_label()) && is_empty(linux.mount_label()), "an SELinux label"),
            (process.io_priority().is_none(), "an I/O priority"),
            (process.scheduler().is_none(), "a scheduler"),
            (process.exec_cpu_affinity().is_none(), "a CPU affinity"),
            (is_empty(spec.domainname()), "a domain name"),
            (spec.hooks().as_ref().is_none_or(|hooks| *hooks == Default::default()), "hooks"),
            (is_none_or_empty(linux.uid_mappings()) && is_none_or_empty(linux.gid_mappings()), "a mapping of ids"),
            (is_none_or_empty(linux.devices()), "further devices"),
            (linux.net_devices().as_ref().is_none_or(|devices| devices.is_empty()), "network devices"),
            (linux.intel_rdt().is_none() && linux.memory_policy().is_none(), "a policy for cache or memory"),
            (linux.personality().is_none(), "a personality"),
            (linux.time_offsets().as_ref().is_none_or(|offsets| offsets.is_empty()), "a clock of its own"),
        ];
        if let Some((_, what)) = asked.iter().find(|(as_expected, _)| !as_expected) {
            return unknown(what);
        }
        let namespaces = linux.namespaces().as_deref().unwrap_or_default();
        let is_there = |wanted| namespaces.iter().any(|one| one.typ() == wanted && one.path().is_none());
        if let Some(missing) = NAMESPACES.into_iter().find(|wanted| !is_there(*wanted)) {
            return unknown(&format!("no {missing} namespace of its own"));
        }
        if let Some(more) = namespaces.iter().find(|one| !NAMESPACES.contains(&one.typ())) {
            return unknown(&format!("a {} namespace", more.typ()));
        }

        let mut masked: Vec<PathBuf> = linux.masked_paths().iter().flatten().map(PathBuf::from).collect();
        let mut mounts = Vec::new();
        for mount in spec.mounts().iter().flatten() {
            let place = place(mount)?;
            match place.what {
                What::New(Kind::Cgroup, _) if !own_cgroup => masked.push(place.at),
                _ => mounts.push(place),
            }
        }
        let capabilities = process.capabilities().as_ref().ok_or_else(|| missing("capabilities"))?;
        let sets = [capabilities.bounding(), capabilities.effective(), capabilities.permitted()];
        let [bounding, effective, permitted] = sets.map(|set| set.iter().flatten().copied().collect::<Vec<_>>());
        let held = bounding.iter().filter(|one| effective.contains(one) && permitted.contains(one));
        let seccomp = linux.seccomp().as_ref().ok_or_else(|| missing("seccomp profile"))?;
        let plan = Plan {
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
            capabilities: held.map(|one| capability(*one)).try_fold(0, |set, one| one.map(|one| set | one.bits()))?,
            oom_score: process.oom_score_adj(),
            filter: podman_profile::compiled(seccomp)
                .ok_or_else(|| "podman's seccomp profile is not a list of what is allowed".to_owned())?,
            limits: limits(linux.resources().as_ref())?,
        };
        if let Some(path) = plan.paths().find(|path| !is_plain(path)) {
            return unknown(&format!("the path {}, which is not from the root on", path.display()));
        }
        Ok(plan)
    }

    /// Those in a sandbox, and that of its root.
    fn paths(&self) -> impl Iterator<Item = &Path> {
        let places = self.mounts.iter().map(|place| &place.at);
        let lists = [&self.masked, &self.readonly].into_iter().flatten();
        places.chain(lists).chain(self.sysctls.keys()).chain([&self.root]).map(PathBuf::as_path)
    }
}

/// Whether a path says where it is, and no other way than straight.
fn is_plain(path: &Path) -> bool {
    path.is_absolute() && !path.components().any(|part| part == Component::ParentDir)
}

/// The namespaces that a sandbox has.
const NAMESPACES: [LinuxNamespaceType; 6] = [
    LinuxNamespaceType::Pid,
    LinuxNamespaceType::Ipc,
    LinuxNamespaceType::Uts,
    LinuxNamespaceType::Mount,
    LinuxNamespaceType::Cgroup,
    LinuxNamespaceType::Network,
];

fn is_empty(text: &Option<String>) -> bool {
    text.as_ref().is_none_or(String::is_empty)
}

fn is_none_or_empty<T>(list: &Option<Vec<T>>) -> bool {
    list.as_ref().is_none_or(Vec::is_empty)
}

fn place(mount: &Mount) -> Result<Place, String> {
    let at = mount.destination().clone();
    let unknown = |what: &str| format!("podman wants {what} mounted at {}", at.display());
    let kind = mount.typ().as_deref().unwrap_or_default();
    let kind = match kind {
        "proc" => Some(Kind::Proc),
        "sysfs" => Some(Kind::Sysfs),
        "tmpfs" => Some(Kind::Tmpfs),
        "devpts" => Some(Kind::Devpts),
        "cgroup" | "cgroup2" => Some(Kind::Cgroup),
        "bind" | "" => None,
        other => return Err(unknown(other)),
    };
    let mut flags = match kind {
        // podman says nothing of it.
        Some(Kind::Devpts) => MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC,
        _ => MountAttrFlags::empty(),
    };
    let mut parameters = Vec::new();
    for option in mount.options().iter().flatten() {
        flags |= match option.as_str() {
            "ro" => MountAttrFlags::MOUNT_ATTR_RDONLY,
            "nosuid" => MountAttrFlags::MOUNT_ATTR_NOSUID,
            "nodev" => MountAttrFlags::MOUNT_ATTR_NODEV,
            "noexec" => MountAttrFlags::MOUNT_ATTR_NOEXEC,
            // Nothing is seen of these, or they are so anyway: all mounts are private, and relatime is the kernel's way.
            "rw" | "suid" | "dev" | "exec" | "bind" | "rbind" | "private" | "rprivate" | "relatime" | "strictatime" => {
                MountAttrFlags::empty()
            }
            other => match (kind, other.split_once('=')) {
                (Some(_), Some((name, value))) => {
                    parameters.push((name.to_owned(), value.to_owned()));
                    MountAttrFlags::empty()
                }
                _ => return Err(unknown(&format!("something with the option {other:?}"))),
            },
        };
    }
    let what = match (kind, mount.source()) {
        (Some(kind), _) => What::New(kind, parameters),
        (None, _) if at == Path::new(JOB_DIR) => What::Job,
        (None, Some(source)) => What::Bound(source.clone()),
        (None, None) => return Err(unknown("nothing")),
    };
    Ok(Place { at, what, flags: flags.bits() })
}

fn capability(of: Capability) -> Result<CapabilitySet, String> {
    CapabilitySet::from_name(&of.to_string()).ok_or_else(|| format!("podman wants a capability {of}"))
}

/// What podman would have the OCI runtime write to a cgroup. Devices are not counted in: a sandbox has those of
/// [`DEV`] and cannot make others.
fn limits(resources: Option<&LinuxResources>) -> Result<Limits, String> {
    let Some(resources) = resources else { return Ok(Limits::default()) };
    let unknown = |what: &str| Err(format!("podman wants a limit of {what}"));
    if resources.block_io().is_some() || resources.rdma().is_some() || resources.network().is_some() {
        return unknown("blocks, network or RDMA");
    }
    if !is_none_or_empty(resources.hugepage_limits()) {
        return unknown("huge pages");
    }
    if resources.unified().as_ref().is_some_and(|files| !files.is_empty()) {
        return unknown("its own (--cgroup-conf)");
    }
    let mut files = Vec::new();
    let mut write = |name: &str, value: String| files.push((name.to_owned(), value));
    if let Some(memory) = resources.memory()
        && let Some(limit) = memory.limit()
    {
        write("memory.max", limit.to_string());
        // OCI counts both together, the kernel apart.
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
    Ok(Limits(files))
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// As podman 4.3 wrote it, shortened.
    pub const SPEC: &str = r#"{
        "ociVersion": "1.0.2-dev",
        "process": {"user": {"uid": 0, "gid": 0, "umask": 18, "additionalGids": [0]}, "args": ["/run/coderunner-init", "init"],
            "env": ["PATH=/bin"], "cwd": "/", "noNewPrivileges": true,
            "capabilities": {"bounding": ["CAP_KILL", "CAP_SETUID"], "effective": ["CAP_KILL", "CAP_SETUID"], "permitted": ["CAP_KILL"]},
            "rlimits": [{"type": "RLIMIT_CORE", "hard": 1, "soft": 1}]},
        "root": {"path": "/image", "readonly": true},
        "hostname": "sandbox",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755"]},
            {"destination": "/run/coderunner-init", "type": "bind", "source": "/bin/true", "options": ["ro", "rbind"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]},
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "size=1"]},
            {"destination": "/job", "type": "bind", "source": "none", "options": ["ro", "noexec"]}],
        "linux": {"resources": {"memory": {"limit": 100, "swap": 100}, "pids": {"limit": 7}, "cpu": {"quota": 5, "period": 10}},
            "sysctl": {"kernel.shm_rmid_forced": "1"},
            "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "cgroup"}, {"type": "network"}],
            "seccomp": {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW"},
                {"names": ["personality"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 8, "op": "SCMP_CMP_EQ"}]}]},
            "maskedPaths": ["/proc/kcore"], "readonlyPaths": ["/proc/sys"]}}"#;

    fn plan(own_cgroup: bool, change: impl FnOnce(&mut serde_json::Value)) -> Result<Plan, String> {
        let mut spec = serde_json::from_str(SPEC).unwrap();
        change(&mut spec);
        Plan::of(&serde_json::from_value(spec).unwrap(), own_cgroup)
    }

    #[test]
    fn a_configuration_of_podman_is_understood() {
        let plan = plan(true, |_| {}).unwrap();
        let places = |own| -> Vec<String> {
            let mounts = plan.mounts.iter().filter(|place| place.is_own() == own);
            mounts.map(|place| place.at.display().to_string()).collect()
        };
        assert_eq!(places(true), ["/proc", "/sys/fs/cgroup", "/tmp", "/job"]);
        assert_eq!(places(false), ["/dev", "/run/coderunner-init"]);
        assert_eq!(plan.mounts[4].what, What::New(Kind::Tmpfs, vec![("size".into(), "1".into())]));
        assert_eq!(plan.mounts[5].what, What::Job);
        assert_eq!(plan.mounts[5].flags, 1 | 8);
        assert_eq!(plan.capabilities, CapabilitySet::KILL.bits());
        assert_eq!(plan.sysctls[Path::new("/proc/sys/kernel/shm_rmid_forced")], "1");
        let limits = [("memory.max", "100"), ("memory.swap.max", "0"), ("pids.max", "7"), ("cpu.max", "5 10")];
        assert_eq!(plan.limits.0, limits.map(|(file, value)| (file.to_owned(), value.to_owned())));
        assert_eq!(plan.rlimits, [(PosixRlimitType::RlimitCore, 1, 1)]);
    }

    #[test]
    fn a_cgroup_that_is_not_its_own_is_hidden() {
        let plan = plan(false, |_| {}).unwrap();
        assert!(plan.masked.contains(&"/sys/fs/cgroup".into()));
        assert!(plan.mounts.iter().all(|place| place.at != Path::new("/sys/fs/cgroup")));
    }

    #[test]
    fn what_is_not_known_is_refused() {
        let changes: [(&str, &str, serde_json::Value, &str); 15] = [
            ("/root", "readonly", false.into(), "a root that can be written to"),
            ("/process", "noNewPrivileges", false.into(), "new privileges"),
            ("/process", "selinuxLabel", "container_t".into(), "SELinux"),
            ("/process", "apparmorProfile", "containers-default".into(), "AppArmor"),
            ("/process/user", "uid", 7.into(), "another user"),
            ("", "hooks", serde_json::json!({"prestart": [{"path": "/bin/true"}]}), "hooks"),
            (
                "/linux",
                "devices",
                serde_json::json!([{"path": "/dev/kvm", "type": "c", "major": 10, "minor": 232}]),
                "devices",
            ),
            ("/linux", "uidMappings", serde_json::json!([{"containerID": 0, "hostID": 1, "size": 1}]), "mapping"),
            ("/linux/namespaces/0", "path", "/proc/1/ns/pid".into(), "no pid namespace"),
            ("/linux/namespaces/0", "type", "user".into(), "no pid namespace"),
            ("/linux/seccomp", "defaultAction", "SCMP_ACT_ALLOW".into(), "seccomp"),
            ("/mounts/4", "destination", "/tmp/../etc".into(), "/tmp/../etc"),
            ("/root", "path", "image".into(), "the path image"),
            ("/mounts/1", "type", "overlay".into(), "overlay mounted at /dev"),
            ("/mounts/4", "options", serde_json::json!(["tmpcopyup"]), "tmpcopyup"),
        ];
        for (place, key, value, word) in changes {
            let changed = plan(true, |spec| spec.pointer_mut(place).unwrap()[key] = value.clone());
            let reason = changed.expect_err(word);
            assert!(reason.contains(word), "{place} {key}: {reason}");
        }
    }
}
