//! A lane: what the pool knows of one language, its image, sandboxes, failures and use.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::model::backoff::Backoff;
use crate::model::language::Language;
use crate::sandbox::{Enforced, Sandbox};
use crate::scheduler::PoolError;

/// Failures in a row after which a language counts as broken and its requests are refused at once.
pub(super) const BROKEN_AFTER: u32 = 3;

/// First and longest pause before sandboxes are made again after a failure.
const RETRY_FIRST: Duration = Duration::from_millis(400);
pub(super) const RETRY_LONGEST: Duration = Duration::from_secs(10);

/// After this long without requests a language's past counts half when spare slots are given out.
const HALF_LIFE: Duration = Duration::from_secs(60);

/// Why a language is unavailable before the updater has looked for its image.
const NOT_LOOKED: &str = "its image has not been looked for yet";

/// The image of a language, as far as the pool is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Image {
    /// There is none that sandboxes can be made from; the reason.
    Missing(String),
    /// It cannot be found out; the reason. An image that was in use stays in use.
    Unknown(String),
    /// Content id of the one to use.
    Ready(String),
}

/// A snapshot of one language, for readiness and metrics.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Status {
    /// Sandboxes that wait for a job.
    pub ready: usize,
    /// Why sandboxes cannot be made, if they cannot.
    pub problem: Option<String>,
    /// What the latest sandbox saw of its limits.
    pub enforced: Option<Enforced>,
    /// When a sandbox last ran a program to its end, whatever the program did.
    pub proved_at: Option<Instant>,
}

/// What the pool knows of one language.
pub(super) struct Lane {
    pub(super) language: Arc<Language>,
    /// Its place in the configuration: the default language has the first one.
    pub(super) rank: usize,
    pub(super) image: Image,
    /// Counts the changes of the language and of its image. A sandbox whose start began before a change is not used;
    /// its image's id would not tell, for an image that was deleted and pulled again has the same one.
    pub(super) generation: u64,
    pub(super) ready: VecDeque<Sandbox>,
    /// Slots of the sandboxes that are being made.
    pub(super) making: BTreeSet<u32>,
    /// Failures in a row.
    pub(super) failures: u32,
    last_error: Option<String>,
    backoff: Backoff,
    pub(super) retry_at: Option<Instant>,
    /// Requests, those of long ago counted less; as of `used_at`.
    uses: f64,
    used_at: Instant,
    pub(super) enforced: Option<Enforced>,
    pub(super) proved_at: Option<Instant>,
}

impl Lane {
    pub(super) fn new(rank: usize, language: &Arc<Language>) -> Lane {
        Lane {
            language: Arc::clone(language),
            rank,
            image: Image::Missing(NOT_LOOKED.into()),
            generation: 0,
            ready: VecDeque::new(),
            making: BTreeSet::new(),
            failures: 0,
            last_error: None,
            backoff: Backoff::new(RETRY_FIRST, RETRY_LONGEST),
            retry_at: None,
            uses: 0.0,
            used_at: Instant::now(),
            enforced: None,
            proved_at: None,
        }
    }

    pub(super) fn status(&self) -> Status {
        let missing = self.image_id().err().map(|error| error.to_string());
        Status {
            ready: self.ready.iter().filter(|sandbox| !sandbox.gone.is_cancelled()).count(),
            problem: missing.or_else(|| self.last_error.clone()),
            enforced: self.enforced,
            proved_at: self.proved_at,
        }
    }

    /// Content id of the image to make sandboxes from.
    pub(super) fn image_id(&self) -> Result<String, PoolError> {
        match &self.image {
            Image::Ready(id) => Ok(id.clone()),
            Image::Missing(reason) | Image::Unknown(reason) => {
                Err(PoolError::Unavailable { language: self.language.name.clone(), reason: reason.clone() })
            }
        }
    }

    /// Refuses a request at once where none can be served.
    pub(super) fn refusal(&self) -> Result<(), PoolError> {
        self.image_id()?;
        match self.failures >= BROKEN_AFTER && self.ready.is_empty() {
            true => Err(PoolError::Broken { language: self.language.name.clone() }),
            false => Ok(()),
        }
    }

    /// Whether a sandbox can be made now.
    pub(super) fn can_make(&self, now: Instant) -> bool {
        matches!(self.image, Image::Ready(_)) && self.retry_at.is_none_or(|at| at <= now)
            // One attempt at a time while it fails.
            && (self.failures == 0 || self.making.is_empty())
    }

    /// Notes that no sandbox could be made.
    pub(super) fn failed(&mut self, reason: &str) {
        self.failures = self.failures.saturating_add(1);
        self.retry_at = Some(Instant::now() + self.backoff.failed());
        if self.last_error.as_deref() != Some(reason) {
            tracing::error!(language = self.language.name, reason, "no sandbox; trying again");
        }
        self.last_error = Some(reason.to_owned());
    }

    /// Notes that a sandbox was made, or that everything is different now.
    pub(super) fn forget_failures(&mut self) {
        self.failures = 0;
        self.backoff.reset();
        self.retry_at = None;
        self.last_error = None;
    }

    /// Takes the first ready sandbox that is alive; those before it go to `ended`. The others are not checked, which
    /// costs a system call for each: their engine gives their slots back.
    pub(super) fn take(&mut self, ended: &mut Vec<Sandbox>) -> Option<Sandbox> {
        while let Some(sandbox) = self.ready.pop_front() {
            if !sandbox.is_gone() {
                return Some(sandbox);
            }
            ended.push(sandbox);
        }
        None
    }

    /// Counts a request.
    pub(super) fn note_use(&mut self) {
        let now = Instant::now();
        self.uses = self.uses_at(now) + 1.0;
        self.used_at = now;
    }

    /// What the count of requests has decayed to.
    fn uses_at(&self, now: Instant) -> f64 {
        let halvings = now.saturating_duration_since(self.used_at).as_secs_f64() / HALF_LIFE.as_secs_f64();
        self.uses * 0.5f64.powf(halvings)
    }

    /// The priority of this language for a spare slot: first of all where it has no sandbox, else its recent uses for
    /// each sandbox that it has.
    pub(super) fn refill_priority(&self, now: Instant) -> f64 {
        let have = self.ready.len() + self.making.len();
        if have == 0 { f64::INFINITY } else { (self.uses_at(now) + 0.01) / (have as f64) }
    }
}
