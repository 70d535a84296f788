//! Finds and kills the processes of containers that podman no longer knows.
//!
//! A container may be deleted while it is being created, together with its image or because a disk is full. podman then
//! deletes its record and its files, but the process that should have become its init waits forever to be started, and
//! podman's monitor, `conmon`, waits for that process.

use std::collections::HashMap;
use std::fs;

use nix::unistd::getuid;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// The name of a container of an instance. `kind` is `box` for a sandbox, or `template`.
pub fn name(instance: &str, kind: &str, number: u64) -> String {
    format!("coderunner-{instance}-{}-{kind}-{number}", std::process::id())
}

/// The source of the volumes of a container, by which a sweep finds their owner. Programs can read it, so it does not
/// tell them how many sandboxes there were.
pub fn volume_source(instance: &str, name: &str) -> String {
    format!("{}{}", volume_prefix(instance), &blake3::hash(name.as_bytes()).to_hex()[..16])
}

/// Whether [`volume_source`] made this source for a container of this instance.
pub fn is_volume_of(instance: &str, source: &str) -> bool {
    let hash = source.strip_prefix(&volume_prefix(instance)).unwrap_or_default();
    hash.len() == 16 && hash.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn volume_prefix(instance: &str) -> String {
    format!("coderunner-{instance}-")
}

/// Whether [`name`] made this name for this instance. The name of an instance may begin with that of another one.
fn is_of(instance: &str, name: &str) -> bool {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let rest = name.strip_prefix("coderunner-").and_then(|rest| rest.strip_prefix(instance));
    let parts: Vec<&str> = rest.unwrap_or_default().split('-').collect();
    matches!(parts[..], ["", process, "box" | "template", number] if digits(process) && digits(number))
}

/// Names of the containers of an instance that have a process which podman's monitor waits for, whether podman still
/// knows the container or not.
pub fn monitored(instance: &str) -> Vec<String> {
    first_processes(|name| is_of(instance, name)).into_keys().collect()
}

/// Kills the remaining processes of these containers. Their monitors then exit.
pub fn kill(names: &[String]) {
    let remaining = || first_processes(|name| names.iter().any(|one| one == name)).into_values();
    for pid in remaining() {
        let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else { continue };
        // The pid may have been reused before the pidfd was opened.
        if remaining().any(|one| one == pid) {
            // Fails if the process has already ended.
            let _ = pidfd_send_signal(process, Signal::KILL);
        }
    }
}

/// The first process of each of this user's containers, by the container name on the command line of its monitor. Skips
/// entries of `/proc` that cannot be read: those processes have ended or belong to other users.
fn first_processes(is_wanted: impl Fn(&str) -> bool) -> HashMap<String, Pid> {
    let (mut monitors, mut children) = (HashMap::new(), Vec::new());
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let number = entry.file_name().to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw);
        let status = fs::read_to_string(entry.path().join("status")).unwrap_or_default();
        let Some(pid) = number.filter(|_| is_ours(&status)) else { continue };
        if let Some(parent) = parent_outside(&status) {
            children.push((parent, pid));
            continue;
        }
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if let Some(name) = monitored_name(&String::from_utf8_lossy(&line)).filter(|name| is_wanted(name)) {
            monitors.insert(pid, name.to_owned());
        }
    }
    children.into_iter().filter_map(|(parent, pid)| Some((monitors.remove(&parent)?, pid))).collect()
}

/// The container name on a command line of `conmon`; `None` for any other command line.
fn monitored_name(line: &str) -> Option<&str> {
    let mut words = line.split('\0');
    words.next().filter(|program| program.ends_with("conmon"))?;
    words.find(|word| *word == "-n")?;
    words.next()
}

/// The words of the line `name` in a process's `status` file.
fn words<'a>(status: &'a str, name: &str) -> impl Iterator<Item = &'a str> {
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_default().split_whitespace()
}

/// Whether a process belongs to this user. Its `status` decides, because its directory in `/proc` may belong to root:
/// that is so for processes that are not dumpable.
fn is_ours(status: &str) -> bool {
    words(status, "Uid").next() == Some(&getuid().to_string())
}

/// The parent of a container's first process, which is outside of the container; `None` for any other process.
fn parent_outside(status: &str) -> Option<Pid> {
    let is_first = words(status, "NSpid").skip(1).last() == Some("1");
    words(status, "PPid").next().filter(|_| is_first)?.parse().ok().and_then(Pid::from_raw)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn container_names_belong_to_one_instance() {
        let made = name("main", "box", 7);
        assert!(is_of("main", &made), "{made}");
        for other in ["mai", "main-1", "", "1", &format!("main-{}", std::process::id())] {
            assert!(!is_of(other, &made), "{other:?}");
            let theirs = name(other, "template", 7);
            assert!(!is_of("main", &theirs) && is_of(other, &theirs), "{theirs}");
        }
        for by_hand in ["coderunner-main", "coderunner-main-x-box-1", "coderunner-main-1-box-", "other"] {
            assert!(!is_of("main", by_hand), "{by_hand}");
        }
    }

    #[test]
    fn volumes_belong_to_one_instance() {
        let source = volume_source("main", &name("main", "box", 7));
        assert!(is_volume_of("main", &source), "{source}");
        for other in ["mai", "main-1", ""] {
            assert!(!is_volume_of(other, &source), "{other:?}");
        }
        for by_hand in ["tmpfs", "coderunner-main-", "coderunner-main-data", "", "/dev/sda1"] {
            assert!(!is_volume_of("main", by_hand), "{by_hand}");
        }
    }

    #[test]
    fn conmon_processes_are_recognised_by_command_line() {
        assert_eq!(monitored_name("/usr/bin/conmon\0--syslog\0-c\0id\0-n\0name\0-l\0none\0"), Some("name"));
        assert_eq!(monitored_name("/usr/bin/conmon\0-c\0id\0"), None);
        assert_eq!(monitored_name("grep\0conmon\0-n\0name\0"), None);
        assert_eq!(monitored_name(""), None);
    }

    #[test]
    fn process_owner_is_read_from_proc_status() {
        let own = getuid().as_raw();
        assert!(is_ours(&format!("Name:\tcrun\nUid:\t{own}\t0\t0\t0\n")));
        assert!(!is_ours(&format!("Name:\tcrun\nUid:\t{}\t{own}\n", own + 1)) && !is_ours(""));
    }

    #[test]
    fn parent_is_found_only_for_pid_1_of_a_namespace() {
        let parent =
            |ids: &str| parent_outside(&format!("Name:\tcrun\nPid:\t9\nPPid:\t5\nNSpid:\t{ids}\nThreads:\t1\n"));
        assert_eq!(parent("9\t1"), Pid::from_raw(5));
        for none in ["9", "1", "9\t2", ""] {
            assert_eq!(parent(none), None, "{none:?}");
        }
        assert_eq!(parent_outside(""), None);
    }
}
