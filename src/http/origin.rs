//! Checks the `Host` and `Origin` of requests: protects the users of browsers from DNS rebinding and from requests by
//! pages of other sites.

use std::net::{IpAddr, SocketAddr};

use warp::Reply;
use warp::http::header::{
    ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN,
    ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_HEADERS,
    ACCESS_CONTROL_REQUEST_METHOD, HOST, HeaderMap, ORIGIN, VARY,
};
use warp::http::uri::Authority;
use warp::http::{HeaderName, HeaderValue, Method, Request, Version};
use warp::reply::Response;

use crate::http::error::ApiError;
use crate::http::headers::list_items;

/// How long a browser may cache the response to a preflight, in seconds: a day, the most that Firefox accepts.
const PREFLIGHT_MAX_AGE: u32 = 86_400;

/// Headers that a preflight response allows if the preflight names none.
const DEFAULT_ALLOWED_HEADERS: &str =
    "content-type, cache-control, authorization, x-api-key, x-request-id, traceparent";

/// Headers that pages of other origins may read.
const EXPOSED_HEADERS: HeaderValue = HeaderValue::from_static("x-request-id, retry-after");

const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// The allowed hosts and origins.
#[derive(Debug, Clone)]
pub struct Origins {
    /// Allowed host names beside those of loopback, in lower case; `None` for any.
    hosts: Option<Vec<String>>,
    /// Origins whose pages may send requests; `None` for any.
    pages: Option<Vec<HeaderValue>>,
}

/// Whether a request comes from a page of another origin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Caller {
    /// No: from a page of this server, or not from a page.
    Direct,
    /// From a page of another origin that is allowed; the value of `Access-Control-Allow-Origin`.
    Page(HeaderValue),
}

impl Origins {
    /// The hosts and origins of the settings. If `allowed_hosts` is empty, a server that listens on loopback allows
    /// only loopback names, and any other server allows all names.
    pub fn new(allowed_hosts: &[String], cors_origins: &[String], address: SocketAddr) -> Origins {
        let has_wildcard = |list: &[String]| list.iter().any(|one| one == "*");
        let own = address.ip().to_canonical();
        let any_host_by_default = allowed_hosts.is_empty() && !own.is_loopback();
        let hosts = allowed_hosts.iter().map(|host| host_name(host).to_ascii_lowercase()).chain([own.to_string()]);
        let pages = cors_origins.iter().filter_map(|origin| HeaderValue::from_str(origin).ok());
        Origins {
            hosts: (!has_wildcard(allowed_hosts) && !any_host_by_default).then(|| hosts.collect()),
            pages: (!has_wildcard(cors_origins)).then(|| pages.collect()),
        }
    }

    /// Checks the host and the origin of a request. The host is checked even for the same origin: a foreign name that
    /// was pointed at this address (DNS rebinding) makes its pages same-origin.
    pub fn admit<B>(&self, request: &Request<B>) -> Result<Caller, ApiError> {
        let headers = request.headers();
        let mut hosts = headers.get_all(HOST).iter();
        let host = match (hosts.next(), hosts.next()) {
            (_, Some(_)) => return Err(bad_request("there is more than one Host header")),
            (None, None) if request.version() >= Version::HTTP_11 => {
                return Err(bad_request("the Host header is missing"));
            }
            (host, None) => host,
        };
        let host =
            host.map(|host| host.to_str().map_err(|_| bad_request("the Host header is not valid"))).transpose()?;
        for host in host.into_iter().chain(request.uri().authority().map(Authority::as_str)) {
            self.check_host(host)?;
        }
        let Some(origin) = headers.get(ORIGIN) else { return Ok(Caller::Direct) };
        // Two checks for the same origin: browsers send no Sec-Fetch-Site on plain HTTP, and a proxy may have changed
        // Host.
        let rest = origin.to_str().ok().and_then(|origin| origin.split_once("://")).map(|(_, rest)| rest);
        let own = headers.get(SEC_FETCH_SITE).is_some_and(|site| site == "same-origin")
            || rest.is_some_and(|rest| Some(rest) == host);
        match &self.pages {
            _ if own => Ok(Caller::Direct),
            None => Ok(Caller::Page(HeaderValue::from_static("*"))),
            Some(pages) if pages.contains(origin) => Ok(Caller::Page(origin.clone())),
            Some(_) => Err(ApiError::OriginForbidden(String::from_utf8_lossy(origin.as_bytes()).into_owned())),
        }
    }

