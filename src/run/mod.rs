//! The way of a job: memo, then one flight per key, then a sandbox from the pool, then the outcome.

pub mod cache;
pub mod context;
pub mod readiness;

use std::collections::HashMap;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use futures_util::{StreamExt, stream};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;
use tracing::Instrument;

use crate::host::signals;
use crate::metrics;
use crate::model::client::Client;
use crate::model::job::Job;
use crate::model::key::JobKey;
use crate::model::language::{self, Language};
use crate::model::outcome::Outcome;
use crate::run::cache::MemoCache;
use crate::run::context::Caller;
use crate::sandbox::{Builds, Built, LOST_SANDBOXES, Wanted};
pub use crate::sandbox::{Event, Live, SandboxError};
use crate::scheduler::pool::Pool;
pub use crate::scheduler::pool::PoolError;

/// What a request is given.
#[derive(Debug, Clone)]
pub struct Answer {
    /// What became of its job.
    pub outcome: Arc<Outcome>,
    /// For how long the outcome has been kept, if it is one from the memo.
    pub cached: Option<Duration>,
    /// How long the run waited for its sandbox.
    pub queued: Duration,
}

/// Whether an outcome of before may answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reuse {
    /// From the memo, or of a run in flight.
    Allowed,
    /// Only of a run that starts now.
    Refused,
}

/// Why a job has no outcome.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RunError {
    /// No sandbox could be had.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// The sandbox failed under the job.
    #[error(transparent)]
    Sandbox(Arc<SandboxError>),
    /// The server is going down and its time to drain is over.
    #[error("the server is shutting down")]
    ShuttingDown,
}

/// Runs of a batch at once: those of others find room beside them.
const AT_ONCE: usize = 4;

type Landed = Option<Result<Answer, RunError>>;

/// A run that one or more requests wait for. The last who drops it ends the run.
struct Flight {
    landed: watch::Receiver<Landed>,
    _last_left: DropGuard,
}

/// Runs jobs.
pub struct Runner {
    languages: Vec<Arc<Language>>,
    memo: Arc<MemoCache>,
    pool: Arc<Pool>,
    flights: Arc<Mutex<HashMap<JobKey, Weak<Flight>>>>,
    tasks: Tasks,
    /// Most bytes of what a batch has compiled.
    most_build: u64,
}

/// The runs of all runners there have been since the start: a reload makes a new runner, and the runs of
/// the old one go on.
#[derive(Debug, Clone, Default)]
pub struct Tasks {
    running: TaskTracker,
    stop: CancellationToken,
    builds: Builds,
}

impl Tasks {
    /// How many runs there are, those in the queue included.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Refuses new runs, lets the others go on until `drain` is over, then ends them.
    pub async fn shut_down(&self, drain: Duration) {
        self.running.close();
        if tokio::time::timeout(drain, self.running.wait()).await.is_err() {
            tracing::warn!(running = self.running.len(), "cancelling requests: the drain time is over");
        }
        self.stop.cancel();
        self.running.wait().await;
    }
}

