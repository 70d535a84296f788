//! Maps all errors to HTTP responses.

use serde::Serialize;
use warp::http::header::{ALLOW, RETRY_AFTER, WWW_AUTHENTICATE};
use warp::http::{HeaderValue, StatusCode};
use warp::reply::Response;
use warp::{Rejection, Reply};

use crate::http::auth::Denied;

/// Longest message in bytes: some messages quote the request, which may be as long as a body.
const MAX_MESSAGE: usize = 1000;

/// An error response.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    #[error("invalid request body: {why}; send {example}")]
    BadBody { why: String, example: &'static str },
    #[error("{0}")]
    BadRequest(String),
    #[error("the body did not arrive in time")]
    BodyTimeout,
    #[error("{what} too large: {}at most {limit} bytes are allowed", size_text(.size))]
    TooLarge { what: &'static str, size: Option<usize>, limit: usize },
    #[error("the head of the request is too large: at most {0} bytes are allowed")]
    HeadTooLarge(usize),
    #[error("send the body as Content-Type: application/json")]
    UnsupportedMediaType,
    #[error("send the body without Content-Encoding: compressed bodies are not supported")]
    UnsupportedEncoding,
    #[error("not found; POST /coderunner or /api/v2/execute runs code")]
    NotFound,
    #[error("method not allowed; this path allows {0}")]
    MethodNotAllowed(&'static str),
    #[error("the origin {0:?} is not allowed: add it to the setting cors_origins")]
    OriginForbidden(String),
    #[error("the host {0:?} is not allowed: add it to the setting allowed_hosts")]
    HostForbidden(String),
    #[error("an API key is required: send it as `Authorization: Bearer KEY` or `X-API-Key: KEY`")]
    Unauthorized,
    #[error("too many requests; the next one will be served in {0} s")]
    TooManyRequests(u64),
    #[error("{0}; try again later")]
    Overloaded(String),
    #[error("{0}; try again in a minute")]
    Unavailable(String),
    #[error("the server failed, its log says why under request id {0}")]
    Internal(String),
    #[error("the server failed, its log says why")]
    Unexpected,
}

/// The body of every error response.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct Refusal {
    /// What is wrong, and what to do about it.
    message: String,
}

impl From<Denied> for ApiError {
    fn from(denied: Denied) -> ApiError {
        match denied {
            Denied::NoKey => ApiError::Unauthorized,
            // Rounded up, so that a client that waits for whole seconds is not too early.
            Denied::TooMany(wait) => ApiError::TooManyRequests(wait.as_secs() + 1),
        }
    }
}

impl Reply for ApiError {
    /// The response, with the headers that belong to its status.
    fn into_response(self) -> Response {
        let body = warp::reply::json(&Refusal { message: self.message() });
        let mut response = warp::reply::with_status(body, self.status()).into_response();
        match self {
            ApiError::Overloaded(_) => {
                response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("5"));
            }
            ApiError::Unavailable(_) => {
                response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("60"));
            }
            ApiError::Unauthorized => {
                let bearer = HeaderValue::from_static("Bearer realm=\"coderunner\"");
                response.headers_mut().insert(WWW_AUTHENTICATE, bearer);
            }
            ApiError::TooManyRequests(seconds) => {
                response.headers_mut().insert(RETRY_AFTER, seconds.into());
            }
            ApiError::MethodNotAllowed(allow) => {
                response.headers_mut().insert(ALLOW, HeaderValue::from_static(allow));
            }
            _ => {}
        }
        response
    }
}

impl ApiError {
    /// The error for a response that cannot be serialized; logs it.
    pub fn unserializable(error: serde_json::Error) -> ApiError {
        tracing::error!(%error, "cannot serialize a response");
        ApiError::Unexpected
    }

    /// The message for the client, cut to `MAX_MESSAGE` bytes.
    pub fn message(&self) -> String {
        let mut message = self.to_string();
        if message.len() > MAX_MESSAGE {
            message.truncate(message.floor_char_boundary(MAX_MESSAGE));
            message.push('…');
        }
        message
    }

    pub fn status(&self) -> StatusCode {
        match self {
            ApiError::BadBody { .. } | ApiError::BadRequest(_) => StatusCode::BAD_REQUEST,
            ApiError::BodyTimeout => StatusCode::REQUEST_TIMEOUT,
            ApiError::TooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            ApiError::HeadTooLarge(_) => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            ApiError::UnsupportedMediaType | ApiError::UnsupportedEncoding => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            ApiError::NotFound => StatusCode::NOT_FOUND,
            ApiError::MethodNotAllowed(_) => StatusCode::METHOD_NOT_ALLOWED,
            ApiError::OriginForbidden(_) | ApiError::HostForbidden(_) => StatusCode::FORBIDDEN,
            ApiError::Unauthorized => StatusCode::UNAUTHORIZED,
            ApiError::TooManyRequests(_) => StatusCode::TOO_MANY_REQUESTS,
            ApiError::Overloaded(_) | ApiError::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
            ApiError::Internal(_) | ApiError::Unexpected => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// Converts a rejection by one of warp's filters. Our own filters do not reject; they respond with errors.
    pub fn from_rejection(rejection: &Rejection) -> ApiError {
        if rejection.find::<warp::reject::InvalidHeader>().is_some() {
            ApiError::BadRequest("a header is not valid".into())
        } else {
            tracing::error!(?rejection, "unexpected rejection");
            ApiError::Unexpected
        }
    }
}

fn size_text(size: &Option<usize>) -> String {
    size.map(|size| format!("{size} bytes, and ")).unwrap_or_default()
}
