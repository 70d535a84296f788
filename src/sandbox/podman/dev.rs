//! The directory that the podman engine mounts at /dev.

use std::fs::File;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use crate::model::rootfs::{DEVICES, LINKS};

/// Created last, to mark the directory as complete. podman's own `/dev` has a directory of this name too.
const COMPLETE: &str = "mqueue";

/// Creates the directory to mount at /dev, unless it exists: files to mount devices on, and the usual links. It is
/// removed with the directory of the instance.
pub(super) fn make_dev(dev: &Path) -> std::io::Result<()> {
    if dev.join(COMPLETE).exists() {
        return Ok(());
    }
    let exists = |error: &std::io::Error| error.kind() == std::io::ErrorKind::AlreadyExists;
    let or_exists =
        |result: std::io::Result<()>| result.or_else(|error| if exists(&error) { Ok(()) } else { Err(error) });
    std::fs::create_dir_all(dev)?;
    ["pts", "shm"].iter().try_for_each(|name| or_exists(std::fs::create_dir(dev.join(name))))?;
    DEVICES.iter().try_for_each(|name| File::create(dev.join(name)).map(drop))?;
    LINKS.iter().try_for_each(|(name, target)| or_exists(symlink(target, dev.join(name))))?;
    // The subordinate ids that containers run as must be able to read it, whatever the server's umask.
    for (name, mode) in [("pts", 0o755), ("shm", 0o755), ("", 0o755)] {
        std::fs::set_permissions(dev.join(name), std::fs::Permissions::from_mode(mode))?;
    }
    or_exists(std::fs::create_dir(dev.join(COMPLETE)))
}
