//! What every request passes before and after its route: an id, whom it is from, whether that one may, a count, a
//! line in the log.

use std::convert::Infallible;
use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Instant;

use hyper::body::Incoming;
use hyper::service::Service;
use hyper_util::service::TowerToHyperService;
use tokio::sync::watch;
use tracing::Instrument;
use warp::Reply;
use warp::filters::BoxedFilter;
use warp::http::header::{AUTHORIZATION, HeaderMap, UPGRADE};
use warp::http::{HeaderName, HeaderValue, Method, Request};
use warp::reply::Response;

use crate::http::auth::{Credentials, Denied, Gate};
use crate::http::error::ApiError;
use crate::http::origin::{self, Origins};
use crate::http::server::{MAX_HEAD, Place};
use crate::metrics;
use crate::model::client::Client;
use crate::run::context::Caller;

/// Header of a request's id, the client's own or ours.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Headers without names in the `http` crate.
const API_KEY: HeaderName = HeaderName::from_static("x-api-key");
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// Longest id that is taken from a client.
const ID_LENGTH: usize = 64;

/// Counted where the client left before its answer, as nginx has it.
const CLIENT_LEFT: u16 = 499;

/// Paths that are counted by name; all others are one.
const ROUTES: [&str; 12] = [
    "/",
    "/embed.js",
    "/coderunner",
    "/healthz",
    "/readyz",
    "/metrics",
    "/openapi.json",
    "/docs",
    "/api/v2/execute",
    "/api/v2/batch",
    "/api/v2/runtimes",
    "/api/v2/connect",
];

/// All that answers requests: of one configuration.
pub struct Front {
    /// What is behind it.
    pub routes: BoxedFilter<(Response,)>,
    /// Who may.
    pub gate: Gate,
    /// Which names it answers to, and which pages may call.
    pub origins: Origins,
}

/// Answers the requests of one connection, whose peer has this address, each by the configuration of its time. Those
/// that become something else take its place along.
pub fn service(
    fronts: watch::Receiver<Arc<Front>>,
    peer: Option<IpAddr>,
    place: Place,
) -> impl Service<
    Request<Incoming>,
    Response = Response,
    Error = Infallible,
    Future = impl Future<Output = Result<Response, Infallible>> + Send,
> {
    hyper::service::service_fn(move |mut request: Request<Incoming>| {
        let front = Arc::clone(&fronts.borrow());
        if request.headers().contains_key(UPGRADE) {
            request.extensions_mut().insert(place.clone());
        }
        async move {
            let routes = TowerToHyperService::new(warp::service(front.routes.clone()));
            front.answer(request, peer, |request| routes.call(request)).await
        }
    })
}

impl Front {
    async fn answer<B, F>(
        &self,
        request: Request<B>,
        peer: Option<IpAddr>,
        routes: impl FnOnce(Request<B>) -> F,
    ) -> Result<Response, Infallible>
    where
        F: Future<Output = Result<Response, Infallible>>,
    {
        let began = Instant::now();
        let id: Arc<str> = sane_id(request.headers()).map_or_else(|| new_id().into(), Arc::from);
        let client = self.gate.client(&credentials(request.headers(), peer));
        let span = tracing::info_span!("request", %id, trace = tracing::field::Empty, parent = tracing::field::Empty);
        if let Some((trace, parent)) = trace_context(request.headers()) {
            span.record("trace", trace).record("parent", parent);
        }
        let mut seen = Seen { route: route(request.uri().path()), client: client.clone(), began, code: CLIENT_LEFT };
        let caller = Caller { request: Arc::clone(&id), client: client.clone() };
        let answering = async {
            let mut response = caller.scope(self.pass(request, &client, routes)).await?;
            seen.code = response.status().as_u16();
            drop(seen);
            if let Ok(id) = HeaderValue::from_str(&id) {
                response.headers_mut().insert(REQUEST_ID, id);
            }
            Ok(response)
        };
        answering.instrument(span).await
    }

    /// Answers a request, or refuses it where it is from.
    async fn pass<B, F>(
        &self,
        request: Request<B>,
        client: &Client,
        routes: impl FnOnce(Request<B>) -> F,
    ) -> Result<Response, Infallible>
    where
        F: Future<Output = Result<Response, Infallible>>,
    {
        let admitted = small(&request).and_then(|()| self.origins.admit(&request));
        let from = admitted.as_ref().cloned().unwrap_or(origin::From::Nobody);
        let mut response = match (admitted, origin::preflight(&from, &request)) {
            (Err(refused), _) => refused.into_response(),
            (Ok(_), Some(answer)) => answer,
            (Ok(_), None) => match self.admit(request.method(), request.uri().path(), client) {
                Ok(()) => routes(request).await?,
                Err(denied) => ApiError::from(denied).into_response(),
            },
        };
        // Also of refusals, so that a page can read them.
        self.origins.tell(&from, response.headers_mut());
        Ok(response)
    }

