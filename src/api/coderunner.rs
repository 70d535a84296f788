//! `POST /coderunner`: code in, three fields out.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use warp::filters::BoxedFilter;
use warp::reply::Response;

use super::error::ApiError;
use super::{ApiSettings, Wishes, is_json, post, respond};
use crate::job::{Job, Outcome, StageOutcome, Streams};
use crate::language::Language;
use crate::runner::Runner;

/// A request that is one, for those who sent another.
const EXAMPLE: &str = "{\"code\": \"…\"}";

/// What is asked. Fields of other APIs are ignored.
#[derive(Debug, Deserialize)]
pub struct Request {
    code: String,
}

/// What is answered.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Answer {
    status: u8,
    compile_output: String,
    run_output: String,
}

impl From<&Outcome> for Answer {
    fn from(outcome: &Outcome) -> Answer {
        let text = |stage: &Option<StageOutcome>| stage.as_ref().map(StageOutcome::explained).unwrap_or_default();
        Answer {
            status: outcome.compiled().into(),
            compile_output: text(&outcome.compile),
            run_output: text(&outcome.run),
        }
    }
}

impl Request {
    /// The job that it stands for.
    pub fn into_job(self, language: &Language, source_limit: usize) -> Result<Job, ApiError> {
        if self.code.len() > source_limit {
            return Err(ApiError::TooLarge { what: "code", limit: source_limit });
        }
        Ok(language.job(self.code.into(), Streams::Merged))
    }
}

/// The path of plain code.
pub fn route(runner: &Arc<Runner>, settings: &Arc<ApiSettings>) -> BoxedFilter<(Response,)> {
    post(warp::path!("coderunner"), is_json, EXAMPLE, run, runner, settings)
}

/// Runs the code in the default language.
async fn run(
    request: Result<Request, ApiError>,
    wishes: Wishes,
    runner: Arc<Runner>,
    settings: Arc<ApiSettings>,
) -> Result<Response, ApiError> {
    let language = runner.language(None)?;
    let job = request?.into_job(language, settings.source_limit)?;
    respond(runner, job, wishes, |answer| Answer::from(&*answer.outcome)).await
}
