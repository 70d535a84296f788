//! Packs the files that the programs have left, or finds that they cannot be carried.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{CWD, Dir, FileType, IFlags, Mode, OFlags, SeekFrom, ioctl_getflags, llistxattr, openat, seek};
use rustix::io::Errno;

use crate::host::at;
use crate::sandbox::init::carry::{CHUNK, Deadline, Entry, Kind, Part, Tree, packed_index};

/// Most files, directories and links. Keeps the list within a few MiB of the sandbox's memory, and is more than the
/// default of `limits.inodes` allows for all roots together.
pub(crate) const MAX_ENTRIES: usize = 32 * 1024;

/// Lists of System V message queues, semaphores and shared memory. These are no files, and outlive their processes.
const IPC: [&str; 3] = ["/proc/sysvipc/msg", "/proc/sysvipc/sem", "/proc/sysvipc/shm"];

/// Packs the files below the roots. Runs with the rights of the programs, when all of these are dead. Fails before
/// anything is written if the files cannot be carried exactly, or take more than `max_bytes`.
pub fn pack(roots: &[&str], max_bytes: u64, mut packed: impl Write) -> io::Result<()> {
    for list in IPC {
        match fs::read_to_string(list) {
            // The first line is a heading.
            Ok(text) if text.lines().nth(1).is_some() => return Err(not_carried(list)),
            Ok(_) => {}
            // The kernel does not support it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return at(list, Err(error)),
        }
    }
    let tree = Tree::read(roots)?;
    let list = postcard::to_stdvec(&tree.entries).map_err(io::Error::other)?;
    let bytes = 8 + list.len() as u64 + tree.contents;
    if bytes > max_bytes {
        return Err(io::Error::other(format!("the files take {bytes} bytes, more than {max_bytes}")));
    }
    packed.write_all(&(list.len() as u64).to_le_bytes())?;
    packed.write_all(&list)?;
    let mut buffer = vec![0; CHUNK];
    for (index, entry) in tree.entries.iter().enumerate() {
        let Kind::File { parts, .. } = &entry.kind else { continue };
        if parts.is_empty() {
            continue;
        }
        let file = open(&tree.path(index))?;
        for part in parts {
            tree.copy(&file, part.start, part.length, &mut buffer, |bytes, _| packed.write_all(bytes))?;
        }
    }
    Ok(())
}

impl Tree {
    /// Reads all entries below the roots, without their contents.
    fn read(roots: &[&str]) -> io::Result<Tree> {
        let mut tree = Tree { entries: Vec::new(), contents: 0, deadline: Deadline::new() };
        // Entries of files with several names, by device and inode number.
        let mut linked: HashMap<(u64, u64), u32> = HashMap::new();
        for (index, root) in (0..).zip(roots) {
            let entry = Entry::new(index, root.as_bytes().to_vec(), &fs::metadata(root)?, Kind::Directory);
            tree.entries.push(entry);
        }
        let mut index = 0;
        while let Some(entry) = tree.entries.get(index) {
            if let Kind::Directory = entry.kind {
                tree.add_directory(index, index < roots.len(), &mut linked)?;
            }
            index += 1;
        }
        Ok(tree)
    }

    /// Adds the files in a directory.
    fn add_directory(&mut self, parent: usize, is_root: bool, linked: &mut HashMap<(u64, u64), u32>) -> io::Result<()> {
        let path = self.path(parent);
        // Programs do not own the roots: they cannot set flags on them, and O_NOATIME in `open` would fail.
        let open = if is_root { File::open(&path) } else { open(&path) };
        let dir = at(path.display(), open)?;
        if !is_root {
            check_flags(&path, &dir)?;
        }
        for entry in Dir::new(dir)? {
            self.deadline.check()?;
            let name = entry?.file_name().to_bytes().to_vec();
            if name == b"." || name == b".." {
                continue;
            }
            if self.entries.len() == MAX_ENTRIES {
                return Err(io::Error::other(format!("there are more than {MAX_ENTRIES} files")));
            }
            let path = path.join(OsStr::from_bytes(&name));
            let meta = fs::symlink_metadata(&path)?;
            let index = packed_index(self.entries.len())?;
            let kind = match linked.get(&(meta.dev(), meta.ino())) {
                Some(first) => Kind::HardLink(*first),
                None => at(path.display(), self.read_kind(&path, &meta))?,
            };
            if meta.nlink() > 1 && !meta.is_dir() {
                linked.entry((meta.dev(), meta.ino())).or_insert(index);
            }
            self.entries.push(Entry::new(packed_index(parent)?, name, &meta, kind));
        }
        Ok(())
    }

