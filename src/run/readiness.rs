//! Whether a language really works: what `/readyz` is answered by.
//!
//! The best proof costs nothing: a program of a client's that ran a moment ago. Where there is none, the language's
//! health program runs in a sandbox that waits for work, but only while no request waits for one, and not more
//! often than `ready.interval` however often it is asked for. Who is busy is not broken.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};
use tokio::time::Instant;
use tracing::Instrument;

use crate::metrics;
use crate::model::job::Streams;
use crate::model::language::Language;
use crate::run::{RunError, Runner};
use crate::sandbox::{Live, Sandbox, SandboxError};
use crate::scheduler::Pool;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// `[ready]`
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReadySettings {
    /// Whether `/readyz` runs health programs.
    pub probe: bool,
    /// How long what is known of a language is not asked again.
    #[serde(with = "humantime_serde")]
    pub interval: Duration,
}

/// What the latest health program of a language came to.
#[derive(Debug, Clone)]
struct Probed {
    at: Instant,
    problem: Option<String>,
}

/// Remembers what was found.
pub struct Readiness {
    settings: ReadySettings,
    /// Each is locked while its health program runs: who asks meanwhile gets the same answer.
    probed: Mutex<BTreeMap<String, Arc<AsyncMutex<Option<Probed>>>>>,
}

impl Readiness {
    /// Nothing has been found yet.
    pub fn new(settings: ReadySettings) -> Readiness {
        Readiness { settings, probed: Mutex::default() }
    }

    /// Why a language cannot be used at present, if it cannot.
    pub async fn problem(&self, runner: &Runner, language: &Arc<Language>) -> Option<String> {
        let status = runner.pool().status(&language.name);
        if status.problem.is_some() || status.enforced.is_none() {
            return status.problem.or_else(|| Some("no sandbox yet".into()));
        }
        if !self.settings.probe {
            return None;
        }
        let of_language = {
            let mut probed = self.probed.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(probed.entry(language.name.clone()).or_default())
        };
        let probed = of_language.lock_owned().await;
        let is_new = |at: Instant| at.elapsed() < self.settings.interval;
        // Asked again: one may have succeeded while we waited.
        let proved_at = runner.pool().status(&language.name).proved_at;
        if let Some(known) = probed.as_ref().filter(|known| is_new(known.at)) {
            return known.problem.clone().filter(|_| proved_at.is_none_or(|at| at < known.at));
        }
        if proved_at.is_some_and(is_new) {
            return None;
        }
        // Nobody waits for it, and it is not made for this.
        let Some(sandbox) = runner.pool().take_idle(&language.name) else {
            return probed.as_ref().and_then(|known| known.problem.clone());
        };
        // Whoever asked may leave: the sandbox is used up then, and what comes of it is to be known.
        let probing = probe(Arc::clone(runner.pool()), Arc::clone(language), sandbox, probed);
        let probing = runner.spawn(probing.in_current_span());
        probing.await.ok().flatten().unwrap_or_else(|| Some(RunError::ShuttingDown.to_string()))
    }
}

/// Runs the health program, and keeps what it came to.
async fn probe(
    pool: Arc<Pool>,
    language: Arc<Language>,
    mut sandbox: Sandbox,
    mut probed: OwnedMutexGuard<Option<Probed>>,
) -> Option<String> {
    let job = language.job(language.health.code.clone().into(), Streams::Merged);
    let failure = loop {
        match sandbox.run(&language, &job, &mut Live::default()).await {
            Ok(outcome) => break language.health.failure(&outcome),
            // It proves nothing.
            Err(SandboxError::Lost) => match pool.take_idle(&language.name) {
                Some(another) => sandbox = another,
                None => return probed.as_ref().and_then(|known| known.problem.clone()),
            },
            Err(error) => break Some(error.to_string()),
        }
    };
    if let Some(failure) = &failure {
        tracing::error!(language = language.name, failure, "not ready: the health program fails");
    }
    metrics::probed(&language.name, failure.is_none());
    // What exactly is for the log.
    let problem = failure.map(|_| "its health program fails".to_owned());
    *probed = Some(Probed { at: Instant::now(), problem: problem.clone() });
    problem
}
