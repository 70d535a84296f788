//! The cost of a run after many others, which must not grow.

use anyhow::Result;
use serde::Serialize;

use crate::contenders::Contender;
use crate::jobs::Job;
use crate::load::Until;
use crate::rounds::loaded;
use crate::server::Server;

/// Clients at once.
const CLIENTS: usize = 4;

/// Number of runs in each measurement.
const RUNS: usize = 20;

/// The cost of a run after a number of others.
#[derive(Debug, Clone, Serialize)]
pub struct Cost {
    /// Name of the server.
    pub contender: String,
    /// Number of runs before.
    pub after: usize,
    /// CPU time per run.
    pub cpu_ms: f64,
    /// Wall time per run, including the time until the pool is full again.
    pub wall_ms: f64,
    /// Memory of the server in bytes.
    pub server_memory: u64,
    /// Open file descriptors of the server.
    pub descriptors: usize,
}

/// Measures a new server.
pub fn measure(server: &Server, job: &Job, after: &[usize]) -> Result<Vec<Cost>> {
    let mut done = 0;
    let mut costs = Vec::new();
    for &after in std::iter::once(&0).chain(after) {
        eprintln!("cost of a run after {after} others: {}", server.name());
        if after > done {
            loaded(server, job, CLIENTS, Until::Runs(after - done))?;
            done = after;
        }
        let spent = loaded(server, job, CLIENTS, Until::Runs(RUNS))?;
        done += spent.runs;
        costs.push(Cost {
            contender: server.name().to_owned(),
            after,
            cpu_ms: spent.per_run(spent.cpu),
            wall_ms: spent.per_run(spent.wall),
            server_memory: server.memory()?,
            descriptors: server.descriptors()?,
        });
    }
    Ok(costs)
}
