//! Limits locks on ranges of files. They take kernel memory that no cgroup counts, and the kernel does not limit them.
//!
//! The seccomp filter cannot refuse them, because databases need them. So init counts the locks in its pid namespace,
//! and ends a stage that holds too many.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::time::Duration;

/// Most locks that a sandbox may hold at once: more than any database uses. A lock takes some 200 bytes.
const MAX_LOCKS: usize = 10_000;

/// Time from the start of a stage to its first check, after which most compilers and programs have ended.
pub const FIRST_CHECK: Duration = Duration::from_millis(100);

/// CPU time of the programs after which another check is made. The kernel takes 5 ms or more to give the list, because
/// it waits until no process is inside a lock call. Init cannot notice the end of a program meanwhile, and lock calls of
/// all programs are slower.
pub const CPU_BETWEEN: Duration = Duration::from_millis(20);

/// Time between two checks. In this time a CPU can create some 100,000 locks, which take 20 MB.
pub const CHECK_INTERVAL: Duration = Duration::from_millis(50);

/// Most bytes to read of the list: more than [`MAX_LOCKS`] lines.
const MAX_LIST: u64 = 1 << 20;

/// Whether programs hold more than [`MAX_LOCKS`] locks. The list has the locks of processes in this pid namespace, and
/// the open file description locks of all namespaces; the seccomp filter denies programs the latter.
pub fn are_too_many() -> bool {
    let Ok(list) = File::open("/proc/locks") else { return false };
    BufReader::new(list.take(MAX_LIST)).lines().count() > MAX_LOCKS
}
