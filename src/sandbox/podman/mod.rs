//! podman: its argument vectors, its JSON, and the engine that makes each sandbox by `podman run`.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::File;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use futures_util::future::BoxFuture;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use tokio::sync::{Mutex, OnceCell};

use crate::host::aside::aside;
use crate::host::process::{Cmd, Passed, ProcessError, xdg_runtime_dir};
use crate::model::language::Language;
use crate::sandbox::channel::Channel;
use crate::sandbox::direct::oci_plan::{DEVICES, LINKS};
use crate::sandbox::protocol::{JOB_DIR, WORK_DIR};
use crate::sandbox::supervisor::{EngineSettings, Started};
use crate::sandbox::{Engine, LABEL, LABEL_INSTANCE, LABEL_LANGUAGE, Sandbox, SandboxError, SandboxSpec, orphans};

/// Longest that a quick verb (ps, rm, inspect, tag) may take: podman waits for its locks under load.
const VERB_TIME: Duration = Duration::from_secs(30);

/// Time between two looks whether a lock is free: a fraction of what a verb takes.
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// Where the executable is mounted in a sandbox.
pub const INIT: &str = "/run/coderunner-init";

/// The places that programs may write to, and whether they may execute what they wrote there.
pub(crate) const WRITABLE: [(&str, &str); 3] = [(WORK_DIR, "exec"), ("/tmp", "exec"), ("/dev/shm", "noexec")];

/// In a directory of devices: all that there is to be is there. podman's own `/dev` has one of this name, too.
const COMPLETE: &str = "mqueue";

/// What podman says when its own process that holds the user namespace was killed, and all containers with it.
const NAMESPACE_LOST: &str = "invalid internal status";

/// What podman says when it came upon an image that another process is making or deleting, even where it was asked
/// about a different one that shares a layer (https://github.com/containers/podman/issues/12582). Of one that is not
/// there it says "image not known" alone.
const HALF_MADE: [&str; 3] = ["image with ID", "reading image", "layer not known"];

/// How often a verb is tried that comes upon such an image: the other process needs milliseconds.
const HALF_MADE_TRIES: u32 = 10;

/// Time between two of these tries.
const HALF_MADE_PAUSE: Duration = Duration::from_millis(100);

/// Longest user of an image, in bytes: twice a name of 32, as long as Linux has them, with room for what it does not have.
const MOST_USER: usize = 256;

/// The podman of this user, one function per verb.
#[derive(Debug, Clone)]
pub struct Podman {
    program: PathBuf,
    /// Held while podman is mended: it is done once, whoever notices first.
    mending: Arc<Mutex<()>>,
    /// Asked for once: what podman looks for to tell it takes longer than making a container.
    info: Arc<OnceCell<Info>>,
}

/// What `podman info` tells that matters here.
#[derive(Debug, Clone, Default)]
pub struct Info {
    /// podman's version.
    pub version: String,
    /// Name and version of the OCI runtime.
    pub runtime: String,
    /// The storage driver.
    pub driver: String,
    /// Whether overlay is the kernel's own; `None` where podman does not say.
    pub native_overlay: Option<bool>,
    /// `v1` or `v2`.
    pub cgroup_version: String,
    /// Controllers that this user's containers get.
    pub controllers: Vec<String>,
}

impl Info {
    /// Reads `podman info --format json`; what is not there is empty.
    pub fn parse(json: &[u8]) -> Info {
        let value: serde_json::Value = serde_json::from_slice(json).unwrap_or_default();
        let text = |pointer: &str| value.pointer(pointer).and_then(|v| v.as_str()).unwrap_or_default().to_owned();
        Info {
            version: text("/version/Version"),
            runtime: text("/host/ociRuntime/version").lines().next().unwrap_or_default().to_owned(),
            driver: text("/store/graphDriverName"),
            native_overlay: match text("/store/graphStatus/Native Overlay Diff").as_str() {
                "true" => Some(true),
                "false" => Some(false),
                _ => None,
            },
            cgroup_version: text("/host/cgroupVersion"),
            controllers: value
                .pointer("/host/cgroupControllers")
                .and_then(|v| v.as_array())
                .map(|list| list.iter().filter_map(|v| v.as_str()).map(str::to_owned).collect())
                .unwrap_or_default(),
        }
    }

