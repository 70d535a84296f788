//! Readiness: whether a language works, for `/readyz`.
//!
//! A client's program that ran within the last `ready.interval` proves that its language works. Without one, the
//! language's health program runs in a ready sandbox: only while no request waits for a sandbox, and at most once per
//! `ready.interval`. A language whose sandboxes are all busy therefore does not become unready.

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
    /// How long the result of a health program, or a run of a client, is valid.
    #[serde(with = "humantime_serde")]
    pub interval: Duration,
}

/// Result of the latest health program of a language.
#[derive(Debug, Clone)]
struct ProbeResult {
    at: Instant,
    problem: Option<String>,
}

/// The results of the latest health programs.
pub struct Readiness {
    settings: ReadySettings,
    /// By language. An entry is locked while its health program runs, so that concurrent requests share the result.
    probed: Mutex<BTreeMap<String, Arc<AsyncMutex<Option<ProbeResult>>>>>,
}

impl Readiness {
    /// No language has been probed yet.
    pub fn new(settings: ReadySettings) -> Readiness {
        Readiness { settings, probed: Mutex::default() }
    }

    /// Why a language cannot be used at present, or `None` if it works.
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
        let is_recent = |at: Instant| at.elapsed() < self.settings.interval;
        // Read the status again: a run may have succeeded while this request waited for the lock.
        let last_run_at = runner.pool().status(&language.name).last_run_at;
        if let Some(known) = probed.as_ref().filter(|known| is_recent(known.at)) {
            return known.problem.clone().filter(|_| last_run_at.is_none_or(|at| at < known.at));
        }
        if last_run_at.is_some_and(is_recent) {
            return None;
        }
        // Only an idle sandbox is used: none is made for a probe, and none is taken from a waiting request.
        let Some(sandbox) = runner.pool().take_idle(&language.name) else {
            return probed.as_ref().and_then(|known| known.problem.clone());
        };
        // In a task of its own: the client may leave, and the result should be kept since the sandbox is used up.
        let probing = probe(Arc::clone(runner.pool()), Arc::clone(language), sandbox, probed);
        let probing = runner.spawn(probing.in_current_span());
        probing.await.ok().flatten().unwrap_or_else(|| Some(RunError::ShuttingDown.to_string()))
    }
}

/// Runs the health program and stores the result.
async fn probe(
    pool: Arc<Pool>,
    language: Arc<Language>,
    mut sandbox: Sandbox,
    mut probed: OwnedMutexGuard<Option<ProbeResult>>,
) -> Option<String> {
    let job = language.job(language.health.code.clone().into(), Streams::Merged);
    let failure = loop {
        match sandbox.run(&language, &job, &mut Live::default()).await {
            Ok(outcome) => break language.health.failure(&outcome),
            // A lost sandbox says nothing about the language.
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
    // Clients do not see the details; the log has them.
    let problem = failure.map(|_| "its health program fails".to_owned());
    *probed = Some(ProbeResult { at: Instant::now(), problem: problem.clone() });
    problem
}
