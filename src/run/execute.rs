//! A run: a job in a sandbox of its own, and in another one if that was lost before anything of the job ran in it.

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

/// Runs a job; returns the id of the image that it ran on as well.
pub(super) async fn execute(
    pool: &Pool,
    language: &Language,
    job: &Job,
    mut live: Live,
    client: &Client,
) -> Result<(Answer, String), RunError> {
    let (mut retries, mut queued) = (Retries::default(), Duration::ZERO);
    let came = tokio::time::Instant::now();
    loop {
        let asked = Instant::now();
        let acquired = pool.acquire(&job.language, client, live.events.as_ref(), came).await;
        let sandbox = acquired.inspect_err(|error| metrics::error(error.kind()))?;
        queued += asked.elapsed();
        let _busy = metrics::sandbox_taken(&job.language, asked.elapsed());
        let image = sandbox.image.clone();
        let carried = live.build_for(&image).is_some();
        match sandbox.run(language, job, &mut live).await {
            Ok(outcome) => {
                pool.note_proof(&job.language);
                metrics::ran(&job.language, &outcome, !carried);
                return Ok((Answer { outcome: Arc::new(outcome), cached: None, queued }, image));
            }
            Err(error) => {
                metrics::error(error.kind());
                if retries.allow(&error) {
                    continue;
                }
                match &error {
                    // Clients are not told of it as a failure of the server, so nothing else logs it.
                    SandboxError::HostMemory => tracing::error!(language = job.language, %error, "a run failed"),
                    // The API that answers logs it, under the id of each request.
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
    fn a_request_whose_sandbox_was_lost_waits_no_longer_than_others() {
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
