//! The directory that the podman engine mounts at /dev.

use std::fs::File;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use crate::model::rootfs::{DEVICES, LINKS};

/// Marks a directory that is complete; made last. podman's own `/dev` has a directory of this name, too.
const COMPLETE: &str = "mqueue";

/// Makes a directory to be mounted at /dev, unless it is there: files to mount devices on, and the usual links. It is removed
/// with the directory of the instance that it is in.
pub(super) fn make_dev(dev: &Path) -> std::io::Result<()> {
    if dev.join(COMPLETE).exists() {
        return Ok(());
    }
    let there = |error: &std::io::Error| error.kind() == std::io::ErrorKind::AlreadyExists;
    let made = |result: std::io::Result<()>| result.or_else(|error| if there(&error) { Ok(()) } else { Err(error) });
    std::fs::create_dir_all(dev)?;
    ["pts", "shm"].iter().try_for_each(|name| made(std::fs::create_dir(dev.join(name))))?;
    DEVICES.iter().try_for_each(|name| File::create(dev.join(name)).map(drop))?;
    LINKS.iter().try_for_each(|(name, target)| made(symlink(target, dev.join(name))))?;
    // podman's ids are to see all of it, whatever the server's umask.
    for (name, mode) in [("pts", 0o755), ("shm", 0o755), ("", 0o755)] {
        std::fs::set_permissions(dev.join(name), std::fs::Permissions::from_mode(mode))?;
    }
    made(std::fs::create_dir(dev.join(COMPLETE)))
}
