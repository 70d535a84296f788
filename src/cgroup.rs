//! The part of the cgroup tree that was delegated to this server, for containers that it limits itself.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::{Instant, sleep};

/// Where cgroup v2 is mounted.
const ROOT: &str = "/sys/fs/cgroup";

/// The leaf that the server itself sits in: a cgroup that hands controllers on has no processes of its own.
/// systemd's `DelegateSubgroup=` is given the same name.
const LEAF: &str = "sup";

/// Longest that what is killed in a cgroup may take to die, and the time between two looks.
const KILL_TIME: Duration = Duration::from_secs(1);
const KILL_PAUSE: Duration = Duration::from_millis(10);

/// What containers are limited by.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];

/// A delegated cgroup below which containers get theirs.
#[derive(Debug, Clone)]
pub struct Delegated {
    /// Its path below the root of the tree, with a slash in front.
    path: PathBuf,
}

impl Delegated {
    /// Makes room: moves this process into a leaf and hands the controllers on. The error says what is in
    /// the way: cgroup v1, or a cgroup that is not ours.
    pub fn take() -> io::Result<Delegated> {
        if !Path::new(ROOT).join("cgroup.controllers").exists() {
            return Err(io::Error::other("there is no cgroup v2 tree"));
        }
        let own = fs::read_to_string("/proc/self/cgroup")?;
        let own = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
        let own = Path::new(own);
        let base = if own.ends_with(LEAF) { own.parent().unwrap_or(own) } else { own };
        if base.as_os_str().is_empty() {
            return Err(io::Error::other("this process is in the root cgroup"));
        }
        let dir = Path::new(ROOT).join(base);
        let explain = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", dir.display()));
        let leaf = dir.join(LEAF);
        match fs::create_dir(&leaf) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(explain(error)),
            _ => fs::write(leaf.join("cgroup.procs"), std::process::id().to_string()).map_err(explain)?,
        }
        for controller in CONTROLLERS {
            fs::write(dir.join("cgroup.subtree_control"), format!("+{controller}")).map_err(explain)?;
        }
        Ok(Delegated { path: Path::new("/").join(base) })
    }

    /// Makes a container's cgroup with these limits, by file, and returns its directory.
    pub fn make(&self, name: &str, limits: &[(String, String)]) -> io::Result<File> {
        let dir = self.dir().join(name);
        let explain =
            |error: io::Error, path: &Path| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
        fs::create_dir(&dir).map_err(|error| explain(error, &dir))?;
        // Programs may read what they used, whatever the server's umask.
        let open = fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).map_err(|error| explain(error, &dir));
        let set = limits.iter().try_for_each(|(file, value)| match fs::write(dir.join(file), value) {
            // A kernel that does not account for swap.
            Err(error) if error.kind() == io::ErrorKind::NotFound && file == "memory.swap.max" => Ok(()),
            written => written.map_err(|error| explain(error, &dir.join(file))),
        });
        let opened = open.and(set).and_then(|()| File::open(&dir).map_err(|error| explain(error, &dir)));
        opened.inspect_err(|_| self.remove(name))
    }

    /// Removes a container's cgroup, if it is there and empty.
    pub fn remove(&self, name: &str) {
        let _ = fs::remove_dir(self.dir().join(name));
    }

    /// Kills whatever is in a container's cgroup, and removes it as soon as that is dead.
    pub async fn kill(&self, name: &str) {
        let dir = self.dir().join(name);
        // Kernels before 5.14 do not have it: what is in there ends by itself then.
        let _ = fs::write(dir.join("cgroup.kill"), "1");
        let deadline = Instant::now() + KILL_TIME;
        let is_busy = |error: io::Error| error.kind() == io::ErrorKind::ResourceBusy;
        while fs::remove_dir(&dir).is_err_and(is_busy) && Instant::now() < deadline {
            sleep(KILL_PAUSE).await;
        }
    }

    /// Removes the empty cgroups that an earlier server left.
    pub fn clear(&self) {
        let Ok(entries) = fs::read_dir(self.dir()) else { return };
        for entry in entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
            if entry.file_name() != LEAF {
                self.remove(&entry.file_name().to_string_lossy());
            }
        }
    }

    fn dir(&self) -> PathBuf {
        Path::new(ROOT).join(self.path.strip_prefix("/").unwrap_or(&self.path))
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    /// Where this process may make cgroups.
    #[tokio::test]
    async fn what_is_in_a_cgroup_is_killed_before_it_is_removed() {
        let (below, name) = (Delegated { path: "/".into() }, format!("coderunner-test-{}", std::process::id()));
        if !Path::new(ROOT).join("cgroup.controllers").exists() || below.make(&name, &[]).is_err() {
            return;
        }
        let dir = below.dir().join(&name);
        let mut inside = Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn().unwrap();
        fs::write(dir.join("cgroup.procs"), inside.id().to_string()).unwrap();
        below.remove(&name);
        assert!(dir.exists(), "it is not empty");
        below.kill(&name).await;
        assert!(!dir.exists());
        assert_eq!(inside.wait().unwrap().code(), None, "killed");
    }
}
