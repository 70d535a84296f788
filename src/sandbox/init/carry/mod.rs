//! What compiling left behind, as one init packs it and others unpack it.
//!
//! A program must not be able to tell whether it was compiled in its sandbox or in another one. So all that it can see of
//! the [places](crate::sandbox::init) that programs may write to is carried: names, in the order in which a directory tells them,
//! kinds, contents with their holes, hard links, modes, times. Whatever else a file can have (an owner, attributes, ACLs,
//! room that is reserved) and whatever cannot be read makes packing fail, and then each sandbox compiles for itself.
//!
//! Packed it is the length of a list, the list, and the contents of files one after the other.

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

/// Longest that packing or unpacking may take: a hundred times what the largest build takes on an idle machine, and less
/// than anyone waits for without noticing.
pub const MOST_TIME: Duration = Duration::from_secs(2);

/// A file of any kind. The first ones are the places themselves; those of one directory follow each other.
#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    /// The directory that it is in, by number.
    parent: u32,
    /// That of a place is its path.
    name: Vec<u8>,
    mode: u32,
    accessed: (i64, u32),
    modified: (i64, u32),
    what: What,
}

#[derive(Debug, Serialize, Deserialize)]
enum What {
    Directory,
    /// What is not in one of the parts is a hole.
    File {
        size: u64,
        parts: Vec<Part>,
    },
    Link(Vec<u8>),
    Fifo,
    Socket,
    /// Another name of an entry, by number.
    Same(u32),
}

/// Part of a file.
#[derive(Debug, Serialize, Deserialize)]
struct Part {
    /// Where in the file it begins.
    start: u64,
    length: u64,
    /// Where its bytes begin among all contents.
    packed: u64,
}

/// All that is below some places.
struct Tree {
    entries: Vec<Entry>,
    /// Bytes of all contents.
    contents: u64,
    deadline: Deadline,
}

struct Deadline(Instant);

impl Deadline {
    fn new() -> Deadline {
        Deadline(Instant::now() + MOST_TIME)
    }

    fn check(&self) -> io::Result<()> {
        if Instant::now() > self.0 { Err(io::Error::other("it takes too long")) } else { Ok(()) }
    }
}

/// Bytes that are copied at a time.
const CHUNK: usize = 256 * 1024;

impl Tree {
    fn path(&self, number: usize) -> PathBuf {
        let mut names = Vec::new();
        let mut at = number;
        while let Some(entry) = self.entries.get(at) {
            names.push(OsStr::from_bytes(&entry.name));
            if entry.parent as usize >= at {
                break;
            }
            at = entry.parent as usize;
        }
        names.iter().rev().collect()
    }

    /// Hands on so many bytes of a file, with how many there were before.
    fn copy(
        &self,
        file: &File,
        start: u64,
        length: u64,
        buffer: &mut [u8],
        mut take: impl FnMut(&[u8], u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut done = 0;
        while done < length {
            self.deadline.check()?;
            let most = usize::try_from(length - done).map_or(buffer.len(), |left| left.min(buffer.len()));
            let bytes = &mut buffer[..most];
            file.read_exact_at(bytes, start + done)?;
            take(bytes, done)?;
            done += most as u64;
        }
        Ok(())
    }
}

fn number(index: usize) -> io::Result<u32> {
    u32::try_from(index).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;
    use std::os::unix::fs::MetadataExt;
    use std::path::Path;

    use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, utimensat};

    use super::pack::MOST_ENTRIES;
    use super::*;

    /// In memory, as a sandbox's are.
    fn place() -> tempfile::TempDir {
        tempfile::tempdir_in("/dev/shm").unwrap()
    }

    fn carried(from: &Path, most: u64) -> io::Result<tempfile::TempDir> {
        let (packed, to) = (tempfile::tempfile()?, place());
        pack(&[from.to_str().unwrap()], most, &packed)?;
        let times = unpack(&[to.path().to_str().unwrap()], &packed)?;
        assert_eq!(times[0].last_modification.tv_sec, fs::metadata(from)?.mtime());
        Ok(to)
    }

