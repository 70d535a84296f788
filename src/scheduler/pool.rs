//! Ready sandboxes: a bounded number of slots, a queue for those who find none, refill in the background.
//!
//! One task, the manager, decides what to make next; everything else happens in the tasks of those who
//! ask. The state is behind one lock that is never held across an await.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::model::client::Client;
use crate::model::language::Language;
use crate::sandbox::Enforced;
use crate::sandbox::{Engine, Event, Sandbox, SandboxError, SandboxSpec, Slot};
use crate::scheduler::QueueSettings;
use crate::scheduler::queue::Queue;

/// Failures in a row after which a language counts as broken and its requests are refused at once.
const BROKEN_AFTER: u32 = 3;

/// First and longest pause after a failure, doubled in between.
const RETRY_FIRST: Duration = Duration::from_millis(200);
const RETRY_LONGEST: Duration = Duration::from_secs(10);

/// Time between two looks at the place of a request that is watched.
const POSITION_CHECK: Duration = Duration::from_millis(200);

/// After this long without requests a language's past counts half when spare slots are given out.
const HALF_LIFE: Duration = Duration::from_secs(60);

/// Time between two looks for ready sandboxes that died without their engine's notice.
const LOOK_PAUSE: Duration = Duration::from_secs(10);

/// What is said of an image before the updater has had its first look.
const NOT_LOOKED: &str = "its image has not been looked for yet";

/// Why no sandbox could be had.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum PoolError {
    /// The language has no image yet, or none that works.
    #[error("{language} is not available: {reason}")]
    Unavailable {
        /// Which language.
        language: String,
        /// Why.
        reason: String,
    },
    /// Sandboxes cannot be made at present; the log has the reason.
    #[error("sandboxes for {language} cannot be made at present")]
    Broken {
        /// Which language.
        language: String,
    },
    /// As many requests wait as may.
    #[error("the queue is full: {length} requests are waiting")]
    QueueFull {
        /// How many.
        length: usize,
    },
    /// The wait was as long as it may be.
    #[error("no container became free within {}", humantime::format_duration(*.waited))]
    QueueTimeout {
        /// How long.
        waited: Duration,
    },
    /// The server is going down.
    #[error("the server is shutting down")]
    Draining,
}

/// What the pool is told of a language's image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Image {
    /// There is none to make sandboxes from; why.
    Missing(String),
    /// Nobody can say; why. One that was to be used still is.
    Unknown(String),
    /// Content id of the one to use.
    Ready(String),
}

impl PoolError {
    /// There are no sandboxes for this language.
    pub fn not_enabled(language: &str) -> PoolError {
        PoolError::Unavailable { language: language.to_owned(), reason: "it is not enabled".into() }
    }

    /// Which failure it is, in a word.
    pub fn kind(&self) -> &'static str {
        match self {
            PoolError::Unavailable { .. } => "unavailable",
            PoolError::Broken { .. } => "broken",
            PoolError::QueueFull { .. } => "queue_full",
            PoolError::QueueTimeout { .. } => "queue_timeout",
            PoolError::Draining => "draining",
        }
    }
}

/// A snapshot for readiness and metrics.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Status {
    /// Sandboxes that wait for a job.
    pub ready: usize,
    /// Why there are none, where something is wrong.
    pub problem: Option<String>,
    /// What the latest sandbox saw of its limits.
    pub enforced: Option<Enforced>,
    /// When a program last ran as it should, whatever the program did.
    pub proved_at: Option<Instant>,
}

/// Ready sandboxes of all languages.
pub struct Pool {
    shared: Arc<Shared>,
}

struct Shared {
    engine: Arc<dyn Engine>,
    state: Mutex<State>,
    changed: Notify,
    freed: mpsc::UnboundedSender<u32>,
    stop: CancellationToken,
}

struct State {
    queue: Queue,
    /// How many slots there may be, those there are (free or taken; more for a while after a cut), the free ones.
    slots: u32,
    existing: BTreeSet<u32>,
    free: Vec<u32>,
    /// Slots of sandboxes given up that have not come back yet.
    closing: BTreeSet<u32>,
    lanes: BTreeMap<String, Lane>,
    draining: bool,
}

