//! The runner: the way of a job through the memo, a run of the same job in flight, or a run of its own.

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
use crate::run::cache::MemoCache;
use crate::run::execute::execute;
use crate::run::flight::{Flights, Publisher};
use crate::run::tasks::Tasks;
use crate::sandbox::{Build, Live};
use crate::scheduler::{Pool, PoolError};

/// Whether the outcome of an earlier run may answer a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reuse {
    /// One from the memo, or that of a run in flight.
    Allowed,
    /// Only that of a run that starts now.
    Refused,
}

/// Runs jobs.
pub struct Runner {
    languages: Vec<Arc<Language>>,
    memo: Arc<MemoCache>,
    pool: Arc<Pool>,
    flights: Flights,
    pub(super) tasks: Tasks,
    /// Most bytes of what a batch has compiled.
    pub(super) most_build: u64,
}

/// A job, and its key on the image that it is expected to run on.
struct Keyed {
    job: Job,
    image: String,
    key: JobKey,
}

impl Runner {
    /// A runner of these languages, the default one first. What a batch has compiled it keeps for its other inputs if
    /// that is at most `most_build` bytes.
    pub fn new(
        languages: Vec<Arc<Language>>,
        memo: MemoCache,
        pool: Arc<Pool>,
        tasks: Tasks,
        most_build: u64,
    ) -> Runner {
        Runner { languages, memo: Arc::new(memo), pool, flights: Flights::default(), tasks, most_build }
    }

    /// The languages that are served, the default one first.
    pub fn languages(&self) -> &[Arc<Language>] {
        &self.languages
    }

    /// A language by its name or an alias; the default one where none is named.
    pub fn language(&self, name: Option<&str>) -> Result<&Arc<Language>, RunError> {
        let found = match name {
            Some(name) => language::named(&self.languages, name),
            None => self.languages.first(),
        };
        found.ok_or_else(|| PoolError::not_enabled(name.unwrap_or("default")).into())
    }

    /// The sandboxes that this runner takes from.
    pub fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// What the metrics show of this moment.
    pub fn now(&self) -> metrics::Now {
        let ready = |language: &Arc<Language>| (language.name.clone(), self.pool.status(&language.name).ready);
        metrics::Now {
            queue_length: self.pool.queue_length(),
            cache_bytes: self.memo.bytes(),
            ready: self.languages.iter().map(ready).collect(),
        }
    }

    /// Answers a job from the memo, from a run of the same job in flight, or by running it. Dropping the
    /// future gives the job up, unless others wait for the same one.
    pub async fn run(&self, job: Job, reuse: Reuse, client: &Client) -> Result<Answer, RunError> {
        self.run_compiled(job, None, reuse, client).await
    }

    /// Like [`Runner::run`]; where the job was compiled already, its run takes that.
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
            && let Some(answer) = self.kept(&keyed.key)
        {
            return Ok(answer);
        }
        let language = Arc::clone(self.language(Some(&keyed.job.language))?);
        let (flight, started) = self.flights.join_or_start(keyed.key, reuse);
        if let Some(publisher) = started {
            self.fly(publisher, language, keyed, built, client.clone());
        }
        flight.result().await
    }

    /// Runs the job of a flight in the background, and keeps its outcome.
    fn fly(
        &self,
        publisher: Publisher,
        language: Arc<Language>,
        keyed: Keyed,
        built: Option<Arc<Build>>,
        client: Client,
    ) {
        let Keyed { job, image: expected, key } = keyed;
        let (pool, memo, stop) = (Arc::clone(&self.pool), Arc::clone(&self.memo), self.tasks.stop.clone());
        let live = Live { build: built, ..Live::default() };
        let flying = async move {
            let executed = tokio::select! {
                executed = execute(&pool, &language, &job, live, &client) => executed,
                () = publisher.given_up() => Err(RunError::ShuttingDown),
                () = stop.cancelled() => Err(RunError::ShuttingDown),
            };
            let result = executed.map(|(answer, image)| {
                // Under the image that it ran on: a newer one may have come while it was queued.
                let ran = if image == expected { key } else { job.key(&image) };
                memo.put(ran, &answer.outcome);
                answer
            });
            publisher.publish(result);
        };
        // Its log lines are those of the request that began it.
        self.tasks.running.spawn(signals::isolate_panics(flying).in_current_span());
    }

    /// Runs a job for a client that watches it: never from the memo, never shared. Dropping the future ends the run.
    pub async fn run_live(&self, job: Job, live: Live, client: &Client) -> Result<Answer, RunError> {
        if self.tasks.running.is_closed() {
            return Err(RunError::ShuttingDown);
        }
        let language = Arc::clone(self.language(Some(&job.language))?);
        let typed = live.stdin.is_some() || live.signals.is_some();
        let running = async {
            tokio::select! {
                executed = execute(&self.pool, &language, &job, live, client) => executed,
                () = self.tasks.stop.cancelled() => Err(RunError::ShuttingDown),
            }
        };
        let (answer, image) = self.tasks.running.track_future(running).await?;
        if !typed {
            self.memo.put(job.key(&image), &answer.outcome);
        }
        Ok(answer)
    }

    /// The answer of the memo, if it has one.
    pub fn remembered(&self, job: &Job, reuse: Reuse) -> Result<Option<Answer>, RunError> {
        if reuse == Reuse::Refused {
            return Ok(None);
        }
        Ok(self.kept(&job.key(&self.image(&job.language)?)))
    }

    /// A job with its key, which takes a while to hash.
    fn keyed(&self, job: Job) -> Result<Keyed, RunError> {
        let image = self.image(&job.language)?;
        Ok(Keyed { key: job.key(&image), image, job })
    }

    fn image(&self, language: &str) -> Result<String, PoolError> {
        self.pool.image(language).inspect_err(|error| metrics::error(error.kind()))
    }

    fn kept(&self, key: &JobKey) -> Option<Answer> {
        let kept = self.memo.get(key);
        metrics::cache(kept.is_some());
        kept.map(|(outcome, age)| Answer { outcome, cached: Some(age), queued: Duration::ZERO })
    }

    /// Does something beside the runs, to its end, whether or not the caller waits for it, or until the server ends.
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

    /// A runner of bash that remembers nothing, and the starts of its engine.
    pub fn runner(slots: u32) -> (Arc<Runner>, mpsc::UnboundedReceiver<fake::Start>) {
        let (engine, starts) = fake::engine();
        let queue = QueueSettings { length: 10, wait: WAIT, fair: false };
        let languages = vec![Arc::new(crate::config::tests::language("bash"))];
        let pool = Arc::new(Pool::new(engine, slots, queue, &languages));
        pool.set_image("bash", Image::Ready("id".into()));
        let memo = MemoCache::new(CacheSettings { ttl: Duration::from_secs(600), size: ByteSize(0) }).unwrap();
        (Arc::new(Runner::new(languages, memo, pool, Tasks::default(), 1 << 20)), starts)
    }

    /// Begins to run the same job as all others.
    pub fn begin(runner: &Arc<Runner>, reuse: Reuse) -> JoinHandle<Result<Answer, RunError>> {
        let runner = Arc::clone(runner);
        tokio::spawn(async move {
            let job = runner.language(None).unwrap().job("echo".into(), Streams::Merged);
            runner.run(job, reuse, &Client::default()).await
        })
    }
}
