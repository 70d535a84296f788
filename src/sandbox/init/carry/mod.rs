//! Carries compiled files to other sandboxes: one init packs them, and others unpack them.
//!
//! A program must not be able to tell whether it was compiled in its own sandbox or in another one. So everything that
//! it can see of the writable directories is carried: names in the order in which a directory lists them, types,
//! contents with their holes, hard links, modes, times. Packing fails if a file has anything else (another owner,
//! attributes, ACLs, reserved space) or cannot be read. Each sandbox then compiles for itself.
//!
//! Format: the length of a list of entries (8 bytes, little-endian), the list (postcard), and the contents of all files
//! one after the other. The *roots* are the writable directories themselves.

mod pack;
mod unpack;

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

pub use pack::pack;
pub use unpack::unpack;

/// Longest that packing or unpacking may take: a hundred times as long as the largest build takes on an idle machine,
/// and a delay that hardly anyone notices.
pub const MAX_TIME: Duration = Duration::from_secs(2);

/// A file of any type. The first entries are the roots. The entries of one directory are consecutive.
#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    /// Index of the directory that contains the file.
    parent: u32,
    /// Name in the directory; for a root, its path.
    name: Vec<u8>,
    mode: u32,
    /// Seconds and nanoseconds.
    accessed: (i64, u32),
    /// Seconds and nanoseconds.
    modified: (i64, u32),
    kind: Kind,
}

/// The type of a file, with its content.
#[derive(Debug, Serialize, Deserialize)]
enum Kind {
    Directory,
    /// Ranges of the file that are in none of the parts are holes.
    File {
        size: u64,
        parts: Vec<Part>,
    },
    Symlink(Vec<u8>),
    Fifo,
    Socket,
    /// Another name of the entry with this index.
    HardLink(u32),
}

/// A range of a file that has data.
#[derive(Debug, Serialize, Deserialize)]
struct Part {
    /// Offset in the file.
    start: u64,
    length: u64,
    /// Offset in the contents of all files.
    packed: u64,
}

/// All files below the roots.
struct Tree {
    entries: Vec<Entry>,
    /// Size of the contents of all files, in bytes.
    contents: u64,
    deadline: Deadline,
}

struct Deadline(Instant);

impl Deadline {
    fn new() -> Deadline {
        Deadline(Instant::now() + MAX_TIME)
    }

    fn check(&self) -> io::Result<()> {
        if Instant::now() > self.0 { Err(io::Error::other("it takes too long")) } else { Ok(()) }
    }
}

/// Bytes to copy at a time.
const CHUNK: usize = 256 * 1024;

impl Tree {
    /// The path of the entry with this index.
    fn path(&self, index: usize) -> PathBuf {
        let mut names = Vec::new();
        let mut current = index;
        while let Some(entry) = self.entries.get(current) {
            names.push(OsStr::from_bytes(&entry.name));
            // The parent of a root is the root itself.
            if entry.parent as usize >= current {
                break;
            }
            current = entry.parent as usize;
        }
        names.iter().rev().collect()
    }

    /// Passes a range of a file to `write` in chunks, each with its offset in the range.
    fn copy(
        &self,
        file: &File,
        start: u64,
        length: u64,
        buffer: &mut [u8],
        mut write: impl FnMut(&[u8], u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut done = 0;
        while done < length {
            self.deadline.check()?;
            let chunk = usize::try_from(length - done).map_or(buffer.len(), |left| left.min(buffer.len()));
            let bytes = &mut buffer[..chunk];
            file.read_exact_at(bytes, start + done)?;
            write(bytes, done)?;
            done += chunk as u64;
        }
        Ok(())
    }
}

/// An index in the type of the packed format.
fn packed_index(index: usize) -> io::Result<u32> {
    u32::try_from(index).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;
    use std::os::unix::fs::MetadataExt;
    use std::path::Path;

    use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, utimensat};

    use super::pack::MAX_ENTRIES;
    use super::*;

    /// A directory on a tmpfs, like those of a sandbox.
    fn root() -> tempfile::TempDir {
        tempfile::tempdir_in("/dev/shm").unwrap()
    }