impl Runner {
    /// A runner of these languages, the default one first. What a batch has compiled it keeps for its other inputs if that
    /// is at most `most_build` bytes.
    pub fn new(
        languages: Vec<Arc<Language>>,
        memo: MemoCache,
        pool: Arc<Pool>,
        tasks: Tasks,
        most_build: u64,
    ) -> Runner {
        Runner { languages, memo: Arc::new(memo), pool, flights: Arc::default(), tasks, most_build }
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

    /// Does something beside the runs, to its end whoever waits for it, or to the server's.
    pub fn spawn<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> JoinHandle<Option<T>> {
        self.tasks.running.spawn(signals::apart(self.tasks.stop.clone().run_until_cancelled_owned(work)))
    }

    /// What there is at the moment.
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
    pub async fn run(&self, job: Job, reuse: Reuse) -> Result<Answer, RunError> {
        self.run_compiled(job, None, reuse).await
    }

    /// Like [`Runner::run`], of which compiling may be done already.
    async fn run_compiled(&self, job: Job, built: Option<Arc<Built>>, reuse: Reuse) -> Result<Answer, RunError> {
        if self.tasks.running.is_closed() {
            return Err(RunError::ShuttingDown);
        }
        let keyed = self.keyed(job)?;
        if reuse != Reuse::Refused
            && let Some(answer) = self.kept(&keyed.key)
        {
            return Ok(answer);
        }
        let flight = self.board(keyed, built, reuse)?;
        let mut landed = flight.landed.clone();
        match landed.wait_for(Option::is_some).await {
            Ok(landed) => landed.clone().unwrap_or(Err(RunError::ShuttingDown)),
            Err(_) => Err(RunError::ShuttingDown),
        }
    }

    fn image(&self, language: &str) -> Result<String, PoolError> {
        self.pool.image(language).inspect_err(|error| metrics::error(error.kind()))
    }

    /// The answer of the memo, if it has one.
    pub fn remembered(&self, job: &Job, reuse: Reuse) -> Result<Option<Answer>, RunError> {
        if reuse == Reuse::Refused {
            return Ok(None);
        }
        Ok(self.kept(&job.key(&self.image(&job.language)?)))
    }

    fn kept(&self, key: &JobKey) -> Option<Answer> {
        let kept = self.memo.get(key);
        metrics::cache(kept.is_some());
        kept.map(|(outcome, age)| Answer { outcome, cached: Some(age), queued: Duration::ZERO })
    }

    /// A job with its key, which takes a while to hash.
    fn keyed(&self, job: Job) -> Result<Keyed, RunError> {
        let image = self.image(&job.language)?;
        Ok(Keyed { key: job.key(&image), image, job })
    }

    /// Runs a job for one who watches it: never from the memo, never shared. Dropping the future ends the run.
    pub async fn run_live(&self, job: Job, live: Live) -> Result<Answer, RunError> {
        if self.tasks.running.is_closed() {
            return Err(RunError::ShuttingDown);
        }
        let language = Arc::clone(self.language(Some(&job.language))?);
        let client = client();
        let typed = live.stdin.is_some() || live.signals.is_some();
        let running = async {
            tokio::select! {
                executed = execute(&self.pool, &language, &job, live, &client) => executed,
                () = self.tasks.stop.cancelled() => Err(RunError::ShuttingDown),
            }
        };
        let (answer, image) = self.tasks.running.track_future(running).await?;
        if !typed {
            self.memo.put(job.key(&image), &answer.outcome);
        }
        Ok(answer)
    }

    /// Runs jobs that differ in nothing but their input, a few at once, and tells the outcome of each as it comes. The
    /// first is compiled; the others run what that made, each in a sandbox of its own. Where it cannot be carried there,
    /// each compiles for itself. Dropping the future ends all.
    pub async fn run_batch(&self, jobs: Vec<Job>, reuse: Reuse, tell: impl Fn(usize, Result<Answer, RunError>)) {
        let mut left = jobs.into_iter().enumerate();
        let (first, job) = loop {
            let Some((index, job)) = left.next() else { return };
            match self.remembered(&job, reuse) {
                Ok(None) => break (index, job),
                Ok(Some(answer)) => tell(index, Ok(answer)),
                Err(error) => tell(index, Err(error)),
            }
        };
        let (wanted, mut handed_on) = oneshot::channel();
        let wanted = Wanted { room: self.tasks.builds.take(self.most_build), built: wanted };
        let mut running = pin!(self.run_live(job, Live { built: Some(wanted), ..Live::default() }));
        let mut over = None;
        let built = tokio::select! {
            biased;
            Ok(built) = &mut handed_on => built,
            result = &mut running => match result {
                // It was over before this heard of what it had compiled. Its outcome is that of its own input.
                Ok(answer) if answer.outcome.compiled() => {
                    over = Some(Ok(answer));
                    handed_on.try_recv().ok().flatten()
                }
                // It never got as far as being run, and no other would.
                result => {
                    left.for_each(|(index, _)| tell(index, result.clone()));
                    return tell(first, result);
                }
            },
        };
        let running = async move {
            match over {
                Some(result) => result,
                None => running.await,
            }
        };
        let others = stream::iter(left)
            .map(async |(index, job)| (index, self.run_compiled(job, built.clone(), reuse).await))
            .buffer_unordered(AT_ONCE - 1);
        let mut results = pin!(stream::select(stream::once(running).map(|result| (first, result)), others));
        while let Some((index, result)) = results.next().await {
            tell(index, result);
        }
    }

    /// Joins the flight of the same job, or starts one.
    fn board(&self, keyed: Keyed, built: Option<Arc<Built>>, reuse: Reuse) -> Result<Arc<Flight>, RunError> {
        let language = Arc::clone(self.language(Some(&keyed.job.language))?);
        let Keyed { job, image: expected, key } = keyed;
        let mut flights = self.flights.lock().unwrap_or_else(PoisonError::into_inner);
        if reuse == Reuse::Allowed
            && let Some(flight) = flights.get(&key).and_then(Weak::upgrade)
        {
            return Ok(flight);
        }
        let (land, landed) = watch::channel(None);
        let given_up = CancellationToken::new();
        let flight = Arc::new(Flight { landed, _last_left: given_up.clone().drop_guard() });
        let own = Arc::downgrade(&flight);
        flights.insert(key, Weak::clone(&own));
        drop(flights);

        let (pool, memo, flights, stop) =
            (Arc::clone(&self.pool), Arc::clone(&self.memo), Arc::clone(&self.flights), self.tasks.stop.clone());
        let client = client();
        let flying = async move {
            let executed = tokio::select! {
                executed = execute(&pool, &language, &job, Live { compiled: built, ..Live::default() }, &client) => executed,
                () = given_up.cancelled() => Err(RunError::ShuttingDown),
                () = stop.cancelled() => Err(RunError::ShuttingDown),
            };
            let result = executed.map(|(answer, image)| {
                // Under the image that it ran on: a newer one may have come while it was queued.
                let ran = if image == expected { key } else { job.key(&image) };
                memo.put(ran, &answer.outcome);
                answer
            });
            {
                let mut flights = flights.lock().unwrap_or_else(PoisonError::into_inner);
                // Another of the same job may have taken its place: after it was given up, or for one who wants it run anew.
                if flights.get(&key).is_some_and(|flight| Weak::ptr_eq(flight, &own)) {
                    flights.remove(&key);
                }
            }
            let _ = land.send(Some(result));
        };
        // Its log lines are those of the request that began it.
        self.tasks.running.spawn(signals::apart(flying).in_current_span());
        Ok(flight)
    }
}

/// A job, and its key on the image that it is expected to run on.
struct Keyed {
    job: Job,
    image: String,
    key: JobKey,
}

/// Who is asking.
fn client() -> Client {
    Caller::current().map(|caller| caller.client).unwrap_or_default()
}

/// A job in a sandbox of its own; also tells the image that it ran on.
async fn execute(
    pool: &Pool,
    language: &Language,
    job: &Job,
    mut live: Live,
    client: &Client,
) -> Result<(Answer, String), RunError> {
    let (mut lost, mut queued) = (0, Duration::ZERO);
    let came = tokio::time::Instant::now();
    loop {
        let asked = Instant::now();
        let acquired = pool.acquire(&job.language, client, live.events.as_ref(), came).await;
        let sandbox = acquired.inspect_err(|error| metrics::error(error.kind()))?;
        queued += asked.elapsed();
        let _busy = metrics::sandbox_taken(&job.language, asked.elapsed());
        let image = sandbox.image.clone();
        let carried = live.compiled_on(&image).is_some();
        match sandbox.run(language, job, &mut live).await {
            Ok(outcome) => {
                pool.note_proof(&job.language);
                metrics::ran(&job.language, &outcome, !carried);
                return Ok((Answer { outcome: Arc::new(outcome), cached: None, queued }, image));
            }
            Err(SandboxError::Lost) if lost < LOST_SANDBOXES => {
                metrics::error(SandboxError::Lost.kind());
                lost += 1;
            }
            // Not a second time: what was compiled elsewhere is of no use to anyone then.
            Err(SandboxError::NotCarried) => metrics::error(SandboxError::NotCarried.kind()),
            Err(error) => {
                metrics::error(error.kind());
                match &error {
                    // To clients it is no failure of the server's: nobody else tells of it.
                    SandboxError::HostMemory => tracing::error!(language = job.language, %error, "a run failed"),
                    // Whoever answers tells of it, under the id of each request.
                    _ => tracing::debug!(language = job.language, %error, "a run failed"),
                }
                return Err(RunError::Sandbox(Arc::new(error)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use bytesize::ByteSize;
    use tokio::sync::mpsc;
    use tokio::time::Instant;

    use super::*;
    use crate::model::job::Streams;
    use crate::run::cache::CacheSettings;
    use crate::sandbox::fake;
    use crate::scheduler::QueueSettings;
    use crate::scheduler::pool::Image;

    const WAIT: Duration = Duration::from_secs(30);

    /// A runner of bash that remembers nothing, and the starts of its engine.
    fn runner(slots: u32) -> (Arc<Runner>, mpsc::UnboundedReceiver<fake::Start>) {
        let (engine, starts) = fake::engine();
        let queue = QueueSettings { length: 10, wait: WAIT, fair: false };
        let languages = vec![Arc::new(crate::config::tests::language("bash"))];
        let pool = Arc::new(Pool::new(engine, slots, queue, &languages));
        pool.set_image("bash", Image::Ready("id".into()));
        let memo = MemoCache::new(CacheSettings { ttl: Duration::from_secs(600), size: ByteSize(0) }).unwrap();
        (Arc::new(Runner::new(languages, memo, pool, Tasks::default(), 1 << 20)), starts)
    }

    /// Begins to run the same job as all others.
    fn begin(runner: &Arc<Runner>, reuse: Reuse) -> JoinHandle<Result<Answer, RunError>> {
        let runner = Arc::clone(runner);
        tokio::spawn(async move {
            let job = runner.language(None).unwrap().job("echo".into(), Streams::Merged);
            runner.run(job, reuse).await
        })
    }

    #[test]
    fn a_request_whose_sandbox_was_lost_waits_no_longer_than_others() {
        fake::on_paused_clock(|| async {
            let (runner, mut starts) = runner(1);
            let begun = Instant::now();
            let running = begin(&runner, Reuse::Allowed);
            let first = starts.recv().await.unwrap();
            tokio::time::sleep(WAIT * 2 / 3).await;
            let init = first.succeed();
            init.hear().await;
            drop(init);
            let _never = starts.recv().await.unwrap();
            let error = running.await.unwrap().unwrap_err();
            assert!(matches!(error, RunError::Pool(PoolError::QueueTimeout { waited: WAIT })), "{error}");
            assert_eq!(begun.elapsed().as_secs(), WAIT.as_secs());
        });
    }

    #[test]
    fn the_end_of_a_run_leaves_the_flight_of_another_to_those_who_come() {
        fake::on_paused_clock(|| async {
            let (runner, mut starts) = runner(3);
            let first = begin(&runner, Reuse::Allowed);
            let one = starts.recv().await.unwrap().succeed();
            one.begin().await;
            let anew = begin(&runner, Reuse::Refused);
            let two = starts.recv().await.unwrap().succeed();
            two.begin().await;
            one.end_well();
            first.await.unwrap().unwrap();
            let joins = begin(&runner, Reuse::Allowed);
            let spare = starts.recv().await.unwrap().succeed();
            // It would be given to the one who joins, if that took any.
            assert!(tokio::time::timeout(Duration::from_secs(1), spare.hear()).await.is_err());
            two.end_well();
            anew.await.unwrap().unwrap();
            joins.await.unwrap().unwrap();
            drop(spare);
        });
    }
}