/// The sandboxes of one language.
struct Lane {
    language: Arc<Language>,
    /// Its place in the configuration: the default language is served first.
    rank: usize,
    image: Image,
    /// Counts the changes of the language and of its image: what was begun before is not for it, for an image that
    /// was deleted and pulled again has the same id.
    generation: u64,
    ready: VecDeque<Sandbox>,
    /// Slots of those that are being made.
    making: BTreeSet<u32>,
    failures: u32,
    last_error: Option<String>,
    retry_at: Option<Instant>,
    uses: f64,
    used_at: Instant,
    enforced: Option<Enforced>,
    proved_at: Option<Instant>,
}

/// What the manager does next.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    Make(String),
    /// Give up a ready sandbox of this language for one that is waited for.
    GiveUp(String),
    Nothing,
}

impl Pool {
    /// A pool of `slots` containers for these languages, none of which has an image yet.
    pub fn new(engine: Arc<dyn Engine>, slots: u32, queue: QueueSettings, languages: &[Arc<Language>]) -> Pool {
        let (freed, given_back) = mpsc::unbounded_channel();
        let lane = |(rank, language): (usize, &Arc<Language>)| (language.name.clone(), Lane::new(rank, language));
        let mut state = State {
            queue: Queue::new(queue),
            slots: 0,
            existing: BTreeSet::new(),
            free: Vec::new(),
            closing: BTreeSet::new(),
            lanes: languages.iter().enumerate().map(lane).collect(),
            draining: false,
        };
        state.resize(slots);
        let shared = Arc::new(Shared {
            engine,
            state: Mutex::new(state),
            changed: Notify::new(),
            freed,
            stop: CancellationToken::new(),
        });
        tokio::spawn(manage(Arc::clone(&shared), given_back));
        Pool { shared }
    }

    /// Takes a ready sandbox of a language, or waits for one in the queue, until `queue.wait` has passed since the request
    /// `came`; a watcher is told its place there. Dropping the future leaves the queue.
    pub async fn acquire(
        &self,
        language: &str,
        client: &Client,
        watcher: Option<&mpsc::UnboundedSender<Event>>,
        came: Instant,
    ) -> Result<Sandbox, PoolError> {
        // Dropped after the lock is.
        let mut ended = Vec::new();
        let (place, turn, wait) = {
            let mut state = self.shared.lock();
            let wait = state.queue.settings.wait;
            if state.draining {
                return Err(PoolError::Draining);
            }
            let lane = state.lane(language)?;
            lane.note_use();
            let taken = lane.take(&mut ended);
            state.expect(&ended);
            if let Some(sandbox) = taken {
                self.shared.changed.notify_one();
                return Ok(sandbox);
            }
            state.lane(language)?.refusal()?;
            let (id, turn) = state.queue.join(language, client)?;
            (Place { shared: &self.shared, id }, turn, wait)
        };
        self.shared.changed.notify_one();
        let waited = tokio::select! {
            waited = tokio::time::timeout(wait.saturating_sub(came.elapsed()), turn) => waited,
            never = place.tell(watcher) => match never {},
        };
        drop(place);
        match waited {
            Ok(Ok(handed_over)) => handed_over,
            Ok(Err(_)) => Err(PoolError::Draining),
            Err(_) => Err(PoolError::QueueTimeout { waited: wait }),
        }
    }

    /// Tells of a language's image: from now on sandboxes are made from it, and ready ones of another are given up.
    pub fn set_image(&self, language: &str, image: Image) {
        let given_up = {
            let mut state = self.shared.lock();
            let Ok(lane) = state.lane(language) else { return };
            let known = matches!(lane.image, Image::Ready(_));
            if lane.image == image || (known && matches!(image, Image::Unknown(_))) {
                return;
            }
            lane.image = image;
            let refusal = lane.image_id().err();
            lane.failures = 0;
            lane.retry_at = None;
            lane.last_error = None;
            lane.generation += 1;
            let given_up = std::mem::take(&mut lane.ready);
            let making = std::mem::take(&mut lane.making);
            state.closing.extend(making);
            state.expect(&given_up);
            // Those who wait are told what newcomers are.
            if let Some(refusal) = refusal {
                state.queue.refuse(language, &refusal);
            }
            given_up
        };
        drop(given_up);
        self.shared.changed.notify_one();
    }

