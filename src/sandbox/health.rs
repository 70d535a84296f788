//! Health programs: they show whether an image works.

use std::sync::Arc;

use tokio::sync::mpsc;

use super::{Engine, HEALTH_SLOT, LOST_SANDBOXES, Live, SandboxError, SandboxSpec, Slot};
use crate::job::{Outcome, Streams};
use crate::language::Language;

/// Runs the health program of a language in a sandbox of an image: what is wrong with the image, if anything is. One check
/// at a time: all of them take the same slot. Nothing is left of the sandbox when it returns.
pub async fn check(engine: &dyn Engine, language: &Arc<Language>, image: &str) -> Result<Option<String>, SandboxError> {
    let mut lost = 0;
    loop {
        match run(engine, language, image).await {
            Ok(outcome) => return Ok(language.health.failure(&outcome)),
            Err(SandboxError::Lost) if lost < LOST_SANDBOXES => lost += 1,
            Err(error) => return Err(error),
        }
    }
}

async fn run(engine: &dyn Engine, language: &Arc<Language>, image: &str) -> Result<Outcome, SandboxError> {
    let (free, mut freed) = mpsc::unbounded_channel();
    let spec =
        SandboxSpec { language: Arc::clone(language), image: image.to_owned(), slot: Slot::new(HEALTH_SLOT, free) };
    let job = language.job(language.health.code.clone().into(), Streams::Merged);
    let outcome = match engine.start(spec).await {
        Ok(sandbox) => sandbox.run(language, &job, &mut Live::default()).await,
        Err(error) => Err(error),
    };
    // Until the container is gone its image cannot be deleted, nor its slot, and with it the uid, used again.
    let _ = freed.recv().await;
    outcome
}
