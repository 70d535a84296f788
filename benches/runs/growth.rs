//! What a run costs after many others: it must not grow.

use anyhow::Result;
use serde::Serialize;

use crate::contenders::Contender;
use crate::jobs::Job;
use crate::load::Until;
use crate::rounds::loaded;
use crate::server::Server;

/// Clients at once.
const CLIENTS: usize = 4;

/// Runs that are measured each time.
const RUNS: usize = 20;

/// The cost of runs after others.
#[derive(Debug, Clone, Serialize)]
pub struct Cost {
    /// Of which server.
    pub contender: String,
    /// How many runs there were before.
    pub after: usize,
    /// CPU time per run.
    pub cpu_ms: f64,
    /// Wall time per run, until the pool is full again.
    pub wall_ms: f64,
    /// Memory of the server in bytes.
    pub server_memory: u64,
    /// Its open file descriptors.
    pub descriptors: usize,
}

/// Measures a server that has not run anything yet.
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