    /// Serves other languages, or the same with other limits, in other numbers. What runs is not disturbed.
    pub fn reconfigure(&self, slots: u32, queue: QueueSettings, languages: &[Arc<Language>]) {
        let given_up: Vec<Sandbox> = {
            let mut state = self.shared.lock();
            state.resize(slots);
            state.queue.settings = queue;
            let mut before = std::mem::take(&mut state.lanes);
            let mut given_up = Vec::new();
            for (rank, language) in languages.iter().enumerate() {
                let lane = match before.remove(&language.name) {
                    Some(same) if same.language == *language => Lane { rank, ..same },
                    Some(mut other) => {
                        given_up.extend(std::mem::take(&mut other.ready));
                        state.closing.append(&mut other.making);
                        let image = match other.language.image == language.image {
                            true => other.image,
                            false => Image::Missing(NOT_LOOKED.into()),
                        };
                        // Sandboxes that are being made have the old limits: they are given up on arrival.
                        Lane { image, generation: other.generation + 1, ..Lane::new(rank, language) }
                    }
                    None => Lane::new(rank, language),
                };
                state.lanes.insert(language.name.clone(), lane);
            }
            for (name, lane) in before {
                state.queue.refuse(&name, &PoolError::not_enabled(&name));
                given_up.extend(lane.ready);
                state.closing.extend(lane.making);
            }
            for lane in state.lanes.values_mut() {
                let (kept, beyond) =
                    std::mem::take(&mut lane.ready).into_iter().partition(|sandbox| sandbox.number < slots);
                lane.ready = kept;
                let beyond: VecDeque<Sandbox> = beyond;
                given_up.extend(beyond);
            }
            state.expect(&given_up);
            given_up
        };
        drop(given_up);
        self.shared.engine.keep_only(languages);
        self.shared.changed.notify_one();
    }

    /// The image that a language's sandboxes are made from, or why there is none.
    pub fn image(&self, language: &str) -> Result<String, PoolError> {
        let mut state = self.shared.lock();
        if state.draining {
            return Err(PoolError::Draining);
        }
        state.lane(language)?.image_id()
    }

    /// How a language stands.
    pub fn status(&self, language: &str) -> Status {
        self.shared.lock().lane(language).map(|lane| lane.status()).unwrap_or_default()
    }

    /// How each language stands, the default one first.
    pub fn statuses(&self) -> Vec<(String, Status)> {
        let mut state = self.shared.lock();
        let mut lanes: Vec<(&String, &mut Lane)> = state.lanes.iter_mut().collect();
        lanes.sort_by_key(|(_, lane)| lane.rank);
        lanes.into_iter().map(|(name, lane)| (name.clone(), lane.status())).collect()
    }

    /// Notes that a sandbox of this language has just run a program as it should.
    pub fn note_proof(&self, language: &str) {
        if let Ok(lane) = self.shared.lock().lane(language) {
            lane.proved_at = Some(Instant::now());
        }
    }

    /// Requests that wait for a sandbox.
    pub fn queue_length(&self) -> usize {
        self.shared.lock().queue.len()
    }

    /// A ready sandbox of a language, if no request waits for any. It does not count as a use.
    pub fn take_idle(&self, language: &str) -> Option<Sandbox> {
        let mut ended = Vec::new();
        let mut state = self.shared.lock();
        if state.draining || !state.queue.is_empty() {
            return None;
        }
        let sandbox = state.lane(language).ok()?.take(&mut ended);
        state.expect(&ended);
        self.shared.changed.notify_one();
        sandbox
    }

    /// Ends: whoever waits is refused, ready sandboxes are given up, nothing more is made.
    pub fn drain(&self) {
        let given_up: Vec<Sandbox> = {
            let mut state = self.shared.lock();
            state.draining = true;
            state.queue.clear();
            state.lanes.values_mut().flat_map(|lane| std::mem::take(&mut lane.ready)).collect()
        };
        drop(given_up);
        self.shared.stop.cancel();
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.drain();
    }
}

/// A place in the queue; dropping it leaves.
struct Place<'a> {
    shared: &'a Shared,
    id: u64,
}

