//! What the API is, for programs at `/openapi.json` and for people at `/docs`: made of the types and comments of the code.

use bytes::Bytes;
use utoipa::openapi::security::{ApiKey, ApiKeyValue, HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::openapi::{OpenApi as Description, SecurityRequirement};
use utoipa::{IntoResponses, Modify, OpenApi};
use warp::filters::BoxedFilter;
use warp::http::HeaderValue;
use warp::http::header::CONTENT_TYPE;
use warp::reply::Response;
use warp::{Filter, Reply};

use crate::http::api::{batch, coderunner, connect, piston};
use crate::http::error::{ApiError, Refusal};
use crate::http::{docs, page};

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
        crate::http::healthz,
        crate::http::ready,
        crate::http::exposition
    ),
    components(schemas(Refusal)),
    modifiers(&Keys)
)]
struct Api;

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
        api.security = Some(vec![SecurityRequirement::default(), needs("bearer"), needs("key")]);
    }
}

/// The paths of the descriptions.
pub fn routes() -> BoxedFilter<(Response,)> {
    let api = Api::openapi();
    // Shared by all that are on their way.
    let json = Bytes::from(serde_json::to_string(&api).unwrap_or_default());
    let html = Bytes::from(docs::html(&serde_json::to_value(&api).unwrap_or_default()));
    let read = || warp::get().or(warp::head()).unify();
    let json = warp::path!("openapi.json").and(read()).map(move || of_type("application/json", json.clone()));
    let html = warp::path!("docs").and(read()).map(move || of_type("text/html; charset=utf-8", html.clone()));
    let style = warp::path!("docs.css")
        .and(read())
        .map(|| of_type("text/css; charset=utf-8", Bytes::from_static(STYLE.as_bytes())));
    let other_method = warp::path!("openapi.json")
        .or(warp::path!("docs"))
        .or(warp::path!("docs.css"))
        .map(|_| ApiError::MethodNotAllowed("GET, HEAD").into_response());
    json.or(html).unify().or(style).unify().or(other_method).unify().boxed()
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
    use super::*;

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
