//! A batch: one program, compiled once and run on many inputs.

use std::pin::pin;

use futures_util::{StreamExt, stream};
use tokio::sync::oneshot;

use crate::model::client::Client;
use crate::model::job::Job;
use crate::run::answer::{Answer, RunError};
use crate::run::runner::{Reuse, Runner};
use crate::sandbox::{BuildRequest, Live};

/// Most runs of a batch at the same time: few, to leave sandboxes for other clients.
const MAX_RUNS: usize = 4;

impl Runner {
    /// Runs jobs that differ only in their input, a few at a time, and calls `on_result` with the index and result of
    /// each as it completes. The first job compiles the program; the others run the compiled files, each in a sandbox
    /// of its own. If the compiled files cannot be copied there, each job compiles for itself. Dropping the future ends
    /// all runs.
    pub async fn run_batch(
        &self,
        jobs: Vec<Job>,
        reuse: Reuse,
        client: &Client,
        on_result: impl Fn(usize, Result<Answer, RunError>),
    ) {
        let mut left = jobs.into_iter().enumerate();
        let (first, job) = loop {
            let Some((index, job)) = left.next() else { return };
            match self.cached(&job, reuse) {
                Ok(None) => break (index, job),
                Ok(Some(answer)) => on_result(index, Ok(answer)),
                Err(error) => on_result(index, Err(error)),
            }
        };
        let (wanted, mut built_files) = oneshot::channel();
        let wanted = BuildRequest { permit: self.tasks.builds.reserve(self.max_build), build: wanted };
        let mut running = pin!(self.run_live(job, Live { build_request: Some(wanted), ..Live::default() }, client));
        let mut finished = None;
        let built = tokio::select! {
            biased;
            Ok(built) = &mut built_files => built,
            result = &mut running => match result {
                // The first run finished before its compiled files were received here.
                Ok(answer) if answer.outcome.compiled() => {
                    finished = Some(Ok(answer));
                    built_files.try_recv().ok().flatten()
                }
                // The program did not compile, or the server failed: the result is the same for all inputs.
                result => {
                    left.for_each(|(index, _)| on_result(index, result.clone()));
                    return on_result(first, result);
                }
            },
        };
        let running = async move {
            match finished {
                Some(result) => result,
                None => running.await,
            }
        };
        let others = stream::iter(left)
            .map(async |(index, job)| (index, self.run_compiled(job, built.clone(), reuse, client).await))
            .buffer_unordered(MAX_RUNS - 1);
        let mut results = pin!(stream::select(stream::once(running).map(|result| (first, result)), others));
        while let Some((index, result)) = results.next().await {
            on_result(index, result);
        }
    }
}
