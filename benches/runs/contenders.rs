//! Those that run the jobs: bare exec, bwrap and `podman run` here, coderunner in `server`.

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

    /// Returns when nothing of the runs before goes on any more, and all is made that is made ahead: the time of that,
    /// or of the last answer where nothing is made ahead.
    fn settle(&self) -> Result<Instant>;

    /// How many runs it may answer from what was made ahead.
    fn made_ahead(&self) -> usize {
        0
    }

    /// Whether this process is what runs the programs, so that its own time is part of theirs, and not a client's.
    fn runs_here(&self) -> bool;
}

/// Programs of the host, and the Debian packages that have them.
const PROGRAMS: [(&str, &str); 5] =
    [("busybox", "busybox-static"), ("tcc", "tcc"), ("gcc", "gcc"), ("bwrap", "bubblewrap"), ("podman", "podman")];

/// Paths of the programs, found once: a search of PATH at each run would count for them.
pub struct Programs(BTreeMap<&'static str, PathBuf>);

impl Programs {
    /// All of them, or an error that says what to install.
    pub fn find() -> Result<Programs> {
        let dirs: Vec<PathBuf> = std::env::split_paths(&std::env::var_os("PATH").context("no PATH")?).collect();
        let mut found = BTreeMap::new();
        for (program, package) in PROGRAMS {
            let path = dirs.iter().map(|dir| dir.join(program)).find(|path| path.is_file());
            let missing = || format!("no {program} here: `make setup`, or install Debian's package {package}");
            found.insert(program, path.with_context(missing)?);
        }
        Ok(Programs(found))
    }

    /// Path of one.
    pub fn path(&self, program: &str) -> Result<&Path> {
        let path = self.0.get(program).map(PathBuf::as_path);
        path.with_context(|| format!("{program} is not among PROGRAMS"))
    }
}

/// The commands of a job, one after the other, with a source that is in this directory.
type Commands = Box<dyn Fn(&Job, &Path) -> Vec<Command> + Sync>;

/// One whose runs are processes that we start.
pub struct Spawning {
    name: &'static str,
    /// What of a run goes on after its end, at most.
    wake: Duration,
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
            // Moved in: the directory lives as long as the client.
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
        std::thread::sleep(self.wake);
        Ok(now)
    }

    fn runs_here(&self) -> bool {
        true
    }
}

/// Refuses anything but the output that the job has.
pub fn check(contender: &str, printed: &str) -> Result<()> {
    ensure!(printed == OUTPUT, "{contender} printed {printed:?} instead of {OUTPUT:?}");
    Ok(())
}

/// The programs themselves, in a directory of the client.
pub fn bare(programs: &Programs) -> Spawning {
    let paths = programs.0.clone();
    Spawning {
        name: "bare exec",
        wake: Duration::ZERO,
        commands: Box::new(move |job, dir| {
            let stages = [job.compile, job.run].into_iter();
            let command = |argv: &'static [&'static str]| {
                let (program, args) = argv.split_first()?;
                // A name without a slash is on PATH; the other one is what was compiled.
                let path = paths.get(program).cloned().unwrap_or_else(|| dir.join(program));
                let mut command = Command::new(path);
                command.args(args).current_dir(dir);
                Some(command)
            };
            stages.filter_map(command).collect()
        }),
    }
}

/// A fresh set of namespaces for each run, the host's programs in it.
pub fn bwrap(programs: &Programs) -> Result<Spawning> {
    let path = programs.path("bwrap")?.to_owned();
    let system = system_dirs();
    Ok(Spawning {
        name: "bwrap",
        // The kernel takes namespaces down in the background.
        wake: Duration::from_millis(50),
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

/// /usr as it is, and what stands beside it as on the host: directories or links.
fn system_dirs() -> Vec<String> {
    let mut args: Vec<String> = ["--ro-bind", "/usr", "/usr"].map(str::to_owned).into();
    for dir in ["/bin", "/sbin", "/lib", "/lib32", "/lib64"] {
        match std::fs::read_link(dir) {
            Ok(target) => args.extend(["--symlink".into(), target.display().to_string(), dir.into()]),
            Err(_) => args.extend(["--ro-bind-try", dir, dir].map(str::to_owned)),
        }
    }
    // Without it the loader searches its directories one by one.
    args.extend(["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"].map(str::to_owned));
    args
}

/// A container for each run, as a user of podman would start it.
pub fn podman_run(programs: &Programs) -> Result<Spawning> {
    let path = programs.path("podman")?.to_owned();
    Ok(Spawning {
        name: "podman run",
        // conmon's clean-up outlives the command.
        wake: Duration::from_millis(300),
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

/// Refuses to begin without the images.
pub fn require_images(programs: &Programs, jobs: &[&Job]) -> Result<()> {
    for job in jobs {
        let status = Command::new(programs.path("podman")?).args(["image", "exists", job.image]).status()?;
        let name = job.image.trim_start_matches("localhost/coderunner-").trim_end_matches(":latest");
        ensure!(status.success(), "no image {}: packaging/images/build {name}", job.image);
    }
    Ok(())
}
