//! Finds what a server has left behind: containers, mounts, processes, directories and volumes. It asks podman and the
//! kernel, not the server.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};

use nix::unistd::Pid;
use serde_json::Value;

use crate::harness::{eventually, eventually_none, output};
use crate::shared;

/// Runs podman and returns its stdout; panics if it fails.
pub fn podman(args: &[&str]) -> String {
    let output = output(Command::new("podman").args(args), b"");
    assert!(output.status.success(), "podman {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Runs a podman command that lists objects, and returns its lines. Retries, because podman fails if a listed object is
/// deleted meanwhile.
pub fn list(args: &[&str]) -> Vec<String> {
    eventually("podman lists objects", || {
        let output = output(Command::new("podman").args(args), b"");
        let text = String::from_utf8(output.stdout).unwrap();
        output.status.success().then(|| text.lines().map(str::to_owned).collect())
    })
}

/// Names of all containers with the label of the instance.
pub fn containers(instance: &str) -> Vec<String> {
    let label = format!("label=io.coderunner.instance={instance}");
    list(&["ps", "--all", "--filter", &label, "--format", "{{.Names}}"])
}

/// Live processes whose command line names a container or a job directory of the instance.
pub fn processes(instance: &str) -> Vec<String> {
    let marks = [format!("coderunner-{instance}-"), format!("coderunner/{instance}/")];
    command_lines(|line| marks.iter().any(|mark| line.contains(mark)))
}

/// Processes in any sandbox whose command line contains this mark, which a test gave its program.
pub fn marked(mark: &str) -> Vec<String> {
    command_lines(|line| line.contains(mark))
}

/// Kills the processes with this mark. They run under subordinate ids, so it takes `podman unshare`.
pub fn kill_marked(mark: &str) {
    for line in marked(mark) {
        // It is no error if the process has ended meanwhile.
        let _ = output(Command::new("podman").args(["unshare", "kill", line.split_whitespace().next().unwrap()]), b"");
    }
}

/// The agents, in podman's namespace, of the server with this process id.
pub fn agents(server: Pid) -> Vec<Pid> {
    let pid = |text: &str| text.split_whitespace().next()?.parse().ok().map(Pid::from_raw);
    let parent = |of: &Pid| {
        let status = fs::read_to_string(format!("/proc/{of}/status")).ok()?;
        pid(status.lines().find_map(|line| line.strip_prefix("PPid:"))?)
    };
    let ours = |of: &Pid| std::iter::successors(Some(*of), parent).any(|of| of == server);
    marked(" agent ").iter().filter_map(|line| pid(line)).filter(ours).filter(|of| !is_init(*of)).collect()
}

/// Whether a process is the init of a sandbox.
pub fn is_init(pid: Pid) -> bool {
    fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim_end() == "coderunner-init")
}

fn command_lines(wanted: impl Fn(&str) -> bool) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        // The command line of a zombie is empty.
        let Ok(bytes) = fs::read(entry.path().join("cmdline")) else { continue };
        let line = String::from_utf8_lossy(&bytes).replace('\0', " ");
        if wanted(&line) {
            found.push(format!("{} {line}", entry.file_name().to_string_lossy()));
        }
    }
    found
}

/// Processes in whose mount namespace a directory of the instance is mounted: on the host, with podman, or in a sandbox.
pub fn mounts(instance: &str) -> Vec<PathBuf> {
    let mark = format!("coderunner/{instance}/");
    let processes = fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    let mounted =
        |process: &PathBuf| fs::read_to_string(process.join("mountinfo")).is_ok_and(|all| all.contains(&mark));
    processes.filter(mounted).collect()
}

/// The number of sandboxes of an instance: mount namespaces in which one of its job directories is mounted.
pub fn sandboxes(instance: &str) -> usize {
    let namespaces = mounts(instance).into_iter().filter_map(|process| fs::read_link(process.join("ns/mnt")).ok());
    namespaces.collect::<BTreeSet<PathBuf>>().len()
}

/// The runtime directory of an instance.
pub fn runtime_dir(instance: &str) -> PathBuf {
    let dir = std::env::var_os("XDG_RUNTIME_DIR").expect("XDG_RUNTIME_DIR: `make test` sets it");
    PathBuf::from(dir).join("coderunner").join(instance)
}

