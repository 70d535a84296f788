//! JSON from clients: reads bodies within limits of size and time, and parses JSON with lone surrogates.

use std::time::Duration;

use bytes::{Buf, BufMut};
use futures_util::{Stream, StreamExt};
use serde::de::DeserializeOwned;
use warp::http::HeaderMap;
use warp::http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE};

use crate::http::budget::{Allowance, Lease};
use crate::http::error::ApiError;

/// How long a client may take to send its body.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// Bytes of a body that need no lease: most programs are smaller, and the buffers of a connection take as much.
const FREE: usize = 16 * 1024;

/// Reads and parses a JSON body within limits of size and time. `accepts` decides which content types are allowed;
/// `example` is shown if the body is invalid.
pub async fn read_body<T: DeserializeOwned>(
    headers: &HeaderMap,
    body: impl Stream<Item = Result<impl Buf, warp::Error>>,
    memory: &Allowance,
    limit: usize,
    accepts: fn(Option<&str>) -> bool,
    example: &'static str,
) -> Result<T, ApiError> {
    let mut codings = headers.get_all(CONTENT_ENCODING).iter();
    if codings.any(|coding| !coding.as_bytes().trim_ascii().eq_ignore_ascii_case(b"identity")) {
        return Err(ApiError::UnsupportedEncoding);
    }
    let kind = headers.get(CONTENT_TYPE).map(|kind| String::from_utf8_lossy(kind.as_bytes()));
    if !accepts(kind.as_deref()) {
        return Err(ApiError::UnsupportedMediaType);
    }
    // Before the body is read, so that a client that waits for `100 Continue` does not send it.
    let size = headers.get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
    if size.is_some_and(|size: usize| size > limit) {
        return Err(ApiError::TooLarge { what: "the body is", size, limit });
    }
    let (bytes, _lease) = read(body, limit, memory).await?;
    parse(&bytes).map_err(|error| ApiError::BadBody { why: error.to_string(), example })
}

/// Whether a content type is `application/json`.
pub fn is_json(kind: Option<&str>) -> bool {
    let essence = kind.and_then(|kind| kind.split(';').next()).unwrap_or_default().trim();
    essence.eq_ignore_ascii_case("application/json")
}

/// Reads a body. Returns it with the lease of its memory.
async fn read(
    body: impl Stream<Item = Result<impl Buf, warp::Error>>,
    limit: usize,
    memory: &Allowance,
) -> Result<(Vec<u8>, Option<Lease>), ApiError> {
    let reading = async {
        let mut body = std::pin::pin!(body);
        let (mut bytes, mut lease) = (Vec::new(), None::<Lease>);
        while let Some(chunk) = body.next().await {
            let chunk = chunk.map_err(|_| ApiError::BadRequest("the body ended too early".into()))?;
            let (before, size) = (bytes.capacity(), bytes.len() + chunk.remaining());
            if size > limit {
                return Err(ApiError::TooLarge { what: "the body is", size: None, limit });
            }
            bytes.put(chunk);
            if bytes.capacity() > before.max(FREE) {
                let more = memory.try_lease(bytes.capacity() - before)?;
                match &mut lease {
                    Some(lease) => lease.add(more),
                    none => *none = Some(more),
                }
            }
        }
        Ok((bytes, lease))
    };
    tokio::time::timeout(BODY_TIMEOUT, reading).await.unwrap_or(Err(ApiError::BodyTimeout))
}

/// Parses JSON. Replaces the escape of a lone surrogate, which JavaScript writes for a text cut within a character, by
/// U+FFFD.
pub fn parse<T: DeserializeOwned>(bytes: &[u8]) -> serde_json::Result<T> {
    serde_json::from_slice(bytes).or_else(|error| match replace_lone_surrogates(bytes) {
        Some(replaced) => serde_json::from_slice(&replaced),
        None => Err(error),
    })
}

/// Replaces each escaped lone surrogate by U+FFFD; `None` if there is none.
fn replace_lone_surrogates(bytes: &[u8]) -> Option<Vec<u8>> {
    // Every backslash starts an escape: in valid JSON there are none outside of strings.
    let unit = |at: usize| {
        let digits = bytes.get(at..at + 6)?.strip_prefix(b"\\u")?;
        u16::from_str_radix(std::str::from_utf8(digits).ok().filter(|digits| !digits.starts_with('+'))?, 16).ok()
    };
    let (mut alone, mut at) = (Vec::new(), 0);
    while let Some(found) = bytes.get(at..).and_then(|rest| rest.iter().position(|byte| *byte == b'\\')) {
        at += found;
        at += match unit(at) {
            Some(0xd800..=0xdbff) if unit(at + 6).is_some_and(|next| (0xdc00..=0xdfff).contains(&next)) => 12,
            Some(0xd800..=0xdfff) => {
                alone.push(at);
                6
            }
            _ => 2,
        };
    }
    if alone.is_empty() {
        return None;
    }
    let mut replaced = bytes.to_vec();
    for at in alone {
        replaced[at..at + 6].copy_from_slice(b"\\ufffd");
    }
    Some(replaced)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn text(json: &str) -> Option<String> {
        parse(json.as_bytes()).ok()
    }

    #[test]
    fn lone_surrogates_become_the_replacement_character() {
        assert_eq!(text(r#""a\ud83d""#).as_deref(), Some("a\u{fffd}"));
        assert_eq!(text(r#""\ude00b\uD83D\ud83d\ude00""#).as_deref(), Some("\u{fffd}b\u{fffd}😀"));
        assert_eq!(text(r#""\\ud83d\ud83dx""#).as_deref(), Some("\\ud83d\u{fffd}x"));
        assert_eq!(text(r#""\ud83d\n""#).as_deref(), Some("\u{fffd}\n"));
        for wrong in
            [r#""\ud83""#, r#""\ud83d"#, r#""\ud83d\u12""#, r#""\u+83d\ud83d""#, "\"\\ud83d\u{1}\"", r#"\ud83d"#]
        {
            assert_eq!(text(wrong), None, "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn any_utf16_text_is_parsed(units in proptest::collection::vec(any::<u16>(), 0..40)) {
            let json: String = units.iter().map(|unit| format!("\\u{unit:04x}")).collect();
            prop_assert_eq!(text(&format!("\"{json}\"")), Some(String::from_utf16_lossy(&units)));
        }

        #[test]
        fn valid_json_is_left_unchanged(any in any::<String>()) {
            let json = serde_json::to_vec(&any).unwrap();
            prop_assert_eq!(replace_lone_surrogates(&json), None);
            prop_assert_eq!(parse::<String>(&json).ok(), Some(any));
        }
    }
}
