//! Memory and CPU time of the running processes, from /proc, for hosts without a cgroup that counts them.

use std::fs;
use std::time::Duration;

use nix::unistd::Pid;

/// All processes except init. Skips entries of /proc that are no numbers: `self` and `thread-self` are init, whose CPU
/// time includes that of the processes it has reaped.
pub(super) fn pids() -> impl Iterator<Item = Pid> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| *pid != 1).map(Pid::from_raw)
}

/// A file of /proc of each process except init. It may contain the name of the process, which need not be UTF-8.
fn read_each(file: &str) -> impl Iterator<Item = String> {
    let read = move |pid: Pid| fs::read(format!("/proc/{pid}/{file}")).ok();
    pids().filter_map(read).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

/// Memory of all processes except init, in bytes. Pages that a fork shares with its parent count once per process.
pub(super) fn memory() -> u64 {
    // In pages: the second field is the resident memory, the third is the part of it that belongs to files.
    let pages = |statm: String| -> Option<u64> {
        let mut fields = statm.split_whitespace().skip(1).map(str::parse::<u64>);
        let (resident, shared) = (fields.next()?.ok()?, fields.next()?.ok()?);
        Some(resident.saturating_sub(shared))
    };
    let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok().flatten();
    let page = page.and_then(|bytes| u64::try_from(bytes).ok()).unwrap_or(4096);
    read_each("statm").filter_map(pages).sum::<u64>() * page
}

/// CPU time of all processes except init.
pub(super) fn cpu() -> Duration {
    let ticks: u64 = read_each("stat")
        .filter_map(|stat| {
            // Fields 14 to 17: the CPU time of the process, and that of the children it has waited for. Counted from
            // the end of the command's name, which may contain anything.
            let times = stat.rsplit(')').next()?.split_whitespace().skip(11).take(4);
            times.map(|time| time.parse::<u64>().ok()).sum::<Option<u64>>()
        })
        .sum();
    // USER_HZ is 100 on every Linux that /proc shows to user space.
    Duration::from_millis(ticks * 10)
}
