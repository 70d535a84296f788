//! `POST /coderunner`: code in, three fields out.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use warp::filters::BoxedFilter;
use warp::reply::Response;

use super::error::ApiError;
use super::openapi::Refused;
use super::{ApiSettings, Wishes, is_json, post, respond};
use crate::job::{Job, Outcome, StageOutcome, Streams};
use crate::language::Language;
use crate::runner::Runner;

/// A request that is one, for those who sent another.
const EXAMPLE: &str = "{\"code\": \"…\"}";

/// What is asked. Fields of other APIs are ignored.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = Code, example = json!({"code": "echo hello"}))]
pub struct Request {
    /// The program, in the default language.
    code: String,
}

/// What is answered.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = CodeAnswer)]
struct Answer {
    /// 1 if it compiled, 0 if not.
    #[schema(maximum = 1)]
    status: u8,
    /// What the compiler printed, both streams in order.
    compile_output: String,
    /// What the program printed, both streams in order. A last line that begins with `coderunner:` says why it was cut short.
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
        let job = language.job(self.code.into(), Streams::Merged);
        job.has_room().map_err(ApiError::BadRequest)?;
        Ok(job)
    }
}

/// The path of plain code.
pub fn route(runner: &Arc<Runner>, settings: &Arc<ApiSettings>) -> BoxedFilter<(Response,)> {
    post(warp::path!("coderunner"), is_json, EXAMPLE, run, runner, settings)
}

/// Compile and run code in the default language
///
/// Whatever the program does, the answer is 200. With `Accept: text/event-stream` events tell what happens: `queued`,
/// `stage`, `data`, `exit`, and at last `result` with the plain answer, or `error`.
#[utoipa::path(
    post, path = "/coderunner", operation_id = "code", request_body = Request,
    responses((status = 200, description = "What became of it",
        content((Answer = "application/json"), (String = "text/event-stream"))), Refused)
)]
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
