//! Locks on ranges of files: memory of the kernel that it counts for nobody, as many as a program has time to make.
//!
//! They cannot be refused, for databases need them, and no limit of the kernel's is of them. So init looks how many there
//! are in its pid namespace, and ends a stage that holds too many.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::time::Duration;

/// Most locks of a sandbox at once: some 200 bytes each, and more than any database takes.
const MOST: usize = 10_000;

/// Time between two looks. A core makes some 100,000 meanwhile, of 20 MB.
pub const CHECK: Duration = Duration::from_millis(50);

/// Longest that is read of the list, in bytes: more than [`MOST`] lines of it.
const LIST: u64 = 1 << 20;

/// Whether programs hold more than they may. The list has those of this pid namespace, and locks of open files of any: those
/// are refused to programs by the filter.
pub fn are_too_many() -> bool {
    let Ok(list) = File::open("/proc/locks") else { return false };
    BufReader::new(list.take(LIST)).lines().count() > MOST
}