    fn names(place: &Path) -> Vec<std::ffi::OsString> {
        fs::read_dir(place).unwrap().map(|entry| entry.unwrap().file_name()).collect()
    }

    #[test]
    fn what_was_read_last_and_in_which_order_is_told_stays() {
        let from = place();
        let time = |seconds| Timespec { tv_sec: seconds, tv_nsec: 123_456_789 };
        let times = Timestamps { last_access: time(1000), last_modification: time(-2000) };
        for name in ["b", "a", "d", "c"] {
            fs::write(from.path().join(name), name).unwrap();
            utimensat(CWD, from.path().join(name), &times, AtFlags::empty()).unwrap();
        }
        fs::rename(from.path().join("a"), from.path().join("e")).unwrap();
        let to = carried(from.path(), 1 << 20).unwrap();
        assert_eq!(names(from.path()), names(to.path()));
        for path in [from.path().join("e"), to.path().join("e")] {
            let meta = fs::metadata(path).unwrap();
            assert_eq!((meta.atime(), meta.atime_nsec()), (1000, 123_456_789));
            assert_eq!((meta.mtime(), meta.mtime_nsec()), (-2000, 123_456_789));
        }
    }

    #[test]
    fn nothing_is_written_of_what_is_too_much() {
        let from = place();
        fs::write(from.path().join("x"), [7; 100_000]).unwrap();
        let places = [from.path().to_str().unwrap()];
        let mut packed = Vec::new();
        assert!(pack(&places, 100_000, &mut packed).is_err() && packed.is_empty());
        pack(&places, 101_000, &mut packed).unwrap();
        (0..MOST_ENTRIES).for_each(|n| drop(File::create(from.path().join(n.to_string())).unwrap()));
        packed.clear();
        assert!(pack(&places, 1 << 30, &mut packed).is_err() && packed.is_empty());
    }

    #[test]
    fn what_is_no_list_of_files_makes_nothing() {
        let place = place();
        let outside = place.path().join("outside");
        fs::create_dir(place.path().join("inside")).unwrap();
        let inside = place.path().join("inside");
        let entry = |parent, name: &str, what| {
            let (name, times) = (name.as_bytes().to_vec(), (0, 0));
            Entry { parent, name, mode: 0o644, accessed: times, modified: times, what }
        };
        let file = |parts| What::File { size: 1, parts };
        let part = |packed| Part { start: 0, length: 1, packed };
        for wrong in [
            entry(0, "../outside", What::Fifo),
            entry(0, outside.to_str().unwrap(), What::Fifo),
            entry(0, "..", What::Fifo),
            entry(0, ".", What::Directory),
            entry(0, "", What::Directory),
            entry(1, "x", What::Fifo),
            entry(u32::MAX, "x", What::Fifo),
            entry(0, "x", What::Same(1)),
            entry(0, "x", What::Same(u32::MAX)),
            entry(0, "x", file(vec![part(u64::MAX)])),
            entry(0, "x", file(vec![part(1 << 40)])),
        ] {
            let shown = format!("{wrong:?}");
            let list = postcard::to_stdvec(&[entry(0, "/work", What::Directory), wrong]).unwrap();
            let mut packed = tempfile::tempfile().unwrap();
            packed.write_all(&(list.len() as u64).to_le_bytes()).unwrap();
            packed.write_all(&list).unwrap();
            assert!(unpack(&[inside.to_str().unwrap()], &packed).is_err(), "{shown}");
            assert_eq!(names(place.path()), ["inside"], "{shown}");
            names(&inside).iter().for_each(|name| fs::remove_file(inside.join(name)).unwrap());
        }
        for bytes in [&b""[..], &[255; 8], &[255; 100], &[0; 8]] {
            let mut packed = tempfile::tempfile().unwrap();
            packed.write_all(bytes).unwrap();
            assert!(unpack(&[inside.to_str().unwrap()], &packed).is_err());
        }
    }
}
