//! What all adapters do with a request: read its headers and its body, run its job, answer in the wished form.

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
use crate::http::text::Texts;
use crate::http::{Api, Context, body, events, json};
use crate::model::job::Job;
use crate::run::{Answer, Reuse};

/// The content type of JSON in lines.
pub const LINES: &str = "application/x-ndjson";

/// A request, apart from its body.
#[derive(Clone)]
pub struct Call {
    /// What all routes share.
    pub api: Arc<Api>,
    /// Who asks.
    pub context: Context,
    /// In which form.
    pub wishes: Wishes,
}

impl Call {
    /// The memory that answers to this client may take.
    pub fn memory(&self) -> Allowance {
        self.api.answers.of(&self.context.client)
    }

    /// Does something for this request beside the task that answers it: its log lines are the request's, and a panic
    /// ends it alone.
    pub fn spawn<F: Future<Output = ()> + Send + 'static>(self, work: impl FnOnce(Call) -> F) {
        tokio::spawn(signals::isolate_panics(work(self)).in_current_span());
    }

    /// Answers with what becomes of a job: as it happens, where that is wished, else when it is over. `form` makes the answer.
    pub async fn respond<A: Texts>(
        self,
        job: Job,
        form: impl Fn(&Answer) -> A + Send + Sync + 'static,
    ) -> Result<Response, ApiError> {
        if self.wishes.events {
            return Ok(events::events(self, job, form));
        }
        let ran = self.api.runner.run(job, self.wishes.reuse, &self.context.client).await;
        let answer = ran.map_err(|error| self.context.refusal(error))?;
        body::json(&self.memory(), form(&answer), &answer.outcome).await
    }
}

/// What a request's headers ask for.
#[derive(Debug, Clone, Copy)]
pub struct Wishes {
    /// `Cache-Control: no-cache` asks for a run of its own.
    pub reuse: Reuse,
    /// `Accept: text/event-stream` asks to be told what happens.
    pub events: bool,
    /// `Accept: application/x-ndjson` asks for each result as it comes.
    pub lines: bool,
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

/// Whether a header that is a list has one of these words, its parameters aside.
fn lists(headers: &HeaderMap, name: HeaderName, words: &[&str]) -> bool {
    let values = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
    values
        .flat_map(|value| value.split(','))
        .filter_map(|item| item.split(';').next())
        .any(|item| words.iter().any(|word| item.trim().eq_ignore_ascii_case(word)))
}

/// A filter that takes a body of JSON; `taken` tells the content types of it, `example` is for those who sent something else.
pub fn post<T: DeserializeOwned + Send + 'static, F>(
    taken: fn(Option<&str>) -> bool,
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
                let bodies = api.bodies.of(&context.client);
                let request = json::body(&headers, body, &bodies, api.body_limit, taken, example).await?;
                handler(request, Call { api, context, wishes: Wishes::from(&headers) }).await
            }
        })
        .map(|answered: Result<Response, ApiError>| answered.unwrap_or_else(Reply::into_response))
        .boxed()
}