impl Place<'_> {
    /// Tells how many wait before this one, now and whenever that changes.
    async fn tell(&self, watcher: Option<&mpsc::UnboundedSender<Event>>) -> Infallible {
        let Some(watcher) = watcher else { return std::future::pending().await };
        let mut told = None;
        loop {
            let position = self.shared.lock().queue.position(self.id);
            if let Some(position) = position.filter(|position| told != Some(*position)) {
                told = Some(position);
                let _ = watcher.send(Event::Queued(position));
            }
            tokio::time::sleep(POSITION_CHECK).await;
        }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.shared.lock().queue.leave(self.id);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a start came to: a sandbox for the first who waits for it, or a failure.
    fn arrived(&self, language: &str, generation: u64, number: u32, made: Result<Sandbox, SandboxError>) {
        // Sandboxes that nobody wants, or that have ended already, are dropped after the lock is.
        let mut unwanted = None;
        {
            let mut state = self.lock();
            let State { lanes, queue, closing, draining, .. } = &mut *state;
            let Some(lane) = lanes.get_mut(language).filter(|lane| lane.generation == generation) else {
                return;
            };
            // The slot of one that failed may have come back before this is told, and have been taken again.
            let was_making = lane.making.remove(&number);
            closing.remove(&number);
            match made {
                Ok(sandbox) if *draining || sandbox.is_gone() => unwanted = Some(sandbox),
                Ok(sandbox) => {
                    lane.failures = 0;
                    lane.retry_at = None;
                    lane.last_error = None;
                    let missing = sandbox.enforced.missing().join(", ");
                    if lane.enforced.replace(sandbox.enforced) != Some(sandbox.enforced) && !missing.is_empty() {
                        tracing::warn!(
                            language,
                            missing,
                            "limits are NOT enforced on this host: see `coderunner doctor`"
                        );
                    }
                    lane.ready.extend(queue.serve(language, sandbox));
                }
                Err(error) => {
                    closing.extend(was_making.then_some(number));
                    lane.failed(&error.to_string());
                    if let Err(refusal) = lane.refusal() {
                        queue.refuse(language, &refusal);
                    }
                }
            }
        }
        drop(unwanted);
        self.changed.notify_one();
    }
}

/// Makes what [`State::next_step`] says until the pool is drained.
async fn manage(shared: Arc<Shared>, mut given_back: mpsc::UnboundedReceiver<u32>) {
    let cores = std::thread::available_parallelism().map_or(2, usize::from);
    let mut look_at = Instant::now() + LOOK_PAUSE;
    loop {
        if Instant::now() >= look_at {
            look_at = Instant::now() + LOOK_PAUSE;
            let dead = shared.lock().take_dead();
            drop(dead);
        }
        let retry_at = loop {
            let mut state = shared.lock();
            let now = Instant::now();
            match state.next_step(cores, now) {
                Step::Make(name) => {
                    let Some(number) = state.free.pop() else { break None };
                    let Some(lane) = state.lanes.get_mut(&name) else {
                        break None;
                    };
                    let Ok(image) = lane.image_id() else { break None };
                    lane.making.insert(number);
                    let generation = lane.generation;
                    let slot = Slot::new(number, shared.freed.clone());
                    let spec = SandboxSpec { language: Arc::clone(&lane.language), image, slot };
                    let shared = Arc::clone(&shared);
                    tokio::spawn(async move {
                        let made = tokio::select! {
                            made = shared.engine.start(spec) => made,
                            () = shared.stop.cancelled() => return,
                        };
                        shared.arrived(&name, generation, number, made);
                    });
                }
                Step::GiveUp(name) => {
                    let given_up = state.lanes.get_mut(&name).and_then(|lane| lane.ready.pop_front());
                    state.expect(&given_up);
                    drop(state);
                    drop(given_up);
                }
                // A pause that is over waits for something else now: an attempt, a slot or a core, which tell of themselves.
                Step::Nothing => {
                    break state.lanes.values().filter_map(|lane| lane.retry_at).filter(|at| *at > now).min();
                }
            }
        };
        let wake = retry_at.map_or(look_at, |at| at.min(look_at));
        tokio::select! {
            () = shared.changed.notified() => {}
            Some(number) = given_back.recv() => {
                let ended = shared.lock().take_back(number);
                drop(ended);
            }
            () = tokio::time::sleep_until(wake) => {}
            () = shared.stop.cancelled() => return,
        }
    }
}

impl State {
    /// Changes the number of slots; those beyond it go when they come back.
    fn resize(&mut self, slots: u32) {
        self.slots = slots;
        // Beyond the new number only those that are taken still exist.
        for number in std::mem::take(&mut self.free) {
            let _none = self.take_back(number);
        }
        for number in (0..slots).rev() {
            if self.existing.insert(number) {
                self.free.push(number);
            }
        }
    }

    /// A slot has come back, and with it the ready sandbox that was in it, if that ended by itself.
    fn take_back(&mut self, number: u32) -> Vec<Sandbox> {
        self.closing.remove(&number);
        let mut ended = Vec::new();
        for lane in self.lanes.values_mut() {
            lane.making.remove(&number);
            let at = lane.ready.iter().position(|sandbox| sandbox.number == number);
            ended.extend(at.and_then(|at| lane.ready.remove(at)));
        }
        match number < self.slots {
            true => self.free.push(number),
            false => drop(self.existing.remove(&number)),
        }
        ended
    }

