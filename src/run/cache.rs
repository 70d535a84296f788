//! The cache: outcomes of repeatable runs, kept for a limited time in a bounded amount of memory.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use cached::{Cached, LruTtlCache};

use crate::model::key::JobKey;
use crate::model::outcome::Outcome;
use crate::model::size::exact;
use bytesize::ByteSize;
use serde::{Deserialize, Serialize};

/// `[cache]`
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CacheSettings {
    /// How long an outcome is kept.
    #[serde(with = "humantime_serde")]
    pub ttl: Duration,
    /// Memory for all cached outcomes; 0 turns the cache off.
    #[serde(serialize_with = "exact")]
    pub size: ByteSize,
}

/// Most entries, whatever their size: bounds the index.
const MAX_ENTRIES: usize = 100_000;

/// Bytes that an entry takes beside its outcome: key and time in the list and in the index, their links, the reference
/// counts of the outcome, and allocator rounding.
const ENTRY_OVERHEAD: usize = 256;

/// An outcome, and when it was stored.
type Entry = (Arc<Outcome>, Instant);

/// Outcomes by key. Evicts the least recently used entry first.
pub struct OutcomeCache {
    entries: Mutex<LruTtlCache<JobKey, Entry>>,
    bytes: Arc<AtomicUsize>,
    capacity: usize,
}

impl OutcomeCache {
    /// An empty cache. With a `size` of 0 it stores nothing.
    pub fn new(settings: CacheSettings) -> Result<OutcomeCache, cached::BuildError> {
        let bytes = Arc::new(AtomicUsize::new(0));
        let freed = Arc::clone(&bytes);
        let entries = LruTtlCache::builder()
            .max_size(MAX_ENTRIES)
            .ttl(settings.ttl)
            .on_evict(move |_, (outcome, _): &Entry| {
                freed.fetch_sub(cost(outcome), Ordering::Relaxed);
            })
            .build()?;
        let capacity = usize::try_from(settings.size.as_u64()).unwrap_or(usize::MAX);
        Ok(OutcomeCache { entries: Mutex::new(entries), bytes, capacity })
    }

    /// Approximate memory of all entries, in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    /// A cached outcome and its age.
    pub fn get(&self, key: &JobKey) -> Option<(Arc<Outcome>, Duration)> {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.cache_get(key).map(|(outcome, since)| (Arc::clone(outcome), since.elapsed()))
    }

    /// Stores an outcome if its verdict is repeatable and it fits.
    pub fn put(&self, key: JobKey, outcome: &Arc<Outcome>) {
        let size = cost(outcome);
        if !outcome.verdict().is_repeatable() || size > self.capacity {
            return;
        }
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        self.bytes.fetch_add(size, Ordering::Relaxed);
        if let Some((replaced, _)) = entries.cache_set(key, (Arc::clone(outcome), Instant::now())) {
            self.bytes.fetch_sub(cost(&replaced), Ordering::Relaxed);
        }
        // Expired entries soon are the least recently used ones. Searching for them would visit all entries.
        while self.bytes.load(Ordering::Relaxed) > self.capacity && entries.cache_size() > 1 {
            // This makes the store evict its least recently used entry.
            let fewer = entries.cache_size() - 1;
            entries.set_max_size(fewer);
        }
        entries.set_max_size(MAX_ENTRIES);
    }
}

/// Memory that a cached outcome takes, in bytes.
fn cost(outcome: &Outcome) -> usize {
    outcome.size() + ENTRY_OVERHEAD
}

#[cfg(test)]
mod tests {
    use nix::sys::resource::{UsageWho, getrusage};
    use nix::sys::time::TimeValLike;

    use super::*;
    use crate::model::job::Stage;
    use crate::model::outcome::{Ended, StageOutcome, Usage};
    use crate::model::output::{Output, Stream};
    use bytesize::ByteSize;

    fn outcome(ended: Ended, printed: usize) -> Arc<Outcome> {
        let mut output = Output::default();
        output.push(Stream::Stdout, &vec![b'x'; printed], usize::MAX);
        let run = StageOutcome { stage: Stage::Run, ended, artifact: true, usage: Usage::default(), output };
        Arc::new(Outcome { compile: None, run: Some(run) })
    }

