//! The runtime directory of an instance, and the lock that keeps instance names unique.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::host::process::xdg_runtime_dir;

/// Why an instance cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum InstanceError {
    /// There is no runtime directory for sockets, locks and job directories.
    #[error(
        "XDG_RUNTIME_DIR is not set to a directory of user {uid} ({detail}). Log in properly (not by su or sudo), or \
         have root run `loginctl enable-linger {uid}` and set XDG_RUNTIME_DIR=/run/user/{uid}"
    )]
    NoRuntimeDir {
        /// The user id of this process.
        uid: u32,
        /// What is wrong.
        detail: String,
    },
    /// The path has a character by which podman's options separate paths.
    #[error("podman cannot mount the path {0}: it contains a colon or a comma")]
    Unmountable(PathBuf),
    /// Another process holds this name.
    #[error("an instance named {name:?} is running already (process {pid}); give this one another name (`instance`)")]
    Taken {
        /// The name.
        name: String,
        /// The process that holds it.
        pid: String,
    },
    /// A file operation failed.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

/// The common directory of all instances of this user.
pub fn runtime_dir() -> Result<PathBuf, InstanceError> {
    let uid = nix::unistd::getuid().as_raw();
    let error = |detail: String| InstanceError::NoRuntimeDir { uid, detail };
    let dir = xdg_runtime_dir();
    let meta = dir.metadata().map_err(|e| error(format!("{}: {e}", dir.display())))?;
    if meta.uid() != uid {
        return Err(error(format!("{} belongs to user {}", dir.display(), meta.uid())));
    }
    if !meta.is_dir() {
        return Err(error(format!("{} is no directory", dir.display())));
    }
    check_mountable(&dir)?;
    Ok(dir.join("coderunner"))
}

/// Refuses a path that podman's `--volume` would parse differently.
pub fn check_mountable(path: &Path) -> Result<(), InstanceError> {
    match path.to_str() {
        Some(text) if !text.contains([':', ',']) => Ok(()),
        _ => Err(InstanceError::Unmountable(path.into())),
    }
}

/// An instance, the only one of its name. Dropping it removes its directory.
#[derive(Debug)]
pub struct Instance {
    /// Its name.
    pub name: String,
    dir: PathBuf,
    _lock: Flock<File>,
}

impl Instance {
    /// Takes the name. If another process holds it, the error names that process.
    pub fn take(name: &str) -> Result<Instance, InstanceError> {
        let dir = runtime_dir()?.join(name);
        let io = |source| InstanceError::Io { path: dir.clone(), source };
        let path = dir.join("lock");
        loop {
            // In each attempt: an instance that ended meanwhile has removed the directory.
            DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(io)?;
            let file = match open_lock(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                opened => opened.map_err(io)?,
            };
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(mut lock) => {
                    // If the locked file was deleted meanwhile, another process may lock the new file of that name.
                    let same =
                        path.metadata().is_ok_and(|now| lock.metadata().is_ok_and(|held| held.ino() == now.ino()));
                    if !same {
                        continue;
                    }
                    lock.set_len(0).map_err(io)?;
                    write!(lock, "{}", std::process::id()).map_err(io)?;
                    return Ok(Instance { name: name.into(), dir, _lock: lock });
                }
                Err((mut file, Errno::EWOULDBLOCK)) => {
                    let mut pid = String::new();
                    let _ = file.read_to_string(&mut pid);
                    return Err(InstanceError::Taken { name: name.into(), pid });
                }
                Err((_, error)) => return Err(io(error.into())),
            }
        }
    }

    /// The parent of job directories.
    pub fn jobs(&self) -> PathBuf {
        self.dir.join("jobs")
    }

    /// The control socket on which a running server takes commands.
    pub fn control(&self) -> PathBuf {
        control_of(&self.dir)
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.dir) {
            tracing::warn!(dir = %self.dir.display(), %error, "cannot remove the runtime directory");
        }
        // Fails, as it should, while another instance's directory is in the common one.
        let _ = self.dir.parent().map(std::fs::remove_dir);
    }
}

/// The control socket of the instance of this name, whether or not it runs.
pub fn control_path(name: &str) -> Result<PathBuf, InstanceError> {
    Ok(control_of(&runtime_dir()?.join(name)))
}

fn control_of(dir: &Path) -> PathBuf {
    dir.join("control")
}

fn open_lock(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
}
