//! The route table: every path of the server, once. Dispatch, `Allow`, CORS, the key check, the rate limit, the label of
//! the metrics and the OpenAPI document all read it.

use std::convert::Infallible;
use std::sync::Arc;

use warp::filters::BoxedFilter;
use warp::http::Method;
use warp::reply::Response;
use warp::{Filter, Rejection, Reply};

use crate::http::api::{batch, coderunner, connect, piston};
use crate::http::error::ApiError;
use crate::http::{Api, health, openapi, page};

/// A path that is served.
pub struct Route {
    /// The path, which is also the label of its metrics.
    pub path: &'static str,
    /// The methods that it takes.
    pub methods: Methods,
    /// What a client needs.
    pub access: Access,
    /// Whether it is a part of the API, which the OpenAPI document describes.
    pub described: bool,
    /// Makes the filter that answers.
    filter: fn(&Arc<Api>) -> BoxedFilter<(Response,)>,
}

/// The methods of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Methods {
    /// It is read.
    Read,
    /// A body is posted to it.
    Post,
    /// It is a WebSocket.
    Upgrade,
}

/// What a client needs to use a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Nothing.
    Open,
    /// A key, where the server has keys.
    Key,
    /// A key, and room in the client's rate limit: it runs code.
    Run,
}

/// All paths, those in most use first.
pub static ROUTES: [Route; 13] = [
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
];

/// The other files that pages load: their names change with their contents, so they have one label.
static ASSET: Route = file("other", page::filter);

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

/// The route of a path, with or without a slash at its end.
pub fn find(path: &str) -> Option<&'static Route> {
    let path = path.strip_suffix('/').filter(|path| !path.is_empty() && !path.ends_with('/')).unwrap_or(path);
    ROUTES.iter().find(|route| route.path == path).or_else(|| page::is_asset(path).then_some(&ASSET))
}

impl Methods {
    /// Whether a request of this method is taken.
    pub fn take(self, method: &Method) -> bool {
        match self {
            Methods::Read => method == Method::GET || method == Method::HEAD,
            Methods::Post => method == Method::POST,
            Methods::Upgrade => method == Method::GET,
        }
    }

    /// As in `Allow`. Browsers ask before a page of another origin may post JSON, by OPTIONS.
    pub fn allow(self) -> &'static str {
        match self {
            Methods::Read => "GET, HEAD",
            Methods::Post => "POST, OPTIONS",
            Methods::Upgrade => "GET",
        }
    }

    /// As in `Access-Control-Allow-Methods`.
    pub fn for_pages(self) -> &'static str {
        match self {
            Methods::Read | Methods::Upgrade => "GET",
            Methods::Post => "POST",
        }
    }
}

/// The filters of a configuration.
pub struct Routes {
    /// In the order of the table.
    filters: Vec<BoxedFilter<(Response,)>>,
    asset: BoxedFilter<(Response,)>,
}

impl Routes {
    /// The routes of an API.
    pub fn new(api: Api) -> Routes {
        let api = Arc::new(api);
        let filter = |route: &Route| (route.filter)(&api).recover(refuse).unify().boxed();
        Routes { filters: ROUTES.iter().map(filter).collect(), asset: filter(&ASSET) }
    }

    /// The filter that answers on a route.
    pub fn filter(&self, route: &'static Route) -> BoxedFilter<(Response,)> {
        let index = ROUTES.iter().position(|known| std::ptr::eq(known, route));
        index.and_then(|index| self.filters.get(index)).unwrap_or(&self.asset).clone()
    }
}

/// Turns what a filter did not take into an answer.
async fn refuse(rejection: Rejection) -> Result<Response, Infallible> {
    Ok(ApiError::from_rejection(&rejection).into_response())
}
