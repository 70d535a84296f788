//! Piston's API, version 2, with additional fields.

mod request;
mod response;
mod version;

use std::sync::Arc;

use warp::filters::BoxedFilter;
use warp::reply::Response;
use warp::{Filter, Reply};

use crate::http::Api;
use crate::http::error::ApiError;
use crate::http::json::is_json;
use crate::http::openapi::ErrorResponses;
use crate::http::request::{Call, post};
use crate::run::Runner;
pub use request::{ExecuteRequest, check_args, job_files};
pub use response::{Ending, ExecuteResponse, RunResult, Runtime, StageResult};

/// A valid request, shown in error messages.
const EXAMPLE: &str = "{\"language\": \"…\", \"version\": \"*\", \"files\": [{\"content\": \"…\"}]}";

/// Answers `/api/v2/runtimes`.
pub fn runtimes_filter(api: &Arc<Api>) -> BoxedFilter<(Response,)> {
    let api = Arc::clone(api);
    warp::any().map(move || warp::reply::json(&runtimes(&api.runner)).into_response()).boxed()
}

/// Answers `/api/v2/execute`.
pub fn execute_filter(api: &Arc<Api>) -> BoxedFilter<(Response,)> {
    post(is_accepted, EXAMPLE, execute, api)
}

/// Some published clients send JSON as `text/plain` or without a content type.
fn is_accepted(kind: Option<&str>) -> bool {
    let essence = kind.and_then(|kind| kind.split(';').next()).map(str::trim);
    is_json(kind) || essence.is_none_or(|essence| essence.eq_ignore_ascii_case("text/plain"))
}

/// The enabled languages
#[utoipa::path(get, path = "/api/v2/runtimes", responses((status = 200, description = "All enabled languages", body = Vec<Runtime>), ErrorResponses))]
fn runtimes(runner: &Runner) -> Vec<Runtime> {
    runner.languages().iter().map(|language| Runtime::from(&**language)).collect()
}

/// Compile and run a program
///
/// As in Piston, with additional fields: `verdict`, `cached`, `age`, `queued`, `truncated`, `stdout_bytes` and
/// `stderr_bytes`. The status is 200 whatever the program does. `Cache-Control: no-cache` forces a new run. With
/// `Accept: text/event-stream` the response is a stream of events.
#[utoipa::path(
    post, path = "/api/v2/execute", request_body = ExecuteRequest,
    responses((status = 200, description = "The result of the run",
        content((ExecuteResponse = "application/json"), (String = "text/event-stream"))), ErrorResponses)
)]
async fn execute(request: ExecuteRequest, call: Call) -> Result<Response, ApiError> {
    let (language, job) = request.into_job(call.api.runner.languages(), call.api.source_limit)?;
    call.respond(job, move |answer| ExecuteResponse::new(&language, answer)).await
}
