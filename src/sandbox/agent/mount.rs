//! Mounts with the kernel's newer calls, which create a file system or a bind mount first and attach it later.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use rustix::fs::{CWD, statvfs};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create,
    fsconfig_set_string, fsmount, fsopen, mount_remount, move_mount, open_tree,
};

use crate::host::at;
use crate::sandbox::direct::oci_config::{FsType, Mount, MountSource};

/// Creates a file system that is not attached yet.
pub(super) fn new(fs_type: FsType, parameters: &[(String, String)], flags: u32) -> rustix::io::Result<File> {
    let file_system = fsopen(fs_type.name(), FsOpenFlags::FSOPEN_CLOEXEC)?;
    parameters.iter().try_for_each(|(name, value)| fsconfig_set_string(&file_system, name.as_str(), value.as_str()))?;
    fsconfig_create(&file_system)?;
    fsmount(&file_system, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::from_bits_retain(flags)).map(File::from)
}

/// Clones the mount of a file or directory: a bind mount that is not attached yet.
pub(super) fn clone_of(source: &Path) -> rustix::io::Result<File> {
    open_tree(CWD, source, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC).map(File::from)
}

/// Attaches a mount of [`new`] or [`clone_of`] at a path.
pub(super) fn move_to(mount: &File, path: &Path) -> rustix::io::Result<()> {
    move_mount(mount, "", CWD, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
}

/// Attaches a mount of [`new`] or [`clone_of`] as `mount` configures it.
pub(super) fn attach(source: &File, mount: &Mount) -> io::Result<()> {
    at(mount.destination.display(), move_to(source, &mount.destination))?;
    match &mount.source {
        // It was created with its flags.
        MountSource::New(..) => Ok(()),
        MountSource::Bind(_) | MountSource::JobDir => {
            let flags = MountFlags::from_bits_truncate(mount.flags) | MountFlags::NOSUID | MountFlags::NODEV;
            at(mount.destination.display(), restrict(&mount.destination, flags))
        }
    }
}

/// Adds flags to a mount, which keeps the flags that it already has.
pub(super) fn restrict(path: &Path, flags: MountFlags) -> rustix::io::Result<()> {
    // These four have the same values in `statvfs` and in `mount`.
    let kept = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let current = u32::try_from(statvfs(path)?.f_flag.bits()).unwrap_or(0);
    mount_remount(path, MountFlags::BIND | flags | (MountFlags::from_bits_truncate(current) & kept), "")
}

/// Creates the file or directory to mount on, if it does not exist.
pub(super) fn make_mount_point(path: &Path, for_file: bool) -> io::Result<()> {
    if path.exists() {
        return Ok(());
    }
    if for_file {
        path.parent().map_or(Ok(()), fs::create_dir_all)?;
        File::create(path).map(drop)
    } else {
        fs::create_dir_all(path)
    }
}