    /// Ready sandboxes whose init has gone, whether or not their engine knows. Each costs a system call.
    fn take_dead(&mut self) -> VecDeque<Sandbox> {
        let mut dead = VecDeque::new();
        for lane in self.lanes.values_mut() {
            let (gone, living) = std::mem::take(&mut lane.ready).into_iter().partition(Sandbox::is_gone);
            lane.ready = living;
            dead.extend::<VecDeque<Sandbox>>(gone);
        }
        self.expect(&dead);
        dead
    }

    /// The slots of these are going to come back. Those whose container had ended by itself are gone already.
    fn expect<'a>(&mut self, given_up: impl IntoIterator<Item = &'a Sandbox>) {
        let numbers = given_up.into_iter().map(|sandbox| sandbox.number);
        self.closing.extend(numbers.filter(|number| self.existing.contains(number) && !self.free.contains(number)));
    }

    fn lane(&mut self, language: &str) -> Result<&mut Lane, PoolError> {
        self.lanes.get_mut(language).ok_or_else(|| PoolError::not_enabled(language))
    }

    /// Demand first, in order of arrival; then refill what was used most.
    fn next_step(&mut self, cores: usize, now: Instant) -> Step {
        if self.draining {
            return Step::Nothing;
        }
        let making: usize = self.lanes.values().map(|lane| lane.making.len()).sum();
        let mut expected: BTreeMap<&str, usize> =
            self.lanes.iter().map(|(name, lane)| (name.as_str(), lane.making.len())).collect();
        let mut coming = self.closing.len();
        for language in self.queue.languages() {
            let Some(lane) = self.lanes.get(language) else {
                continue;
            };
            if let Some(on_the_way @ 1..) = expected.get_mut(language) {
                *on_the_way -= 1;
                continue;
            }
            if !lane.can_make(now) {
                continue;
            }
            if !self.free.is_empty() {
                return if making < cores { Step::Make(language.to_owned()) } else { Step::Nothing };
            }
            if coming > 0 {
                coming -= 1;
                continue;
            }
            // Nobody waits for what is ready, or it would not be.
            let spare = self.lanes.iter().filter(|(_, lane)| !lane.ready.is_empty());
            return match spare.max_by_key(|(_, lane)| (lane.ready.len(), lane.rank)) {
                Some((name, _)) => Step::GiveUp(name.clone()),
                None => Step::Nothing,
            };
        }
        if self.free.is_empty() {
            return match self.closing.is_empty() {
                true => self.rebalance(now),
                false => Step::Nothing,
            };
        }
        // A core stays free of this for the runs that clients wait for.
        if making >= cores.saturating_sub(1).max(1) {
            return Step::Nothing;
        }
        let refill = self
            .lanes
            .iter()
            .filter(|(_, lane)| lane.can_make(now))
            .max_by(|(_, a), (_, b)| a.pull(now).total_cmp(&b.pull(now)).then_with(|| b.rank.cmp(&a.rank)));
        refill.map_or(Step::Nothing, |(name, _)| Step::Make(name.clone()))
    }

    /// Every language has something ready, if there are slots enough: one whose image came late takes from
    /// another that has two, or from a lesser one where it never had any.
    fn rebalance(&self, now: Instant) -> Step {
        let lanes = || self.lanes.iter();
        let lacks = |lane: &Lane| lane.ready.len() + lane.making.len() == 0 && lane.failures == 0 && lane.can_make(now);
        let Some((_, lacking)) = lanes().filter(|(_, lane)| lacks(lane)).min_by_key(|(_, lane)| lane.rank) else {
            return Step::Nothing;
        };
        let gives = |lane: &Lane| match lane.ready.len() {
            0 => false,
            1 => lacking.enforced.is_none() && lacking.rank < lane.rank,
            _ => true,
        };
        let giver = lanes().filter(|(_, lane)| gives(lane)).max_by_key(|(_, lane)| (lane.ready.len(), lane.rank));
        giver.map_or(Step::Nothing, |(name, _)| Step::GiveUp(name.clone()))
    }
}

impl Lane {
    fn new(rank: usize, language: &Arc<Language>) -> Lane {
        Lane {
            language: Arc::clone(language),
            rank,
            image: Image::Missing(NOT_LOOKED.into()),
            generation: 0,
            ready: VecDeque::new(),
            making: BTreeSet::new(),
            failures: 0,
            last_error: None,
            retry_at: None,
            uses: 0.0,
            used_at: Instant::now(),
            enforced: None,
            proved_at: None,
        }
    }

