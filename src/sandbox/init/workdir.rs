//! The files of the programs: copies sources to the working directory, and packs and unpacks compiled files.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use nix::unistd::{Gid, Uid, setegid, seteuid};
use rustix::fs::{AtFlags, CWD, utimensat};

use crate::host::at;
use crate::model::rootfs::{JOB_DIR, WORK_DIR, WRITABLE_MODE, WRITABLE_PATHS};
use crate::sandbox::init::counters::CGROUP;
use crate::sandbox::init::{Init, carry};

impl Init {
    /// Copies the job's files to the working directory with the programs' uid, so that programs own them.
    pub(super) fn place_files(&mut self, uid: u32, files: &[String]) -> io::Result<()> {
        self.ids = Some((Uid::from_raw(uid), Gid::from_raw(uid)));
        WRITABLE_PATHS.iter().try_for_each(|path| at(path, open_to_all(Path::new(path))))?;
        // With cgroup v1 this is a tmpfs that anyone can write to. Otherwise this call fails and is not needed.
        let _ = fs::set_permissions(CGROUP, fs::Permissions::from_mode(0o755));
        let mut contents = Vec::with_capacity(files.len());
        for name in files {
            let source = Path::new(JOB_DIR).join(name);
            contents.push((Path::new(WORK_DIR).join(name), at(source.display(), fs::read(&source))?));
        }
        self.as_programs(|| {
            contents.iter().try_for_each(|(path, content)| {
                path.parent().map_or(Ok(()), fs::create_dir_all)?;
                at(path.display(), fs::write(path, content))
            })
        })
    }

    /// Packs the files that the programs have left. Fails if a killed process may still run.
    pub(super) fn pack(&self, max_bytes: u64, pipes: Vec<OwnedFd>) -> io::Result<()> {
        if self.has_stuck_process {
            return Err(io::Error::other("a killed process is stuck in the kernel"));
        }
        let pipe = only_fd(pipes)?;
        self.as_programs(|| carry::pack(&WRITABLE_PATHS, max_bytes, pipe))
    }

    /// Unpacks the files that the init of another sandbox has packed.
    pub(super) fn unpack(&self, packed: Vec<OwnedFd>) -> io::Result<()> {
        let packed = only_fd(packed)?;
        let times = self.as_programs(|| carry::unpack(&WRITABLE_PATHS, &packed))?;
        WRITABLE_PATHS.iter().zip(times).try_for_each(|(path, times)| {
            let path = Path::new(path);
            as_owner(&fs::metadata(path)?, || Ok(utimensat(CWD, path, &times, AtFlags::empty())?))
        })
    }

    /// Runs `action` with the programs' uid and gid.
    fn as_programs<T>(&self, action: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let (uid, gid) = self.ids.ok_or_else(|| io::Error::other("the uid of the programs is not known yet"))?;
        setegid(gid)?;
        seteuid(uid)?;
        let result = action();
        seteuid(Uid::from_raw(0))?;
        setegid(Gid::from_raw(0))?;
        result
    }
}

/// Whether the working directory has a regular file of this name.
pub(super) fn has_file(name: &str) -> bool {
    fs::symlink_metadata(Path::new(WORK_DIR).join(name)).is_ok_and(|meta| meta.is_file())
}

/// The only descriptor that was passed with a message.
fn only_fd(mut fds: Vec<OwnedFd>) -> io::Result<fs::File> {
    match (fds.pop(), fds.pop()) {
        (Some(fd), None) => Ok(fd.into()),
        _ => Err(io::Error::other("the message came without exactly one descriptor")),
    }
}

/// Lets every uid write to a directory. podman gives a mount the owner and mode that the image's directory at this path
/// has.
fn open_to_all(directory: &Path) -> io::Result<()> {
    let meta = fs::metadata(directory)?;
    if meta.mode() & 0o7777 == WRITABLE_MODE {
        return Ok(());
    }
    as_owner(&meta, || fs::set_permissions(directory, fs::Permissions::from_mode(WRITABLE_MODE)))
}

/// Runs `action` with the uid of a directory's owner. Init can change its uid, but has no capability to change the
/// files of other users.
fn as_owner(directory: &fs::Metadata, action: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    seteuid(Uid::from_raw(directory.uid()))?;
    let result = action();
    seteuid(Uid::from_raw(0))?;
    result
}