    fn carry(from: &Path, max_bytes: u64) -> io::Result<tempfile::TempDir> {
        let (packed, to) = (tempfile::tempfile()?, root());
        pack(&[from.to_str().unwrap()], max_bytes, &packed)?;
        let times = unpack(&[to.path().to_str().unwrap()], &packed)?;
        assert_eq!(times[0].last_modification.tv_sec, fs::metadata(from)?.mtime());
        Ok(to)
    }

    fn names(root: &Path) -> Vec<std::ffi::OsString> {
        fs::read_dir(root).unwrap().map(|entry| entry.unwrap().file_name()).collect()
    }

    #[test]
    fn copied_files_keep_access_times_and_directory_order() {
        let from = root();
        let time = |seconds| Timespec { tv_sec: seconds, tv_nsec: 123_456_789 };
        let times = Timestamps { last_access: time(1000), last_modification: time(-2000) };
        for name in ["b", "a", "d", "c"] {
            fs::write(from.path().join(name), name).unwrap();
            utimensat(CWD, from.path().join(name), &times, AtFlags::empty()).unwrap();
        }
        fs::rename(from.path().join("a"), from.path().join("e")).unwrap();
        let to = carry(from.path(), 1 << 20).unwrap();
        assert_eq!(names(from.path()), names(to.path()));
        for path in [from.path().join("e"), to.path().join("e")] {
            let meta = fs::metadata(path).unwrap();
            assert_eq!((meta.atime(), meta.atime_nsec()), (1000, 123_456_789));
            assert_eq!((meta.mtime(), meta.mtime_nsec()), (-2000, 123_456_789));
        }
    }

    #[test]
    fn pack_writes_nothing_if_a_limit_is_exceeded() {
        let from = root();
        fs::write(from.path().join("x"), [7; 100_000]).unwrap();
        let roots = [from.path().to_str().unwrap()];
        let mut packed = Vec::new();
        assert!(pack(&roots, 100_000, &mut packed).is_err() && packed.is_empty());
        pack(&roots, 101_000, &mut packed).unwrap();
        (0..MAX_ENTRIES).for_each(|n| drop(File::create(from.path().join(n.to_string())).unwrap()));
        packed.clear();
        assert!(pack(&roots, 1 << 30, &mut packed).is_err() && packed.is_empty());
    }

    #[test]
    fn malformed_file_lists_are_rejected_and_create_nothing() {
        let root = root();
        let outside = root.path().join("outside");
        fs::create_dir(root.path().join("inside")).unwrap();
        let inside = root.path().join("inside");
        let entry = |parent, name: &str, kind| {
            let (name, times) = (name.as_bytes().to_vec(), (0, 0));
            Entry { parent, name, mode: 0o644, accessed: times, modified: times, kind }
        };
        let file = |parts| Kind::File { size: 1, parts };
        let part = |packed| Part { start: 0, length: 1, packed };
        for wrong in [
            entry(0, "../outside", Kind::Fifo),
            entry(0, outside.to_str().unwrap(), Kind::Fifo),
            entry(0, "..", Kind::Fifo),
            entry(0, ".", Kind::Directory),
            entry(0, "", Kind::Directory),
            entry(1, "x", Kind::Fifo),
            entry(u32::MAX, "x", Kind::Fifo),
            entry(0, "x", Kind::HardLink(1)),
            entry(0, "x", Kind::HardLink(u32::MAX)),
            entry(0, "x", file(vec![part(u64::MAX)])),
            entry(0, "x", file(vec![part(1 << 40)])),
        ] {
            let shown = format!("{wrong:?}");
            let list = postcard::to_stdvec(&[entry(0, "/work", Kind::Directory), wrong]).unwrap();
            let mut packed = tempfile::tempfile().unwrap();
            packed.write_all(&(list.len() as u64).to_le_bytes()).unwrap();
            packed.write_all(&list).unwrap();
            assert!(unpack(&[inside.to_str().unwrap()], &packed).is_err(), "{shown}");
            assert_eq!(names(root.path()), ["inside"], "{shown}");
            names(&inside).iter().for_each(|name| fs::remove_file(inside.join(name)).unwrap());
        }
        for bytes in [&b""[..], &[255; 8], &[255; 100], &[0; 8]] {
            let mut packed = tempfile::tempfile().unwrap();
            packed.write_all(bytes).unwrap();
            assert!(unpack(&[inside.to_str().unwrap()], &packed).is_err());
        }
    }
}