    /// The limits that podman's containers cannot have here.
    pub fn missing_controllers(&self) -> Vec<&'static str> {
        let has = |name: &str| self.cgroup_version == "v2" && self.controllers.iter().any(|c| c == name);
        [("memory", "memory"), ("pids", "processes"), ("cpu", "CPU")]
            .into_iter()
            .filter(|(controller, _)| !has(controller))
            .map(|(_, what)| what)
            .collect()
    }
}

impl Podman {
    /// The podman at this path, or of this name on PATH.
    pub fn new(program: &Path) -> Podman {
        Podman { program: program.to_owned(), mending: Arc::default(), info: Arc::default() }
    }

    fn cmd(&self, args: impl IntoIterator<Item = impl Into<OsString>>) -> Cmd {
        Cmd::new(&self.program, args)
    }

    /// Runs a quick verb. Where all of this user's containers were killed and podman's own process with them, podman
    /// refuses every verb until it is told to begin anew: that is done here.
    async fn verb(&self, args: impl IntoIterator<Item = impl Into<OsString>>) -> Result<Vec<u8>, ProcessError> {
        let cmd = self.cmd(args);
        let is_lost =
            |result: &Result<_, ProcessError>| result.as_ref().is_err_and(|error| error.tells(NAMESPACE_LOST));
        let first = settled(&cmd).await;
        if !is_lost(&first) {
            return first;
        }
        let _one_at_a_time = self.mending.lock().await;
        // Another may have mended it while we waited, and containers may run again: these would be stopped.
        let again = settled(&cmd).await;
        if !is_lost(&again) {
            return again;
        }
        tracing::warn!("podman's process was killed together with all containers; resetting podman");
        // It fails over the containers that it finds dead, after it has done what is needed.
        let migrated = self.cmd(["system", "migrate"]).output(VERB_TIME).await;
        settled(&cmd).await.inspect_err(|_| {
            if let Err(error) = migrated {
                tracing::error!(%error, "cannot reset podman");
            }
        })
    }

    /// Runs a quick verb that changes names of images. podman before 4.8 loses names where two do so at once
    /// (https://github.com/containers/common/pull/1700): of a user's servers one does at a time.
    async fn rename(&self, args: impl IntoIterator<Item = impl Into<OsString>>) -> Result<(), ProcessError> {
        // With a newer podman all is well also where it cannot be had.
        let _one_at_a_time = renaming().await;
        self.verb(args).await.map(drop)
    }

    async fn text(&self, args: &[&str]) -> Result<String, ProcessError> {
        Ok(String::from_utf8_lossy(&self.verb(args).await?).trim().to_owned())
    }

    /// Names of all containers of an instance, whatever their state, and whether or not podman still knows them.
    pub async fn list(&self, instance: &str) -> Result<Vec<String>, ProcessError> {
        let filter = format!("label={LABEL_INSTANCE}={instance}");
        let ours = format!("label={LABEL}=1");
        let names =
            self.text(&["ps", "--all", "--format", "{{.Names}}", "--filter", &ours, "--filter", &filter]).await?;
        let mut names: Vec<String> = names.lines().map(str::to_owned).collect();
        let instance = instance.to_owned();
        names.extend(beside_podman(move || orphans::monitored(&instance)).await?);
        names.sort_unstable();
        names.dedup();
        Ok(names)
    }

    /// Removes containers with their volumes, running or not; those that are not there are no error.
    pub async fn remove(&self, names: &[String]) -> Result<(), ProcessError> {
        if names.is_empty() {
            return Ok(());
        }
        let fixed = ["rm", "--force", "--volumes", "--ignore", "--time", "0", "--"];
        let args = fixed.into_iter().chain(names.iter().map(String::as_str));
        let removed = self.verb(args).await;
        let names = names.to_vec();
        beside_podman(move || orphans::kill(&names)).await?;
        removed.map(drop)
    }

    /// Removes a container; a failure is for the log, and for the next sweep.
    pub async fn remove_or_warn(&self, name: &str) {
        if let Err(error) = self.remove(&[name.to_owned()]).await {
            tracing::warn!(container = name, %error, "cannot remove a container; retrying in the next sweep");
        }
    }

