//! Tries to read, write and find files that no program may access: of the root file system, the kernel, the host and
//! init.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use nix::sys::statvfs::{FsFlags, statvfs};

use crate::cli::doctor::wall::{Wall, WallResult};
use crate::model::rootfs::WRITABLE_PATHS;

/// Paths that reveal something about the host or other programs: podman masks them, or they belong to init.
const HIDDEN: [&str; 14] = [
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/sched_debug",
    "/proc/acpi",
    "/proc/scsi",
    "/sys/firmware",
    "/proc/1/environ",
    "/proc/1/maps",
    "/proc/1/mem",
    "/proc/1/fd",
    "/proc/1/root/work",
    "/job",
];

/// Kernel control files, which no program may write to.
const SWITCHES: [&str; 3] = ["/proc/sysrq-trigger", "/proc/sys/kernel/core_pattern", "/proc/sys/vm/drop_caches"];

/// Devices that a program may have.
const DEVICES: [&str; 8] = ["null", "zero", "full", "random", "urandom", "tty", "ptmx", "console"];

/// Opens a file for writing that only Landlock protects, not a mount option: one of the process's own files in /proc.
pub(super) fn landlock() -> WallResult {
    let own = "/proc/self/comm";
    let opened = File::options().write(true).open(own).map(|_| format!("{own} can be written"));
    WallResult::from_holes(
        Wall::Landlock,
        "nothing else can be written, whatever mounts allow",
        &opened.into_iter().collect::<Vec<_>>(),
    )
}

/// Tries to write to each mount and to directories of the root file system.
pub(super) fn read_only_root() -> io::Result<WallResult> {
    let mut holes = Vec::new();
    if !statvfs("/").map_err(io::Error::from)?.flags().contains(FsFlags::ST_RDONLY) {
        holes.push("/ is not read-only".to_owned());
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let mounted = mounts.lines().filter_map(|line| line.split_whitespace().nth(4));
    let below = ["/", "/etc", "/usr", "/run", "/var", "/dev", "/proc", "/sys", "/proc/sys", "/sys/fs/cgroup"];
    for place in mounted.chain(below).filter(|place| !WRITABLE_PATHS.contains(place)) {
        let place = Path::new(place);
        let Ok(meta) = place.metadata() else { continue };
        let probe: PathBuf = if meta.is_dir() { place.join("coderunner-probe") } else { place.into() };
        // Skips devices, which programs may write to.
        let is_tested = meta.is_dir() || meta.is_file();
        if is_tested && File::options().append(true).create(meta.is_dir()).open(&probe).is_ok() {
            holes.push(format!("{} can be written", place.display()));
        }
    }
    holes.sort();
    holes.dedup();
    Ok(WallResult::from_holes(Wall::ReadOnlyRoot, "nothing but /work, /tmp and /dev/shm can be written", &holes))
}

/// Tries to read the hidden paths and to write to the kernel's control files.
pub(super) fn masked_paths() -> WallResult {
    let is_readable = |path: &&&str| {
        let of_file = || File::open(path).is_ok_and(|mut file| file.read(&mut [0]).is_ok_and(|length| length > 0));
        fs::read_dir(path).map_or_else(|_| of_file(), |mut entries| entries.next().is_some())
    };
    let read = HIDDEN.iter().filter(is_readable).map(|path| format!("{path} can be read"));
    let is_open = |path: &&&str| File::options().write(true).open(path).is_ok();
    let written = SWITCHES.iter().filter(is_open).map(|path| format!("{path} can be written"));
    let holes: Vec<String> = read.chain(written).collect();
    WallResult::from_holes(Wall::MaskedPaths, "nothing of the host's and of init's can be read", &holes)
}

/// Looks for devices other than those that a program may have.
pub(super) fn devices() -> io::Result<WallResult> {
    let mut holes = Vec::new();
    for entry in fs::read_dir("/dev")? {
        let entry = entry?;
        let (kind, name) = (entry.file_type()?, entry.file_name());
        let device = kind.is_block_device() || kind.is_char_device();
        if device && !DEVICES.iter().any(|known| name == *known) {
            holes.push(entry.path().display().to_string());
        }
    }
    Ok(WallResult::from_holes(Wall::Devices, "none of the host's", &holes))
}

/// Looks for inherited descriptors.
pub(super) fn descriptors() -> io::Result<WallResult> {
    let mut holes = Vec::new();
    for entry in fs::read_dir("/proc/self/fd")? {
        let entry = entry?;
        // Ignores the descriptor of the listing itself, which refers to /proc.
        let number: i32 = entry.file_name().to_string_lossy().parse().map_err(io::Error::other)?;
        let target = fs::read_link(entry.path()).unwrap_or_default();
        if number > 2 && !target.starts_with("/proc/") {
            holes.push(format!("{number}: {}", target.display()));
        }
    }
    Ok(WallResult::from_holes(Wall::Descriptors, "input, output and error", &holes))
}
