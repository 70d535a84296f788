//! Makes what was packed.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, futimens, mknodat, utimensat};
use rustix::io::Errno;

use crate::host::at;
use crate::sandbox::init::carry::{CHUNK, Deadline, Entry, Part, Tree, What, number};

/// Makes in these places, which must be empty, what was packed: with the rights of the programs, before there are any.
/// Returns the times of the places themselves, which are not the programs'.
pub fn unpack(places: &[&str], packed: &File) -> io::Result<Vec<Timestamps>> {
    let mut length = [0; 8];
    packed.read_exact_at(&mut length, 0)?;
    let length = u64::from_le_bytes(length);
    let mut list = vec![0; usize::try_from(length.min(packed.metadata()?.len())).unwrap_or(0)];
    packed.read_exact_at(&mut list, 8)?;
    let mut entries: Vec<Entry> = postcard::from_bytes(&list).map_err(io::Error::other)?;
    for (number, (entry, place)) in (0..).zip(entries.iter_mut().zip(places)) {
        // Where they are is not for a list to say.
        (entry.parent, entry.name, entry.what) = (number, place.as_bytes().to_vec(), What::Directory);
    }
    let tree = Tree { entries, contents: 0, deadline: Deadline::new() };
    if tree.entries.len() < places.len() {
        return Err(io::Error::other("places are missing"));
    }
    if places.iter().any(|place| fs::read_dir(place).map_or(true, |mut inside| inside.next().is_some())) {
        return Err(io::Error::other("it is not the first that is there"));
    }
    let contents = 8 + length;
    let mut making = Making { tree: &tree, packed, contents, first: HashMap::new(), buffer: vec![0; CHUNK] };
    making.all(Path::new(places[0]), places.len())?;
    for (number, entry) in tree.entries.iter().enumerate().skip(places.len()).rev() {
        if let What::Directory = entry.what {
            tree.deadline.check()?;
            entry.finish(&tree.path(number))?;
        }
    }
    Ok(tree.entries.iter().take(places.len()).map(Entry::times).collect())
}

impl Entry {
    fn times(&self) -> Timestamps {
        let time = |(seconds, nanoseconds): (i64, u32)| Timespec { tv_sec: seconds, tv_nsec: nanoseconds.into() };
        Timestamps { last_access: time(self.accessed), last_modification: time(self.modified) }
    }

    /// Gives what it has made the rest of what is known of it.
    fn finish(&self, path: &Path) -> io::Result<()> {
        if !matches!(self.what, What::Link(_)) {
            fs::set_permissions(path, Permissions::from_mode(self.mode))?;
        }
        Ok(utimensat(CWD, path, &self.times(), AtFlags::SYMLINK_NOFOLLOW)?)
    }
}

/// Files that are being made.
struct Making<'a> {
    tree: &'a Tree,
    packed: &'a File,
    /// Where the contents begin.
    contents: u64,
    /// Those of which a name is there already, by their number, and which name that is.
    first: HashMap<u32, usize>,
    buffer: Vec<u8>,
}

impl Making<'_> {
    /// Makes all but the places, of which there are so many. A directory tells its files in the order in which they were
    /// made, or in the reverse: which it is depends on the kernel.
    fn all(&mut self, scratch: &Path, places: usize) -> io::Result<()> {
        let newest_first = tells_newest_first(scratch)?;
        let entries = self.tree.entries.get(places..).unwrap_or_default();
        let mut next = places;
        for siblings in entries.chunk_by(|one, other| one.parent == other.parent) {
            let numbers = next..next + siblings.len();
            next = numbers.end;
            match newest_first {
                true => numbers.rev().try_for_each(|number| self.one(number))?,
                false => numbers.clone().try_for_each(|number| self.one(number))?,
            }
        }
        Ok(())
    }

    fn one(&mut self, number: usize) -> io::Result<()> {
        self.tree.deadline.check()?;
        let entry = &self.tree.entries[number];
        let parent = self.tree.entries.get(entry.parent as usize);
        let is_inside = (entry.parent as usize) < number && matches!(parent, Some(Entry { what: What::Directory, .. }));
        if !is_inside || entry.name.contains(&b'/') || [&b""[..], b".", b".."].contains(&entry.name.as_slice()) {
            return Err(io::Error::other("a file that is nowhere"));
        }
        let path = self.tree.path(number);
        let original = if let What::Same(original) = entry.what { original } else { self::number(number)? };
        match self.first.get(&original) {
            Some(first) => fs::hard_link(self.tree.path(*first), &path),
            None => {
                self.first.insert(original, number);
                at(path.display(), self.make(original as usize, &path))
            }
        }
    }

    fn make(&mut self, number: usize, path: &Path) -> io::Result<()> {
        let Some(entry) = self.tree.entries.get(number) else { return Err(io::Error::other("no such file")) };
        let node = |kind| mknodat(CWD, path, kind, Mode::RUSR, 0);
        match &entry.what {
            // Its mode and times are those of the end.
            What::Directory => return fs::create_dir(path),
            What::File { size, parts } => {
                let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
                let mut end = 0;
                for Part { start, length, packed } in parts {
                    let from = self.contents.checked_add(*packed).ok_or(Errno::INVAL)?;
                    let write = |bytes: &[u8], done| file.write_all_at(bytes, start + done);
                    self.tree.copy(self.packed, from, *length, &mut self.buffer, write)?;
                    end = start + length;
                }
                if end < *size {
                    file.set_len(*size)?;
                }
                file.set_permissions(Permissions::from_mode(entry.mode))?;
                return Ok(futimens(&file, &entry.times())?);
            }
            What::Link(target) => symlink(OsStr::from_bytes(target), path)?,
            What::Fifo => node(FileType::Fifo)?,
            What::Socket => node(FileType::Socket)?,
            What::Same(_) => return Err(io::Error::other("another name of nothing")),
        }
        entry.finish(path)
    }
}

/// Whether a directory tells the file first that was made last. Leaves nothing in the directory.
fn tells_newest_first(scratch: &Path) -> io::Result<bool> {
    let names = ["first", "second"].map(|name| scratch.join(name));
    names.iter().try_for_each(|name| File::create_new(name).map(drop))?;
    let told = fs::read_dir(scratch)?.next().transpose()?;
    names.iter().try_for_each(fs::remove_file)?;
    Ok(told.is_some_and(|told| told.file_name() == "second"))
}