    /// Content id of an image; `None` where there is none of that name.
    pub async fn image_id(&self, name: &str) -> Result<Option<String>, ProcessError> {
        match self.text(&["image", "inspect", "--format", "{{.Id}}", "--", name]).await {
            Ok(id) => Ok(Some(id)),
            // Exit code 125 is any failure: ask in a way that tells them apart.
            Err(error @ ProcessError::Failed { .. }) => match self.text(&["image", "exists", "--", name]).await {
                Err(ProcessError::Failed { status, .. }) if status.code() == Some(1) => Ok(None),
                _ => Err(error),
            },
            Err(error) => Err(error),
        }
    }

    /// Pulls an image and returns the id that the name stands for now; progress goes to `on_line`.
    pub async fn pull(&self, name: &str, deadline: Duration, on_line: impl Fn(&str)) -> Result<String, ProcessError> {
        let output = self.cmd(["pull", "--", name]).output_with(deadline, on_line).await?;
        let id = String::from_utf8_lossy(&output).lines().last().unwrap_or_default().trim().to_owned();
        match id.is_empty() {
            false => Ok(id),
            true => self.text(&["image", "inspect", "--format", "{{.Id}}", "--", name]).await,
        }
    }

    /// Makes an image of this name from an archive of files.
    pub async fn import(&self, archive: &Path, name: &str) -> Result<(), ProcessError> {
        let fixed = ["import", "--quiet", "--"].map(OsString::from);
        self.rename(fixed.into_iter().chain([archive.into(), name.into()])).await
    }

    /// Gives an image a further name.
    pub async fn tag(&self, id: &str, name: &str) -> Result<(), ProcessError> {
        self.rename(["tag", "--", id, name]).await
    }

    /// Takes a name from an image.
    pub async fn untag(&self, id: &str, name: &str) -> Result<(), ProcessError> {
        self.rename(["untag", "--", id, name]).await
    }

    /// Removes an image unless a container or a name still uses it.
    pub async fn remove_image(&self, id: &str) -> Result<(), ProcessError> {
        self.rename(["rmi", "--", id]).await
    }

    /// The user that an image is to be run as, as the image says it; empty where it says nothing.
    pub async fn image_user(&self, id: &str) -> Result<String, ProcessError> {
        let user = self.text(&["image", "inspect", "--format", "{{.Config.User}}", "--", id]).await?;
        // What is longer is nobody's name.
        Ok(if user.len() <= MOST_USER { user } else { String::new() })
    }

    /// When an image was built.
    pub async fn image_created(&self, id: &str) -> Result<SystemTime, ProcessError> {
        let seconds = self.text(&["image", "inspect", "--format", "{{.Created.Unix}}", "--", id]).await?;
        // One that was built before 1970 has no time: builds that can be repeated have 0.
        Ok(UNIX_EPOCH + Duration::from_secs(seconds.parse().unwrap_or_default()))
    }

    /// Names that start with `prefix`.
    pub async fn names(&self, prefix: &str) -> Result<Vec<String>, ProcessError> {
        let names = self.text(&["images", "--format", "{{.Repository}}:{{.Tag}}"]).await?;
        Ok(names.lines().filter(|name| name.starts_with(prefix)).map(str::to_owned).collect())
    }

    /// Names that an image has.
    pub async fn names_of(&self, id: &str) -> Result<Vec<String>, ProcessError> {
        let names =
            self.text(&["image", "inspect", "--format", "{{range .RepoTags}}{{println .}}{{end}}", "--", id]).await?;
        Ok(names.lines().map(str::to_owned).filter(|name| !name.is_empty()).collect())
    }

    /// How many ids this user's containers have, the user's own among them.
    pub async fn mapped_ids(&self) -> Result<u64, ProcessError> {
        let map = self.text(&["unshare", "cat", "/proc/self/uid_map"]).await?;
        Ok(map.lines().filter_map(|line| line.split_whitespace().nth(2)?.parse::<u64>().ok()).sum())
    }

    /// The command that runs another one inside this user's user and mount namespace.
    pub fn unshare(&self, program: &Path, args: &[&str]) -> Cmd {
        let fixed = ["unshare".into(), program.into()];
        self.cmd(fixed.into_iter().chain(args.iter().map(OsString::from)))
    }

    /// Creates a container and has everything mounted for it, but does not start it. Returns the path of the
    /// OCI configuration that podman wrote for it.
    pub async fn create(&self, name: &str, args: Vec<OsString>) -> Result<PathBuf, ProcessError> {
        let args = std::iter::once("create".into()).chain(args);
        self.verb(args).await?;
        self.text(&["init", "--", name]).await?;
        self.text(&["container", "inspect", "--format", "{{.OCIConfigPath}}", "--", name]).await.map(PathBuf::from)
    }

