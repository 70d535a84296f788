//! Handles every request before and after its route: request id, client, host and origin, key and rate limit, metrics
//! and log.

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
use warp::http::header::{AUTHORIZATION, HeaderMap, UPGRADE};
use warp::http::{HeaderName, HeaderValue, Method, Request};
use warp::reply::Response;

use crate::http::Context;
use crate::http::auth::{Credentials, Gate};
use crate::http::error::ApiError;
use crate::http::origin::{self, Origins};
use crate::http::routes::{self, Access, RouteId, Routes};
use crate::http::server::{ConnectionPermit, MAX_HEAD};
use crate::metrics;
use crate::model::client::Client;

/// Header of the request id, which the client or the server chooses.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Headers for which the `http` crate has no constant.
const API_KEY: HeaderName = HeaderName::from_static("x-api-key");
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// Longest request id that is accepted from a client.
const MAX_ID_LENGTH: usize = 64;

/// Status recorded if the client left before its response, as in nginx.
const CLIENT_LEFT: u16 = 499;

/// The application: everything that handles requests, built from one configuration.
pub struct App {
    /// The routes behind the middleware.
    pub routes: Routes,
    /// Checks keys and rates.
    pub gate: Gate,
    /// Checks hosts and origins.
    pub origins: Origins,
}

/// A service for the requests of one connection from `peer`, each handled by the current application. An upgraded
/// request keeps a clone of the connection's permit.
pub fn service(
    apps: watch::Receiver<Arc<App>>,
    peer: Option<IpAddr>,
    permit: ConnectionPermit,
) -> impl Service<
    Request<Incoming>,
    Response = Response,
    Error = Infallible,
    Future = impl Future<Output = Result<Response, Infallible>> + Send,
> {
    hyper::service::service_fn(move |mut request: Request<Incoming>| {
        let app = Arc::clone(&apps.borrow());
        if request.headers().contains_key(UPGRADE) {
            request.extensions_mut().insert(permit.clone());
        }
        async move { app.answer(request, peer).await }
    })
}

impl App {
    async fn answer(&self, request: Request<Incoming>, peer: Option<IpAddr>) -> Result<Response, Infallible> {
        let began = Instant::now();
        let context = Context {
            id: client_request_id(request.headers()).map_or_else(|| new_id().into(), Arc::from),
            client: self.gate.client(&credentials(request.headers(), peer)),
        };
        let id = Arc::clone(&context.id);
        let span = tracing::info_span!("request", %id, trace = tracing::field::Empty, parent = tracing::field::Empty);
        if let Some((trace, parent)) = trace_context(request.headers()) {
            span.record("trace", trace).record("parent", parent);
        }
        let route = routes::find(request.uri().path());
        let mut record = RequestRecord { route, client: context.client.clone(), began, code: CLIENT_LEFT };
        let answering = async {
            let mut response = self.respond(request, route, context).await?;
            record.code = response.status().as_u16();
            drop(record);
            if let Ok(id) = HeaderValue::from_str(&id) {
                response.headers_mut().insert(REQUEST_ID, id);
            }
            Ok(response)
        };
        answering.instrument(span).await
    }

    /// Responds to a request: by an error, to a preflight, or by its route.
    async fn respond(
        &self,
        mut request: Request<Incoming>,
        route: Option<RouteId>,
        context: Context,
    ) -> Result<Response, Infallible> {
        let admitted = check_head_size(&request).and_then(|()| self.origins.admit(&request));
        let caller = admitted.as_ref().cloned().unwrap_or(origin::Caller::Direct);
        let methods = route.map_or("GET, POST", |route| route.methods.cors_methods());
        let mut response = match (admitted, origin::preflight(&caller, &request, methods)) {
            (Err(refused), _) => refused.into_response(),
            (Ok(_), Some(answer)) => answer,
            (Ok(_), None) => match admit(&self.gate, request.method(), route, &context.client) {
                Ok(route) => {
                    request.extensions_mut().insert(context);
                    let service = TowerToHyperService::new(warp::service(self.routes.filter(route)));
                    service.call(request).await?
                }
                Err(refused) => refused.into_response(),
            },
        };
        // For errors as well, so that a page can read them.
        self.origins.add_headers(&caller, response.headers_mut());
        Ok(response)
    }
}

/// Checks that the path has a route, that the route accepts the method, and that the client may use it.
fn admit(gate: &Gate, method: &Method, route: Option<RouteId>, client: &Client) -> Result<RouteId, ApiError> {
    let route = route.ok_or(ApiError::NotFound)?;
    if !route.methods.accept(method) {
        return Err(ApiError::MethodNotAllowed(route.methods.allow()));
    }
    if route.access != Access::Open {
        gate.check_key(client)?;
    }
    if route.access == Access::Run {
        gate.check_rate(client)?;
    }
    Ok(route)
}

/// A request in progress. On drop it is counted and logged, also if the request was cancelled.
struct RequestRecord {
    route: Option<RouteId>,
    client: Client,
    began: Instant,
    code: u16,
}

impl Drop for RequestRecord {
    fn drop(&mut self) {
        let took = self.began.elapsed();
        // Data from the client never becomes a label.
        let route = self.route.map_or(routes::OTHER, |route| route.path);
        metrics::request(route, self.code, took);
        tracing::debug!(route, code = self.code, took = ?took, client = self.client.to_string(), "answered");
    }
}