    fn status(&self) -> Status {
        let missing = self.image_id().err().map(|error| error.to_string());
        Status {
            ready: self.ready.iter().filter(|sandbox| !sandbox.gone.is_cancelled()).count(),
            problem: missing.or_else(|| self.last_error.clone()),
            enforced: self.enforced,
            proved_at: self.proved_at,
        }
    }

    fn image_id(&self) -> Result<String, PoolError> {
        match &self.image {
            Image::Ready(id) => Ok(id.clone()),
            Image::Missing(reason) | Image::Unknown(reason) => {
                Err(PoolError::Unavailable { language: self.language.name.clone(), reason: reason.clone() })
            }
        }
    }

    /// Why a request is refused at once, if it is.
    fn refusal(&self) -> Result<(), PoolError> {
        self.image_id()?;
        match self.failures >= BROKEN_AFTER && self.ready.is_empty() {
            true => Err(PoolError::Broken { language: self.language.name.clone() }),
            false => Ok(()),
        }
    }

    fn can_make(&self, now: Instant) -> bool {
        matches!(self.image, Image::Ready(_)) && self.retry_at.is_none_or(|at| at <= now)
            // One attempt at a time while it fails.
            && (self.failures == 0 || self.making.is_empty())
    }

    fn failed(&mut self, reason: &str) {
        self.failures = self.failures.saturating_add(1);
        let pause = RETRY_FIRST.saturating_mul(1 << self.failures.min(10)).min(RETRY_LONGEST);
        self.retry_at = Some(Instant::now() + pause);
        if self.last_error.as_deref() != Some(reason) {
            tracing::error!(language = self.language.name, reason, "no sandbox; trying again");
        }
        self.last_error = Some(reason.to_owned());
    }

    /// The first ready sandbox that lives; those before it have ended. The others are not asked, which costs a system
    /// call for each: their engine gives their slots back.
    fn take(&mut self, ended: &mut Vec<Sandbox>) -> Option<Sandbox> {
        while let Some(sandbox) = self.ready.pop_front() {
            if !sandbox.is_gone() {
                return Some(sandbox);
            }
            ended.push(sandbox);
        }
        None
    }

    fn note_use(&mut self) {
        let now = Instant::now();
        self.uses = self.uses_at(now) + 1.0;
        self.used_at = now;
    }

    fn uses_at(&self, now: Instant) -> f64 {
        let halvings = now.saturating_duration_since(self.used_at).as_secs_f64() / HALF_LIFE.as_secs_f64();
        self.uses * 0.5f64.powf(halvings)
    }

