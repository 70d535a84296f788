//! Packs what the programs have left, or finds out that it cannot be carried.

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
use crate::sandbox::init::carry::{CHUNK, Deadline, Entry, Part, Tree, What, number};

/// Most files, directories and links, so that the list of them takes a few MiB of the sandbox at most: more than there can
/// be with the default of `limits.inodes` in all places together.
pub(crate) const MOST_ENTRIES: usize = 32 * 1024;

/// What System V's shared memory, semaphores and queues are listed in: they are no files, and outlive their makers.
const IPC: [&str; 3] = ["/proc/sysvipc/msg", "/proc/sysvipc/sem", "/proc/sysvipc/shm"];

/// Packs what is in these places, with the rights of the programs and when they are dead. Fails before it has written
/// anything where that cannot be done exactly, or takes more than `most` bytes.
pub fn pack(places: &[&str], most: u64, mut packed: impl Write) -> io::Result<()> {
    for list in IPC {
        match fs::read_to_string(list) {
            // Below a heading.
            Ok(text) if text.lines().nth(1).is_some() => return Err(refused(list)),
            Ok(_) => {}
            // Where the kernel has none.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return at(list, Err(error)),
        }
    }
    let tree = Tree::of(places)?;
    let list = postcard::to_stdvec(&tree.entries).map_err(io::Error::other)?;
    let bytes = 8 + list.len() as u64 + tree.contents;
    if bytes > most {
        return Err(io::Error::other(format!("it is {bytes} bytes, and {most} may be carried")));
    }
    packed.write_all(&(list.len() as u64).to_le_bytes())?;
    packed.write_all(&list)?;
    let mut buffer = vec![0; CHUNK];
    for (number, entry) in tree.entries.iter().enumerate() {
        let What::File { parts, .. } = &entry.what else { continue };
        if parts.is_empty() {
            continue;
        }
        let file = open(&tree.path(number))?;
        for part in parts {
            tree.copy(&file, part.start, part.length, &mut buffer, |bytes, _| packed.write_all(bytes))?;
        }
    }
    Ok(())
}

impl Tree {
    fn of(places: &[&str]) -> io::Result<Tree> {
        let mut tree = Tree { entries: Vec::new(), contents: 0, deadline: Deadline::new() };
        // Of those with several names: by what the kernel knows them.
        let mut known: HashMap<(u64, u64), u32> = HashMap::new();
        for (number, place) in (0..).zip(places) {
            let entry = Entry::of(number, place.as_bytes().to_vec(), &fs::metadata(place)?, What::Directory);
            tree.entries.push(entry);
        }
        let mut number = 0;
        while let Some(entry) = tree.entries.get(number) {
            if let What::Directory = entry.what {
                tree.add(number, number < places.len(), &mut known)?;
            }
            number += 1;
        }
        Ok(tree)
    }

    /// Adds what is in a directory.
    fn add(&mut self, parent: usize, is_place: bool, known: &mut HashMap<(u64, u64), u32>) -> io::Result<()> {
        let path = self.path(parent);
        // The programs do not own the places, and cannot do much to them.
        let open = if is_place { File::open(&path) } else { open(&path) };
        let dir = at(path.display(), open)?;
        if !is_place {
            plain(&path, &dir)?;
        }
        for entry in Dir::new(dir)? {
            self.deadline.check()?;
            let name = entry?.file_name().to_bytes().to_vec();
            if name == b"." || name == b".." {
                continue;
            }
            if self.entries.len() == MOST_ENTRIES {
                return Err(io::Error::other(format!("there are more than {MOST_ENTRIES} files")));
            }
            let path = path.join(OsStr::from_bytes(&name));
            let meta = fs::symlink_metadata(&path)?;
            let number = number(self.entries.len())?;
            let what = match known.get(&(meta.dev(), meta.ino())) {
                Some(first) => What::Same(*first),
                None => at(path.display(), self.look(&path, &meta))?,
            };
            if meta.nlink() > 1 && !meta.is_dir() {
                known.entry((meta.dev(), meta.ino())).or_insert(number);
            }
            self.entries.push(Entry::of(self::number(parent)?, name, &meta, what));
        }
        Ok(())
    }

    /// What a file is that has not been met yet. Fails where it is anything that is not carried.
    fn look(&mut self, path: &Path, meta: &fs::Metadata) -> io::Result<What> {
        let (uid, gid) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
        if (meta.uid(), meta.gid()) != (uid, gid) {
            return Err(refused("its owner"));
        }
        without_attributes(path)?;
        match FileType::from_raw_mode(meta.mode()) {
            FileType::Directory => Ok(What::Directory),
            FileType::RegularFile => {
                let file = open(path)?;
                plain(path, &file)?;
                let parts = self.parts(&file, meta)?;
                Ok(What::File { size: meta.size(), parts })
            }
            FileType::Symlink => Ok(What::Link(fs::read_link(path)?.into_os_string().into_vec())),
            FileType::Fifo => Ok(What::Fifo),
            FileType::Socket => Ok(What::Socket),
            _ => Err(refused("a device")),
        }
    }

    /// The parts of a file that are no holes.
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
            return Err(refused("room that is reserved"));
        }
        Ok(parts)
    }
}

impl Entry {
    fn of(parent: u32, name: Vec<u8>, meta: &fs::Metadata, what: What) -> Entry {
        let time = |seconds, nanoseconds| (seconds, u32::try_from(nanoseconds).unwrap_or(0));
        Entry {
            parent,
            name,
            mode: meta.mode() & 0o7777,
            accessed: time(meta.atime(), meta.atime_nsec()),
            modified: time(meta.mtime(), meta.mtime_nsec()),
            what,
        }
    }
}

/// Opens a file or a directory of the programs, which does not notice it.
fn open(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NOATIME | OFlags::NONBLOCK | OFlags::CLOEXEC;
    Ok(openat(CWD, path, flags, Mode::empty())?.into())
}

/// Fails where a file has flags, as `chattr` sets them.
fn plain(path: &Path, file: &File) -> io::Result<()> {
    match ioctl_getflags(file) {
        Ok(flags) if flags != IFlags::empty() => at(path.display(), Err(refused("its flags"))),
        // Where the file system has none.
        Ok(_) | Err(Errno::NOTTY | Errno::OPNOTSUPP) => Ok(()),
        Err(error) => at(path.display(), Err(io::Error::from(error))),
    }
}

/// Fails where a file has extended attributes, of which ACLs are some. Those of the system's own no program can set.
fn without_attributes(path: &Path) -> io::Result<()> {
    let mut names = [0_u8; 4096];
    let length = match llistxattr(path, &mut names) {
        Err(Errno::OPNOTSUPP) => 0,
        length => length?,
    };
    let mut names = names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    if names.any(|name| !name.starts_with(b"security.")) { Err(refused("its attributes")) } else { Ok(()) }
}

fn refused(what: &str) -> io::Error {
    io::Error::other(format!("{what} cannot be carried"))
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn there_is_an_end_to_the_time_that_it_takes() {
        let from = tempfile::tempdir_in("/dev/shm").unwrap();
        fs::write(from.path().join("x"), "x").unwrap();
        let mut tree = Tree { entries: Vec::new(), contents: 0, deadline: Deadline(Instant::now()) };
        let meta = fs::metadata(from.path()).unwrap();
        tree.entries.push(Entry::of(0, from.path().as_os_str().as_bytes().to_vec(), &meta, What::Directory));
        assert!(tree.add(0, true, &mut HashMap::new()).is_err());
    }
}