    /// Whether a request may go on. Reading is free but for the API and the metrics; preflights carry no key.
    fn admit(&self, method: &Method, path: &str, client: &Client) -> Result<(), Denied> {
        let free = match *method {
            Method::OPTIONS => true,
            Method::GET | Method::HEAD => !path.starts_with("/api") && !path.starts_with("/metrics"),
            _ => false,
        };
        if !free {
            self.gate.knows(client)?;
        }
        if runs_code(method, path) {
            self.gate.count(client)?;
        }
        Ok(())
    }
}

/// A request that is being answered; counted and logged when it is over, however that comes.
struct Seen {
    route: &'static str,
    client: Client,
    began: Instant,
    code: u16,
}

impl Drop for Seen {
    fn drop(&mut self) {
        let took = self.began.elapsed();
        metrics::request(self.route, self.code, took);
        tracing::debug!(route = self.route, code = self.code, took = ?took, client = self.client.to_string(), "answered");
    }
}

/// Refuses a large head: of one that came all at once the connection does not say that it is one.
fn small<B>(request: &Request<B>) -> Result<(), ApiError> {
    let fields = request.headers().iter().map(|(name, value)| name.as_str().len() + value.len());
    let target = request.uri().path_and_query().map_or(0, |target| target.as_str().len());
    match fields.sum::<usize>() + target <= MAX_HEAD {
        true => Ok(()),
        false => Err(ApiError::HeadTooLarge(MAX_HEAD)),
    }
}

/// Whether a request is one of those that a rate is of.
fn runs_code(method: &Method, path: &str) -> bool {
    // Routes are found with a slash at their end, too.
    match path.trim_end_matches('/') {
        "/coderunner" | "/api/v2/execute" | "/api/v2/batch" => method == Method::POST,
        "/api/v2/connect" => method == Method::GET,
        _ => false,
    }
}

/// The route as a label: nothing of what the client wrote.
fn route(path: &str) -> &'static str {
    ROUTES.into_iter().find(|known| *known == path).unwrap_or("other")
}

fn text(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

fn credentials(headers: &HeaderMap, peer: Option<IpAddr>) -> Credentials<'_> {
    Credentials {
        peer,
        // One that is no text stands for an address that is none.
        forwarded: headers.get_all(FORWARDED_FOR).iter().map(|value| value.to_str().unwrap_or_default()).collect(),
        authorization: text(headers, AUTHORIZATION),
        key: text(headers, API_KEY),
    }
}

/// The client's id of a request, where it cannot be mistaken for anything else in a log.
fn sane_id(headers: &HeaderMap) -> Option<&str> {
    let sane = |id: &&str| {
        (1..=ID_LENGTH).contains(&id.len()) && id.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    text(headers, REQUEST_ID).filter(sane)
}

/// An id that a client can quote: unique for this server, and not the next one after another's.
fn new_id() -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    static KEY: LazyLock<RandomState> = LazyLock::new(RandomState::new);
    format!("{:016x}", KEY.hash_one(COUNT.fetch_add(1, Ordering::Relaxed)))
}