    /// The type and the parts of a file. Fails if the file has anything that is not carried.
    fn read_kind(&mut self, path: &Path, meta: &fs::Metadata) -> io::Result<Kind> {
        let (uid, gid) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
        if (meta.uid(), meta.gid()) != (uid, gid) {
            return Err(not_carried("its owner"));
        }
        check_attributes(path)?;
        match FileType::from_raw_mode(meta.mode()) {
            FileType::Directory => Ok(Kind::Directory),
            FileType::RegularFile => {
                let file = open(path)?;
                check_flags(path, &file)?;
                let parts = self.parts(&file, meta)?;
                Ok(Kind::File { size: meta.size(), parts })
            }
            FileType::Symlink => Ok(Kind::Symlink(fs::read_link(path)?.into_os_string().into_vec())),
            FileType::Fifo => Ok(Kind::Fifo),
            FileType::Socket => Ok(Kind::Socket),
            _ => Err(not_carried("a device")),
        }
    }

    /// The ranges of a file that are no holes.
    fn parts(&mut self, file: &File, meta: &fs::Metadata) -> io::Result<Vec<Part>> {
        let page = rustix::param::page_size() as u64;
        let (mut parts, mut end, mut blocks) = (Vec::new(), 0, 0);
        while end < meta.size() {
            self.deadline.check()?;
            let start = match seek(file, SeekFrom::Data(end)) {
                Err(Errno::NXIO) => break,
                start => start?,
            };
            end = seek(file, SeekFrom::Hole(start))?.min(meta.size());
            let length = end.checked_sub(start).filter(|length| *length > 0).ok_or(Errno::IO)?;
            parts.push(Part { start, length, packed: self.contents });
            self.contents += length;
            blocks += length.next_multiple_of(page) / 512;
        }
        if blocks != meta.blocks() {
            return Err(not_carried("reserved space"));
        }
        Ok(parts)
    }
}

impl Entry {
    fn new(parent: u32, name: Vec<u8>, meta: &fs::Metadata, kind: Kind) -> Entry {
        let time = |seconds, nanoseconds| (seconds, u32::try_from(nanoseconds).unwrap_or(0));
        Entry {
            parent,
            name,
            mode: meta.mode() & 0o7777,
            accessed: time(meta.atime(), meta.atime_nsec()),
            modified: time(meta.mtime(), meta.mtime_nsec()),
            kind,
        }
    }
}

/// Opens a file or a directory of the programs without changing its access time.
fn open(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NOATIME | OFlags::NONBLOCK | OFlags::CLOEXEC;
    Ok(openat(CWD, path, flags, Mode::empty())?.into())
}

/// Fails if a file has inode flags, which `chattr` sets.
fn check_flags(path: &Path, file: &File) -> io::Result<()> {
    match ioctl_getflags(file) {
        Ok(flags) if flags != IFlags::empty() => at(path.display(), Err(not_carried("its flags"))),
        // The file system does not support flags.
        Ok(_) | Err(Errno::NOTTY | Errno::OPNOTSUPP) => Ok(()),
        Err(error) => at(path.display(), Err(io::Error::from(error))),
    }
}

/// Fails if a file has extended attributes, which include ACLs. Ignores those in `security.`, which no program can set.
fn check_attributes(path: &Path) -> io::Result<()> {
    let mut names = [0_u8; 4096];
    let length = match llistxattr(path, &mut names) {
        Err(Errno::OPNOTSUPP) => 0,
        length => length?,
    };
    let mut names = names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    if names.any(|name| !name.starts_with(b"security.")) { Err(not_carried("its attributes")) } else { Ok(()) }
}

fn not_carried(what: &str) -> io::Error {
    io::Error::other(format!("{what} cannot be carried"))
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn packing_stops_at_its_deadline() {
        let from = tempfile::tempdir_in("/dev/shm").unwrap();
        fs::write(from.path().join("x"), "x").unwrap();
        let mut tree = Tree { entries: Vec::new(), contents: 0, deadline: Deadline(Instant::now()) };
        let meta = fs::metadata(from.path()).unwrap();
        tree.entries.push(Entry::new(0, from.path().as_os_str().as_bytes().to_vec(), &meta, Kind::Directory));
        assert!(tree.add_directory(0, true, &mut HashMap::new()).is_err());
    }
}
