//! Runs podman's commands, and retries those that fail for a known reason of podman's own.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use tokio::sync::{Mutex, OnceCell};

use crate::host::process::{Cmd, ProcessError, xdg_runtime_dir};
use crate::sandbox::podman::Info;

/// Longest that a quick verb (ps, rm, inspect, tag) may take: podman waits for its locks under load.
const VERB_TIME: Duration = Duration::from_secs(30);

/// Time between two tries to take a lock: a fraction of what a verb takes.
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// Part of podman's error when its own process that holds the user namespace was killed, together with all containers.
const NAMESPACE_LOST: &str = "invalid internal status";

/// Parts of podman's errors when it finds an image that another process is making or deleting, even where it was asked
/// about a different one that shares a layer (https://github.com/containers/podman/issues/12582). For an image that does not
/// exist it only says "image not known".
const HALF_MADE: [&str; 3] = ["image with ID", "reading image", "layer not known"];

/// How often a verb that finds such an image is tried: the other process needs milliseconds.
const HALF_MADE_TRIES: u32 = 10;

/// Time between two of these tries.
const HALF_MADE_PAUSE: Duration = Duration::from_millis(100);

/// The podman of this user, one function per verb.
#[derive(Debug, Clone)]
pub struct Podman {
    program: PathBuf,
    /// Held while podman is reset: only one task does it, and the others wait.
    resetting: Arc<Mutex<()>>,
    /// Asked for once, for it takes podman longer than making a container.
    pub(super) info: Arc<OnceCell<Info>>,
}

impl Podman {
    /// The podman at this path, or of this name on PATH.
    pub fn new(program: &Path) -> Podman {
        Podman { program: program.to_owned(), resetting: Arc::default(), info: Arc::default() }
    }

    pub(super) fn cmd(&self, args: impl IntoIterator<Item = impl Into<OsString>>) -> Cmd {
        Cmd::new(&self.program, args)
    }

    /// Runs a quick verb. Where all of this user's containers were killed together with podman's own process, every verb
    /// fails until podman is reset: that is done here.
    pub(super) async fn verb(
        &self,
        args: impl IntoIterator<Item = impl Into<OsString>>,
    ) -> Result<Vec<u8>, ProcessError> {
        let cmd = self.cmd(args);
        let is_lost =
            |result: &Result<_, ProcessError>| result.as_ref().is_err_and(|error| error.tells(NAMESPACE_LOST));
        let first = retried(&cmd).await;
        if !is_lost(&first) {
            return first;
        }
        let _one_at_a_time = self.resetting.lock().await;
        // Another task may have reset it while we waited; a reset would stop the containers that were started since.
        let again = retried(&cmd).await;
        if !is_lost(&again) {
            return again;
        }
        tracing::warn!("podman's process was killed together with all containers; resetting podman");
        // It fails because of the containers that it finds dead, after it has done what is needed.
        let migrated = self.cmd(["system", "migrate"]).output(VERB_TIME).await;
        retried(&cmd).await.inspect_err(|_| {
            if let Err(error) = migrated {
                tracing::error!(%error, "cannot reset podman");
            }
        })
    }

    /// Runs a quick verb that changes names of images. podman before 4.8 loses names where two of them run at once
    /// (https://github.com/containers/common/pull/1700): all servers of a user take turns.
    pub(super) async fn rename(&self, args: impl IntoIterator<Item = impl Into<OsString>>) -> Result<(), ProcessError> {
        // Without the lock it is still right with a newer podman.
        let _one_at_a_time = rename_lock().await;
        self.verb(args).await.map(drop)
    }

    /// Runs a quick verb and returns its output as text.
    pub(super) async fn text(&self, args: &[&str]) -> Result<String, ProcessError> {
        Ok(String::from_utf8_lossy(&self.verb(args).await?).trim().to_owned())
    }

    /// The command that runs another one inside this user's user and mount namespace.
    pub fn unshare(&self, program: &Path, args: &[&str]) -> Cmd {
        let fixed = ["unshare".into(), program.into()];
        self.cmd(fixed.into_iter().chain(args.iter().map(OsString::from)))
    }
}

/// Runs a quick verb, and again where it finds an image that is half made.
async fn retried(cmd: &Cmd) -> Result<Vec<u8>, ProcessError> {
    for _ in 1..HALF_MADE_TRIES {
        match cmd.output(VERB_TIME).await {
            Err(error) if HALF_MADE.iter().any(|words| error.tells(words)) => tokio::time::sleep(HALF_MADE_PAUSE).await,
            other => return other,
        }
    }
    cmd.output(VERB_TIME).await
}

/// Takes a lock that all servers of this user share: on the directory of their runtime directories, so that no file stays.
async fn rename_lock() -> Option<Flock<File>> {
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
