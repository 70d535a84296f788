//! The cgroup subtree that is delegated to this server, for containers that it limits without podman, and the kernel's
//! counters of a cgroup.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::host::at;
use crate::host::blocking::run_blocking;

/// Where cgroup v2 is mounted.
const ROOT: &str = "/sys/fs/cgroup";

/// The leaf cgroup of the server itself: a cgroup that enables controllers for its children cannot have processes.
/// The units pass the same name as systemd's `DelegateSubgroup=`.
const LEAF: &str = "sup";

/// How long killed processes may take to leave their cgroup, and the pause between two attempts to remove it.
const KILL_TIMEOUT: Duration = Duration::from_secs(1);
const KILL_PAUSE: Duration = Duration::from_millis(10);

/// The controllers that limit containers.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];

/// A delegated cgroup, the parent of the cgroups of containers.
#[derive(Debug, Clone)]
pub struct Delegated {
    /// Its path below the root of the tree, with a leading slash.
    path: PathBuf,
}

impl Delegated {
    /// Moves this process into a leaf and enables the controllers for child cgroups. Fails, with the reason, on cgroup
    /// v1 or if this process's cgroup is not delegated to it.
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
        let leaf = dir.join(LEAF);
        match fs::create_dir(&leaf) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return at(dir.display(), Err(error)),
            _ => at(dir.display(), fs::write(leaf.join("cgroup.procs"), std::process::id().to_string()))?,
        }
        for controller in CONTROLLERS {
            at(dir.display(), fs::write(dir.join("cgroup.subtree_control"), format!("+{controller}")))?;
        }
        Ok(Delegated { path: Path::new("/").join(base) })
    }

    /// Makes a container's cgroup with these limits: pairs of a file name and its value.
    pub fn make(&self, name: &str, limits: &[(String, String)]) -> io::Result<OwnCgroup> {
        let dir = self.dir().join(name);
        at(dir.display(), fs::create_dir(&dir))?;
        let made = OwnCgroup { dir };
        // Programs may read their usage, whatever the server's umask.
        at(made.dir.display(), fs::set_permissions(&made.dir, fs::Permissions::from_mode(0o755)))?;
        for (file, value) in limits {
            let path = made.dir.join(file);
            match fs::write(&path, value) {
                // This kernel does not account for swap.
                Err(error) if error.kind() == io::ErrorKind::NotFound && file == "memory.swap.max" => {}
                written => at(path.display(), written)?,
            }
        }
        Ok(made)
    }

    /// Removes the empty cgroups that an earlier server left behind.
    pub fn clear(&self) {
        let Ok(entries) = fs::read_dir(self.dir()) else { return };
        for entry in entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
            if entry.file_name() != LEAF {
                let _ = fs::remove_dir(entry.path());
            }
        }
    }

    fn dir(&self) -> PathBuf {
        Path::new(ROOT).join(self.path.strip_prefix("/").unwrap_or(&self.path))
    }
}

/// A container's cgroup. Dropping this removes it if it is empty.
#[derive(Debug)]
pub struct OwnCgroup {
    dir: PathBuf,
}

impl OwnCgroup {
    /// Opens its directory.
    pub fn open(&self) -> io::Result<File> {
        at(self.dir.display(), File::open(&self.dir))
    }

    /// Its counters since it was made.
    pub fn counters(&self) -> Counters {
        Counters::read(&self.dir)
    }

    /// Kills all processes in it, and removes it once they are dead.
    pub async fn kill(&self) {
        let dir = self.dir.clone();
        let killed = run_blocking(move || {
            // Kernels before 5.14 do not have this file: there the processes end without it.
            let _ = fs::write(dir.join("cgroup.kill"), "1");
            let deadline = Instant::now() + KILL_TIMEOUT;
            let is_busy = |error: io::Error| error.kind() == io::ErrorKind::ResourceBusy;
            while fs::remove_dir(&dir).is_err_and(is_busy) && Instant::now() < deadline {
                sleep(KILL_PAUSE);
            }
        });
        if let Err(error) = killed.await {
            tracing::warn!(cgroup = %self.dir.display(), %error, "cannot kill the processes of a cgroup");
        }
    }
}

