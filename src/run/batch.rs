//! A batch: one program that is run on many inputs, and compiled once.

use std::pin::pin;

use futures_util::{StreamExt, stream};
use tokio::sync::oneshot;

use crate::model::client::Client;
use crate::model::job::Job;
use crate::run::answer::{Answer, RunError};
use crate::run::runner::{Reuse, Runner};
use crate::sandbox::{BuildRequest, Live};

/// Most runs of a batch at the same time: few, so that there is room for those of others.
const AT_ONCE: usize = 4;

impl Runner {
    /// Runs jobs that differ only in their input, a few at a time, and tells the result of each as it comes. The first
    /// one is compiled; the others run the compiled program, each in a sandbox of its own. Where that cannot be copied
    /// there, each one is compiled by itself. Dropping the future ends all.
    pub async fn run_batch(
        &self,
        jobs: Vec<Job>,
        reuse: Reuse,
        client: &Client,
        tell: impl Fn(usize, Result<Answer, RunError>),
    ) {
        let mut left = jobs.into_iter().enumerate();
        let (first, job) = loop {
            let Some((index, job)) = left.next() else { return };
            match self.remembered(&job, reuse) {
                Ok(None) => break (index, job),
                Ok(Some(answer)) => tell(index, Ok(answer)),
                Err(error) => tell(index, Err(error)),
            }
        };
        let (wanted, mut handed_on) = oneshot::channel();
        let wanted = BuildRequest { permit: self.tasks.builds.reserve(self.most_build), build: wanted };
        let mut running = pin!(self.run_live(job, Live { build_request: Some(wanted), ..Live::default() }, client));
        let mut over = None;
        let built = tokio::select! {
            biased;
            Ok(built) = &mut handed_on => built,
            result = &mut running => match result {
                // It was over before the compiled program was received. Its outcome is that of its own input.
                Ok(answer) if answer.outcome.compiled() => {
                    over = Some(Ok(answer));
                    handed_on.try_recv().ok().flatten()
                }
                // It never got as far as being run, and none of the others would.
                result => {
                    left.for_each(|(index, _)| tell(index, result.clone()));
                    return tell(first, result);
                }
            },
        };
        let running = async move {
            match over {
                Some(result) => result,
                None => running.await,
            }
        };
        let others = stream::iter(left)
            .map(async |(index, job)| (index, self.run_compiled(job, built.clone(), reuse, client).await))
            .buffer_unordered(AT_ONCE - 1);
        let mut results = pin!(stream::select(stream::once(running).map(|result| (first, result)), others));
        while let Some((index, result)) = results.next().await {
            tell(index, result);
        }
    }
}
