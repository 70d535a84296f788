//! Load: a number of clients, each with its next run as soon as the last has ended.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Barrier, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

/// One run after another for one client.
pub type Client<'a> = Box<dyn FnMut() -> Result<()> + Send + 'a>;

/// How long a load lasts.
#[derive(Clone, Copy)]
pub enum Until {
    /// For this long after the warm-up.
    Elapsed(Duration),
    /// This many runs.
    Runs(usize),
}

/// What was seen of a load.
#[derive(Default)]
pub struct Load {
    /// How long each run took that ended after the warm-up.
    pub latencies: Vec<Duration>,
    /// From the end of the warm-up to the end of the last run.
    pub elapsed: Duration,
    /// All runs, the warm-up included.
    pub runs: usize,
}

/// Has all clients run at once. The first `warm_up` runs are not among the latencies: a server answers them from
/// what it made ahead, which is not how it goes on.
pub fn press(clients: Vec<Client>, warm_up: usize, until: Until) -> Result<Load> {
    let (all_there, failed) = (Barrier::new(clients.len()), AtomicBool::new(false));
    let (begun, ended) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let warm = OnceLock::new();
    let go_on = || match until {
        _ if failed.load(Ordering::Relaxed) => false,
        Until::Elapsed(time) => warm.get().is_none_or(|at: &Instant| at.elapsed() < time),
        Until::Runs(runs) => begun.fetch_add(1, Ordering::Relaxed) < runs,
    };
    let one_after_another = |mut client: Client| {
        let mut runs = Vec::new();
        all_there.wait();
        if warm_up == 0 {
            warm.get_or_init(Instant::now);
        }
        while go_on() {
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
        let run = &one_after_another;
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

/// The value below which this share of the samples lies, in milliseconds.
pub fn percentile(samples: &[Duration], share: f64) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_unstable();
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).map_or(f64::NAN, |sample| sample.as_secs_f64() * 1e3)
}
