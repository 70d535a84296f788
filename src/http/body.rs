//! Response bodies: small ones are built at once, large ones in chunks as the client reads them.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::task::Poll;

use bytes::Bytes;
use futures_util::stream;
use warp::Reply;
use warp::http::HeaderValue;
use warp::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use warp::reply::Response;

use crate::http::budget::{Allowance, Lease};
use crate::http::error::ApiError;
use crate::http::text::{self, Fields, MAX_PIECE_JSON, Part, Reader, Source, Texts};
use crate::model::outcome::Outcome;

/// Bytes of a chunk. A connection holds the chunk that is being sent and the next one.
pub const CHUNK: usize = 64 * 1024;

/// Memory for the chunks of one response.
pub const CHUNKS: usize = 2 * CHUNK;

/// Most bytes of program output in a body that is built at once.
const MAX_UNCHUNKED: usize = 8 * 1024;

/// Most bytes of a body without a lease: less than the buffers of the connection.
const FREE: usize = 8 * 1024;

/// Responds with JSON. The memory of a large response, that is `outcome` or the body, is leased until it has been sent.
pub async fn json(memory: &Allowance, mut value: impl Texts, outcome: &Outcome) -> Result<Response, ApiError> {
    if text_size(&mut value) > MAX_UNCHUNKED {
        let lease = memory.lease(cost(outcome)).await?;
        return leased_json(value, vec![lease]).await;
    }
    let bytes = serde_json::to_vec(&value).map_err(ApiError::unserializable)?;
    if bytes.len() <= FREE {
        return Ok(as_json(Response::new(bytes.into())));
    }
    // Only the body is kept from here on.
    drop(value);
    let lease = Arc::new(memory.lease(bytes.len()).await?);
    Ok(as_json(Response::new(Leased::bytes(bytes, lease).into())))
}

