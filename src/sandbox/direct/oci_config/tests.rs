//! Tests: what is parsed of a configuration, and which configurations are rejected.

use rustix::thread::CapabilitySet;

use super::*;

/// A configuration that podman 4.3 wrote, shortened.
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

fn config(own_cgroup: bool, change: impl FnOnce(&mut serde_json::Value)) -> Result<SandboxConfig, String> {
    let mut spec = serde_json::from_str(SPEC).unwrap();
    change(&mut spec);
    SandboxConfig::from_spec(&serde_json::from_value(spec).unwrap(), own_cgroup)
}

#[test]
fn the_configuration_that_podman_writes_is_parsed() {
    let config = config(true, |_| {}).unwrap();
    let destinations = |own| -> Vec<String> {
        let mounts = config.mounts.iter().filter(|mount| mount.is_own() == own);
        mounts.map(|mount| mount.destination.display().to_string()).collect()
    };
    assert_eq!(destinations(true), ["/proc", "/sys/fs/cgroup", "/tmp", "/job"]);
    assert_eq!(destinations(false), ["/dev", "/run/coderunner-init"]);
    assert_eq!(config.mounts[4].source, MountSource::New(FsType::Tmpfs, vec![("size".into(), "1".into())]));
    assert_eq!(config.mounts[5].source, MountSource::JobDir);
    assert_eq!(config.mounts[5].flags, 1 | 8);
    assert_eq!(config.capabilities, CapabilitySet::KILL.bits());
    assert_eq!(config.sysctls[Path::new("/proc/sys/kernel/shm_rmid_forced")], "1");
    let limits = [("memory.max", "100"), ("memory.swap.max", "0"), ("pids.max", "7"), ("cpu.max", "5 10")];
    assert_eq!(config.limits.0, limits.map(|(file, value)| (file.to_owned(), value.to_owned())));
    assert_eq!(config.rlimits, [(PosixRlimitType::RlimitCore, 1, 1)]);
}

#[test]
fn sandbox_without_its_own_cgroup_sees_none() {
    let config = config(false, |_| {}).unwrap();
    assert!(config.masked.contains(&"/sys/fs/cgroup".into()));
    assert!(config.mounts.iter().all(|mount| mount.destination != Path::new("/sys/fs/cgroup")));
}

#[test]
fn unsupported_settings_are_rejected() {
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
    for (pointer, key, value, word) in changes {
        let changed = config(true, |spec| spec.pointer_mut(pointer).unwrap()[key] = value.clone());
        let reason = changed.expect_err(word);
        assert!(reason.contains(word), "{pointer} {key}: {reason}");
    }
}
