//! Load: a number of clients, each of which starts its next run as soon as the last one has ended.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Barrier, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

/// A client: each call is one run.
pub type Client<'a> = Box<dyn FnMut() -> Result<()> + Send + 'a>;

/// When a load ends.
#[derive(Clone, Copy)]
pub enum Until {
    /// This long after the warm-up.
    Elapsed(Duration),
    /// After this many runs.
    Runs(usize),
}

/// The measurements of a load.
#[derive(Default)]
pub struct Load {
    /// Latency of each run that ended after the warm-up.
    pub latencies: Vec<Duration>,
    /// From the end of the warm-up to the end of the last run.
    pub elapsed: Duration,
    /// Number of all runs, including the warm-up.
    pub runs: usize,
}

/// Runs all clients at once. The latencies exclude the first `warm_up` runs, which a server answers from its pool and
/// which therefore do not represent a sustained load.
pub fn run_load(clients: Vec<Client>, warm_up: usize, until: Until) -> Result<Load> {
    let (all_started, failed) = (Barrier::new(clients.len()), AtomicBool::new(false));
    let (begun, ended) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let warm = OnceLock::new();
    let continues = || match until {
        _ if failed.load(Ordering::Relaxed) => false,
        Until::Elapsed(time) => warm.get().is_none_or(|at: &Instant| at.elapsed() < time),
        Until::Runs(runs) => begun.fetch_add(1, Ordering::Relaxed) < runs,
    };
    let run_client = |mut client: Client| {
        let mut runs = Vec::new();
        all_started.wait();
        if warm_up == 0 {
            warm.get_or_init(Instant::now);
        }
        while continues() {
            let start = Instant::now();
            client().inspect_err(|_| failed.store(true, Ordering::Relaxed))?;
            let end = Instant::now();
            runs.push((end, end - start));
            if ended.fetch_add(1, Ordering::Relaxed) + 1 == warm_up {
                warm.get_or_init(|| end);
            }
        }
        Ok::<_, anyhow::Error>(runs)
    };
    let runs: Vec<(Instant, Duration)> = std::thread::scope(|scope| {
        let run = &run_client;
        let threads: Vec<_> = clients.into_iter().map(|client| scope.spawn(move || run(client))).collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, Result<Vec<_>>>| {
            thread.join().map_err(|_| anyhow!("a client panicked")).flatten()
        };
        let joined: Vec<_> = threads.into_iter().map(join).collect();
        joined.into_iter().collect::<Result<Vec<_>>>()
    })?
    .concat();

    let since = warm.get().copied();
    let counted = || runs.iter().filter(|(end, _)| since.is_some_and(|since| *end > since));
    let last = counted().map(|(end, _)| *end).max();
    Ok(Load {
        latencies: counted().map(|(_, latency)| *latency).collect(),
        elapsed: last.zip(since).map_or(Duration::ZERO, |(last, since)| last - since),
        runs: runs.len(),
    })
}

/// A percentile of the samples in milliseconds; `share` is between 0 and 1.
pub fn percentile(samples: &[Duration], share: f64) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_unstable();
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).map_or(f64::NAN, |sample| sample.as_secs_f64() * 1e3)
}
