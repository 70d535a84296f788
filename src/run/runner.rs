//! The runner: answers a job from the cache, from a run of the same job in flight, or by a run of its own.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;
use tracing::Instrument;

use crate::host::signals;
use crate::metrics;
use crate::model::client::Client;
use crate::model::job::Job;
use crate::model::key::JobKey;
use crate::model::language::{self, Language};
use crate::run::answer::{Answer, RunError};
use crate::run::cache::OutcomeCache;
use crate::run::execute::execute;
use crate::run::flight::{Flights, Publisher};
use crate::run::tasks::Tasks;
use crate::sandbox::{Build, Live};
use crate::scheduler::{Pool, PoolError};

/// Whether the outcome of an earlier run may answer a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reuse {
    /// A cached outcome, or the outcome of a run in flight, may be used.
    Allowed,
    /// The request needs a new run.
    Refused,
}

/// Runs jobs.
pub struct Runner {
    languages: Vec<Arc<Language>>,
    cache: Arc<OutcomeCache>,
    pool: Arc<Pool>,
    flights: Flights,
    pub(super) tasks: Tasks,
    /// Most bytes of compiled files that a batch hands from its first run to the others.
    pub(super) max_build: u64,
}

/// A job, the image that it is expected to run on, and its cache key on that image.
struct KeyedJob {
    job: Job,
    image: String,
    key: JobKey,
}

impl Runner {
    /// A runner of these languages, the default one first. A batch reuses its compiled files for the other inputs if
    /// they take at most `max_build` bytes.
    pub fn new(
        languages: Vec<Arc<Language>>,
        cache: OutcomeCache,
        pool: Arc<Pool>,
        tasks: Tasks,
        max_build: u64,
    ) -> Runner {
        Runner { languages, cache: Arc::new(cache), pool, flights: Flights::default(), tasks, max_build }
    }

    /// The languages that are served, the default one first.
    pub fn languages(&self) -> &[Arc<Language>] {
        &self.languages
    }

    /// Finds a language by its name or an alias; `None` is the default language.
    pub fn language(&self, name: Option<&str>) -> Result<&Arc<Language>, RunError> {
        let found = match name {
            Some(name) => language::named(&self.languages, name),
            None => self.languages.first(),
        };
        found.ok_or_else(|| PoolError::not_enabled(name.unwrap_or("default")).into())
    }

    /// The pool of sandboxes that this runner uses.
    pub fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// Current values for the metrics.
    pub fn metrics_snapshot(&self) -> metrics::Snapshot {
        let ready = |language: &Arc<Language>| (language.name.clone(), self.pool.status(&language.name).ready);
        metrics::Snapshot {
            queue_length: self.pool.queue_length(),
            cache_bytes: self.cache.bytes(),
            ready: self.languages.iter().map(ready).collect(),
        }
    }

    /// Answers a job from the cache, from a run of the same job in flight, or by running it. Dropping the future
    /// cancels the run, unless other requests wait for it.
    pub async fn run(&self, job: Job, reuse: Reuse, client: &Client) -> Result<Answer, RunError> {
        self.run_compiled(job, None, reuse, client).await
    }

    /// Like [`Runner::run`]; a new run uses the compiled files `built`, if any, instead of compiling.
    pub(super) async fn run_compiled(
        &self,
        job: Job,
        built: Option<Arc<Build>>,
        reuse: Reuse,
        client: &Client,
    ) -> Result<Answer, RunError> {
        if self.tasks.running.is_closed() {
            return Err(RunError::ShuttingDown);
        }
        let keyed = self.keyed(job)?;
        if reuse != Reuse::Refused
            && let Some(answer) = self.lookup(&keyed.key)
        {
            return Ok(answer);
        }
        let language = Arc::clone(self.language(Some(&keyed.job.language))?);
        let (flight, started) = self.flights.join_or_start(keyed.key, reuse);
        if let Some(publisher) = started {
            self.start(publisher, language, keyed, built, client.clone());
        }
        flight.result().await
    }