    fn check_host(&self, host: &str) -> Result<(), ApiError> {
        // An empty host is valid, and matches no allowed name.
        let valid = host.is_empty() || (host.parse::<Authority>().is_ok() && !host.contains('@'));
        if !valid {
            return Err(bad_request("the Host header is not valid"));
        }
        let Some(hosts) = &self.hosts else { return Ok(()) };
        let name = host_name(host);
        let known = is_loopback(name) || hosts.iter().any(|known| known.eq_ignore_ascii_case(name));
        if known { Ok(()) } else { Err(ApiError::HostForbidden(name.to_owned())) }
    }

    /// Adds the CORS headers and `Vary` to a response.
    pub fn add_headers(&self, caller: &Caller, headers: &mut HeaderMap) {
        headers.append(VARY, HeaderValue::from_static("Origin"));
        if let Caller::Page(origin) = caller {
            headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
            headers.insert(ACCESS_CONTROL_EXPOSE_HEADERS, EXPOSED_HEADERS);
        }
    }
}

/// The response to a CORS preflight, if a request is one: allows `methods` and any header. The server ignores headers
/// that it does not know, and browsers do not let pages set forbidden headers.
pub fn preflight<B>(caller: &Caller, request: &Request<B>, methods: &'static str) -> Option<Response> {
    let is_preflight =
        request.method() == Method::OPTIONS && request.headers().contains_key(ACCESS_CONTROL_REQUEST_METHOD);
    if !is_preflight || *caller == Caller::Direct {
        return None;
    }
    let asked = list_items(request.headers(), ACCESS_CONTROL_REQUEST_HEADERS);
    let names: Vec<&str> = asked.filter(|name| HeaderName::try_from(*name).is_ok()).collect();
    let names = if names.is_empty() { DEFAULT_ALLOWED_HEADERS.to_owned() } else { names.join(", ") };
    let mut response = warp::reply().into_response();
    let headers = response.headers_mut();
    headers.insert(ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static(methods));
    headers.insert(ACCESS_CONTROL_MAX_AGE, PREFLIGHT_MAX_AGE.into());
    headers.append(VARY, HeaderValue::from_static("access-control-request-headers"));
    if let Ok(names) = HeaderValue::try_from(names) {
        headers.insert(ACCESS_CONTROL_ALLOW_HEADERS, names);
    }
    Some(response)
}

/// Whether this is valid in `allowed_hosts`: a name or an address, without a port.
pub fn is_host(text: &str) -> bool {
    let address = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    let label = |label: &str| {
        (1..=63).contains(&label.len()) && label.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-' || c == b'_')
    };
    address.parse::<IpAddr>().is_ok() || (text.len() <= 253 && text.split('.').all(label))
}

/// A host without its port, the brackets of an IPv6 address and the trailing dot.
fn host_name(host: &str) -> &str {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        // Several colons: an IPv6 address without brackets.
        None if host.bytes().filter(|c| *c == b':').count() > 1 => host,
        None => host.split(':').next().unwrap_or_default(),
    };
    name.strip_suffix('.').unwrap_or(name)
}

/// Whether this is a name or address of loopback.
fn is_loopback(name: &str) -> bool {
    let last = name.rsplit('.').next().unwrap_or_default();
    let is_name = last.eq_ignore_ascii_case("localhost") && !name.starts_with('.');
    is_name || name.parse::<IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback())
}