/// Trace and parent of W3C's `traceparent`, if it is valid (https://www.w3.org/TR/trace-context/#traceparent-header).
fn trace_context(headers: &HeaderMap) -> Option<(&str, &str)> {
    let hex = |text: &str, length| {
        text.len() == length && text.bytes().all(|c| c.is_ascii_digit() || (b'a'..=b'f').contains(&c))
    };
    let id = |text: &str, length| hex(text, length) && text.bytes().any(|c| c != b'0');
    let mut values = headers.get_all(TRACEPARENT).iter();
    let (Some(value), None) = (values.next(), values.next()) else { return None };
    let mut parts = value.to_str().ok()?.split('-');
    let (version, trace, parent, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    // Later versions may have further parts.
    let known = hex(version, 2) && version != "ff" && (version != "00" || parts.next().is_none());
    (known && id(trace, 32) && id(parent, 16) && hex(flags, 2)).then_some((trace, parent))
}

#[cfg(test)]
mod tests {
    use warp::Filter;

    use super::*;
    use crate::http::auth::AccessSettings;

    fn headers(name: HeaderName, values: &[&str]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(&name, HeaderValue::from_str(value).unwrap());
        }
        headers
    }

    #[test]
    fn an_id_is_taken_if_it_is_sane() {
        for id in ["a", "0123-456_789.X", &"x".repeat(64)] {
            assert_eq!(sane_id(&headers(REQUEST_ID, &[id])), Some(id));
        }
        for id in ["", "a b", "a\"b", "{}", "a\tb", &"x".repeat(65), "a/b", "a=b"] {
            assert_eq!(sane_id(&headers(REQUEST_ID, &[id])), None, "{id:?}");
        }
        assert_ne!(new_id(), new_id());
    }

    #[test]
    fn a_trace_context_is_taken_if_it_is_valid() {
        let (trace, parent) = ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7");
        let valid = format!("00-{trace}-{parent}-01");
        let later = format!("cc-{trace}-{parent}-01-what-ever");
        for value in [&valid, &later] {
            assert_eq!(trace_context(&headers(TRACEPARENT, &[value])), Some((trace, parent)));
        }
        for wrong in [
            String::new(),
            format!("ff-{trace}-{parent}-01"),
            format!("00-{trace}-{parent}-01-more"),
            format!("00-{trace}-{parent}"),
            format!("00-{}-{parent}-01", trace.to_uppercase()),
            format!("00-{}-{parent}-01", "0".repeat(32)),
            format!("00-{trace}-{}-01", "0".repeat(16)),
            format!("00-{trace}0-{parent}-01"),
            format!("00-{trace}-{parent}-zz"),
        ] {
            assert_eq!(trace_context(&headers(TRACEPARENT, &[&wrong])), None, "{wrong}");
        }
        assert_eq!(trace_context(&headers(TRACEPARENT, &[&valid, &valid])), None, "two are none");
    }

    #[test]
    fn a_route_is_a_label_of_ours_or_other() {
        assert_eq!(route("/coderunner"), "/coderunner");
        for path in ["/coderunner/", "/COD", "/x\"y", ""] {
            assert_eq!(route(path), "other");
        }
    }

    fn front(rate: &str, keys: &str) -> Front {
        let text = format!("rate = {rate:?}\nburst = 1\ntrusted_proxies = []\n[keys]\n{keys}");
        let settings: AccessSettings = toml::from_str(&text).unwrap();
        let origins = Origins::new(&[], &[], ([127, 0, 0, 1], 0).into());
        Front { routes: warp::any().map(Response::default).boxed(), gate: Gate::new(&settings), origins }
    }

    #[test]
    fn a_rate_is_of_requests_that_run_code() {
        let front = front("1/h", "");
        let cases = [
            (Method::POST, "/coderunner", true),
            (Method::POST, "/coderunner/", true),
            (Method::POST, "/api/v2/execute", true),
            (Method::POST, "/api/v2/batch", true),
            (Method::GET, "/api/v2/connect", true),
            (Method::GET, "/api/v2/runtimes", false),
            (Method::POST, "/anything", false),
            (Method::GET, "/coderunner", false),
            (Method::OPTIONS, "/api/v2/connect", false),
            (Method::GET, "/metrics", false),
        ];
        for (method, path, counts) in cases {
            let client = Client::Key(format!("{method} {path}").into());
            let twice = [(); 2].map(|()| front.admit(&method, path, &client).is_ok());
            assert_eq!(twice, [true, !counts], "{method} {path}");
        }
    }

    #[test]
    fn what_runs_code_needs_a_key_and_what_tells_of_health_does_not() {
        let (_, hash) = crate::http::auth::new_key().unwrap();
        let front = front("off", &format!("alice = \"{hash}\""));
        let stranger = Client::at([192, 0, 2, 1].into());
        let alice = Client::Key("alice".into());
        let admits = |method: Method, path: &str, client| front.admit(&method, path, client).is_ok();
        for (method, path) in [
            (Method::POST, "/coderunner"),
            (Method::POST, "/coderunner/"),
            (Method::POST, "/anything"),
            (Method::PUT, "/"),
            (Method::GET, "/api/v2/connect"),
            (Method::GET, "/api/v2/connect/"),
            (Method::GET, "/metrics"),
            (Method::HEAD, "/metrics/"),
        ] {
            assert!(!admits(method.clone(), path, &stranger), "{method} {path}");
            assert!(admits(method.clone(), path, &alice), "{method} {path}");
        }
        for (method, path) in [
            (Method::GET, "/healthz"),
            (Method::GET, "/readyz"),
            (Method::GET, "/"),
            (Method::OPTIONS, "/coderunner"),
            (Method::OPTIONS, "/api/v2/execute"),
        ] {
            assert!(admits(method.clone(), path, &stranger), "{method} {path}");
        }
    }
}
