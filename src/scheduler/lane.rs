//! A lane: the pool's state of one language, that is its image, sandboxes, failures and use.

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

/// Half-life of the request count of a language, by which spare slots are assigned.
const HALF_LIFE: Duration = Duration::from_secs(60);

/// Why a language is unavailable before the updater has looked for its image.
const NOT_CHECKED: &str = "its image has not been looked for yet";

/// The image of a language, as the updater announced it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Image {
    /// There is no usable image, for this reason.
    Missing(String),
    /// The state of the image is unknown, for this reason. An image that was in use stays in use.
    Unknown(String),
    /// Content id of the image to use.
    Ready(String),
}

/// The status of one language, for readiness and metrics.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LanguageStatus {
    /// Number of ready sandboxes.
    pub ready: usize,
    /// Why no sandboxes can be made, if they cannot.
    pub problem: Option<String>,
    /// The limits that the latest sandbox found to be enforced.
    pub enforced: Option<Enforced>,
    /// When a sandbox last ran a program to completion, whatever its verdict.
    pub last_run_at: Option<Instant>,
}

/// The state of one language.
pub(super) struct Lane {
    pub(super) language: Arc<Language>,
    /// Index of the language in the configuration; the default language has 0.
    pub(super) rank: usize,
    pub(super) image: Image,
    /// Counts the changes of the language and of its image. A sandbox whose start began before a change is discarded.
    /// The image id does not suffice to tell: an image that was deleted and pulled again has the same id.
    pub(super) generation: u64,
    pub(super) ready: VecDeque<Sandbox>,
    /// Slots of the sandboxes that are being made.
    pub(super) making: BTreeSet<u32>,
    /// Number of failures in a row.
    pub(super) failures: u32,
    last_error: Option<String>,
    backoff: Backoff,
    pub(super) retry_at: Option<Instant>,
    /// Number of requests, decayed with [`HALF_LIFE`], as of `counted_at`.
    recent_requests: f64,
    counted_at: Instant,
    pub(super) enforced: Option<Enforced>,
    pub(super) last_run_at: Option<Instant>,
}

impl Lane {
    pub(super) fn new(rank: usize, language: &Arc<Language>) -> Lane {
        Lane {
            language: Arc::clone(language),
            rank,
            image: Image::Missing(NOT_CHECKED.into()),
            generation: 0,
            ready: VecDeque::new(),
            making: BTreeSet::new(),
            failures: 0,
            last_error: None,
            backoff: Backoff::new(RETRY_FIRST, RETRY_LONGEST),
            retry_at: None,
            recent_requests: 0.0,
            counted_at: Instant::now(),
            enforced: None,
            last_run_at: None,
        }
    }

    pub(super) fn status(&self) -> LanguageStatus {
        let missing = self.image_id().err().map(|error| error.to_string());
        LanguageStatus {
            ready: self.ready.iter().filter(|sandbox| !sandbox.gone.is_cancelled()).count(),
            problem: missing.or_else(|| self.last_error.clone()),
            enforced: self.enforced,
            last_run_at: self.last_run_at,
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

    /// An error if requests have to be refused at once: there is no image, or starts keep failing.
    pub(super) fn check_available(&self) -> Result<(), PoolError> {
        self.image_id()?;
        match self.failures >= BROKEN_AFTER && self.ready.is_empty() {
            true => Err(PoolError::Broken { language: self.language.name.clone() }),
            false => Ok(()),
        }
    }

    /// Whether a sandbox can be made now.
    pub(super) fn can_make(&self, now: Instant) -> bool {
        matches!(self.image, Image::Ready(_)) && self.retry_at.is_none_or(|at| at <= now)
            // While starts fail, only one is tried at a time.
            && (self.failures == 0 || self.making.is_empty())
    }

    /// Records that a start failed.
    pub(super) fn note_failure(&mut self, reason: &str) {
        self.failures = self.failures.saturating_add(1);
        self.retry_at = Some(Instant::now() + self.backoff.failed());
        if self.last_error.as_deref() != Some(reason) {
            tracing::error!(language = self.language.name, reason, "no sandbox; trying again");
        }
        self.last_error = Some(reason.to_owned());
    }

    /// Records that a start succeeded, or that earlier failures no longer matter.
    pub(super) fn clear_failures(&mut self) {
        self.failures = 0;
        self.backoff.reset();
        self.retry_at = None;
        self.last_error = None;
    }

    /// Takes the first ready sandbox that is alive and moves the dead ones before it to `ended`. The others are not
    /// checked, since each check is a system call; their engine returns the slots of those that ended.
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
    pub(super) fn note_request(&mut self) {
        let now = Instant::now();
        self.recent_requests = self.recent_requests_at(now) + 1.0;
        self.counted_at = now;
    }

    /// The decayed request count at a time.
    fn recent_requests_at(&self, now: Instant) -> f64 {
        let halvings = now.saturating_duration_since(self.counted_at).as_secs_f64() / HALF_LIFE.as_secs_f64();
        self.recent_requests * 0.5f64.powf(halvings)
    }

    /// The priority of this language for a spare slot: highest if it has no sandbox, else its recent requests per
    /// sandbox.
    pub(super) fn refill_priority(&self, now: Instant) -> f64 {
        let have = self.ready.len() + self.making.len();
        if have == 0 { f64::INFINITY } else { (self.recent_requests_at(now) + 0.01) / (have as f64) }
    }
}
