//! What the API is, for programs at `/openapi.json` and for people at `/docs`: made of the types and comments of the code.

use std::sync::Arc;

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

/// How `/docs` looks.
const STYLE: &str = include_str!("docs.css");

#[derive(OpenApi)]
#[openapi(
    info(title = "coderunner", description = "Compiles and runs code that strangers send, each run in a fresh container."),
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
    modifiers(&Keys)
)]
struct Document;

/// The answers to what is not served.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "it describes the statuses of ApiError")]
pub enum Refused {
    /// The request is not valid; the message says why.
    #[response(status = 400)]
    BadRequest(Refusal),
    /// A key is needed.
    #[response(status = 401)]
    Unauthorized(Refusal),
    /// Pages of this origin may not call, or the server does not answer to this name.
    #[response(status = 403)]
    Forbidden(Refusal),
    /// The path takes another method; `Allow` says which.
    #[response(status = 405)]
    MethodNotAllowed(Refusal),
    /// The body came too slowly.
    #[response(status = 408)]
    BodyTimeout(Refusal),
    /// The body, or something in it, is too large.
    #[response(status = 413)]
    TooLarge(Refusal),
    /// The body has another `Content-Type`, or is compressed.
    #[response(status = 415)]
    UnsupportedMediaType(Refusal),
    /// Too many requests; `Retry-After` says when to come back.
    #[response(status = 429)]
    TooManyRequests(Refusal),
    /// The headers are too large.
    #[response(status = 431)]
    HeadTooLarge(Refusal),
    /// The server's own fault; its log has the reason.
    #[response(status = 500)]
    Internal(Refusal),
    /// Too much to do, no image yet, or shutting down; `Retry-After` says when to ask again.
    #[response(status = 503)]
    Unavailable(Refusal),
}

/// Keys, which a server may ask for or not.
struct Keys;

impl Modify for Keys {
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
    // Shared by all that are on their way.
    let json = Bytes::from(serde_json::to_string(&Document::openapi()).unwrap_or_default());
    warp::any().map(move || of_type("application/json", json.clone())).boxed()
}

/// Answers `/docs`.
pub fn page_filter(_: &Arc<Api>) -> BoxedFilter<(Response,)> {
    let html = Bytes::from(docs::html(&serde_json::to_value(Document::openapi()).unwrap_or_default()));
    warp::any().map(move || of_type("text/html; charset=utf-8", html.clone())).boxed()
}

/// Answers `/docs.css`.
pub fn style_filter(_: &Arc<Api>) -> BoxedFilter<(Response,)> {
    warp::any().map(|| of_type("text/css; charset=utf-8", Bytes::from_static(STYLE.as_bytes()))).boxed()
}

/// A text of ours, under the same policy as the page.
fn of_type(kind: &'static str, text: Bytes) -> Response {
    let mut response = Response::new(text.into());
    page::secure(response.headers_mut());
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
        let takes = |route: &Route, method: &Method| route.described && route.methods.take(method);
        let table = ROUTES.iter().flat_map(|route| methods(route).into_iter().filter(|(_, m)| takes(route, m)));
        assert_eq!(described, table.collect());
    }

    #[test]
    fn the_documentation_has_every_status() {
        let api = include_str!("../../docs/api.md");
        let cells = api.lines().filter_map(|line| line.strip_prefix("| ")?.split(" |").next());
        let told: Vec<&str> = cells.flat_map(|cell| cell.split(", ")).collect();
        for status in Refused::responses().keys() {
            assert!(told.contains(&status.as_str()), "{status} is not in the table");
        }
    }
}
