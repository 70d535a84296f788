//! `/healthz`, `/readyz` and `/metrics`.

use std::sync::Arc;

use serde_json::json;
use warp::filters::BoxedFilter;
use warp::http::StatusCode;
use warp::http::header::{CONTENT_TYPE, HeaderValue};
use warp::reply::Response;
use warp::{Filter, Reply};

use crate::http::body::Leased;
use crate::http::error::ApiError;
use crate::http::openapi::ErrorResponses;
use crate::http::{Api, Context};

/// Answers `/healthz`.
pub fn live_filter(_: &Arc<Api>) -> BoxedFilter<(Response,)> {
    warp::any().map(live).boxed()
}

/// Answers `/readyz`.
pub fn ready_filter(api: &Arc<Api>) -> BoxedFilter<(Response,)> {
    let api = Arc::clone(api);
    warp::any().then(move || ready(Arc::clone(&api))).boxed()
}

/// Answers `/metrics`.
pub fn metrics_filter(api: &Arc<Api>) -> BoxedFilter<(Response,)> {
    let api = Arc::clone(api);
    warp::ext::get::<Context>().then(move |context| exposition(context, Arc::clone(&api))).boxed()
}

/// Whether the server is alive
#[utoipa::path(get, path = "/healthz", operation_id = "healthz", responses((status = 200, description = "The server is alive", body = serde_json::Value)))]
fn live() -> Response {
    warp::reply::json(&json!({"status": "ok"})).into_response()
}

/// Metrics for Prometheus
#[utoipa::path(get, path = "/metrics", operation_id = "metrics", responses((status = 200, description = "All metrics", content_type = "text/plain", body = String), ErrorResponses))]
async fn exposition(context: Context, api: Arc<Api>) -> Response {
    let text = api.metrics.text(&api.runner.metrics_snapshot());
    let mut response = match api.answers.for_client(&context.client).lease(text.len()).await {
        Ok(lease) => Response::new(Leased::bytes(text.into_bytes(), Arc::new(lease)).into()),
        Err(exhausted) => return ApiError::from(exhausted).into_response(),
    };
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8"));
    response
}

/// Whether the default language works, and the problem of each language that does not
#[utoipa::path(
    get, path = "/readyz", operation_id = "readyz",
    responses(
        (status = 200, description = "The default language works", body = serde_json::Value),
        (status = 503, description = "The default language does not work", body = serde_json::Value),
    )
)]
async fn ready(api: Arc<Api>) -> Response {
    let runner = &api.runner;
    let problems = runner.languages().iter().map(|language| api.readiness.problem(runner, language));
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