    /// What podman says of itself and the host.
    pub async fn info(&self) -> Result<&Info, ProcessError> {
        let ask = || async { self.verb(["info", "--format", "json"]).await.map(|json| Info::parse(&json)) };
        self.info.get_or_try_init(ask).await
    }
}

/// Looks through `/proc`, which takes long where there are many processes.
async fn beside_podman<T: Send + 'static>(look: impl FnOnce() -> T + Send + 'static) -> Result<T, ProcessError> {
    let late = |source| ProcessError::Io { command: "looking for forgotten containers".into(), source };
    aside(look).await.map_err(late)
}

/// Runs a quick verb, again where it came upon an image that is half made.
async fn settled(cmd: &Cmd) -> Result<Vec<u8>, ProcessError> {
    for _ in 1..HALF_MADE_TRIES {
        match cmd.output(VERB_TIME).await {
            Err(error) if HALF_MADE.iter().any(|words| error.tells(words)) => tokio::time::sleep(HALF_MADE_PAUSE).await,
            other => return other,
        }
    }
    cmd.output(VERB_TIME).await
}

/// A lock that all servers of this user have in common: on the directory of their runtime directories, so that no file stays.
async fn renaming() -> Option<Flock<File>> {
    let deadline = Instant::now() + VERB_TIME;
    let mut directory = File::open(xdg_runtime_dir()).ok()?;
    loop {
        match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Some(lock),
            Err((unlocked, Errno::EWOULDBLOCK)) if Instant::now() < deadline => directory = unlocked,
            Err(_) => return None,
        }
        tokio::time::sleep(LOCK_PAUSE).await;
    }
}

/// Makes each sandbox by `podman run`, which stays our child until its container is removed.
pub struct PodmanEngine {
    podman: Podman,
    settings: EngineSettings,
    made: AtomicU64,
    /// By the content ids of images, until these are given up.
    users: std::sync::Mutex<HashMap<String, String>>,
}

impl PodmanEngine {
    /// An engine of this podman.
    pub fn new(podman: Podman, settings: EngineSettings) -> PodmanEngine {
        PodmanEngine { podman, settings, made: AtomicU64::new(0), users: Default::default() }
    }

    fn users(&self) -> MutexGuard<'_, HashMap<String, String>> {
        self.users.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The user of an image, which is asked for once.
    async fn user(&self, image: &str) -> Result<String, ProcessError> {
        let known = self.users().get(image).cloned();
        match known {
            Some(user) => Ok(user),
            None => {
                let user = self.podman.image_user(image).await?;
                Ok(self.users().entry(image.to_owned()).or_insert(user).clone())
            }
        }
    }

    async fn make(&self, spec: SandboxSpec) -> Result<Sandbox, SandboxError> {
        let SandboxSpec { language, image, slot } = spec;
        let user = self.user(&image).await?;
        let job_dir = self.settings.job_directory()?;
        let number = self.made.fetch_add(1, Ordering::Relaxed);
        let name = orphans::name(&self.settings.instance, "box", number);
        let mark = self.settings.living.mark(&name);
        let dev = self.settings.jobs.with_file_name("dev");
        lay_out_dev(&dev).map_err(SandboxError::io("cannot make the directory of a container's devices"))?;
        let args = run_args(&name, &self.settings, &language, &image, job_dir.path(), &dev);
        let (channel, theirs) = Channel::pair()?;
        let mut running = self.podman.cmd(args).spawn(Passed::Third(theirs))?;
        let podman = self.podman.clone();
        let started = Started {
            channel,
            job_dir: job_dir.path().to_owned(),
            image,
            user,
            slot,
            own_cgroup: true,
            cgroup: None,
            // podman removes what it ran (--rm), unless it failed half-way or was killed.
            ended: Box::pin(async move { running.end().await }),
            remove: Box::pin(async move { podman.remove_or_warn(&name).await }),
            owned: Box::new((job_dir, mark)),
        };
        self.settings.raise(started, &language).await
    }
}

