//! The HTTP side: wire types become jobs, outcomes become answers, errors become statuses in one place.

pub mod api;
pub mod auth;
mod backlog;
mod body;
mod budget;
mod docs;
mod error;
mod events;
pub mod front;
mod inbox;
mod json;
mod openapi;
pub mod origin;
mod page;
pub mod server;
mod socket;
mod text;

pub use api::piston::{Answer as PistonAnswer, place};

use std::convert::Infallible;
use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde_json::json;
use warp::filters::BoxedFilter;
use warp::http::header::{ACCEPT, CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use warp::http::{HeaderMap, HeaderName, StatusCode};
use warp::reply::Response;
use warp::{Filter, Rejection, Reply};

use crate::metrics::Export;
use crate::model::job::Job;
use crate::run::readiness::Readiness;
use crate::run::{Answer, Reuse, Runner};
use api::{batch, coderunner, connect, piston};
use body::Leased;
pub use budget::Budget;
use error::ApiError;
use json::is_json;
use openapi::Refused;
use text::Texts;

/// The content type of JSON in lines.
const LINES: &str = "application/x-ndjson";

/// What the API needs of the settings.
#[derive(Debug, Clone)]
pub struct ApiSettings {
    /// Memory for answers on their way.
    pub answers: Arc<Budget>,
    /// Memory for bodies of requests on theirs.
    pub bodies: Arc<Budget>,
    /// Largest body in bytes.
    pub body_limit: usize,
    /// Largest source in bytes.
    pub source_limit: usize,
    /// Whether there is a page at `/`, and `/embed.js`.
    pub playground: bool,
}

/// All routes.
pub fn routes(
    runner: Arc<Runner>,
    settings: ApiSettings,
    readiness: Readiness,
    metrics: Export,
) -> BoxedFilter<(Response,)> {
    let page = page::route(settings.playground);
    let settings = Arc::new(settings);
    let (ready_runner, readiness) = (Arc::clone(&runner), Arc::new(readiness));
    let measured_runner = Arc::clone(&runner);

    let run = coderunner::route(&runner, &settings);
    let api_v2 = piston::routes(&runner, &settings)
        .or(batch::route(&runner, &settings))
        .unify()
        .or(connect::routes(&runner, &settings))
        .unify();
    let read = || warp::get().or(warp::head()).unify();
    let healthz = warp::path!("healthz").and(read()).map(healthz);
    let readyz =
        warp::path!("readyz").and(read()).then(move || ready(Arc::clone(&ready_runner), Arc::clone(&readiness)));
    let measured = warp::path!("metrics").and(read()).then({
        let budget = Arc::clone(&settings.answers);
        move || exposition(metrics.text(&measured_runner.now()), Arc::clone(&budget))
    });
    let other_method = warp::path!("healthz")
        .or(warp::path!("readyz"))
        .or(warp::path!("metrics"))
        .map(|_| ApiError::MethodNotAllowed("GET, HEAD").into_response());

    let rest = api_v2
        .or(healthz)
        .unify()
        .or(readyz)
        .unify()
        .or(measured)
        .unify()
        .or(openapi::routes())
        .unify()
        .or(page)
        .unify()
        .or(other_method)
        .unify();
    // Boxed, a pointer: each request takes a copy of all that may come next.
    run.or(rest.boxed()).unify().recover(refuse).unify().boxed()
}

/// Turns what no route took into an answer.
async fn refuse(rejection: Rejection) -> Result<Response, Infallible> {
    Ok(ApiError::from_rejection(&rejection).into_response())
}

/// What a request's headers ask for.
#[derive(Debug, Clone, Copy)]
struct Wishes {
    /// `Cache-Control: no-cache` asks for a run of its own.
    reuse: Reuse,
    /// `Accept: text/event-stream` asks to be told what happens.
    events: bool,
    /// `Accept: application/x-ndjson` asks for each result as it comes.
    lines: bool,
}

impl From<&HeaderMap> for Wishes {
    fn from(headers: &HeaderMap) -> Wishes {
        Wishes {
            reuse: match lists(headers, CACHE_CONTROL, &["no-cache", "no-store"]) {
                true => Reuse::Refused,
                false => Reuse::Allowed,
            },
            events: lists(headers, ACCEPT, &["text/event-stream"]),
            lines: lists(headers, ACCEPT, &[LINES]),
        }
    }
}

/// Answers with what becomes of a job: as it happens, where that is wished, else when it is over. `form` makes the answer.
async fn respond<A: Texts>(
    runner: Arc<Runner>,
    settings: &ApiSettings,
    job: Job,
    wishes: Wishes,
    form: impl Fn(&Answer) -> A + Send + Sync + 'static,
) -> Result<Response, ApiError> {
    if wishes.events {
        return Ok(events::events(runner, Arc::clone(&settings.answers), job, wishes.reuse, form));
    }
    let answer = runner.run(job, wishes.reuse).await?;
    body::json(&settings.answers, form(&answer), &answer.outcome).await
}

/// Whether a header that is a list has one of these words, its parameters aside.
fn lists(headers: &HeaderMap, name: HeaderName, words: &[&str]) -> bool {
    let values = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
    values
        .flat_map(|value| value.split(','))
        .filter_map(|item| item.split(';').next())
        .any(|item| words.iter().any(|word| item.trim().eq_ignore_ascii_case(word)))
}

/// Answers what was posted.
type Handler<T, F> = fn(Result<T, ApiError>, Wishes, Arc<Runner>, Arc<ApiSettings>) -> F;

/// A path that takes JSON by POST and nothing else; `taken` tells the content types of it.
fn post<T: DeserializeOwned + Send + 'static, F>(
    path: impl Filter<Extract = (), Error = Rejection> + Clone + Send + Sync + 'static,
    taken: fn(Option<&str>) -> bool,
    example: &'static str,
    handler: Handler<T, F>,
    runner: &Arc<Runner>,
    settings: &Arc<ApiSettings>,
) -> BoxedFilter<(Response,)>
where
    F: Future<Output = Result<Response, ApiError>> + Send + 'static,
{
    let (runner, settings) = (Arc::clone(runner), Arc::clone(settings));
    let posted = path
        .clone()
        .and(warp::post())
        .and(warp::header::headers_cloned())
        .and(warp::body::stream())
        .then(move |headers: HeaderMap, body| {
            let (runner, settings) = (Arc::clone(&runner), Arc::clone(&settings));
            async move {
                let wishes = Wishes::from(&headers);
                let request = json::body(&headers, body, &settings, taken, example).await;
                handler(request, wishes, runner, settings).await
            }
        })
        .map(Reply::into_response);
    let other_method = path.map(|| ApiError::MethodNotAllowed("POST, OPTIONS").into_response());
    posted.or(other_method).unify().boxed()
}

