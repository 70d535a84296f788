//! Executes a job in a sandbox of its own, and in another one if the first was lost before the job started in it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::metrics;
use crate::model::client::Client;
use crate::model::job::Job;
use crate::model::language::Language;
use crate::run::answer::{Answer, RunError};
use crate::sandbox::retries::Retries;
use crate::sandbox::{Live, SandboxError};
use crate::scheduler::Pool;

/// Runs a job. Returns the answer and the id of the image that the job ran on.
pub(super) async fn execute(
    pool: &Pool,
    language: &Language,
    job: &Job,
    mut live: Live,
    client: &Client,
) -> Result<(Answer, String), RunError> {
    let (mut retries, mut queued) = (Retries::default(), Duration::ZERO);
    let arrived_at = tokio::time::Instant::now();
    loop {
        let acquire_started = Instant::now();
        let acquired = pool.acquire(&job.language, client, live.events.as_ref(), arrived_at).await;
        let sandbox = acquired.inspect_err(|error| metrics::error(error.kind()))?;
        queued += acquire_started.elapsed();
        let _busy = metrics::sandbox_taken(&job.language, acquire_started.elapsed());
        let image = sandbox.image.clone();
        let precompiled = live.build_for(&image).is_some();
        match sandbox.run(language, job, &mut live).await {
            Ok(outcome) => {
                pool.note_completed_run(&job.language);
                metrics::ran(&job.language, &outcome, !precompiled);
                return Ok((Answer { outcome: Arc::new(outcome), cached: None, queued }, image));
            }
            Err(error) => {
                metrics::error(error.kind());
                if retries.allow(&error) {
                    continue;
                }
                match &error {
                    // The client gets 503, which is not logged elsewhere.
                    SandboxError::HostMemory => tracing::error!(language = job.language, %error, "a run failed"),
                    // The HTTP side logs it under the id of each request.
                    _ => tracing::debug!(language = job.language, %error, "a run failed"),
                }
                return Err(RunError::Sandbox(Arc::new(error)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;
    use crate::run::runner::Reuse;
    use crate::run::runner::tests::{WAIT, begin, runner};
    use crate::sandbox::fake;
    use crate::scheduler::PoolError;

    #[test]
    fn retry_after_a_lost_sandbox_does_not_extend_the_wait() {
        fake::on_paused_clock(|| async {
            let (runner, mut starts) = runner(1);
            let begun = Instant::now();
            let running = begin(&runner, Reuse::Allowed);
            let first = starts.recv().await.unwrap();
            tokio::time::sleep(WAIT * 2 / 3).await;
            let init = first.succeed();
            init.receive().await;
            drop(init);
            let _never = starts.recv().await.unwrap();
            let error = running.await.unwrap().unwrap_err();
            assert!(matches!(error, RunError::Pool(PoolError::QueueTimeout { waited: WAIT })), "{error}");
            assert_eq!(begun.elapsed().as_secs(), WAIT.as_secs());
        });
    }
}
