//! The playground at `/`, and `/embed.js` for other websites. `make web` builds the files, which are embedded in the
//! executable.

use std::sync::{Arc, LazyLock};

use warp::filters::BoxedFilter;
use warp::http::header::{
    ACCEPT_ENCODING, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG, HeaderMap,
    IF_NONE_MATCH, REFERRER_POLICY, VARY, X_CONTENT_TYPE_OPTIONS,
};
use warp::http::{HeaderValue, StatusCode};
use warp::path::FullPath;
use warp::reply::Response;
use warp::{Filter, Reply};

use crate::http::Api;
use crate::http::error::ApiError;
use crate::http::headers::list_items;

/// Content security policy: the page loads only files of this server and talks only to it, and text cannot become
/// markup.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; \
                      trusted-types 'none'";

/// The asset served at `/`.
const PAGE: &str = "playground.html";

/// A file of `web/dist`.
struct Asset {
    name: &'static str,
    content_type: &'static str,
    /// Whether its name contains a hash of its content, so that browsers may cache it forever.
    immutable: bool,
    plain: &'static [u8],
    gzip: &'static [u8],
}

const ASSETS: &[Asset] = include!("../../web/dist/assets.rs");

/// A file in one content coding, with its ETag.
struct Encoded {
    bytes: &'static [u8],
    tag: HeaderValue,
}

/// An asset in both content codings.
struct AssetResponses {
    asset: &'static Asset,
    plain: Encoded,
    gzip: Encoded,
}

impl Encoded {
    fn new(bytes: &'static [u8]) -> Option<Encoded> {
        let tag = HeaderValue::from_str(&format!("\"{}\"", &blake3::hash(bytes).to_hex()[..32])).ok()?;
        Some(Encoded { bytes, tag })
    }
}

/// Answers `/`, `/embed.js` and the files that pages load. All are 404 if the playground is off.
pub fn filter(api: &Arc<Api>) -> BoxedFilter<(Response,)> {
    let files = api.playground.then(|| &*FILES);
    warp::path::full()
        .and(warp::header::headers_cloned())
        .map(move |path: FullPath, headers: HeaderMap| {
            let response = files.and_then(|files| files.answer(path.as_str(), &headers));
            response.unwrap_or_else(|| ApiError::NotFound.into_response())
        })
        .boxed()
}

/// Whether a path is that of an asset.
pub fn is_asset(path: &str) -> bool {
    path.strip_prefix('/').is_some_and(|name| ASSETS.iter().any(|asset| asset.name == name))
}

/// All assets, for every route and configuration: hashing them for their tags takes a while.
static FILES: LazyLock<Files> = LazyLock::new(Files::new);

/// The served assets.
struct Files(Vec<AssetResponses>);

impl Files {
    fn new() -> Files {
        let serve =
            |asset| Some(AssetResponses { asset, plain: Encoded::new(asset.plain)?, gzip: Encoded::new(asset.gzip)? });
        Files(ASSETS.iter().filter_map(serve).collect())
    }

    fn answer(&self, path: &str, headers: &HeaderMap) -> Option<Response> {
        let name = match path.strip_prefix('/')? {
            "" => PAGE,
            name => name,
        };
        let file = self.0.iter().find(|file| file.asset.name == name)?;
        Some(file.answer(headers))
    }
}

impl AssetResponses {
    fn answer(&self, headers: &HeaderMap) -> Response {
        let gzip = accepts_gzip(headers);
        let encoded = if gzip { &self.gzip } else { &self.plain };
        let mut response = match is_cached(headers, &encoded.tag) {
            true => StatusCode::NOT_MODIFIED.into_response(),
            false => encoded.bytes.into_response(),
        };
        let all = response.headers_mut();
        all.insert(CONTENT_TYPE, HeaderValue::from_static(self.asset.content_type));
        all.insert(ETAG, encoded.tag.clone());
        all.insert(VARY, HeaderValue::from_static("accept-encoding"));
        if gzip {
            all.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        }
        let cache_control = if self.asset.immutable { "public, max-age=31536000, immutable" } else { "no-cache" };
        all.insert(CACHE_CONTROL, HeaderValue::from_static(cache_control));
        add_security_headers(all);
        response
    }
}

