//! The ways to run a job that are compared: bare exec, bwrap and `podman run` here, coderunner in `server`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;

use crate::jobs::{Job, OUTPUT};
use crate::load::Client;

/// One way of running a job.
pub trait Contender: Sync {
    /// Its name in the table.
    fn name(&self) -> &str;

    /// A client that runs the job again and again.
    fn client<'a>(&'a self, job: &'a Job) -> Result<Client<'a>>;

    /// Waits until the previous runs are cleaned up and the pool is full again. Returns when that was; a contender
    /// without a pool returns the time of the call.
    fn settle(&self) -> Result<Instant>;

    /// The number of runs that it may serve from its pool.
    fn pool_size(&self) -> usize {
        0
    }

    /// Whether this process spawns the programs, so that its own CPU time is part of the cost of a run.
    fn runs_here(&self) -> bool;
}

/// Programs that must be installed, and their Debian packages.
const PROGRAMS: [(&str, &str); 5] =
    [("busybox", "busybox-static"), ("tcc", "tcc"), ("gcc", "gcc"), ("bwrap", "bubblewrap"), ("podman", "podman")];

/// Paths of the programs. They are looked up once, because a search of PATH in each run would be measured, too.
pub struct Programs(BTreeMap<&'static str, PathBuf>);

impl Programs {
    /// Finds all of them, or returns an error that says what to install.
    pub fn find() -> Result<Programs> {
        let dirs: Vec<PathBuf> = std::env::split_paths(&std::env::var_os("PATH").context("no PATH")?).collect();
        let mut found = BTreeMap::new();
        for (program, package) in PROGRAMS {
            let path = dirs.iter().map(|dir| dir.join(program)).find(|path| path.is_file());
            let missing =
                || format!("{program} is not installed: run `make setup`, or install the Debian package {package}");
            found.insert(program, path.with_context(missing)?);
        }
        Ok(Programs(found))
    }

    /// The path of a program.
    pub fn path(&self, program: &str) -> Result<&Path> {
        let path = self.0.get(program).map(PathBuf::as_path);
        path.with_context(|| format!("{program} is not among PROGRAMS"))
    }
}

/// Returns the commands of a job, to be run one after the other; the directory contains the source.
type Commands = Box<dyn Fn(&Job, &Path) -> Vec<Command> + Sync>;

/// A contender whose runs are processes that the bench spawns.
pub struct Spawning {
    name: &'static str,
    /// The longest time for which clean-up may continue after a run.
    cleanup: Duration,
    commands: Commands,
}

impl Contender for Spawning {
    fn name(&self) -> &str {
        self.name
    }

    fn client<'a>(&'a self, job: &'a Job) -> Result<Client<'a>> {
        let dir = TempDir::new()?;
        let source = dir.path().join(job.source);
        let mut commands = (self.commands)(job, dir.path());
        Ok(Box::new(move || {
            // Moves the directory into the closure, so that it lives as long as the client.
            let _ = &dir;
            std::fs::write(&source, job.code())?;
            let mut printed = Vec::new();
            for command in &mut commands {
                let output = command.stdin(Stdio::null()).output().with_context(|| format!("{command:?}"))?;
                if !output.status.success() {
                    bail!("{command:?}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr));
                }
                printed = output.stdout;
            }
            check(self.name, &String::from_utf8_lossy(&printed))
        }))
    }

    fn settle(&self) -> Result<Instant> {
        let now = Instant::now();
        std::thread::sleep(self.cleanup);
        Ok(now)
    }

    fn runs_here(&self) -> bool {
        true
    }
}

/// Fails unless the output is that of the job.
pub fn check(contender: &str, printed: &str) -> Result<()> {
    ensure!(printed == OUTPUT, "{contender} printed {printed:?} instead of {OUTPUT:?}");
    Ok(())
}

/// Runs the programs themselves, without any isolation, in a directory of the client.
pub fn bare(programs: &Programs) -> Spawning {
    let paths = programs.0.clone();
    Spawning {
        name: "bare exec",
        cleanup: Duration::ZERO,
        commands: Box::new(move |job, dir| {
            let stages = [job.compile, job.run].into_iter();
            let command = |argv: &'static [&'static str]| {
                let (program, args) = argv.split_first()?;
                // A program of the host, or else the compiled program.
                let path = paths.get(program).cloned().unwrap_or_else(|| dir.join(program));
                let mut command = Command::new(path);
                command.args(args).current_dir(dir);
                Some(command)
            };
            stages.filter_map(command).collect()
        }),
    }
}

/// Runs the host's programs in new namespaces for each run.
pub fn bwrap(programs: &Programs) -> Result<Spawning> {
    let path = programs.path("bwrap")?.to_owned();
    let system = system_dirs();
    Ok(Spawning {
        name: "bwrap",
        // The kernel removes namespaces in the background.
        cleanup: Duration::from_millis(50),
        commands: Box::new(move |job, dir| {
            let mut command = Command::new(&path);
            command
                .args(["--unshare-all", "--die-with-parent"])
                .args(&system)
                .args(["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--tmpfs", "/work"])
                .arg("--ro-bind")
                .arg(dir.join(job.source))
                .arg(Path::new("/work").join(job.source))
                .args(["--chdir", "/work", "--"])
                .args(job.command());
            vec![command]
        }),
    })
}

/// Arguments that mount /usr, and the directories or links beside it as they are on the host.
fn system_dirs() -> Vec<String> {
    let mut args: Vec<String> = ["--ro-bind", "/usr", "/usr"].map(str::to_owned).into();
    for dir in ["/bin", "/sbin", "/lib", "/lib32", "/lib64"] {
        match std::fs::read_link(dir) {
            Ok(target) => args.extend(["--symlink".into(), target.display().to_string(), dir.into()]),
            Err(_) => args.extend(["--ro-bind-try", dir, dir].map(str::to_owned)),
        }
    }
    // Without this cache the dynamic loader would search its directories one by one.
    args.extend(["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"].map(str::to_owned));
    args
}

/// Starts a container for each run, as a user of podman would.
pub fn podman_run(programs: &Programs) -> Result<Spawning> {
    let path = programs.path("podman")?.to_owned();
    Ok(Spawning {
        name: "podman run",
        // conmon's clean-up outlives the command.
        cleanup: Duration::from_millis(300),
        commands: Box::new(move |job, dir| {
            let mut command = Command::new(&path);
            command
                .args(["run", "--rm", "--network=none", "--pull=never", "--workdir=/work"])
                .arg(format!("--volume={}:/work", dir.display()))
                .arg(job.image)
                .args(job.command());
            vec![command]
        }),
    })
}

/// Fails unless the images exist.
pub fn require_images(programs: &Programs, jobs: &[&Job]) -> Result<()> {
    for job in jobs {
        let status = Command::new(programs.path("podman")?).args(["image", "exists", job.image]).status()?;
        let name = job.image.trim_start_matches("localhost/coderunner-").trim_end_matches(":latest");
        ensure!(status.success(), "there is no image {}: run packaging/images/build {name}", job.image);
    }
    Ok(())
}
