//! The OpenAPI document at `/openapi.json`, and its rendering at `/docs`. The types and doc comments of the code are
//! its source.

use std::sync::{Arc, LazyLock};

use bytes::Bytes;
use utoipa::openapi::security::{ApiKey, ApiKeyValue, HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::openapi::{OpenApi as Description, SecurityRequirement};
use utoipa::{IntoResponses, Modify, OpenApi};
use warp::Filter;
use warp::filters::BoxedFilter;
use warp::http::HeaderValue;
use warp::http::header::CONTENT_TYPE;
use warp::reply::Response;

use crate::http::api::{batch, coderunner, connect, piston};
use crate::http::error::Refusal;
use crate::http::routes::{Access, ROUTES};
use crate::http::{Api, docs, health, page};

/// Style sheet of `/docs`.
const STYLE: &str = include_str!("docs.css");

#[derive(OpenApi)]
#[openapi(
    info(title = "coderunner", description = "Compiles and runs untrusted code, each run in a fresh container."),
    paths(
        coderunner::run,
        piston::execute,
        batch::run,
        piston::runtimes,
        connect::serve,
        health::live,
        health::ready,
        health::exposition
    ),
    components(schemas(Refusal)),
    modifiers(&KeySchemes)
)]
struct Document;

/// The document, generated once.
static DOCUMENT: LazyLock<Description> = LazyLock::new(Document::openapi);

/// The error responses that every route may give.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "it describes the statuses of ApiError")]
pub enum ErrorResponses {
    /// The request is not valid; the message says why.
    #[response(status = 400)]
    BadRequest(Refusal),
    /// An API key is required.
    #[response(status = 401)]
    Unauthorized(Refusal),
    /// The origin or the host is not allowed.
    #[response(status = 403)]
    Forbidden(Refusal),
    /// The path does not allow this method; `Allow` lists the allowed ones.
    #[response(status = 405)]
    MethodNotAllowed(Refusal),
    /// The body arrived too slowly.
    #[response(status = 408)]
    BodyTimeout(Refusal),
    /// The body, or something in it, is too large.
    #[response(status = 413)]
    TooLarge(Refusal),
    /// The body has another `Content-Type`, or is compressed.
    #[response(status = 415)]
    UnsupportedMediaType(Refusal),
    /// Too many requests; `Retry-After` says when to try again.
    #[response(status = 429)]
    TooManyRequests(Refusal),
    /// The headers are too large.
    #[response(status = 431)]
    HeadTooLarge(Refusal),
    /// The server failed; its log has the reason.
    #[response(status = 500)]
    Internal(Refusal),
    /// The server is overloaded, has no image yet or is shutting down; `Retry-After` says when to try again.
    #[response(status = 503)]
    Unavailable(Refusal),
}

/// Adds the ways to send an API key to the document. A server may require keys or not, so they are optional.
struct KeySchemes;

impl Modify for KeySchemes {
    fn modify(&self, api: &mut Description) {
        let components = api.components.get_or_insert_default();
        let bearer = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build();
        components.add_security_scheme("bearer", SecurityScheme::Http(bearer));
        components.add_security_scheme("key", SecurityScheme::ApiKey(ApiKey::Header(ApiKeyValue::new("X-API-Key"))));
        let needs = |name| SecurityRequirement::new::<_, _, String>(name, []);
        let keys = [SecurityRequirement::default(), needs("bearer"), needs("key")];
        for route in ROUTES.iter().filter(|route| route.access != Access::Open) {
            let Some(item) = api.paths.paths.get_mut(route.path) else { continue };
            for operation in [&mut item.get, &mut item.post].into_iter().flatten() {
                operation.security = Some(keys.to_vec());
            }
        }
    }
}

/// Answers `/openapi.json`.
pub fn document_filter(_: &Arc<Api>) -> BoxedFilter<(Response,)> {
    // `Bytes`, so that all responses share one copy.
    let json = Bytes::from(serde_json::to_string(&*DOCUMENT).unwrap_or_default());
    warp::any().map(move || static_response("application/json", json.clone())).boxed()
}

/// Answers `/docs`.
pub fn page_filter(_: &Arc<Api>) -> BoxedFilter<(Response,)> {
    let html = Bytes::from(docs::html(&serde_json::to_value(&*DOCUMENT).unwrap_or_default()));
    warp::any().map(move || static_response("text/html; charset=utf-8", html.clone())).boxed()
}

/// Answers `/docs.css`.
pub fn style_filter(_: &Arc<Api>) -> BoxedFilter<(Response,)> {
    warp::any().map(|| static_response("text/css; charset=utf-8", Bytes::from_static(STYLE.as_bytes()))).boxed()
}

/// A response with a text of this program, with the security headers of the page.
fn static_response(kind: &'static str, text: Bytes) -> Response {
    let mut response = Response::new(text.into());
    page::add_security_headers(response.headers_mut());
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use warp::http::Method;

    use super::*;
    use crate::http::routes::Route;

    #[test]
    fn the_document_describes_the_route_table() {
        let document = Document::openapi();
        let described: BTreeSet<(&str, Method)> = document
            .paths
            .paths
            .iter()
            .flat_map(|(path, item)| {
                let methods = [(&item.get, Method::GET), (&item.post, Method::POST)];
                methods.into_iter().filter(|(operation, _)| operation.is_some()).map(|(_, method)| (&**path, method))
            })
            .collect();
        let methods = |route: &Route| [Method::GET, Method::POST].map(|method| (route.path, method));
        let takes = |route: &Route, method: &Method| route.described && route.methods.accept(method);
        let table = ROUTES.iter().flat_map(|route| methods(route).into_iter().filter(|(_, m)| takes(route, m)));
        assert_eq!(described, table.collect());
    }

    #[test]
    fn api_documentation_lists_every_status() {
        let api = include_str!("../../docs/api.md");
        let cells = api.lines().filter_map(|line| line.strip_prefix("| ")?.split(" |").next());
        let statuses: Vec<&str> = cells.flat_map(|cell| cell.split(", ")).collect();
        for status in ErrorResponses::responses().keys() {
            assert!(statuses.contains(&status.as_str()), "{status} is not in the table");
        }
    }
}