/// Waits until nothing of the instance is left, and panics on a timeout.
pub fn assert_none(instance: &str) {
    assert_eq!(containers(instance), [""; 0], "containers are left behind");
    assert!(!runtime_dir(instance).exists(), "the runtime directory is left behind");
    assert_nothing_runs(instance);
    eventually_none("volumes without a container", || unused_volumes(instance));
    remove_image_names(instance);
}

/// Waits until no process and no mount of the instance is left, and panics on a timeout.
pub fn assert_nothing_runs(instance: &str) {
    assert_no_process(instance, |_| true);
}

/// Like [`assert_nothing_runs`], but allows the templates of the direct engine, which podman keeps and which never run
/// anything.
pub fn assert_no_sandbox_runs(instance: &str) {
    assert_no_process(instance, |line| !line.contains("-template-"));
}

fn assert_no_process(instance: &str, counts: impl Fn(&str) -> bool) {
    eventually_none(&format!("processes of {instance}"), || {
        let mut left = processes(instance);
        left.retain(|line| counts(line));
        left
    });
    eventually_none(&format!("mounts of {instance}"), || {
        mounts(instance).iter().map(|process| process.display().to_string()).collect()
    });
}

/// Removes what a failed test left behind, as far as possible.
pub fn remove(instance: &str) {
    let label = format!("label=io.coderunner.instance={instance}");
    let _ = output(Command::new("podman").args(["rm", "-fv", "--time", "0", "--filter", &label]), b"");
    let _ = fs::remove_dir_all(runtime_dir(instance));
    remove_image_names(instance);
}

/// Volumes of the instance that no container uses: name and source of each.
fn unused_volumes(instance: &str) -> Vec<String> {
    // Calling podman is slow, and usually there is no volume.
    if fs::read_dir(storage().join("volumes")).is_ok_and(|mut volumes| volumes.next().is_none()) {
        return Vec::new();
    }
    let format = "{{.Name}} {{index .Options \"device\"}}";
    let mut unused = list(&["volume", "ls", "--filter", "dangling=true", "--format", format]);
    unused.retain(|line| line.contains(&format!(" coderunner-{instance}-")));
    unused
}

/// Runs a podman command that changes image names, under the lock that servers take for this: podman before 4.8 loses
/// names if two processes change them at once.
pub fn rename(args: &[&str]) -> Output {
    let directory = std::env::var_os("XDG_RUNTIME_DIR").unwrap();
    output(Command::new("flock").arg(directory).arg("podman").args(args), b"")
}

/// Removes the names under which the instance keeps its images; the instance does not start again.
fn remove_image_names(instance: &str) {
    let names = image_names(instance);
    if !names.is_empty() && !shared::remove_at_end(&names) {
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let _ = rename(&[&["rmi", "--"], &names[..]].concat());
    }
}

/// The default location of podman's storage.
fn storage() -> PathBuf {
    PathBuf::from(std::env::var_os("HOME").unwrap()).join(".local/share/containers/storage")
}

/// The names under which the instance keeps its images. Reads podman's list of images, because calling podman is slow.
pub fn image_names(instance: &str) -> Vec<String> {
    let tag = blake3::hash(instance.as_bytes()).to_hex()[..12].to_owned();
    let known = fs::read_to_string(storage().join("overlay-images/images.json"));
    let known: Option<Value> = known.ok().and_then(|known| known.parse().ok());
    let ours = ["current", "old"].map(|kind| format!("localhost/coderunner-{kind}:{tag}-"));
    let mut names = match &known {
        Some(known) => {
            let images = known.as_array().expect("an array of images").iter();
            let names = images.filter_map(|image| image["names"].as_array()).flatten().filter_map(Value::as_str);
            names.map(str::to_owned).collect()
        }
        // Another storage driver than overlay.
        None => list(&["images", "--format", "{{.Repository}}:{{.Tag}}"]),
    };
    names.retain(|name| ours.iter().any(|prefix| name.starts_with(prefix)));
    names
}
