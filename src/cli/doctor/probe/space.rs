//! Tests the limits that a program can reach by making and opening files.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use bytesize::ByteSize;

use crate::cli::doctor::wall::{Wall, WallResult};
use crate::model::rootfs::WRITABLE_PATHS;

/// Fills each writable directory with bytes.
pub(super) fn disk(size: u64) -> WallResult {
    let chunk = vec![0; usize::try_from(size / 8).unwrap_or(usize::MAX).max(1)];
    let fill = |place: &str| {
        let file = |number: u32| Path::new(place).join(format!("fill-{number}"));
        let mut written = 0;
        let mut files = 0;
        // Several files, since the size of a single file is limited too.
        while written <= 2 * size
            && let Ok(mut part) = File::create(file(files))
        {
            let whole = part.write_all(&chunk).is_ok();
            written += part.metadata().map_or(0, |meta| meta.len());
            files += 1;
            if !whole {
                break;
            }
        }
        (0..files).for_each(|number| drop(fs::remove_file(file(number))));
        written
    };
    let filled = WRITABLE_PATHS.map(|place| (place, fill(place)));
    let seen: Vec<String> = filled.iter().map(|(place, bytes)| format!("{} in {place}", ByteSize(*bytes))).collect();
    let holds = filled.iter().all(|(_, bytes)| (size / 2..=size).contains(bytes));
    WallResult::new(Wall::Disk, holds, format!("{} in each directory", ByteSize(size)), seen.join(", "))
}

/// Fills each writable directory with empty files.
pub(super) fn inodes(most: u64) -> WallResult {
    let fill = |place: &str| {
        let file = |number: &u64| Path::new(place).join(format!("file-{number}"));
        let made = (0..=most).take_while(|number| File::create(file(number)).is_ok()).count() as u64;
        (0..made).for_each(|number| drop(fs::remove_file(file(&number))));
        made
    };
    let filled = WRITABLE_PATHS.map(|place| (place, fill(place)));
    let seen: Vec<String> = filled.iter().map(|(place, files)| format!("{files} in {place}")).collect();
    let holds = filled.iter().all(|(_, files)| (most / 2..=most).contains(files));
    WallResult::new(Wall::Inodes, holds, format!("{most} files in each directory"), seen.join(", "))
}

/// Opens files until one is refused.
pub(super) fn open_files(most: u64) -> WallResult {
    let opened: Vec<File> = (0..=most).map_while(|_| File::open("/dev/null").ok()).collect();
    // Plus the three standard streams.
    let open = opened.len() as u64 + 3;
    WallResult::new(Wall::OpenFiles, open <= most, format!("{most} at once"), format!("{open} at once"))
}