/// Refuses a large head: hyper does not enforce its limit on a head that arrives in one read.
fn check_head_size<B>(request: &Request<B>) -> Result<(), ApiError> {
    let fields = request.headers().iter().map(|(name, value)| name.as_str().len() + value.len());
    let target = request.uri().path_and_query().map_or(0, |target| target.as_str().len());
    match fields.sum::<usize>() + target <= MAX_HEAD {
        true => Ok(()),
        false => Err(ApiError::HeadTooLarge(MAX_HEAD)),
    }
}

fn text(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

fn credentials(headers: &HeaderMap, peer: Option<IpAddr>) -> Credentials<'_> {
    Credentials {
        peer,
        // A value that is not text counts as an invalid address.
        forwarded: headers.get_all(FORWARDED_FOR).iter().map(|value| value.to_str().unwrap_or_default()).collect(),
        authorization: text(headers, AUTHORIZATION),
        key: text(headers, API_KEY),
    }
}

/// The request id from the client, if it has only characters that are unambiguous in a log.
fn client_request_id(headers: &HeaderMap) -> Option<&str> {
    let sane = |id: &&str| {
        (1..=MAX_ID_LENGTH).contains(&id.len()) && id.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    text(headers, REQUEST_ID).filter(sane)
}

/// A new request id: unique within this process, and not guessable from other ids.
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
    use super::*;

    fn headers(name: HeaderName, values: &[&str]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(&name, HeaderValue::from_str(value).unwrap());
        }
        headers
    }

    #[test]
    fn only_valid_request_ids_are_accepted() {
        for id in ["a", "0123-456_789.X", &"x".repeat(64)] {
            assert_eq!(client_request_id(&headers(REQUEST_ID, &[id])), Some(id));
        }
        for id in ["", "a b", "a\"b", "{}", "a\tb", &"x".repeat(65), "a/b", "a=b"] {
            assert_eq!(client_request_id(&headers(REQUEST_ID, &[id])), None, "{id:?}");
        }
        assert_ne!(new_id(), new_id());
    }

    #[test]
    fn only_valid_trace_contexts_are_accepted() {
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

    fn gate(rate: &str, keys: &str) -> Gate {
        let text = format!("rate = {rate:?}\nburst = 1\ntrusted_proxies = []\n[keys]\n{keys}");
        Gate::new(&toml::from_str(&text).unwrap())
    }

    #[test]
    fn the_rate_limit_counts_requests_that_run_code() {
        let gate = gate("1/h", "");
        let cases = [
            (Method::POST, "/coderunner", true),
            (Method::POST, "/coderunner/", true),
            (Method::POST, "/api/v2/execute", true),
            (Method::POST, "/api/v2/batch", true),
            (Method::GET, "/api/v2/connect", true),
            (Method::GET, "/api/v2/runtimes", false),
            (Method::GET, "/metrics", false),
            (Method::GET, "/readyz", false),
        ];
        for (method, path, counts) in cases {
            let client = Client::Key(format!("{method} {path}").into());
            let twice = [(); 2].map(|()| admit(&gate, &method, routes::find(path), &client).is_ok());
            assert_eq!(twice, [true, !counts], "{method} {path}");
        }
    }

    #[test]
    fn the_api_and_the_metrics_need_a_key() {
        let (_, hash) = crate::http::auth::key::new_key().unwrap();
        let gate = gate("off", &format!("alice = \"{hash}\""));
        let stranger = Client::at([192, 0, 2, 1].into());
        let alice = Client::Key("alice".into());
        let admits = |method: &Method, path: &str, client| admit(&gate, method, routes::find(path), client);
        for (method, path) in [
            (Method::POST, "/coderunner"),
            (Method::POST, "/coderunner/"),
            (Method::POST, "/api/v2/execute"),
            (Method::POST, "/api/v2/batch"),
            (Method::GET, "/api/v2/connect"),
            (Method::GET, "/api/v2/connect/"),
            (Method::GET, "/api/v2/runtimes"),
            (Method::GET, "/metrics"),
            (Method::HEAD, "/metrics/"),
        ] {
            let refused = admits(&method, path, &stranger).map(|route| route.path);
            assert!(matches!(refused, Err(ApiError::Unauthorized)), "{method} {path}");
            assert!(admits(&method, path, &alice).is_ok(), "{method} {path}");
        }
        for path in ["/healthz", "/readyz", "/", "/embed.js", "/docs", "/openapi.json"] {
            assert!(admits(&Method::GET, path, &stranger).is_ok(), "{path}");
        }
    }

    #[test]
    fn unknown_paths_and_other_methods_are_refused() {
        let gate = gate("off", "");
        let refused = |method: Method, path: &str| {
            admit(&gate, &method, routes::find(path), &Client::Unidentified).map(|route| route.path).unwrap_err()
        };
        for path in ["/coderunner//", "/CODERUNNER", "/api/v2", "/asset", "/other", "//", "*"] {
            assert!(matches!(refused(Method::GET, path), ApiError::NotFound), "{path}");
        }
        for (method, path, allow) in [
            (Method::GET, "/coderunner", "POST, OPTIONS"),
            (Method::OPTIONS, "/api/v2/execute", "POST, OPTIONS"),
            (Method::POST, "/healthz", "GET, HEAD"),
            (Method::POST, "/", "GET, HEAD"),
            (Method::HEAD, "/api/v2/connect", "GET"),
        ] {
            let error = refused(method, path);
            assert!(matches!(error, ApiError::MethodNotAllowed(allowed) if allowed == allow), "{path}: {error}");
        }
    }
}
