//! Rejects OCI configurations with settings that are not supported.

use std::path::{Component, Path};

use oci_spec::runtime::{Linux, LinuxNamespaceType, Process, Root, Spec};

/// The namespaces that a sandbox must have.
const NAMESPACES: [LinuxNamespaceType; 6] = [
    LinuxNamespaceType::Pid,
    LinuxNamespaceType::Ipc,
    LinuxNamespaceType::Uts,
    LinuxNamespaceType::Mount,
    LinuxNamespaceType::Cgroup,
    LinuxNamespaceType::Network,
];

/// Checks that podman isolates a sandbox as configured, and asks for nothing that the agent does not support.
pub(super) fn check_settings(spec: &Spec, root: &Root, process: &Process, linux: &Linux) -> Result<(), String> {
    let user = process.user();
    // Each condition, with the setting to report if it does not hold.
    let checks = [
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
    if let Some((_, what)) = checks.iter().find(|(as_expected, _)| !as_expected) {
        return Err(unsupported(what));
    }
    Ok(())
}

/// Checks that a sandbox has its own namespaces of all [`NAMESPACES`], and no others.
pub(super) fn check_namespaces(linux: &Linux) -> Result<(), String> {
    let namespaces = linux.namespaces().as_deref().unwrap_or_default();
    let is_new = |required| namespaces.iter().any(|one| one.typ() == required && one.path().is_none());
    if let Some(missing) = NAMESPACES.into_iter().find(|required| !is_new(*required)) {
        return Err(unsupported(&format!("no {missing} namespace of its own")));
    }
    if let Some(other) = namespaces.iter().find(|one| !NAMESPACES.contains(&one.typ())) {
        return Err(unsupported(&format!("a {} namespace", other.typ())));
    }
    Ok(())
}

/// The error for a setting that is not supported.
pub(super) fn unsupported(what: &str) -> String {
    format!("podman's configuration of the container has {what}")
}

/// Whether a path is absolute and without `..`.
pub(super) fn is_plain(path: &Path) -> bool {
    path.is_absolute() && !path.components().any(|part| part == Component::ParentDir)
}

fn is_empty(text: &Option<String>) -> bool {
    text.as_ref().is_none_or(String::is_empty)
}

pub(super) fn is_none_or_empty<T>(list: &Option<Vec<T>>) -> bool {
    list.as_ref().is_none_or(Vec::is_empty)
}