impl Engine for PodmanEngine {
    fn start(&self, spec: SandboxSpec) -> BoxFuture<'_, Result<Sandbox, SandboxError>> {
        Box::pin(self.make(spec))
    }

    /// Nothing is kept.
    fn keep_only(&self, _: &[Arc<Language>]) {}

    fn release<'a>(&'a self, image: Option<&'a str>) -> BoxFuture<'a, ()> {
        self.users().retain(|known, _| image.is_some_and(|image| image != known));
        Box::pin(std::future::ready(()))
    }
}

/// The command that makes a sandbox. Nothing of a request is in it: code, arguments and input go
/// through the job directory and the channel.
fn run_args(
    name: &str,
    settings: &EngineSettings,
    language: &Language,
    image: &str,
    job_dir: &Path,
    dev: &Path,
) -> Vec<OsString> {
    let mut args: Vec<OsString> = ["run", "--rm", "--sdnotify=ignore", "--sig-proxy=false", "--preserve-fds=1"]
        .into_iter()
        .map(OsString::from)
        .collect();
    for (place, options) in WRITABLE {
        let limits = &language.limits;
        args.push(format!("--mount={}", volume(place, options, limits.directory_size(), limits.inodes)).into());
    }
    args.push(format!("--volume={}:{JOB_DIR}:ro", job_dir.display()).into());
    // Where /dev is brought along the OCI runtime mounts no devices into it; its own mounts would let anybody change the
    // times of the host's files.
    args.push(format!("--volume={}:/dev:ro,nosuid,noexec", dev.display()).into());
    args.extend(DEVICES.map(|device| format!("--volume=/dev/{device}:/dev/{device}:ro,nosuid,noexec").into()));
    args.extend(walls(name, settings, language, image));
    args
}

/// Makes a directory to be mounted at /dev: names to mount devices on, and the usual links. It goes with the directory of
/// the instance that it is in.
fn lay_out_dev(dev: &Path) -> std::io::Result<()> {
    if dev.join(COMPLETE).exists() {
        return Ok(());
    }
    let there = |error: &std::io::Error| error.kind() == std::io::ErrorKind::AlreadyExists;
    let made = |result: std::io::Result<()>| result.or_else(|error| if there(&error) { Ok(()) } else { Err(error) });
    std::fs::create_dir_all(dev)?;
    ["pts", "shm"].iter().try_for_each(|name| made(std::fs::create_dir(dev.join(name))))?;
    DEVICES.iter().try_for_each(|name| File::create(dev.join(name)).map(drop))?;
    LINKS.iter().try_for_each(|(name, target)| made(symlink(target, dev.join(name))))?;
    // The last one says that the others are there; podman's ids are to see all of it, whatever the server's umask.
    for (name, mode) in [("pts", 0o755), ("shm", 0o755), ("", 0o755)] {
        std::fs::set_permissions(dev.join(name), std::fs::Permissions::from_mode(mode))?;
    }
    made(std::fs::create_dir(dev.join(COMPLETE)))
}

/// What makes a container a sandbox, whichever engine starts it; the image at the end.
pub(crate) fn walls(name: &str, settings: &EngineSettings, language: &Language, image: &str) -> Vec<OsString> {
    let limits = &language.limits;
    let mut args: Vec<OsString> = Vec::new();
    let mut add = |arg: String| args.push(arg.into());
    for fixed in [
        // Nothing restarts, checks or logs it.
        "--pull=never",
        "--log-driver=none",
        "--no-healthcheck",
        "--network=none",
        "--ipc=none",
        "--pid=private",
        "--uts=private",
        "--cgroupns=private",
        "--user=0:0",
        "--cap-drop=all",
        "--cap-add=SETUID",
        "--cap-add=SETGID",
        "--cap-add=KILL",
        "--security-opt=no-new-privileges",
        "--read-only",
        "--read-only-tmpfs=false",
        "--image-volume=ignore",
        "--http-proxy=false",
        "--no-hosts",
        "--systemd=false",
        "--hostname=sandbox",
        // What init sets for programs; more it may not.
        "--ulimit=core=1:1",
        // No pseudo-terminals: the host has a number of them for all containers together, and this one nobody may open.
        "--mount=type=devpts,destination=/dev/pts,max=1",
        // Shared memory segments would otherwise outlive the processes between two stages.
        "--sysctl=kernel.shm_rmid_forced=1",
    ] {
        add(fixed.into());
    }
    add(format!("--name={name}"));
    add(format!("--label={LABEL}=1"));
    add(format!("--label={LABEL_INSTANCE}={}", settings.instance));
    add(format!("--label={LABEL_LANGUAGE}={}", language.name));
    let memory = limits.memory.as_u64();
    add(format!("--memory={memory}b"));
    add(format!("--memory-swap={memory}b"));
    // One more for init.
    add(format!("--pids-limit={}", limits.processes + 1));
    add(format!("--cpus={}", limits.cpus));
    // Programs start in /work, which is not mounted yet in a template.
    add("--workdir=/".into());
    add(format!("--volume={}:{INIT}:ro", settings.executable.display()));
    add(format!("--entrypoint=[\"{INIT}\",\"init\"]"));
    add("--".into());
    add(image.into());
    args
}

