//! Observes the sandboxes of a server through their processes.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::processes::{Process, Processes, memory};

/// Pause between two checks of the processes.
const POLL: Duration = Duration::from_millis(20);

/// A full pool counts as idle once its processes have not changed for this long.
const IDLE: Duration = Duration::from_millis(40);

/// A pool that keeps fewer sandboxes than it may counts as full once it has not changed for this long.
const STEADY: Duration = Duration::from_millis(400);

/// Timeout of the wait for a full pool.
const LONGEST: Duration = Duration::from_secs(60);

/// Processes of an instance: their own or an ancestor's command line names it. That of podman and conmon contains the
/// name of the container, and that of the server the path of its configuration.
fn of<'a>(instance: &str, processes: &'a Processes) -> Vec<(u32, &'a Process)> {
    processes.below(|_, process| process.mentions(instance)).collect()
}

fn count(processes: &[(u32, &Process)]) -> usize {
    processes.iter().filter(|(_, process)| process.is_init()).count()
}

/// Memory per sandbox of all processes other than the server, in bytes. Shared memory is divided among its users.
pub fn memory_per_sandbox(instance: &str, server: u32) -> Result<u64> {
    let now = Processes::now()?;
    let processes = of(instance, &now);
    let others = processes.iter().filter(|(id, _)| *id != server);
    let total = others.map(|(id, _)| memory(*id, "smaps_rollup", "Pss:")).sum::<Result<u64>>()?;
    total.checked_div(count(&processes) as u64).context("there is no sandbox")
}

/// Waits until the pool of an instance is full and its processes do not change any more. A pool that keeps fewer
/// sandboxes than it may counts as full after a while. Returns since when that has been so.
pub fn wait_until_full(instance: &str, containers: usize) -> Result<Instant> {
    let start = Instant::now();
    let mut before = Vec::new();
    let mut same_since = Instant::now();
    loop {
        let now = Processes::now()?;
        let processes = of(instance, &now);
        let sandboxes = count(&processes);
        let ids: Vec<u32> = processes.iter().map(|(id, _)| *id).collect();
        if ids != before {
            before = ids;
            same_since = Instant::now();
        }
        let enough = if sandboxes >= containers { IDLE } else { STEADY };
        if sandboxes > 0 && same_since.elapsed() >= enough {
            return Ok(same_since);
        }
        ensure!(
            start.elapsed() < LONGEST,
            "the pool of {instance} is not full after {} s: {sandboxes} of {containers} sandboxes",
            LONGEST.as_secs()
        );
        std::thread::sleep(POLL);
    }
}