/// Whether the server lives
#[utoipa::path(get, path = "/healthz", responses((status = 200, description = "It does", body = serde_json::Value)))]
fn healthz() -> Response {
    warp::reply::json(&json!({"status": "ok"})).into_response()
}

/// What Prometheus asks for
#[utoipa::path(get, path = "/metrics", operation_id = "metrics", responses((status = 200, description = "All metrics", content_type = "text/plain", body = String), Refused))]
async fn exposition(text: String, budget: Arc<Budget>) -> Response {
    let mut response = match budget.lease(text.len()).await {
        Ok(lease) => Response::new(Leased::bytes(text.into_bytes(), Arc::new(lease)).into()),
        Err(exhausted) => return ApiError::from(exhausted).into_response(),
    };
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8"));
    response
}

/// Whether the default language works, and what is wrong with each that does not
#[utoipa::path(
    get, path = "/readyz", operation_id = "readyz",
    responses(
        (status = 200, description = "It does", body = serde_json::Value),
        (status = 503, description = "It does not", body = serde_json::Value),
    )
)]
async fn ready(runner: Arc<Runner>, readiness: Arc<Readiness>) -> Response {
    let problems = runner.languages().iter().map(|language| readiness.problem(&runner, language));
    let problems = futures_util::future::join_all(problems).await;
    let mut languages = serde_json::Map::new();
    let mut ready = false;
    let mut missing: Vec<&str> = Vec::new();
    for (rank, (language, problem)) in runner.languages().iter().zip(problems).enumerate() {
        let status = runner.pool().status(&language.name);
        let lacking = status.enforced.map(|enforced| enforced.missing()).unwrap_or_default();
        let works = problem.is_none();
        if rank == 0 {
            ready = works;
            missing = lacking;
        }
        languages.insert(language.name.clone(), json!({"ready": works, "problem": problem}));
    }
    let body = json!({"ready": ready, "languages": languages, "limitsNotEnforced": missing});
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    warp::reply::with_status(warp::reply::json(&body), status).into_response()
}
