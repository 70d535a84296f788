//! Containers that podman has forgotten. Where one is deleted while it is being made, with its image or for want of a
//! disk, its record and its files go; but the process that should have become its init waits to be started for ever, and
//! podman's monitor, `conmon`, waits for that process.

use std::collections::HashMap;
use std::fs;

use nix::unistd::getuid;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// The name of a container of an instance: that of a sandbox (`box`) or of a `template`.
pub fn name(instance: &str, kind: &str, number: u64) -> String {
    format!("coderunner-{instance}-{}-{kind}-{number}", std::process::id())
}

/// Whether [`name`] made it for this instance; instances may be called after each other.
fn is_of(instance: &str, name: &str) -> bool {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let rest = name.strip_prefix("coderunner-").and_then(|rest| rest.strip_prefix(instance));
    let parts: Vec<&str> = rest.unwrap_or_default().split('-').collect();
    matches!(parts[..], ["", process, "box" | "template", number] if digits(process) && digits(number))
}

/// Names of the containers of an instance that have a process which podman's monitor waits for; podman knows those of them
/// that it has not forgotten.
pub fn monitored(instance: &str) -> Vec<String> {
    processes(|name| is_of(instance, name)).into_keys().collect()
}

/// Kills the processes that are left of these containers. Their monitors end with them.
pub fn kill(names: &[String]) {
    let left = || processes(|name| names.iter().any(|one| one == name)).into_values();
    for pid in left() {
        let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else { continue };
        // The number may have become another's before it was opened.
        if left().any(|one| one == pid) {
            // Gone already is as good.
            let _ = pidfd_send_signal(process, Signal::KILL);
        }
    }
}

/// The first processes of this user's containers, by the names that their monitors were given. What cannot be read is
/// gone or somebody else's.
fn processes(is_meant: impl Fn(&str) -> bool) -> HashMap<String, Pid> {
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
        if let Some(name) = monitored_name(&String::from_utf8_lossy(&line)).filter(|name| is_meant(name)) {
            monitors.insert(pid, name.to_owned());
        }
    }
    children.into_iter().filter_map(|(parent, pid)| Some((monitors.remove(&parent)?, pid))).collect()
}

/// Of a command line of `conmon`, the name of its container.
fn monitored_name(line: &str) -> Option<&str> {
    let mut words = line.split('\0');
    words.next().filter(|program| program.ends_with("conmon"))?;
    words.find(|word| *word == "-n")?;
    words.next()
}

/// The words of a line of a process's `status`.
fn words<'a>(status: &'a str, name: &str) -> impl Iterator<Item = &'a str> {
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_default().split_whitespace()
}

/// Whether a process is this user's. Its directory in `/proc` need not be: it is root's where others may not look inside.
fn is_ours(status: &str) -> bool {
    words(status, "Uid").next() == Some(&getuid().to_string())
}

/// Of a container's first process, its parent, which is outside.
fn parent_outside(status: &str) -> Option<Pid> {
    let is_first = words(status, "NSpid").skip(1).last() == Some("1");
    words(status, "PPid").next().filter(|_| is_first)?.parse().ok().and_then(Pid::from_raw)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_of_one_instance() {
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
    fn monitors_are_known_by_their_command_lines() {
        assert_eq!(monitored_name("/usr/bin/conmon\0--syslog\0-c\0id\0-n\0name\0-l\0none\0"), Some("name"));
        assert_eq!(monitored_name("/usr/bin/conmon\0-c\0id\0"), None);
        assert_eq!(monitored_name("grep\0conmon\0-n\0name\0"), None);
        assert_eq!(monitored_name(""), None);
    }

    #[test]
    fn the_status_says_whose_a_process_is() {
        let own = getuid().as_raw();
        assert!(is_ours(&format!("Name:\tcrun\nUid:\t{own}\t0\t0\t0\n")));
        assert!(!is_ours(&format!("Name:\tcrun\nUid:\t{}\t{own}\n", own + 1)) && !is_ours(""));
    }

    #[test]
    fn only_the_first_process_of_a_pid_namespace_counts() {
        let parent =
            |ids: &str| parent_outside(&format!("Name:\tcrun\nPid:\t9\nPPid:\t5\nNSpid:\t{ids}\nThreads:\t1\n"));
        assert_eq!(parent("9\t1"), Pid::from_raw(5));
        for none in ["9", "1", "9\t2", ""] {
            assert_eq!(parent(none), None, "{none:?}");
        }
        assert_eq!(parent_outside(""), None);
    }
}
