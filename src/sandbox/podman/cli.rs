//! Runs podman commands, and retries those that fail for a known reason inside podman.

use std::collections::HashMap;
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
use crate::sandbox::podman::images::ImageFacts;

/// Deadline of a quick verb (ps, rm, inspect, tag). Under load podman waits for its locks.
const VERB_TIME: Duration = Duration::from_secs(30);

/// Time between two tries to take a lock: a fraction of the time of a verb.
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// Part of podman's error after its pause process, which holds the user namespace, was killed with all containers.
const NAMESPACE_LOST: &str = "invalid internal status";

/// Parts of podman's errors when it reads an image or a volume that another process is creating or deleting. The command
/// may be about a different image that shares a layer (https://github.com/containers/podman/issues/12582), or about all
/// volumes. For an image that does not exist podman only says "image not known".
const CHANGING: [&str; 4] = ["image with ID", "reading image", "layer not known", VOLUME_UNKNOWN];

/// Part of podman's error for a volume that does not exist.
pub(super) const VOLUME_UNKNOWN: &str = "no such volume";

/// How often to try a verb that fails because of such an object: the other process needs milliseconds.
const CHANGING_TRIES: u32 = 10;

/// Time between two of these tries.
const CHANGING_PAUSE: Duration = Duration::from_millis(100);

/// The podman of this user, with one function per verb.
#[derive(Debug, Clone)]
pub struct Podman {
    program: PathBuf,
    /// Held by the one task that resets podman.
    resetting: Arc<Mutex<()>>,
    /// Read once, because `podman info` takes longer than creating a container.
    pub(super) info: Arc<OnceCell<Info>>,
    /// Facts about images by content id.
    pub(super) images: Arc<std::sync::Mutex<HashMap<String, ImageFacts>>>,
}

impl Podman {
    /// Uses the podman at this path, or of this name on PATH.
    pub fn new(program: &Path) -> Podman {
        Podman { program: program.to_owned(), resetting: Arc::default(), info: Arc::default(), images: Arc::default() }
    }

    pub(super) fn cmd(&self, args: impl IntoIterator<Item = impl Into<OsString>>) -> Cmd {
        Cmd::new(&self.program, args)
    }

    /// Runs a quick verb. If podman's pause process was killed together with all containers of this user, every verb
    /// fails until podman is reset: this function then resets it and tries again.
    pub(super) async fn verb(
        &self,
        args: impl IntoIterator<Item = impl Into<OsString>>,
    ) -> Result<Vec<u8>, ProcessError> {
        let cmd = self.cmd(args);
        let is_lost = |result: &Result<_, ProcessError>| {
            result.as_ref().is_err_and(|error| error.message_contains(NAMESPACE_LOST))
        };
        let first = run_with_retries(&cmd).await;
        if !is_lost(&first) {
            return first;
        }
        let _one_at_a_time = self.resetting.lock().await;
        // Another task may have reset podman in the meantime. A second reset would stop the containers started since.
        let again = run_with_retries(&cmd).await;
        if !is_lost(&again) {
            return again;
        }
        tracing::warn!("podman's process was killed together with all containers; resetting podman");
        // `system migrate` does the reset, and then fails because it finds dead containers.
        let migrated = self.cmd(["system", "migrate"]).output(VERB_TIME).await;
        run_with_retries(&cmd).await.inspect_err(|_| {
            if let Err(error) = migrated {
                tracing::error!(%error, "cannot reset podman");
            }
        })
    }

    /// Runs a quick verb that changes names of images. podman before 4.8 loses names if two of these verbs run at the
    /// same time (https://github.com/containers/common/pull/1700), so all servers of a user share a lock.
    pub(super) async fn rename(&self, args: impl IntoIterator<Item = impl Into<OsString>>) -> Result<(), ProcessError> {
        // Continues without the lock if it cannot be taken: newer versions of podman do not need it.
        let _one_at_a_time = rename_lock().await;
        self.verb(args).await.map(drop)
    }

    /// Runs a quick verb and returns its output as text.
    pub(super) async fn text(&self, args: &[&str]) -> Result<String, ProcessError> {
        Ok(String::from_utf8_lossy(&self.verb(args).await?).trim().to_owned())
    }

    /// A command that runs a program in podman's user and mount namespace of this user.
    pub fn unshare(&self, program: &Path, args: &[&str]) -> Cmd {
        let fixed = ["unshare".into(), program.into()];
        self.cmd(fixed.into_iter().chain(args.iter().map(OsString::from)))
    }
}

/// Runs a quick verb, and retries it if it fails because an image or a volume is being created or deleted.
async fn run_with_retries(cmd: &Cmd) -> Result<Vec<u8>, ProcessError> {
    for _ in 1..CHANGING_TRIES {
        match cmd.output(VERB_TIME).await {
            Err(error) if CHANGING.iter().any(|words| error.message_contains(words)) => {
                tokio::time::sleep(CHANGING_PAUSE).await
            }
            other => return other,
        }
    }
    cmd.output(VERB_TIME).await
}

/// Takes a lock that all servers of this user share. It is on the parent of their runtime directories, so no lock file
/// is left behind.
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
