//! The part that all adapters share: reads the headers and the body of a request, runs its job, and responds in the
//! requested format.

use std::sync::Arc;

use serde::de::DeserializeOwned;
use tracing::Instrument;
use warp::filters::BoxedFilter;
use warp::http::header::{ACCEPT, CACHE_CONTROL};
use warp::http::{HeaderMap, HeaderName};
use warp::reply::Response;
use warp::{Filter, Reply};

use crate::host::signals;
use crate::http::budget::Allowance;
use crate::http::error::ApiError;
use crate::http::headers::list_items;
use crate::http::text::Texts;
use crate::http::{Api, Context, body, events, json};
use crate::model::job::Job;
use crate::run::{Answer, Reuse};

/// The content type of newline-delimited JSON.
pub const NDJSON: &str = "application/x-ndjson";

/// A request without its body.
#[derive(Clone)]
pub struct Call {
    /// State shared by all routes.
    pub api: Arc<Api>,
    /// Client and id of the request.
    pub context: Context,
    /// The requested form of the response.
    pub preferences: Preferences,
}

impl Call {
    /// Memory for responses to this client.
    pub fn memory(&self) -> Allowance {
        self.api.answers.for_client(&self.context.client)
    }

    /// Spawns a task for this request. It logs in the span of the request, and a panic ends only the task.
    pub fn spawn<F: Future<Output = ()> + Send + 'static>(self, work: impl FnOnce(Call) -> F) {
        tokio::spawn(signals::isolate_panics(work(self)).in_current_span());
    }

    /// Runs a job and responds: with events while it runs if the client asked for them, else with the result.
    /// `to_response` converts the answer.
    pub async fn respond<A: Texts>(
        self,
        job: Job,
        to_response: impl Fn(&Answer) -> A + Send + Sync + 'static,
    ) -> Result<Response, ApiError> {
        if self.preferences.events {
            return Ok(events::respond(self, job, to_response));
        }
        let ran = self.api.runner.run(job, self.preferences.reuse, &self.context.client).await;
        let answer = ran.map_err(|error| self.context.api_error(error))?;
        body::json(&self.memory(), to_response(&answer), &answer.outcome).await
    }
}

/// The preferences in the headers of a request.
#[derive(Debug, Clone, Copy)]
pub struct Preferences {
    /// `Cache-Control: no-cache` asks for a new run.
    pub reuse: Reuse,
    /// `Accept: text/event-stream` asks for events.
    pub events: bool,
    /// `Accept: application/x-ndjson` asks for one result per line, as each completes.
    pub lines: bool,
}

impl From<&HeaderMap> for Preferences {
    fn from(headers: &HeaderMap) -> Preferences {
        Preferences {
            reuse: match list_contains(headers, CACHE_CONTROL, &["no-cache", "no-store"]) {
                true => Reuse::Refused,
                false => Reuse::Allowed,
            },
            events: list_contains(headers, ACCEPT, &["text/event-stream"]),
            lines: list_contains(headers, ACCEPT, &[NDJSON]),
        }
    }
}

/// Whether a header with a list contains one of these words; parameters are ignored.
fn list_contains(headers: &HeaderMap, name: HeaderName, words: &[&str]) -> bool {
    list_items(headers, name)
        .filter_map(|item| item.split(';').next())
        .any(|item| words.iter().any(|word| item.trim().eq_ignore_ascii_case(word)))
}

/// A filter for a route with a JSON body. `accepts` decides which content types are allowed; `example` is shown if the
/// body is invalid.
pub fn post<T: DeserializeOwned + Send + 'static, F>(
    accepts: fn(Option<&str>) -> bool,
    example: &'static str,
    handler: fn(T, Call) -> F,
    api: &Arc<Api>,
) -> BoxedFilter<(Response,)>
where
    F: Future<Output = Result<Response, ApiError>> + Send + 'static,
{
    let api = Arc::clone(api);
    warp::header::headers_cloned()
        .and(warp::ext::get::<Context>())
        .and(warp::body::stream())
        .then(move |headers: HeaderMap, context: Context, body| {
            let api = Arc::clone(&api);
            async move {
                let bodies = api.bodies.for_client(&context.client);
                let request = json::read_body(&headers, body, &bodies, api.body_limit, accepts, example).await?;
                handler(request, Call { api, context, preferences: Preferences::from(&headers) }).await
            }
        })
        .map(|result: Result<Response, ApiError>| result.unwrap_or_else(Reply::into_response))
        .boxed()
}