    fn key(n: u8) -> JobKey {
        crate::model::job::tests::job(&[n]).key("image")
    }

    fn cache(ttl: Duration, size: u64) -> OutcomeCache {
        OutcomeCache::new(CacheSettings { ttl, size: ByteSize(size) }).unwrap()
    }

    #[test]
    fn repeatable_outcomes_are_kept() {
        let cache = cache(Duration::from_secs(60), 1 << 20);
        for (n, ended) in [(1, Ended::Exited(0)), (2, Ended::Exited(3)), (3, Ended::Signalled(11))] {
            cache.put(key(n), &outcome(ended, 1));
            assert!(cache.get(&key(n)).is_some());
        }
    }

    #[test]
    fn outcomes_cut_by_a_limit_are_not_kept() {
        let cache = cache(Duration::from_secs(60), 1 << 20);
        for (n, ended) in [(1, Ended::WallTime), (2, Ended::CpuTime), (3, Ended::Killed)] {
            cache.put(key(n), &outcome(ended, 1));
            assert!(cache.get(&key(n)).is_none());
        }
        let mut killed = (*outcome(Ended::Signalled(9), 1)).clone();
        killed.run.as_mut().unwrap().usage.oom_kills = 1;
        cache.put(key(4), &Arc::new(killed));
        assert!(cache.get(&key(4)).is_none());
    }

    #[test]
    fn entries_expire_after_their_ttl() {
        let cache = cache(Duration::from_millis(50), 1 << 20);
        cache.put(key(1), &outcome(Ended::Exited(0), 1));
        std::thread::sleep(Duration::from_millis(80));
        assert!(cache.get(&key(1)).is_none());
    }

    #[test]
    fn oldest_entries_are_evicted_to_stay_within_size() {
        let cache = cache(Duration::from_secs(60), 10_000);
        for n in 0..100 {
            cache.put(key(n), &outcome(Ended::Exited(0), 1000));
            assert!(cache.bytes() <= 10_000, "{}", cache.bytes());
        }
        assert!(cache.get(&key(0)).is_none());
        assert!(cache.get(&key(99)).is_some());
    }

    #[test]
    fn eviction_time_does_not_grow_with_entries() {
        let mut job = crate::model::job::tests::job(&[]);
        let mut key = |n: u32| {
            job.stdin = n.to_le_bytes().to_vec().into();
            job.key("image")
        };
        let small = outcome(Ended::Exited(0), 1);
        // CPU time of this thread for storing 500 entries in a full cache.
        let mut cost = |entries: u32| {
            let cache = cache(Duration::from_secs(600), super::cost(&small) as u64 * u64::from(entries));
            let keys: Vec<JobKey> = (0..entries + 500).map(&mut key).collect();
            let (fill, more) = keys.split_at(entries as usize);
            fill.iter().for_each(|key| cache.put(*key, &small));
            let used = || {
                let usage = getrusage(UsageWho::RUSAGE_THREAD).unwrap();
                (usage.user_time().num_microseconds() + usage.system_time().num_microseconds()) as f64
            };
            let before = used();
            more.iter().for_each(|key| cache.put(*key, &small));
            used() - before
        };
        let (few, many) = (cost(100).max(4000.0), cost(20_000));
        assert!(many < few * 20.0, "{many} us with many entries, {few} us with few");
    }

    #[test]
    fn entry_cost_includes_all_its_memory() {
        let entry = size_of::<JobKey>() * 2 + size_of::<Entry>() + size_of::<Outcome>();
        let reason = "r".repeat(5000);
        assert!(cost(&outcome(Ended::Exited(0), 0)) > entry);
        assert!(cost(&outcome(Ended::NotStarted(reason), 1000)) > entry + 6000);
    }

    #[test]
    fn replaced_entry_is_counted_once() {
        let cache = cache(Duration::from_secs(60), 1 << 20);
        for _ in 0..3 {
            cache.put(key(1), &outcome(Ended::Exited(0), 1000));
        }
        assert_eq!(cache.bytes(), cost(&outcome(Ended::Exited(0), 1000)));
    }
}