/// Responds with JSON in chunks. `leases` hold the memory for it.
pub async fn leased_json(mut value: impl Texts, leases: Vec<Lease>) -> Result<Response, ApiError> {
    let mut writer = Writer::new(&mut value, Fields::AsDeclared, leases)?;
    let length = writer.length().await;
    let mut made = false;
    let chunks = stream::poll_fn(move |context| {
        // Yields after each chunk, so that a fast client does not block other tasks.
        if std::mem::take(&mut made) {
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        made = true;
        Poll::Ready(writer.chunk().map(Ok::<_, Infallible>))
    });
    let mut response = as_json(warp::reply::stream(chunks).into_response());
    response.headers_mut().insert(CONTENT_LENGTH, length.into());
    Ok(response)
}

fn as_json(mut response: Response) -> Response {
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// Bytes of program output in a response.
fn text_size(value: &mut impl Texts) -> usize {
    let mut size = 0;
    value.each_text(&mut |text| size += text.kept());
    size
}

/// Memory that a response with this outcome takes until it has been sent.
pub fn cost(outcome: &Outcome) -> usize {
    outcome.size() + CHUNKS
}

/// Serializes a value to JSON in chunks.
pub struct Writer {
    parts: VecDeque<Part>,
    /// Bytes of the first part that are already written.
    written: usize,
    reader: Option<Reader>,
    scratch: Vec<u8>,
    leases: Arc<Vec<Lease>>,
}

impl Writer {
    /// A writer for a value. It holds `leases` until the last chunk is dropped.
    pub fn new(value: &mut impl Texts, fields: Fields, leases: Vec<Lease>) -> Result<Writer, ApiError> {
        let parts = text::split(value, fields).map_err(ApiError::unserializable)?.into();
        Ok(Writer { parts, written: 0, reader: None, scratch: Vec::new(), leases: Arc::new(leases) })
    }

    /// Adds bytes before and after the JSON.
    pub fn wrapped(mut self, before: &[u8], after: &[u8]) -> Writer {
        self.parts.push_front(Part::Json(before.to_vec()));
        self.parts.push_back(Part::Json(after.to_vec()));
        self
    }

    /// Total length in bytes.
    pub async fn length(&self) -> usize {
        let mut length = 0;
        for part in &self.parts {
            length += match part {
                Part::Json(json) => json.len(),
                Part::Text(source) => source.json_len().await,
            };
        }
        length
    }

    /// The next chunk; `None` at the end.
    pub fn chunk(&mut self) -> Option<Bytes> {
        let mut chunk = Vec::new();
        while let Some(part) = self.parts.front() {
            let ended = match part {
                Part::Json(json) => {
                    let rest = json.get(self.written..).unwrap_or_default();
                    let taken = rest.len().min(CHUNK - chunk.len());
                    reserve(&mut chunk, taken);
                    chunk.extend_from_slice(&rest[..taken]);
                    self.written += taken;
                    taken == rest.len()
                }
                Part::Text(source) => append_text(&mut chunk, source, &mut self.reader, &mut self.scratch),
            };
            if ended {
                self.parts.pop_front();
                (self.written, self.reader) = (0, None);
            } else {
                break;
            }
        }
        (!chunk.is_empty()).then(|| Leased::bytes(chunk, Arc::clone(&self.leases)))
    }
}

/// Appends text while the chunk has room for a piece. Returns whether the text has ended.
fn append_text(chunk: &mut Vec<u8>, source: &Source, reader: &mut Option<Reader>, scratch: &mut Vec<u8>) -> bool {
    let reader = reader.get_or_insert_with(|| Reader::new(source));
    while chunk.len() + MAX_PIECE_JSON <= CHUNK {
        let Some(piece) = reader.next(source) else { return true };
        let escaped = text::escaped(&piece, scratch);
        reserve(chunk, escaped.len());
        chunk.extend_from_slice(escaped);
    }
    false
}

/// Reserves the whole chunk at once: a buffer that grows by doubling may become twice as large as needed.
fn reserve(chunk: &mut Vec<u8>, more: usize) {
    if chunk.capacity() - chunk.len() < more {
        chunk.reserve_exact(CHUNK.max(chunk.len() + more) - chunk.len());
    }
}

/// Bytes to send, with the lease of their memory. The lease ends when the connection drops the bytes.
pub struct Leased<L> {
    bytes: Vec<u8>,
    _lease: Arc<L>,
}

impl<L> AsRef<[u8]> for Leased<L> {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl<L: Send + Sync + 'static> Leased<L> {
    /// Wraps bytes for sending. The chunks of a response share a lease.
    pub fn bytes(bytes: Vec<u8>, lease: Arc<L>) -> Bytes {
        Bytes::from_owner(Leased { bytes, _lease: lease })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::api::piston::StageResult;
    use crate::http::budget::Budget;
    use crate::model::client::Client;
    use crate::model::job::Stage;
    use crate::model::outcome::{Ended, StageOutcome, Usage};
    use crate::model::output::{Output, Stream};
    use proptest::prelude::*;

    fn outcome(pieces: &[(bool, Vec<u8>)], cap: usize) -> Arc<Outcome> {
        let mut output = Output::default();
        for (stderr, bytes) in pieces {
            output.push(if *stderr { Stream::Stderr } else { Stream::Stdout }, bytes, cap);
        }
        let run = StageOutcome {
            stage: Stage::Run,
            ended: Ended::Exited(0),
            artifact: true,
            usage: Usage::default(),
            output,
        };
        Arc::new(Outcome { compile: None, run: Some(run) })
    }

    /// The JSON that serde_json makes from the complete texts.
    fn at_once(outcome: &Outcome) -> Vec<u8> {
        let output = &outcome.run.as_ref().unwrap().output;
        let mut answer = StageResult::of(&Arc::new(outcome.clone()), Stage::Run)
            .map(|answer| serde_json::to_value(answer).unwrap())
            .unwrap();
        answer["stdout"] = output.text_of(Stream::Stdout).into();
        answer["stderr"] = output.text_of(Stream::Stderr).into();
        answer["output"] = output.text().into();
        serde_json::to_vec(&answer).unwrap()
    }

    fn in_chunks(mut value: impl Texts, fields: Fields) -> (Vec<Bytes>, usize) {
        let mut writer = Writer::new(&mut value, fields, Vec::new()).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let length = runtime.block_on(writer.length());
        (std::iter::from_fn(|| writer.chunk()).collect(), length)
    }

    fn answer(outcome: &Arc<Outcome>) -> StageResult {
        StageResult::of(outcome, Stage::Run).unwrap()
    }

    proptest! {
        #[test]
        fn streamed_body_equals_serde_json_output(
            pieces in proptest::collection::vec((any::<bool>(), prop_oneof![
                proptest::collection::vec(any::<u8>(), 0..40),
                ".{0,40}".prop_map(String::into_bytes),
                (0usize..9000, any::<char>()).prop_map(|(times, c)| c.to_string().repeat(times).into_bytes()),
            ]), 0..8),
            cap in prop_oneof![0usize..100, Just(usize::MAX)],
        ) {
            let outcome = outcome(&pieces, cap);
            let (chunks, length) = in_chunks(answer(&outcome), Fields::AsDeclared);
            let streamed = chunks.concat();
            prop_assert_eq!(streamed.len(), length);
            prop_assert_eq!(&streamed, &serde_json::to_vec(&answer(&outcome)).unwrap());
            let (sorted, _) = in_chunks(answer(&outcome), Fields::Sorted);
            prop_assert_eq!(sorted.concat(), at_once(&outcome));
        }

        #[test]
        fn cut_output_is_a_prefix_within_its_limit(
            pieces in proptest::collection::vec((any::<bool>(), ".{0,60}".prop_map(String::into_bytes)), 0..8),
            max_json in 0usize..600,
        ) {
            let outcome = outcome(&pieces, usize::MAX);
            let mut cut = answer(&outcome);
            let missing = cut.cut(max_json);
            let whole = serde_json::to_value(answer(&outcome)).unwrap();
            let (chunks, length) = in_chunks(cut, Fields::AsDeclared);
            prop_assert_eq!(chunks.concat().len(), length);
            let json: serde_json::Value = serde_json::from_slice(&chunks.concat()).unwrap();
            let mut shorter = false;
            for (field, part) in [("stdout", 4), ("stderr", 4), ("output", 2)] {
                let (text, all) = (json[field].as_str().unwrap(), whole[field].as_str().unwrap());
                prop_assert!(all.starts_with(text));
                prop_assert!(serde_json::to_string(text).unwrap().len() - 2 <= max_json / part);
                shorter |= text.len() < all.len();
            }
            prop_assert_eq!(missing, shorter);
            prop_assert_eq!(json["truncated"].as_bool().unwrap(), shorter);
        }
    }

    #[test]
    fn body_chunks_are_bounded_in_size() {
        let outcome = outcome(&[(false, vec![1; 1 << 20]), (true, vec![0xff; 1 << 20])], usize::MAX);
        let (chunks, length) = in_chunks(answer(&outcome), Fields::AsDeclared);
        assert!(length > 18 << 20, "{length}");
        assert!(chunks.iter().all(|chunk| chunk.len() <= CHUNK));
        assert!(chunks.len() < length / CHUNK * 2, "{}", chunks.len());
    }

    #[test]
    fn lease_is_held_until_the_last_chunk_is_dropped() {
        let budget = Arc::new(Budget::new(1 << 20)).for_client(&Client::Unidentified);
        let outcome = outcome(&[(false, vec![1; 100_000])], usize::MAX);
        let lease = budget.try_lease(400 << 10).unwrap();
        let mut writer = Writer::new(&mut answer(&outcome), Fields::AsDeclared, vec![lease]).unwrap();
        let chunk = std::iter::from_fn(|| writer.chunk()).last();
        drop(writer);
        assert!(budget.try_lease(400 << 10).is_err());
        drop(chunk);
        assert!(budget.try_lease(400 << 10).is_ok());
    }
}
