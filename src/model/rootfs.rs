//! Layout of a sandbox's root file system: where programs may write, where their sources and init come from, and which
//! devices there are. Engines, init, Landlock's rules and `doctor` all derive from it.

/// The working directory of all stages.
pub const WORK_DIR: &str = "/work";

/// Where the job directory is mounted, read-only.
pub const JOB_DIR: &str = "/job";

/// Where the coderunner executable is mounted, which runs as init.
pub const INIT: &str = "/run/coderunner-init";

/// A directory that programs may write to: a tmpfs of the sandbox's own, charged to its memory.
#[derive(Debug, Clone, Copy)]
pub struct WritableDir {
    /// Where it is mounted.
    pub path: &'static str,
    /// Whether programs may execute what they wrote there.
    pub executable: bool,
}

/// All directories that programs may write to.
pub const WRITABLE: [WritableDir; 3] = [
    WritableDir { path: WORK_DIR, executable: true },
    WritableDir { path: "/tmp", executable: true },
    WritableDir { path: "/dev/shm", executable: false },
];

/// The paths of [`WRITABLE`].
pub const WRITABLE_PATHS: [&str; 3] = [WRITABLE[0].path, WRITABLE[1].path, WRITABLE[2].path];

/// Mode of a writable directory: open to every uid, and sticky.
pub const WRITABLE_MODE: u32 = 0o1777;

impl WritableDir {
    /// Mount options for a size in bytes and a number of inodes.
    pub fn mount_options(&self, size: u64, inodes: u64) -> [String; 6] {
        let exec = if self.executable { "exec" } else { "noexec" };
        [
            format!("size={size}"),
            format!("nr_inodes={inodes}"),
            format!("mode={WRITABLE_MODE:o}"),
            "nosuid".into(),
            "nodev".into(),
            exec.into(),
        ]
    }
}

/// The directory of devices.
pub const DEV: &str = "/dev";

/// The devices below [`DEV`] that every container has.
pub const DEVICES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];

/// Symbolic links below [`DEV`], with their targets.
pub const LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_options_limit_size_and_inodes() {
        let options = WRITABLE.map(|dir| dir.mount_options(4096, 7).join(","));
        let limits = "size=4096,nr_inodes=7,mode=1777,nosuid,nodev";
        assert_eq!(options, ["exec", "exec", "noexec"].map(|exec| format!("{limits},{exec}")));
    }
}
