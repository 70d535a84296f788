//! The route table: every path of the server. Dispatch, `Allow`, CORS, the key check, the rate limit, metric labels and
//! the OpenAPI document all use it.
//!
//! Paths have no parameters, and each path has one set of methods. An API that needs more has to extend [`find`] and
//! [`Methods`] first.

use std::convert::Infallible;
use std::ops::Deref;
use std::sync::Arc;

use warp::filters::BoxedFilter;
use warp::http::Method;
use warp::reply::Response;
use warp::{Filter, Rejection, Reply};

use crate::http::api::{batch, coderunner, connect, piston};
use crate::http::error::ApiError;
use crate::http::{Api, health, openapi, page};

/// A path and how it is served.
pub struct Route {
    /// The path, also used as metric label.
    pub path: &'static str,
    /// The allowed methods.
    pub methods: Methods,
    /// What a client needs to use the path.
    pub access: Access,
    /// Whether the OpenAPI document describes it.
    pub described: bool,
    /// Builds the filter that handles requests.
    filter: fn(&Arc<Api>) -> BoxedFilter<(Response,)>,
}

/// The methods of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Methods {
    /// GET and HEAD.
    Read,
    /// POST.
    Post,
    /// GET with an upgrade to a WebSocket.
    Upgrade,
}

/// What a client needs to use a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Nothing.
    Open,
    /// A key, if the server has keys.
    Key,
    /// A key, and the request counts against the client's rate limit, since it runs code.
    Run,
}

/// All routes, the most used ones first.
pub static ROUTES: [Route; 14] = [
    api("/coderunner", Methods::Post, Access::Run, coderunner::filter),
    api("/api/v2/execute", Methods::Post, Access::Run, piston::execute_filter),
    api("/api/v2/batch", Methods::Post, Access::Run, batch::filter),
    api("/api/v2/connect", Methods::Upgrade, Access::Run, connect::filter),
    api("/api/v2/runtimes", Methods::Read, Access::Key, piston::runtimes_filter),
    api("/healthz", Methods::Read, Access::Open, health::live_filter),
    api("/readyz", Methods::Read, Access::Open, health::ready_filter),
    api("/metrics", Methods::Read, Access::Key, health::metrics_filter),
    file("/openapi.json", openapi::document_filter),
    file("/docs", openapi::page_filter),
    file("/docs.css", openapi::style_filter),
    file("/", page::filter),
    file("/embed.js", page::filter),
    file(OTHER, page::filter),
];

/// The label of paths that have none of their own: unknown ones, and the other files that pages load, whose names change
/// with their contents. The route of these files has it as its path.
pub const OTHER: &str = "other";

/// A route of the table.
#[derive(Clone, Copy)]
pub struct RouteId(usize);

impl Deref for RouteId {
    type Target = Route;

    fn deref(&self) -> &Route {
        &ROUTES[self.0]
    }
}

const fn api(
    path: &'static str,
    methods: Methods,
    access: Access,
    filter: fn(&Arc<Api>) -> BoxedFilter<(Response,)>,
) -> Route {
    Route { path, methods, access, described: true, filter }
}

const fn file(path: &'static str, filter: fn(&Arc<Api>) -> BoxedFilter<(Response,)>) -> Route {
    Route { path, methods: Methods::Read, access: Access::Open, described: false, filter }
}

/// The route of a path, with or without a trailing slash.
pub fn find(path: &str) -> Option<RouteId> {
    let path = path.strip_suffix('/').filter(|path| !path.is_empty() && !path.ends_with('/')).unwrap_or(path);
    let position = |path| ROUTES.iter().position(|route| route.path == path);
    position(path).or_else(|| page::is_asset(path).then(|| position(OTHER)).flatten()).map(RouteId)
}

impl Methods {
    /// Whether the method is allowed.
    pub fn accept(self, method: &Method) -> bool {
        match self {
            Methods::Read => method == Method::GET || method == Method::HEAD,
            Methods::Post => method == Method::POST,
            Methods::Upgrade => method == Method::GET,
        }
    }

    /// The value of `Allow`. OPTIONS is for the CORS preflight of JSON posts.
    pub fn allow(self) -> &'static str {
        match self {
            Methods::Read => "GET, HEAD",
            Methods::Post => "POST, OPTIONS",
            Methods::Upgrade => "GET",
        }
    }

    /// The value of `Access-Control-Allow-Methods`.
    pub fn cors_methods(self) -> &'static str {
        match self {
            Methods::Read | Methods::Upgrade => "GET",
            Methods::Post => "POST",
        }
    }
}

/// The filters of all routes, built from one configuration.
pub struct Routes {
    /// In the order of the table.
    filters: Vec<BoxedFilter<(Response,)>>,
}

impl Routes {
    /// Builds the filters.
    pub fn new(api: Api) -> Routes {
        let api = Arc::new(api);
        let filter = |route: &Route| (route.filter)(&api).recover(response_of_rejection).unify().boxed();
        Routes { filters: ROUTES.iter().map(filter).collect() }
    }

    /// The filter of a route.
    pub fn filter(&self, route: RouteId) -> BoxedFilter<(Response,)> {
        self.filters[route.0].clone()
    }
}

/// Turns a rejection by a filter into a response.
async fn response_of_rejection(rejection: Rejection) -> Result<Response, Infallible> {
    Ok(ApiError::from_rejection(&rejection).into_response())
}