/// Adds the headers that isolate a page from other sites.
pub fn add_security_headers(headers: &mut HeaderMap) {
    headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
}

fn accepts_gzip(headers: &HeaderMap) -> bool {
    list_items(headers, ACCEPT_ENCODING).any(|word| {
        let mut parts = word.split(';').map(str::trim);
        let coding = parts.next().unwrap_or_default();
        let refused = parts.filter_map(|part| part.strip_prefix("q=")).any(|q| q.parse() == Ok(0.0));
        coding.eq_ignore_ascii_case("gzip") && !refused
    })
}

/// Whether the client has the representation with this ETag.
fn is_cached(headers: &HeaderMap, tag: &HeaderValue) -> bool {
    list_items(headers, IF_NONE_MATCH)
        .any(|word| word == "*" || word.trim_start_matches("W/").as_bytes() == tag.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(path: &str, headers: &[(&'static str, &str)]) -> Option<Response> {
        let headers = headers
            .iter()
            .map(|(name, value)| (warp::http::HeaderName::from_static(name), HeaderValue::from_str(value).unwrap()));
        Files::new().answer(path, &headers.collect())
    }

    fn get(path: &str, headers: &[(&'static str, &str)]) -> Response {
        ask(path, headers).unwrap()
    }

    #[test]
    fn files_referenced_by_the_page_exist() {
        let page = ASSETS.iter().find(|asset| asset.name == PAGE).unwrap();
        let text = std::str::from_utf8(page.plain).unwrap();
        let is_file = |part: &&str| [".js", ".css", ".svg"].iter().any(|ending| part.ends_with(ending));
        let named: Vec<&str> = text.split('"').filter(is_file).collect();
        assert!(named.len() >= 4, "{named:?}");
        for name in named {
            assert_eq!(get(&format!("/{name}"), &[]).status(), StatusCode::OK, "{name}");
        }
        assert!(!text.contains("style="), "the policy forbids style attributes");
    }

    #[test]
    fn content_encoding_follows_accept_encoding() {
        for refuses in [&[][..], &[("accept-encoding", "br, gzip;q=0")]] {
            assert!(!get("/", refuses).headers().contains_key(CONTENT_ENCODING));
        }
        let gzip = get("/", &[("accept-encoding", "br;q=1.0, GZIP;q=0.5")]);
        assert_eq!(gzip.headers()[CONTENT_ENCODING], "gzip");
        assert_eq!(gzip.headers()[CONTENT_SECURITY_POLICY], POLICY);
        assert_ne!(gzip.headers()[ETAG], get("/", &[]).headers()[ETAG]);
    }

    #[test]
    fn matching_etag_returns_304() {
        let tag = get("/embed.js", &[]).headers()[ETAG].to_str().unwrap().to_owned();
        for list in [tag.clone(), format!("\"other\", W/{tag}"), "*".into()] {
            assert_eq!(get("/embed.js", &[("if-none-match", &list)]).status(), StatusCode::NOT_MODIFIED, "{list}");
        }
        // The other coding is another representation, with its own ETag.
        let other = get("/embed.js", &[("if-none-match", &tag), ("accept-encoding", "gzip")]);
        assert_eq!(other.status(), StatusCode::OK);
    }

    #[test]
    fn only_assets_are_served() {
        assert!(is_asset("/embed.js") && !is_asset("/assets.rs") && !is_asset("/"));
        assert!(ask("/assets.rs", &[]).is_none());
        assert!(Files(Vec::new()).answer("/", &HeaderMap::new()).is_none());
    }
}