    /// How much a spare slot would help this language: one with nothing ready comes first, then its share
    /// of recent use over what it has.
    fn pull(&self, now: Instant) -> f64 {
        let have = self.ready.len() + self.making.len();
        if have == 0 { f64::INFINITY } else { (self.uses_at(now) + 0.01) / (have as f64) }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::future::BoxFuture;

    use super::*;
    use crate::sandbox::fake;
    use crate::scheduler::queue::Turn;

    fn state(slots: u32, names: &[&str]) -> State {
        let lanes = names.iter().enumerate().map(|(rank, name)| {
            let mut language = crate::config::tests::language("bash");
            language.name = (*name).to_owned();
            (language.name.clone(), Lane { image: Image::Ready("id".into()), ..Lane::new(rank, &Arc::new(language)) })
        });
        let mut state = State {
            queue: Queue::new(QueueSettings { length: 10, wait: Duration::from_secs(1), fair: true }),
            slots: 0,
            existing: BTreeSet::new(),
            free: Vec::new(),
            closing: BTreeSet::new(),
            lanes: lanes.collect(),
            draining: false,
        };
        state.resize(slots);
        state
    }

    impl State {
        fn wait_for(&mut self, language: &str) -> Turn {
            self.queue.join(language, &Client::default()).unwrap().1
        }

        /// Follows the steps until there is nothing to do; the languages in the order in which they were made.
        fn made(&mut self) -> Vec<String> {
            let mut made = Vec::new();
            while let Step::Make(name) = self.next_step(usize::MAX, Instant::now()) {
                let number = self.free.pop().unwrap();
                self.lanes.get_mut(&name).unwrap().making.insert(number);
                made.push(name);
            }
            made
        }
    }

    #[tokio::test]
    async fn every_language_gets_one_before_any_gets_two() {
        let mut state = state(4, &["z", "b", "a"]);
        assert_eq!(state.made()[..3], ["z", "b", "a"], "in the order of the configuration");
        assert!(state.free.is_empty());
    }

    #[tokio::test]
    async fn spare_slots_follow_use() {
        let mut state = state(10, &["a", "b"]);
        (0..8).for_each(|_| state.lanes.get_mut("b").unwrap().note_use());
        let made = state.made();
        assert!(made.iter().filter(|name| *name == "b").count() >= 8, "{made:?}");
        assert!(made.contains(&"a".to_owned()));
    }

    #[tokio::test]
    async fn who_waits_comes_first_in_order_of_arrival() {
        let mut state = state(3, &["a", "b", "c"]);
        let _turns = [state.wait_for("c"), state.wait_for("c"), state.wait_for("b")];
        assert_eq!(state.made(), ["c", "c", "b"]);
    }

    #[tokio::test]
    async fn one_that_has_left_is_not_served() {
        let mut state = state(1, &["a", "b"]);
        drop(state.wait_for("b"));
        assert_eq!(state.made(), ["a"]);
    }

    #[tokio::test]
    async fn no_more_starts_at_once_than_cores() {
        let mut state = state(10, &["a"]);
        state.lanes.get_mut("a").unwrap().making.insert(0);
        assert_eq!(state.next_step(2, Instant::now()), Step::Nothing, "nobody waits: a core stays free");
        state.lanes.get_mut("a").unwrap().making.insert(1);
        let _turns = [state.wait_for("a"), state.wait_for("a"), state.wait_for("a")];
        assert_eq!(state.next_step(2, Instant::now()), Step::Nothing);
        assert_eq!(state.next_step(3, Instant::now()), Step::Make("a".into()));
    }

    #[tokio::test]
    async fn a_failing_language_pauses_and_the_others_go_on() {
        let mut state = state(4, &["a", "b"]);
        let broken = state.lanes.get_mut("a").unwrap();
        (0..BROKEN_AFTER).for_each(|_| broken.failed("no podman"));
        assert!(matches!(broken.refusal(), Err(PoolError::Broken { .. })));
        assert_eq!(state.made(), ["b"; 4]);
        let later = Instant::now() + RETRY_LONGEST;
        state.free.push(9);
        assert_eq!(state.next_step(usize::MAX, later), Step::Make("a".into()), "tried again after the pause");
        state.lanes.get_mut("a").unwrap().making.insert(9);
        assert_ne!(state.next_step(usize::MAX, later), Step::Make("a".into()), "one attempt at a time");
    }

    #[tokio::test]
    async fn nothing_is_made_without_an_image_or_while_draining() {
        let mut state = state(2, &["a"]);
        state.lanes.get_mut("a").unwrap().image = Image::Missing("not pulled".into());
        assert!(state.made().is_empty());
        state.lanes.get_mut("a").unwrap().image = Image::Ready("id".into());
        state.draining = true;
        assert!(state.made().is_empty());
    }

    /// Makes nothing.
    struct Idle;

    impl Engine for Idle {
        fn start(&self, _: SandboxSpec) -> BoxFuture<'_, Result<Sandbox, SandboxError>> {
            Box::pin(std::future::pending())
        }

        fn release<'a>(&'a self, _: Option<&'a str>) -> BoxFuture<'a, ()> {
            Box::pin(std::future::ready(()))
        }

        fn keep_only(&self, _: &[Arc<Language>]) {}
    }

    fn shared(state: State) -> Shared {
        let freed = mpsc::unbounded_channel().0;
        let (changed, stop) = (Notify::new(), CancellationToken::new());
        Shared { engine: Arc::new(Idle), state: Mutex::new(state), changed, freed, stop }
    }

    fn bash() -> Arc<Language> {
        Arc::new(crate::config::tests::language("bash"))
    }

    fn queue_settings() -> QueueSettings {
        QueueSettings { length: 10, wait: Duration::from_secs(30), fair: false }
    }

    /// A pool for bash, whose image is there, and the starts of its engine.
    fn pool(slots: u32) -> (Arc<Pool>, mpsc::UnboundedReceiver<fake::Start>) {
        let (engine, starts) = fake::engine();
        let pool = Arc::new(Pool::new(engine, slots, queue_settings(), &[bash()]));
        pool.set_image("bash", Image::Ready("id".into()));
        (pool, starts)
    }

