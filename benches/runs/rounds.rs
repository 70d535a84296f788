//! Rounds: each contender runs a short slice of each load, again and again, so that other activity on the machine
//! affects all of them alike.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Serialize;

use crate::contenders::Contender;
use crate::cpu::Reading;
use crate::jobs::Job;
use crate::load::{Until, percentile, run_load};

/// Clients at once.
const CLIENTS: [usize; 3] = [1, 4, 16];

/// How much is measured.
#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    /// Number of rounds, in each of which every contender has its turn.
    pub rounds: usize,
    /// Duration of a slice.
    pub slice: Duration,
    /// Number of runs with a full pool in each round.
    pub warm_runs: usize,
    /// The numbers of runs after which the cost of a run is measured.
    pub growth: Vec<usize>,
}

/// The pause between runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Pace {
    /// One client, which waits before each run until the pool is full.
    WarmPool,
    /// This many clients, without pauses.
    Sustained(usize),
}

/// A line of the table.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// Name of the job.
    pub job: &'static str,
    /// The pause between runs.
    pub pace: Pace,
    /// Name of the contender.
    pub contender: String,
    /// Number of runs behind the percentiles. Throughput and CPU time also include the warm-up.
    pub runs: usize,
    /// Median latency.
    pub p50_ms: f64,
    /// 95th percentile of the latency.
    pub p95_ms: f64,
    /// Throughput; `None` for runs with pauses.
    pub runs_per_s: Option<f64>,
    /// CPU time per run of all processes that it needs; `None` where it is not measured.
    pub cpu_ms: Option<f64>,
}

/// Measures a job. Those in `warm` also run with a full pool, one run of each in turn.
pub fn measure(job: &Job, all: &[&dyn Contender], warm: &[&dyn Contender], plan: &Plan) -> Result<Vec<Row>> {
    let mut sums: BTreeMap<(Pace, usize), Spent> = BTreeMap::new();
    for round in 1..=plan.rounds {
        eprintln!("{}: round {round} of {}", job.name, plan.rounds);
        all.iter().try_for_each(|contender| contender.settle().map(drop))?;
        for (contender, latencies) in warm.iter().zip(warm_runs(job, warm, plan.warm_runs)?) {
            let place = all.iter().position(|other| other.name() == contender.name()).context("not among all")?;
            sums.entry((Pace::WarmPool, place)).or_default().latencies.extend(latencies);
        }
        for clients in CLIENTS {
            for (place, contender) in all.iter().enumerate() {
                let within = || format!("{}, {}, {clients} clients", contender.name(), job.name);
                let until = Until::Elapsed(plan.slice);
                let spent = loaded(*contender, job, clients, until).with_context(within)?;
                sums.entry((Pace::Sustained(clients), place)).or_default().add(spent);
            }
        }
    }
    let row = |((pace, place), sum): ((Pace, usize), Spent)| Row {
        job: job.name,
        pace,
        contender: all[place].name().to_owned(),
        runs: sum.latencies.len(),
        p50_ms: percentile(&sum.latencies, 0.5),
        p95_ms: percentile(&sum.latencies, 0.95),
        runs_per_s: (sum.runs > 0).then(|| sum.runs as f64 / sum.wall.as_secs_f64()),
        cpu_ms: (sum.runs > 0).then(|| sum.per_run(sum.cpu)),
    };
    Ok(sums.into_iter().map(row).collect())
}

/// Runs each contender in turn, and waits after each run until it has settled.
fn warm_runs(job: &Job, contenders: &[&dyn Contender], runs: usize) -> Result<Vec<Vec<Duration>>> {
    let clients: Result<Vec<_>> = contenders.iter().map(|contender| contender.client(job)).collect();
    let mut clients = clients?;
    let mut latencies = vec![Vec::new(); contenders.len()];
    for _ in 0..runs {
        for (place, contender) in contenders.iter().enumerate() {
            let start = Instant::now();
            clients[place]().with_context(|| format!("{}, {}", contender.name(), job.name))?;
            latencies[place].push(start.elapsed());
            contender.settle()?;
        }
    }
    Ok(latencies)
}

/// The cost of a load.
#[derive(Default)]
pub struct Spent {
    /// Latencies of the runs after the warm-up.
    pub latencies: Vec<Duration>,
    /// Number of all runs, including the warm-up.
    pub runs: usize,
    /// Wall time of all runs.
    pub wall: Duration,
    /// CPU time of all runs.
    pub cpu: Duration,
}

impl Spent {
    /// A time divided by the number of runs, in milliseconds.
    pub fn per_run(&self, time: Duration) -> f64 {
        time.as_secs_f64() * 1e3 / self.runs as f64
    }

    fn add(&mut self, other: Spent) {
        self.latencies.extend(other.latencies);
        self.runs += other.runs;
        self.wall += other.wall;
        self.cpu += other.cpu;
    }
}

/// Runs a load. Wall and CPU time are measured from full pool to full pool, so that preparation and clean-up count for
/// the runs that caused them, and both are those of a sustained load.
pub fn loaded(contender: &dyn Contender, job: &Job, clients: usize, until: Until) -> Result<Spent> {
    let clients: Result<Vec<_>> = (0..clients).map(|_| contender.client(job)).collect();
    let clients = clients?;
    let before = Reading::now()?;
    let start = Instant::now();
    // Twice the pool: first the ready sandboxes, then the runs that wait while all of these are cleaned up at once.
    let load = run_load(clients, 2 * contender.pool_size(), until)?;
    let settled = contender.settle()?;
    let cpu = before.elapsed()?;
    let own = if contender.runs_here() { cpu.own } else { Duration::ZERO };
    Ok(Spent { latencies: load.latencies, runs: load.runs, wall: settled - start, cpu: cpu.tree + own })
}
