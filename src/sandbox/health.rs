//! Runs health programs, which show whether an image works.

use std::sync::Arc;

use tokio::sync::{Mutex, mpsc};

use crate::model::job::Streams;
use crate::model::language::Language;
use crate::model::outcome::Outcome;
use crate::sandbox::retries::Retries;
use crate::sandbox::{Engine, HEALTH_SLOT, Live, SandboxError, SandboxSpec, Slot};

/// Checks images, one at a time, because all checks use the same slot. The slot is free again when the container of the
/// previous check is gone, also if that check was cancelled.
pub struct Checks {
    free: mpsc::UnboundedSender<u32>,
    freed: Mutex<mpsc::UnboundedReceiver<u32>>,
}

impl Default for Checks {
    fn default() -> Checks {
        let (free, freed) = mpsc::unbounded_channel();
        drop(Slot::new(HEALTH_SLOT, free.clone()));
        Checks { free, freed: Mutex::new(freed) }
    }
}

impl Checks {
    /// Runs the health program of a language in a sandbox of an image. Returns what is wrong with the image, if
    /// anything. The sandbox is gone when this returns.
    pub async fn check(
        &self,
        engine: &dyn Engine,
        language: &Arc<Language>,
        image: &str,
    ) -> Result<Option<String>, SandboxError> {
        let mut retries = Retries::default();
        loop {
            match self.run(engine, language, image).await {
                Ok(outcome) => return Ok(language.health.failure(&outcome)),
                Err(error) if retries.allow(&error) => {}
                Err(error) => return Err(error),
            }
        }
    }

    async fn run(&self, engine: &dyn Engine, language: &Arc<Language>, image: &str) -> Result<Outcome, SandboxError> {
        let mut freed = self.freed.lock().await;
        // This never returns `None`, because `self` holds a sender. The supervisor of the previous container releases
        // the slot.
        let number = freed.recv().await.unwrap_or(HEALTH_SLOT);
        let slot = Slot::new(number, self.free.clone());
        let spec = SandboxSpec { language: Arc::clone(language), image: image.to_owned(), slot };
        let job = language.job(language.health.code.clone().into(), Streams::Merged);
        let outcome = match engine.start(spec).await {
            Ok(sandbox) => sandbox.run(language, &job, &mut Live::default()).await,
            Err(error) => Err(error),
        };
        // Wait until the container is gone: until then its image cannot be deleted.
        if let Some(number) = freed.recv().await {
            drop(Slot::new(number, self.free.clone()));
        }
        outcome
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::sandbox::fake;

    #[test]
    fn health_check_waits_for_the_sandbox_of_an_aborted_check() {
        fake::on_paused_clock(|| async {
            let (engine, mut starts) = fake::engine();
            let checks = Arc::new(Checks::default());
            let language = Arc::new(crate::config::tests::language("bash"));
            let begin = || {
                let (engine, checks, language) = (Arc::clone(&engine), Arc::clone(&checks), Arc::clone(&language));
                tokio::spawn(async move { checks.check(&*engine, &language, "id").await })
            };
            let given_up = begin();
            let init = starts.recv().await.unwrap().succeed();
            init.begin().await;
            given_up.abort();
            init.released().await;
            let next = begin();
            let begun = tokio::time::timeout(Duration::from_secs(5), starts.recv()).await;
            assert!(begun.is_err(), "two sandboxes are in the slot");
            drop(init);
            let init = starts.recv().await.unwrap().succeed();
            init.begin().await;
            init.end_well();
            init.released().await;
            drop(init);
            let checked = next.await.unwrap().unwrap();
            assert!(checked.unwrap().contains("printed"), "nothing was");
        });
    }
}