fn bad_request(message: &str) -> ApiError {
    ApiError::BadRequest(message.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origins(hosts: &[&str], pages: &[&str], address: &str) -> Origins {
        let owned = |list: &[&str]| list.iter().map(|one| (*one).to_owned()).collect::<Vec<_>>();
        Origins::new(&owned(hosts), &owned(pages), address.parse().unwrap())
    }

    fn asked(headers: &[(&str, &str)]) -> Request<()> {
        headers.iter().fold(Request::builder(), |all, (name, value)| all.header(*name, *value)).body(()).unwrap()
    }

    fn answers(origins: &Origins, host: &str) -> bool {
        origins.admit(&asked(&[("host", host)])).is_ok()
    }

    #[test]
    fn loopback_server_answers_only_to_its_own_names() {
        let own = origins(&[], &[], "127.0.0.1:8080");
        for host in
            ["localhost", "LOCALHOST:8080", "127.0.0.1:1", "[::1]:8080", "127.1.2.3", "a.localhost", "localhost."]
        {
            assert!(answers(&own, host), "{host}");
        }
        for host in ["evil.example", "localhost.evil.example", "192.0.2.1", "127.0.0.1.evil.example", "localhosts", ""]
        {
            assert!(!answers(&own, host), "{host}");
        }
        assert!(answers(&origins(&[], &[], "[::ffff:127.0.0.1]:1"), "localhost"));
        assert!(!answers(&origins(&[], &[], "[::ffff:127.0.0.1]:1"), "evil.example"));
    }

    #[test]
    fn public_server_answers_to_any_name_unless_configured() {
        assert!(answers(&origins(&[], &[], "0.0.0.0:80"), "any.example"));
        assert!(answers(&origins(&[], &[], "192.0.2.1:80"), "any.example"));
        assert!(answers(&origins(&["*"], &[], "127.0.0.1:80"), "any.example"));
        let named = origins(&["Run.example", "2001:db8::1"], &[], "192.0.2.1:80");
        for host in ["run.example", "RUN.example:8443", "run.example.", "[2001:db8::1]:80", "192.0.2.1", "localhost"] {
            assert!(answers(&named, host), "{host}");
        }
        for host in ["other.example", "a.run.example", "192.0.2.2"] {
            assert!(!answers(&named, host), "{host}");
        }
    }

    #[test]
    fn host_header_must_be_single_and_valid() {
        let any = origins(&["*"], &["*"], "127.0.0.1:80");
        let refused = |headers: &[(&str, &str)]| any.admit(&asked(headers)).unwrap_err().to_string();
        assert!(refused(&[("host", "a"), ("host", "a")]).contains("more than one"));
        assert!(refused(&[]).contains("missing"));
        for host in ["a b", "a/b", "user@a", "a:b:c", "[::1", "a,b c"] {
            assert!(refused(&[("host", host)]).contains("not valid"), "{host}");
        }
        let mut old = asked(&[]);
        *old.version_mut() = Version::HTTP_10;
        assert!(any.admit(&old).is_ok());
        // The host of an absolute request target is checked too.
        let mut whole = asked(&[("host", "localhost")]);
        *whole.uri_mut() = "http://evil.example/".parse().unwrap();
        assert!(origins(&[], &[], "127.0.0.1:80").admit(&whole).is_err());
    }

    #[test]
    fn only_allowed_origins_are_admitted() {
        let some = origins(&[], &["https://one.example"], "127.0.0.1:80");
        let from = |headers: &[(&str, &str)]| some.admit(&asked(&[&[("host", "localhost:80")], headers].concat()));
        assert_eq!(from(&[]).unwrap(), Caller::Direct);
        assert_eq!(from(&[("origin", "http://localhost:80")]).unwrap(), Caller::Direct);
        assert_eq!(
            from(&[("origin", "https://a.example"), ("sec-fetch-site", "same-origin")]).unwrap(),
            Caller::Direct
        );
        assert_eq!(
            from(&[("origin", "https://one.example")]).unwrap(),
            Caller::Page("https://one.example".parse().unwrap())
        );
        for origin in ["https://two.example", "null", "http://localhost:81", ""] {
            assert!(from(&[("origin", origin)]).is_err(), "{origin}");
        }
    }

    #[test]
    fn preflight_allows_the_requested_headers() {
        let page = Caller::Page("*".parse().unwrap());
        let request = |headers: &[(&str, &str)]| {
            let mut request = asked(&[&[("access-control-request-method", "POST")], headers].concat());
            *request.method_mut() = Method::OPTIONS;
            request
        };
        let names = |asks: &str| {
            let response = preflight(&page, &request(&[("access-control-request-headers", asks)]), "POST").unwrap();
            response.headers()[ACCESS_CONTROL_ALLOW_HEADERS].to_str().unwrap().to_owned()
        };
        assert_eq!(names("x-requested-with, content-type"), "x-requested-with, content-type");
        assert_eq!(names("no name, x-a"), "x-a");
        assert_eq!(names(""), DEFAULT_ALLOWED_HEADERS);
        assert!(preflight(&Caller::Direct, &request(&[]), "POST").is_none());
    }

    #[test]
    fn allowed_hosts_are_names_or_addresses() {
        for host in ["run.example.org", "localhost", "192.0.2.1", "::1", "[::1]", "a_b"] {
            assert!(is_host(host), "{host}");
        }
        for host in ["", "run.example.org:80", "http://a", "a/b", "*.a", "a..b", "a b", "[a]"] {
            assert!(!is_host(host), "{host}");
        }
    }
}
