//! The root file system of a template: the image, devices, and all mounts that its sandboxes share.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;

use nix::libc;
use nix::mount::{MntFlags, umount2};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{chdir, pivot_root};
use rustix::fs::CWD;
use rustix::mount::{MountAttrFlags, MountFlags, MountPropagationFlags, OpenTreeFlags, mount_change, open_tree};

use crate::host::at;
use crate::model::rootfs::{DEV, DEVICES, LINKS};
use crate::sandbox::agent::spawn::Child;
use crate::sandbox::agent::{NULL, mount};
use crate::sandbox::direct::oci_config::{FsType, Mount, MountSource, SandboxConfig};

/// The read-only flag of a [`Mount`].
const READ_ONLY: u32 = MountAttrFlags::MOUNT_ATTR_RDONLY.bits();

/// Tries the operations that the kernel may refuse, without any image.
pub(super) fn preflight() -> io::Result<Child> {
    Child::spawn(libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWNET, None, || {
        at("mounts", mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC))?;
        for fs_type in [FsType::Proc, FsType::Sysfs, FsType::Tmpfs, FsType::Devpts] {
            at(fs_type.name(), mount::new(fs_type, &[], 0))?;
        }
        at(NULL, mount::clone_of(Path::new(NULL))).map(drop)
    })
}

/// Turns the mount namespace of this process into the root file system of a template: the image, and the mounts that
/// all sandboxes share.
pub(super) fn set_up(config: &SandboxConfig) -> io::Result<()> {
    umask(Mode::from_bits_truncate(0o022));
    at("mounts", mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC))?;
    let root = at(config.root.display(), mount::clone_of(&config.root))?;
    // Created while podman's /proc and /sys are still visible: without a visible one the kernel refuses a new one.
    let create = |mount| Ok((mount, create_source(mount)?));
    let mounts: Vec<(&Mount, Option<File>)> = config.mounts.iter().map(create).collect::<io::Result<_>>()?;
    let device = |name| at(name, mount::clone_of(&Path::new(DEV).join(name)));
    let devices: Vec<File> = DEVICES.into_iter().map(device).collect::<io::Result<_>>()?;

    at(config.root.display(), mount::move_to(&root, &config.root))?;
    chdir(&config.root)?;
    at("the image", pivot_root(".", "."))?;
    umount2(".", MntFlags::MNT_DETACH)?;
    chdir("/")?;

    for (mount, source) in &mounts {
        let is_file = match source {
            Some(source) => !source.metadata()?.is_dir(),
            None => false,
        };
        at(mount.destination.display(), mount::make_mount_point(&mount.destination, is_file))?;
        if let Some(source) = source {
            mount::attach(source, mount)?;
        }
        if mount.destination == Path::new(DEV) {
            for (name, device) in DEVICES.into_iter().zip(&devices) {
                let path = mount.destination.join(name);
                // Read-only: programs can still write to the device, but cannot change the times of the host's file.
                let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NOEXEC;
                let mounted = || mount::move_to(device, &path).and_then(|()| mount::restrict(&path, flags));
                at(path.display(), File::create(&path).and_then(|_| Ok(mounted()?)))?;
            }
            LINKS.into_iter().try_for_each(|(name, target)| symlink(target, mount.destination.join(name)))?;
        }
    }
    hide(config, |path| !is_in_proc(path))?;
    let closed = MountFlags::RDONLY | MountFlags::NOSUID;
    at("the image", mount::restrict(Path::new("/"), closed | MountFlags::NODEV))?;
    at(DEV, mount::restrict(Path::new(DEV), closed | MountFlags::NOEXEC | MountFlags::NODEV))
}

/// Creates the mount for a template; `None` if each sandbox mounts its own. A template needs a /proc all the same:
/// without one the kernel would not let a sandbox mount its own.
fn create_source(mount: &Mount) -> io::Result<Option<File>> {
    match &mount.source {
        MountSource::New(fs_type, parameters) if !mount.is_own() || *fs_type == FsType::Proc => {
            // /dev becomes read-only later, after the mounts below it.
            let flags = if mount.destination == Path::new(DEV) { mount.flags & !READ_ONLY } else { mount.flags };
            at(fs_type.name(), mount::new(*fs_type, parameters, flags)).map(Some)
        }
        MountSource::Bind(path) => at(path.display(), mount::clone_of(path)).map(Some),
        MountSource::New(..) | MountSource::JobDir => Ok(None),
    }
}

/// Hides the masked paths and makes the read-only paths read-only, for the paths that `selected` accepts.
pub(super) fn hide(config: &SandboxConfig, selected: impl Fn(&Path) -> bool) -> io::Result<()> {
    let mut empty: Option<&Path> = None;
    for path in config.masked.iter().filter(|path| selected(path)) {
        let is_dir = match fs::metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            found => at(path.display(), found)?.is_dir(),
        };
        let cover = match empty {
            // A file is covered by the null device.
            _ if !is_dir => mount::clone_of(Path::new(NULL)),
            Some(empty) => mount::clone_of(empty),
            None => {
                let size = ("size".to_owned(), "0k".to_owned());
                let closed = MountAttrFlags::MOUNT_ATTR_RDONLY
                    | MountAttrFlags::MOUNT_ATTR_NOSUID
                    | MountAttrFlags::MOUNT_ATTR_NODEV
                    | MountAttrFlags::MOUNT_ATTR_NOEXEC;
                mount::new(FsType::Tmpfs, &[size], closed.bits())
            }
        };
        at(path.display(), cover.and_then(|cover| mount::move_to(&cover, path)))?;
        if is_dir {
            empty = Some(path);
        } else {
            at(path.display(), mount::restrict(path, MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NOEXEC))?;
        }
    }
    for path in config.readonly.iter().filter(|path| selected(path)) {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
        let tree = match open_tree(CWD, path, flags) {
            Err(rustix::io::Errno::NOENT) => continue,
            opened => File::from(at(path.display(), opened)?),
        };
        let closed = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
        at(path.display(), mount::move_to(&tree, path).and_then(|()| mount::restrict(path, closed)))?;
    }
    Ok(())
}

/// Whether a path is below the /proc that each sandbox mounts for itself.
pub(super) fn is_in_proc(path: &Path) -> bool {
    path.starts_with("/proc")
}