/// A tmpfs with a count of inodes: as a volume, because podman's own tmpfs mounts refuse `nr_inodes`.
fn volume(place: &str, options: &str, size: u64, inodes: u64) -> String {
    format!(
        "type=volume,destination={place},volume-opt=type=tmpfs,volume-opt=device=tmpfs,\
         \"volume-opt=o=size={size},nr_inodes={inodes},mode=1777,nosuid,nodev,{options}\""
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::supervisor::Living;
    use proptest::prelude::*;
    use tokio_util::task::TaskTracker;

    fn settings() -> EngineSettings {
        EngineSettings {
            instance: "test".into(),
            jobs: "/run/jobs".into(),
            executable: "/usr/bin/coderunner".into(),
            require_limits: false,
            supervisors: TaskTracker::new(),
            living: Living::default(),
            observer: Arc::new(crate::sandbox::fake::Unheard),
        }
    }

    fn args(language: &Language) -> Vec<String> {
        run_args("name", &settings(), language, "sha256:id", Path::new("/run/jobs/job-1"), Path::new("/run/dev"))
            .into_iter()
            .map(|arg| arg.into_string().unwrap())
            .collect()
    }

    #[test]
    fn the_walls_are_all_there() {
        let args = args(&crate::config::tests::language("c"));
        for wall in [
            "--network=none",
            "--read-only",
            "--read-only-tmpfs=false",
            "--cap-drop=all",
            "--security-opt=no-new-privileges",
            "--http-proxy=false",
            "--pids-limit=65",
            "--memory=536870912b",
            "--memory-swap=536870912b",
            "--label=io.coderunner=1",
            "--label=io.coderunner.instance=test",
            "--label=io.coderunner.language=c",
        ] {
            assert!(args.iter().any(|arg| arg == wall), "{wall} is not in {args:?}");
        }
        assert_eq!(args[args.len() - 2..], ["--", "sha256:id"]);
    }

    /// Some text as a TOML string.
    fn quoted(text: &str) -> String {
        toml::Value::String(text.into()).to_string()
    }

    fn configured(key: &str, image: &str, source: &str, word: &str) -> Option<Language> {
        let text = format!(
            "[language.{}]\nimage = {}\nsource = {}\nrun = [{}]\nhealth = {{ code = \"\", output = \"\" }}",
            quoted(key),
            quoted(image),
            quoted(source),
            quoted(word),
        );
        crate::config::tests::load(&text).ok()?.language(key).ok()
    }

    proptest! {
        /// What a request brings is no argument of [`run_args`] at all. What the configuration brings besides
        /// limits changes the label behind its `=`, and nothing else.
        #[test]
        fn no_string_of_a_user_becomes_an_option(
            name in "x[a-z0-9+_-]{0,20}", source in "[^/\0]{1,40}", word in "[^\0]{0,40}",
        ) {
            prop_assume!(source != "." && source != "..");
            let language = configured(&name, "image", &source, &word).expect("valid");
            let label = format!("--label=io.coderunner.language={name}");
            let others: Vec<String> = args(&language).into_iter().filter(|arg| *arg != label).collect();
            let mut plain = args(&crate::config::tests::language("bash"));
            plain.retain(|arg| arg != "--label=io.coderunner.language=bash");
            prop_assert_eq!(others, plain);
        }

        #[test]
        fn names_that_look_like_options_are_refused(text in "--?[a-z=]{0,20}") {
            prop_assert!(configured(&text, "image", "source", "word").is_none());
            prop_assert!(configured("name", &text, "source", "word").is_none());
        }
    }
}
