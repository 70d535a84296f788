//! Unpacks packed files.

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
use crate::sandbox::init::carry::{CHUNK, Deadline, Entry, Kind, Part, Tree, packed_index};

/// Creates the packed files below the roots, which must be empty. Runs with the rights of the programs, before any
/// program runs. Returns the times for the roots themselves, which this function cannot set because programs do not own
/// the roots.
pub fn unpack(roots: &[&str], packed: &File) -> io::Result<Vec<Timestamps>> {
    let mut length = [0; 8];
    packed.read_exact_at(&mut length, 0)?;
    let length = u64::from_le_bytes(length);
    let mut list = vec![0; usize::try_from(length.min(packed.metadata()?.len())).unwrap_or(0)];
    packed.read_exact_at(&mut list, 8)?;
    let mut entries: Vec<Entry> = postcard::from_bytes(&list).map_err(io::Error::other)?;
    for (index, (entry, root)) in (0..).zip(entries.iter_mut().zip(roots)) {
        // The list is not trusted with the paths of the roots.
        (entry.parent, entry.name, entry.kind) = (index, root.as_bytes().to_vec(), Kind::Directory);
    }
    let tree = Tree { entries, contents: 0, deadline: Deadline::new() };
    if tree.entries.len() < roots.len() {
        return Err(io::Error::other("roots are missing"));
    }
    if roots.iter().any(|root| fs::read_dir(root).map_or(true, |mut files| files.next().is_some())) {
        return Err(io::Error::other("a writable directory is not empty"));
    }
    let contents = 8 + length;
    let mut unpacker = Unpacker { tree: &tree, packed, contents, created: HashMap::new(), buffer: vec![0; CHUNK] };
    unpacker.create_all(Path::new(roots[0]), roots.len())?;
    // Directories get their modes and times last, deepest first, because creating files changes the times.
    for (index, entry) in tree.entries.iter().enumerate().skip(roots.len()).rev() {
        if let Kind::Directory = entry.kind {
            tree.deadline.check()?;
            entry.set_metadata(&tree.path(index))?;
        }
    }
    Ok(tree.entries.iter().take(roots.len()).map(Entry::times).collect())
}

impl Entry {
    fn times(&self) -> Timestamps {
        let time = |(seconds, nanoseconds): (i64, u32)| Timespec { tv_sec: seconds, tv_nsec: nanoseconds.into() };
        Timestamps { last_access: time(self.accessed), last_modification: time(self.modified) }
    }

    /// Sets the mode and the times of the created file.
    fn set_metadata(&self, path: &Path) -> io::Result<()> {
        if !matches!(self.kind, Kind::Symlink(_)) {
            fs::set_permissions(path, Permissions::from_mode(self.mode))?;
        }
        Ok(utimensat(CWD, path, &self.times(), AtFlags::SYMLINK_NOFOLLOW)?)
    }
}

/// Creates the packed files.
struct Unpacker<'a> {
    tree: &'a Tree,
    packed: &'a File,
    /// Offset of the contents in the packed file.
    contents: u64,
    /// Files that exist already: the index of the original entry, and that of the entry under whose name it was
    /// created.
    created: HashMap<u32, usize>,
    buffer: Vec<u8>,
}

impl Unpacker<'_> {
    /// Creates all files except the first `roots` entries. Depending on the kernel, a directory lists its files in the
    /// order in which they were created or in the reverse order. `scratch` is an empty directory for finding out which.
    fn create_all(&mut self, scratch: &Path, roots: usize) -> io::Result<()> {
        let newest_first = lists_newest_first(scratch)?;
        let entries = self.tree.entries.get(roots..).unwrap_or_default();
        let mut next = roots;
        for siblings in entries.chunk_by(|one, other| one.parent == other.parent) {
            let indices = next..next + siblings.len();
            next = indices.end;
            match newest_first {
                true => indices.rev().try_for_each(|index| self.create_entry(index))?,
                false => indices.clone().try_for_each(|index| self.create_entry(index))?,
            }
        }
        Ok(())
    }

    /// Creates the file of an entry, or a hard link if the file exists already under another name.
    fn create_entry(&mut self, index: usize) -> io::Result<()> {
        self.tree.deadline.check()?;
        let entry = &self.tree.entries[index];
        let parent = self.tree.entries.get(entry.parent as usize);
        let is_inside = (entry.parent as usize) < index && matches!(parent, Some(Entry { kind: Kind::Directory, .. }));
        if !is_inside || entry.name.contains(&b'/') || [&b""[..], b".", b".."].contains(&entry.name.as_slice()) {
            return Err(io::Error::other("an entry has an invalid parent or name"));
        }
        let path = self.tree.path(index);
        let original = if let Kind::HardLink(original) = entry.kind { original } else { packed_index(index)? };
        match self.created.get(&original) {
            Some(first) => fs::hard_link(self.tree.path(*first), &path),
            None => {
                self.created.insert(original, index);
                at(path.display(), self.create_file(original as usize, &path))
            }
        }
    }

    /// Creates the file of the entry with this index at `path`.
    fn create_file(&mut self, index: usize, path: &Path) -> io::Result<()> {
        let Some(entry) = self.tree.entries.get(index) else { return Err(io::Error::other("no such file")) };
        let node = |file_type| mknodat(CWD, path, file_type, Mode::RUSR, 0);
        match &entry.kind {
            // Its mode and times are set when all files are in it.
            Kind::Directory => return fs::create_dir(path),
            Kind::File { size, parts } => {
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
            Kind::Symlink(target) => symlink(OsStr::from_bytes(target), path)?,
            Kind::Fifo => node(FileType::Fifo)?,
            Kind::Socket => node(FileType::Socket)?,
            Kind::HardLink(_) => return Err(io::Error::other("a hard link to a hard link")),
        }
        entry.set_metadata(path)
    }
}

/// Whether directories list the newest file first. Leaves no files in `scratch`.
fn lists_newest_first(scratch: &Path) -> io::Result<bool> {
    let names = ["first", "second"].map(|name| scratch.join(name));
    names.iter().try_for_each(|name| File::create_new(name).map(drop))?;
    let listed = fs::read_dir(scratch)?.next().transpose()?;
    names.iter().try_for_each(fs::remove_file)?;
    Ok(listed.is_some_and(|listed| listed.file_name() == "second"))
}