    /// Runs the job of a flight in the background and caches its outcome.
    fn start(
        &self,
        publisher: Publisher,
        language: Arc<Language>,
        keyed: KeyedJob,
        built: Option<Arc<Build>>,
        client: Client,
    ) {
        let KeyedJob { job, image: expected, key } = keyed;
        let (pool, cache, stop) = (Arc::clone(&self.pool), Arc::clone(&self.cache), self.tasks.stop.clone());
        let live = Live { build: built, ..Live::default() };
        let running = async move {
            let executed = tokio::select! {
                executed = execute(&pool, &language, &job, live, &client) => executed,
                () = publisher.abandoned() => Err(RunError::ShuttingDown),
                () = stop.cancelled() => Err(RunError::ShuttingDown),
            };
            let result = executed.map(|(answer, image)| {
                // The key has to name the image that the job ran on: it may have changed while the job was queued.
                let ran = if image == expected { key } else { job.key(&image) };
                cache.put(ran, &answer.outcome);
                answer
            });
            publisher.publish(result);
        };
        // In the span of the request that started it.
        self.tasks.running.spawn(signals::isolate_panics(running).in_current_span());
    }

    /// Runs a job for a client that watches it: always a run of its own. Dropping the future ends the run.
    pub async fn run_live(&self, job: Job, live: Live, client: &Client) -> Result<Answer, RunError> {
        if self.tasks.running.is_closed() {
            return Err(RunError::ShuttingDown);
        }
        let language = Arc::clone(self.language(Some(&job.language))?);
        let interactive = live.stdin.is_some() || live.signals.is_some();
        let running = async {
            tokio::select! {
                executed = execute(&self.pool, &language, &job, live, client) => executed,
                () = self.tasks.stop.cancelled() => Err(RunError::ShuttingDown),
            }
        };
        let (answer, image) = self.tasks.running.track_future(running).await?;
        if !interactive {
            self.cache.put(job.key(&image), &answer.outcome);
        }
        Ok(answer)
    }

    /// The cached answer to a job, if any.
    pub fn cached(&self, job: &Job, reuse: Reuse) -> Result<Option<Answer>, RunError> {
        if reuse == Reuse::Refused {
            return Ok(None);
        }
        Ok(self.lookup(&job.key(&self.image(&job.language)?)))
    }

    /// Computes the key of a job on the current image of its language.
    fn keyed(&self, job: Job) -> Result<KeyedJob, RunError> {
        let image = self.image(&job.language)?;
        Ok(KeyedJob { key: job.key(&image), image, job })
    }

    fn image(&self, language: &str) -> Result<String, PoolError> {
        self.pool.image(language).inspect_err(|error| metrics::error(error.kind()))
    }

    fn lookup(&self, key: &JobKey) -> Option<Answer> {
        let cached = self.cache.get(key);
        metrics::cache(cached.is_some());
        cached.map(|(outcome, age)| Answer { outcome, cached: Some(age), queued: Duration::ZERO })
    }

    /// Spawns other work that shutdown waits for or cancels like a run. It goes on if the caller drops the handle.
    pub fn spawn<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> JoinHandle<Option<T>> {
        self.tasks.running.spawn(signals::isolate_panics(self.tasks.stop.clone().run_until_cancelled_owned(work)))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use bytesize::ByteSize;
    use tokio::sync::mpsc;

    use super::*;
    use crate::model::job::Streams;
    use crate::run::cache::CacheSettings;
    use crate::sandbox::fake;
    use crate::scheduler::{Image, QueueSettings};

    pub const WAIT: Duration = Duration::from_secs(30);

    /// A runner of bash that caches nothing, and the starts of its fake engine.
    pub fn runner(slots: u32) -> (Arc<Runner>, mpsc::UnboundedReceiver<fake::Start>) {
        let (engine, starts) = fake::engine();
        let queue = QueueSettings { length: 10, wait: WAIT, fair: false };
        let languages = vec![Arc::new(crate::config::tests::language("bash"))];
        let pool = Arc::new(Pool::new(engine, slots, queue, &languages));
        pool.set_image("bash", Image::Ready("id".into()));
        let cache = OutcomeCache::new(CacheSettings { ttl: Duration::from_secs(600), size: ByteSize(0) }).unwrap();
        (Arc::new(Runner::new(languages, cache, pool, Tasks::default(), 1 << 20)), starts)
    }

    /// Starts a run; all calls use the same job.
    pub fn begin(runner: &Arc<Runner>, reuse: Reuse) -> JoinHandle<Result<Answer, RunError>> {
        let runner = Arc::clone(runner);
        tokio::spawn(async move {
            let job = runner.language(None).unwrap().job("echo".into(), Streams::Merged);
            runner.run(job, reuse, &Client::default()).await
        })
    }
}
