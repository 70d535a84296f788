//! CPU time of all descendants of this bench, and of no other process on the machine.
//!
//! The kernel adds the CPU time of a process to the parent that reaps it. conmon leaves its parent, so a subreaper runs
//! above the bench and finally reaps it. Its counters, together with those of the living processes, cover every
//! process. Only kernel work in the background is missing (removing a network namespace takes half a millisecond).

use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::prctl::set_child_subreaper;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeVal;
use nix::sys::wait::{WaitStatus, wait};
use nix::unistd::{SysconfVar, getppid, sysconf};

use crate::processes::Processes;

/// The flag that says that this process runs below its subreaper.
pub const REAPED: &str = "--reaped";

/// Runs this program again as a child, reaps all orphans, and exits with the code of the child.
pub fn reap() -> Result<ExitCode> {
    set_child_subreaper(true)?;
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "TERM", "--"]).arg(std::env::current_exe()?).arg(REAPED);
    let child = command.args(std::env::args_os().skip(1)).arg0("setpriv").spawn();
    let child = child.context("cannot start setpriv: install Debian's package util-linux")?.id().cast_signed();
    loop {
        match wait()? {
            WaitStatus::Exited(id, code) if id.as_raw() == child => {
                return Ok(u8::try_from(code).map_or(ExitCode::FAILURE, ExitCode::from));
            }
            WaitStatus::Signaled(id, ..) if id.as_raw() == child => return Ok(ExitCode::FAILURE),
            _ => {}
        }
    }
}

/// The CPU time counters at one time.
pub struct Reading {
    tree: Duration,
    own: Duration,
}

/// CPU time that was used since a reading.
#[derive(Debug, Clone, Copy)]
pub struct Spent {
    /// By all descendants of this process.
    pub tree: Duration,
    /// By this process.
    pub own: Duration,
}

impl Reading {
    /// Reads the counters. They are exact if no descendant is busy.
    pub fn now() -> Result<Reading> {
        let (us, above) = (std::process::id(), getppid().as_raw().cast_unsigned());
        let hertz = sysconf(SysconfVar::CLK_TCK)?.context("no clock tick")? as f64;
        let processes = Processes::now()?;
        // The subreaper counts what it reaped. For children that this process reaped, getrusage is more exact.
        let living = processes.below(|id, _| id == above).filter(|(id, _)| *id != us);
        let ticks: u64 = living.map(|(_, process)| process.ticks).sum();
        let tree = used(UsageWho::RUSAGE_CHILDREN)? + Duration::from_secs_f64(ticks as f64 / hertz);
        let own = used(UsageWho::RUSAGE_SELF)?;
        Ok(Reading { tree, own })
    }

    /// The CPU time since the reading.
    pub fn elapsed(&self) -> Result<Spent> {
        // First, because reading the other processes uses CPU time of this one.
        let own = used(UsageWho::RUSAGE_SELF)?;
        Ok(Spent { tree: Reading::now()?.tree.saturating_sub(self.tree), own: own.saturating_sub(self.own) })
    }
}

fn used(who: UsageWho) -> Result<Duration> {
    let usage = getrusage(who)?;
    let duration = |time: TimeVal| Duration::from_micros((time.tv_sec() * 1_000_000 + time.tv_usec()).unsigned_abs());
    Ok(duration(usage.user_time()) + duration(usage.system_time()))
}
