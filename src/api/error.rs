//! The one map from errors to HTTP.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::json;
use warp::http::header::{ALLOW, RETRY_AFTER};
use warp::http::{HeaderValue, StatusCode};
use warp::reply::Response;
use warp::{Rejection, Reply};

use crate::runner::RunError;
use crate::sandbox::pool::PoolError;

/// What is said to a client whose request has no outcome.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    #[error("the body is no valid request: {why}; send {example}")]
    BadBody { why: String, example: &'static str },
    #[error("{0}")]
    BadRequest(String),
    #[error("the body did not arrive in time; send it at once")]
    BodyTimeout,
    #[error("the {what} is too large: at most {limit} bytes")]
    TooLarge { what: &'static str, limit: usize },
    #[error("send the body as Content-Type: application/json")]
    UnsupportedMediaType,
    #[error("there is nothing here; POST /coderunner or /api/v2/execute runs code")]
    NotFound,
    #[error("this path takes another method: {0}")]
    MethodNotAllowed(&'static str),
    #[error("pages of this origin may not call this server")]
    Forbidden,
    #[error("{0}; try again later")]
    Overloaded(String),
    #[error("{0}; try again in a minute")]
    Unavailable(String),
    #[error("{0:?} is not served here; enable it in the server's `languages`")]
    UnknownLanguage(String),
    #[error("the server failed, its log says why under request id {0}")]
    Internal(String),
}

impl From<RunError> for ApiError {
    fn from(error: RunError) -> ApiError {
        match error {
            RunError::UnknownLanguage(name) => ApiError::UnknownLanguage(name),
            RunError::Pool(PoolError::QueueFull { .. } | PoolError::QueueTimeout { .. } | PoolError::Draining)
            | RunError::ShuttingDown => ApiError::Overloaded(error.to_string()),
            RunError::Pool(PoolError::Unavailable { .. } | PoolError::Broken { .. }) => {
                ApiError::Unavailable(error.to_string())
            }
            RunError::Sandbox(ref inner) => {
                let id = request_id();
                tracing::error!(request = id, error = %inner, "a request failed");
                ApiError::Internal(id)
            }
        }
    }
}

impl ApiError {
    fn status(&self) -> StatusCode {
        match self {
            ApiError::BadBody { .. } | ApiError::BadRequest(_) => StatusCode::BAD_REQUEST,
            ApiError::BodyTimeout => StatusCode::REQUEST_TIMEOUT,
            ApiError::TooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            ApiError::UnsupportedMediaType => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            ApiError::NotFound | ApiError::UnknownLanguage(_) => StatusCode::NOT_FOUND,
            ApiError::MethodNotAllowed(_) => StatusCode::METHOD_NOT_ALLOWED,
            ApiError::Forbidden => StatusCode::FORBIDDEN,
            ApiError::Overloaded(_) | ApiError::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
            ApiError::Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// The answer, with the headers that its status asks for.
    pub fn into_response(self) -> Response {
        let body = warp::reply::json(&json!({"message": self.to_string()}));
        let mut response = warp::reply::with_status(body, self.status()).into_response();
        match self {
            ApiError::Overloaded(_) => {
                response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("5"));
            }
            ApiError::Unavailable(_) => {
                response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("60"));
            }
            ApiError::MethodNotAllowed(allow) => {
                response.headers_mut().insert(ALLOW, HeaderValue::from_static(allow));
            }
            _ => {}
        }
        response
    }

    /// What warp's own refusals mean: all ours are answers.
    pub fn from_rejection(rejection: &Rejection) -> ApiError {
        if rejection.find::<warp::cors::CorsForbidden>().is_some() {
            ApiError::Forbidden
        } else if rejection.is_not_found() {
            ApiError::NotFound
        } else if rejection.find::<warp::reject::MethodNotAllowed>().is_some() {
            ApiError::MethodNotAllowed("GET, POST")
        } else if rejection.find::<warp::reject::InvalidHeader>().is_some() {
            ApiError::BadRequest("a header is not valid".into())
        } else {
            let id = request_id();
            tracing::error!(request = id, ?rejection, "a refusal without a meaning");
            ApiError::Internal(id)
        }
    }
}

/// An id for a log line that a client can quote: unique for this server, not guessable work.
fn request_id() -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    blake3::hash(format!("{now} {count} {}", std::process::id()).as_bytes()).to_hex()[..16].to_owned()
}
