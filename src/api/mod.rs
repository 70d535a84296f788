//! The HTTP side: wire types become jobs, outcomes become answers, errors become statuses in one place.

pub mod batch;
pub mod coderunner;
pub mod connect;
mod docs;
mod error;
pub mod front;
mod live;
mod openapi;
mod page;
pub mod piston;
pub mod server;

pub use piston::{Answer as PistonAnswer, place};

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures_util::StreamExt;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;
use warp::filters::BoxedFilter;
use warp::http::header::{ACCEPT, CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use warp::http::{HeaderMap, HeaderName, Method, StatusCode};
use warp::reply::Response;
use warp::{Filter, Rejection, Reply};

use crate::job::Job;
use crate::metrics::Export;
use crate::ready::Readiness;
use crate::runner::{Answer, Reuse, Runner};
use error::ApiError;
use openapi::Refused;

/// How long a client may take to send its body.
const BODY_TIME: Duration = Duration::from_secs(10);

/// How long a browser may remember the answer to a preflight, in seconds: the most that Firefox takes is a day.
const PREFLIGHT_AGE: u32 = 86_400;

/// Headers that pages of other origins may send and read beside the usual ones.
const PAGES_SEND: [&str; 6] =
    ["content-type", "cache-control", "authorization", "x-api-key", "x-request-id", "traceparent"];
const PAGES_READ: [&str; 2] = ["x-request-id", "retry-after"];

/// The content type of JSON in lines.
const LINES: &str = "application/x-ndjson";

/// What the API needs of the settings.
#[derive(Debug, Clone)]
pub struct ApiSettings {
    /// Origins whose pages may call, `*` for any.
    pub cors_origins: Vec<String>,
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
    let cors = cors(&settings.cors_origins);
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
    let measured = warp::path!("metrics").and(read()).map(move || exposition(metrics.text(&measured_runner)));
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
    let all = front::refusals().or(run).unify().or(rest.boxed()).unify().recover(refuse).unify().boxed();
    // Inside, so that a page can read refusals; and outside, for those of its origin.
    own_page().and(all.clone()).or(all.with(cors)).recover(refuse).map(Reply::into_response).boxed()
}

/// Passes what no page asks, and what the server's own page does: browsers name its origin too, which need not be among
/// those that may call.
fn own_page() -> impl Filter<Extract = (), Error = Rejection> + Clone {
    let header = warp::header::optional::<String>;
    header("sec-fetch-site")
        .and(header("origin"))
        .and(header("host"))
        .and_then(async |site: Option<String>, origin: Option<String>, host: Option<String>| {
            // Plain HTTP has no Sec-Fetch-Site, a proxy may have changed Host.
            let same =
                origin.as_deref().and_then(|origin| origin.split_once("://")).map(|(_, rest)| rest) == host.as_deref();
            match origin.is_none() || site.as_deref() == Some("same-origin") || same {
                true => Ok(()),
                false => Err(warp::reject::not_found()),
            }
        })
        .untuple_one()
}

/// Turns what no route took into an answer.
async fn refuse(rejection: Rejection) -> Result<Response, Infallible> {
    Ok(ApiError::from_rejection(&rejection).into_response())
}

/// Answers other origins' preflights and refuses what comes from origins that may not call: a browser asks for no leave
/// before it opens a WebSocket.
fn cors(origins: &[String]) -> warp::cors::Builder {
    let any = origins.iter().any(|origin| origin == "*");
    let builder =
        warp::cors().allow_methods([Method::GET, Method::POST]).allow_headers(PAGES_SEND).expose_headers(PAGES_READ);
    let builder = builder.max_age(PREFLIGHT_AGE);
    match any {
        true => builder.allow_any_origin(),
        false => builder.allow_origins(origins.iter().map(String::as_str)),
    }
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

fn wishes() -> impl Filter<Extract = (Wishes,), Error = Infallible> + Clone + Send + Sync {
    warp::header::headers_cloned().map(|headers: HeaderMap| Wishes {
        reuse: match lists(&headers, CACHE_CONTROL, &["no-cache", "no-store"]) {
            true => Reuse::Refused,
            false => Reuse::Allowed,
        },
        events: lists(&headers, ACCEPT, &["text/event-stream"]),
        lines: lists(&headers, ACCEPT, &[LINES]),
    })
}

/// Answers with what becomes of a job: as it happens, where that is wished, else when it is over. `form` makes the answer.
async fn respond<A: Serialize>(
    runner: Arc<Runner>,
    job: Job,
    wishes: Wishes,
    form: impl Fn(&Answer) -> A + Send + 'static,
) -> Result<Response, ApiError> {
    if wishes.events {
        return Ok(live::events(runner, job, wishes.reuse, move |answer| json!(form(answer))));
    }
    let answer = runner.run(job, wishes.reuse).await?;
    Ok(warp::reply::json(&form(&answer)).into_response())
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
        .and(json_body(settings.body_limit, taken, example))
        .and(wishes())
        .then(move |request, wishes| handler(request, wishes, Arc::clone(&runner), Arc::clone(&settings)))
        .map(Reply::into_response);
    let other_method = path.map(|| ApiError::MethodNotAllowed("POST, OPTIONS").into_response());
    posted.or(other_method).unify().boxed()
}

/// A JSON body of any framing, within its bounds of size and time; `taken` tells the content types of it.
fn json_body<T: DeserializeOwned + Send>(
    limit: usize,
    taken: fn(Option<&str>) -> bool,
    example: &'static str,
) -> impl Filter<Extract = (Result<T, ApiError>,), Error = Rejection> + Clone + Send + Sync {
    warp::header::optional::<String>("content-type").and(warp::body::stream()).then(
        move |kind: Option<String>, body| async move {
            if !taken(kind.as_deref()) {
                return Err(ApiError::UnsupportedMediaType);
            }
            let bytes = read_body(body, limit).await?;
            serde_json::from_slice(&bytes).map_err(|error| ApiError::BadBody { why: error.to_string(), example })
        },
    )
}

fn is_json(kind: Option<&str>) -> bool {
    let essence = kind.and_then(|kind| kind.split(';').next()).unwrap_or_default().trim();
    essence.eq_ignore_ascii_case("application/json")
}

async fn read_body(
    body: impl futures_util::Stream<Item = Result<impl Buf, warp::Error>>,
    limit: usize,
) -> Result<Bytes, ApiError> {
    let reading = async {
        let mut body = std::pin::pin!(body);
        let mut bytes = BytesMut::new();
        while let Some(chunk) = body.next().await {
            let chunk = chunk.map_err(|_| ApiError::BadRequest("the body ended too early".into()))?;
            if bytes.len() + chunk.remaining() > limit {
                return Err(ApiError::TooLarge { what: "body", limit });
            }
            bytes.put(chunk);
        }
        Ok(bytes.freeze())
    };
    tokio::time::timeout(BODY_TIME, reading).await.unwrap_or(Err(ApiError::BodyTimeout))
}

/// Whether the server lives
#[utoipa::path(get, path = "/healthz", responses((status = 200, description = "It does", body = serde_json::Value)))]
fn healthz() -> Response {
    warp::reply::json(&json!({"status": "ok"})).into_response()
}

/// What Prometheus asks for
#[utoipa::path(get, path = "/metrics", operation_id = "metrics", responses((status = 200, description = "All metrics", content_type = "text/plain", body = String), Refused))]
fn exposition(text: String) -> Response {
    let mut response = text.into_response();
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
