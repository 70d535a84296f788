//! The sandboxes of a server, by their processes.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::processes::{Process, Processes, memory};

/// How often the processes are looked at.
const LOOK: Duration = Duration::from_millis(20);

/// How long a full pool is left alone before it counts as quiet.
const QUIET: Duration = Duration::from_millis(40);

/// How long a pool that keeps fewer sandboxes than it may must stay the same to count as full.
const STEADY: Duration = Duration::from_millis(400);

/// Longest to wait for a full pool.
const LONGEST: Duration = Duration::from_secs(60);

/// Processes whose own or an ancestor's command line names the instance: podman and conmon carry the container's
/// name, the server its configuration's, and what runs in a container descends from these.
fn of<'a>(instance: &str, processes: &'a Processes) -> Vec<(u32, &'a Process)> {
    processes.below(|_, process| process.mentions(instance)).collect()
}

fn count(processes: &[(u32, &Process)]) -> usize {
    processes.iter().filter(|(_, process)| process.is_init()).count()
}

/// Memory of all processes but the server per sandbox, in bytes; what they share is divided among them.
pub fn memory_per_sandbox(instance: &str, server: u32) -> Result<u64> {
    let now = Processes::now()?;
    let processes = of(instance, &now);
    let others = processes.iter().filter(|(id, _)| *id != server);
    let total = others.map(|(id, _)| memory(*id, "smaps_rollup", "Pss:")).sum::<Result<u64>>()?;
    total.checked_div(count(&processes) as u64).context("no sandbox is there")
}

/// Waits until the pool of an instance is full: all containers that it may have are there, or fewer for as long as it
/// leaves it at that, and its processes do not change any more. Since when that has been so.
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
        let enough = if sandboxes >= containers { QUIET } else { STEADY };
        if sandboxes > 0 && same_since.elapsed() >= enough {
            return Ok(same_since);
        }
        ensure!(
            start.elapsed() < LONGEST,
            "the pool of {instance} is not full after {} s: {sandboxes} of {containers} sandboxes",
            LONGEST.as_secs()
        );
        std::thread::sleep(LOOK);
    }
}
