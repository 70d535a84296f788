//! CPU time of everything below this bench, and of nothing else that runs on the machine.
//!
//! What ends is counted by whom reaps it. conmon leaves its parent, so another process stands above the bench as its
//! subreaper and gets it in the end: together with what still lives the sum misses no process. Only what the kernel
//! does in the background for nobody (taking a network namespace down: half a millisecond) is not in it.

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

/// The flag of a bench that runs below its subreaper.
pub const REAPED: &str = "--reaped";

/// Runs this program again as a child, reaps all that is left to us, and ends as the child does.
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

/// The counters at one time.
pub struct Reading {
    tree: Duration,
    own: Duration,
}

/// What was spent since a reading.
#[derive(Debug, Clone, Copy)]
pub struct Spent {
    /// By all processes below this one.
    pub tree: Duration,
    /// By this one.
    pub own: Duration,
}

impl Reading {
    /// The counters now. Exact where no process below is busy.
    pub fn now() -> Result<Reading> {
        let (us, above) = (std::process::id(), getppid().as_raw().cast_unsigned());
        let hertz = sysconf(SysconfVar::CLK_TCK)?.context("no clock tick")? as f64;
        let processes = Processes::now()?;
        // The subreaper itself stands for what it reaped; what we reaped ourselves is known more exactly.
        let living = processes.below(|id, _| id == above).filter(|(id, _)| *id != us);
        let ticks: u64 = living.map(|(_, process)| process.ticks).sum();
        let tree = used(UsageWho::RUSAGE_CHILDREN)? + Duration::from_secs_f64(ticks as f64 / hertz);
        let own = used(UsageWho::RUSAGE_SELF)?;
        Ok(Reading { tree, own })
    }

    /// What was spent since then.
    pub fn elapsed(&self) -> Result<Spent> {
        // Before the processes are looked at, which is our own time too.
        let own = used(UsageWho::RUSAGE_SELF)?;
        Ok(Spent { tree: Reading::now()?.tree.saturating_sub(self.tree), own: own.saturating_sub(self.own) })
    }
}

fn used(who: UsageWho) -> Result<Duration> {
    let usage = getrusage(who)?;
    let duration = |time: TimeVal| Duration::from_micros((time.tv_sec() * 1_000_000 + time.tv_usec()).unsigned_abs());
    Ok(duration(usage.user_time()) + duration(usage.system_time()))
}