    #[test]
    fn an_attempt_after_a_failure_is_waited_for_at_rest() {
        fake::on_paused_clock(|| async {
            let (pool, mut starts) = pool(1);
            drop(starts.recv().await.unwrap());
            let hangs = starts.recv().await.unwrap();
            tokio::time::sleep(Duration::from_secs(30)).await;
            let _init = hangs.succeed();
            let made = pool.acquire("bash", &Client::default(), None, Instant::now()).await;
            assert!(made.is_ok(), "{made:?}");
        });
    }

    #[test]
    fn who_waits_for_a_language_that_goes_is_refused_at_once() {
        fake::on_paused_clock(|| async {
            for image_goes in [true, false] {
                let (pool, mut starts) = pool(1);
                let begun = Instant::now();
                let (waiter, client) = (Arc::clone(&pool), Client::default());
                let waiting = tokio::spawn(async move { waiter.acquire("bash", &client, None, begun).await });
                let _hangs = starts.recv().await.unwrap();
                while pool.queue_length() == 0 {
                    tokio::task::yield_now().await;
                }
                match image_goes {
                    true => pool.set_image("bash", Image::Missing("it was deleted".into())),
                    false => pool.reconfigure(1, queue_settings(), &[]),
                }
                let refusal = waiting.await.unwrap().unwrap_err();
                assert!(matches!(refusal, PoolError::Unavailable { .. }), "{refusal}");
                assert_eq!(begun.elapsed(), Duration::ZERO);
            }
        });
    }

    /// Waits until so many sandboxes are ready.
    async fn wait_ready(pool: &Pool, count: usize) {
        while pool.status("bash").ready != count {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    #[test]
    fn ready_sandboxes_that_end_are_not_given_and_their_slots_used_again() {
        fake::on_paused_clock(|| async {
            let (pool, mut starts) = pool(3);
            let mut inits = VecDeque::new();
            for ready in 1..=3 {
                inits.push_back(starts.recv().await.unwrap().succeed());
                wait_ready(&pool, ready).await;
            }
            // The engine tells of one, and nobody asks.
            let told = inits.remove(1).unwrap();
            let slot = told.slot();
            drop(told);
            let again = starts.recv().await.unwrap();
            assert_eq!(again.spec.slot.number, slot);
            inits.push_back(again.succeed());
            wait_ready(&pool, 3).await;
            // One whose end nobody has noticed yet is passed over when it is its turn, and given up.
            let mut first = inits.pop_front().unwrap();
            first.close_channel();
            let given = pool.acquire("bash", &Client::default(), None, Instant::now()).await.unwrap();
            assert_eq!(given.number, inits[0].slot());
            first.released().await;
            // One that stays in silence is found in a while.
            inits[1].close_channel();
            inits[1].released().await;
        });
    }

    #[tokio::test]
    async fn a_slot_is_awaited_until_it_comes_back_and_no_other() {
        let mut state = state(3, &["a"]);
        state.free.clear();
        state.closing.insert(1);
        drop(state.take_back(0));
        assert_eq!(state.closing, BTreeSet::from([1]), "what a finished run gives back was not awaited");
        drop(state.take_back(1));
        assert!(state.closing.is_empty());
    }

    #[tokio::test]
    async fn the_slot_of_a_start_that_failed_is_awaited_unless_it_is_back() {
        for is_back in [true, false] {
            let mut state = state(1, &["a"]);
            assert_eq!(state.made(), ["a"]);
            if is_back {
                drop(state.take_back(0));
            }
            let shared = shared(state);
            shared.arrived("a", 0, 0, Err(SandboxError::Lost));
            let mut state = shared.lock();
            assert_eq!(state.closing.is_empty(), is_back);
            if !is_back {
                drop(state.take_back(0));
            }
            assert!(state.closing.is_empty() && state.lanes["a"].making.is_empty());
        }
    }

    #[tokio::test]
    async fn slots_shrink_and_grow_without_being_given_twice() {
        let mut state = state(4, &["a"]);
        let taken: Vec<u32> = (0..3).map(|_| state.free.pop().unwrap()).collect();
        state.resize(1);
        state.resize(4);
        let mut seen = taken.clone();
        seen.extend(&state.free);
        seen.sort_unstable();
        assert_eq!(seen, [0, 1, 2, 3]);
        state.resize(1);
        taken.into_iter().for_each(|number| drop(state.take_back(number)));
        assert_eq!(state.free, [0]);
    }
}