impl Drop for OwnCgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.dir);
    }
}

/// The kernel's counters of a cgroup: `None` or 0 where the kernel does not count.
#[derive(Debug, Default)]
pub struct Counters {
    /// User and system CPU time.
    pub cpu: Option<Duration>,
    /// Peak memory, in bytes.
    pub peak: Option<u64>,
    /// How often the cgroup ran out of memory at its own limit.
    pub ooms: u64,
    /// How many of its processes the OOM killer killed, for this cgroup's limit or for any other.
    pub oom_kills: u64,
    /// Forks refused at the process limit.
    pub forks_refused: u64,
}

impl Counters {
    /// Reads the counters of the cgroup at this directory.
    pub fn read(dir: &Path) -> Counters {
        let read = |name: &str| fs::read_to_string(dir.join(name)).unwrap_or_default();
        let events = read("memory.events");
        Counters {
            cpu: field(&read("cpu.stat"), "usage_usec").map(Duration::from_micros),
            peak: read("memory.peak").trim().parse().ok(),
            ooms: field(&events, "oom").unwrap_or(0),
            oom_kills: field(&events, "oom_kill").unwrap_or(0),
            forks_refused: field(&read("pids.events"), "max").unwrap_or(0),
        }
    }

    /// Whether the OOM killer has killed processes since `before` although the cgroup was below its own limit, because
    /// other processes had used up the memory.
    pub fn starved_since(&self, before: &Counters) -> bool {
        self.oom_kills > before.oom_kills && self.ooms == before.ooms
    }
}

/// The number of a field in one of the kernel's files with lines of a name and a number.
pub fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn own_and_foreign_oom_kills_are_distinguished() {
        let dir = tempfile::tempdir().unwrap();
        let counted = |events: &str| {
            fs::write(dir.path().join("memory.events"), events).unwrap();
            Counters::read(dir.path())
        };
        let before = counted("low 0\nhigh 0\nmax 7\noom 1\noom_kill 1\noom_group_kill 0\n");
        assert_eq!((before.ooms, before.oom_kills, before.peak, before.cpu), (1, 1, None, None));
        assert!(!before.starved_since(&before));
        assert!(!before.starved_since(&Counters::default()), "its own limit");
        assert!(counted("oom 1\noom_kill 2\n").starved_since(&before), "below its limit");
        assert!(!counted("oom 2\noom_kill 2\n").starved_since(&before));
    }

    #[test]
    fn slow_cgroup_kill_does_not_block_other_work() {
        crate::sandbox::fake::on_paused_clock(|| async {
            let below = tempfile::tempdir().unwrap();
            let dir = below.path().join("box");
            fs::create_dir(&dir).unwrap();
            let kill = dir.join("cgroup.kill");
            nix::unistd::mkfifo(&kill, nix::sys::stat::Mode::S_IRWXU).unwrap();
            let own = OwnCgroup { dir };
            // The write to the FIFO returns once it is read.
            let other_work = async {
                tokio::task::yield_now().await;
                assert_eq!(run_blocking(move || fs::read(kill).unwrap()).await.unwrap(), b"1");
            };
            tokio::join!(own.kill(), other_work);
        });
    }

    /// Tests nothing where this process may not make cgroups.
    #[tokio::test]
    async fn processes_are_killed_before_their_cgroup_is_removed() {
        let (below, name) = (Delegated { path: "/".into() }, format!("coderunner-test-{}", std::process::id()));
        if !Path::new(ROOT).join("cgroup.controllers").exists() || below.make(&name, &[]).is_err() {
            return;
        }
        let made = below.make(&name, &[]).unwrap();
        let dir = below.dir().join(&name);
        let mut inside = Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn().unwrap();
        fs::write(dir.join("cgroup.procs"), inside.id().to_string()).unwrap();
        drop(OwnCgroup { dir: dir.clone() });
        assert!(dir.exists(), "it is not empty");
        made.kill().await;
        assert!(!dir.exists());
        assert_eq!(inside.wait().unwrap().code(), None, "killed");
    }
}
