//! Piston's API, version 2: what its clients send and read, and what we add beside its fields.

mod answer;
mod request;
mod version;

use std::sync::Arc;

use warp::filters::BoxedFilter;
use warp::reply::Response;
use warp::{Filter, Reply};

use crate::http::Api;
use crate::http::error::ApiError;
use crate::http::json::is_json;
use crate::http::openapi::Refused;
use crate::http::request::{Call, post};
use crate::run::Runner;
pub use answer::{Answer, Ending, Ran, Runtime, StageAnswer};
pub use request::{Request, arguments, place};

/// A request that is one, for those who sent another.
const EXAMPLE: &str = "{\"language\": \"…\", \"version\": \"*\", \"files\": [{\"content\": \"…\"}]}";

/// Answers `/api/v2/runtimes`.
pub fn runtimes_filter(api: &Arc<Api>) -> BoxedFilter<(Response,)> {
    let api = Arc::clone(api);
    warp::any().map(move || warp::reply::json(&runtimes(&api.runner)).into_response()).boxed()
}

/// Answers `/api/v2/execute`.
pub fn execute_filter(api: &Arc<Api>) -> BoxedFilter<(Response,)> {
    post(is_taken, EXAMPLE, execute, api)
}

/// Published clients send their JSON as text, or do not say what it is.
fn is_taken(kind: Option<&str>) -> bool {
    let essence = kind.and_then(|kind| kind.split(';').next()).map(str::trim);
    is_json(kind) || essence.is_none_or(|essence| essence.eq_ignore_ascii_case("text/plain"))
}

/// The languages that are served
#[utoipa::path(get, path = "/api/v2/runtimes", responses((status = 200, description = "All of them", body = Vec<Runtime>), Refused))]
fn runtimes(runner: &Runner) -> Vec<Runtime> {
    runner.languages().iter().map(|language| Runtime::from(&**language)).collect()
}

/// Compile and run a program
///
/// As Piston has it, with additions: `verdict`, `cached`, `age`, `queued`, `truncated`, and totals of bytes. Whatever the
/// program does, the answer is 200. `Cache-Control: no-cache` runs anew; `Accept: text/event-stream` tells what happens.
#[utoipa::path(
    post, path = "/api/v2/execute", request_body = Request,
    responses((status = 200, description = "What became of it",
        content((Answer = "application/json"), (String = "text/event-stream"))), Refused)
)]
async fn execute(request: Request, call: Call) -> Result<Response, ApiError> {
    let (language, job) = request.into_job(call.api.runner.languages(), call.api.source_limit)?;
    call.respond(job, move |answer| Answer::new(&language, answer)).await
}
