//! Messages about a run in progress, for the WebSocket and for server-sent events; and responses as server-sent events.

use std::convert::Infallible;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use serde::Serialize;
use tokio::sync::mpsc;
use tokio::time::Instant;
use warp::Reply;
use warp::http::HeaderValue;
use warp::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use warp::reply::Response;

use crate::http::api::piston::Ending;
use crate::http::backlog::Backlog;
use crate::http::body::{self, Leased, Writer};
use crate::http::budget::{Allowance, Exhausted, Lease};
use crate::http::error::ApiError;
use crate::http::request::Call;
use crate::http::text::{Fields, Texts};
use crate::model::job::{Job, Stage};
use crate::model::outcome::{Outcome, StageOutcome};
use crate::model::output::{Position, Stream, whole_characters};
use crate::run::{Answer, Event, Live};

/// Time without events after which a comment is sent: proxies close silent connections.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Buffered bytes of events at which they are sent. One event may add up to [`body::CHUNK`].
const FLUSH_SIZE: usize = 8 * 1024;

/// A message to the client. `queued` is an addition to Piston's messages.
#[derive(Debug, Serialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum ServerMessage {
    /// The request was accepted; this language will run it.
    Runtime {
        /// The language's name.
        language: String,
        /// The language's version.
        version: String,
    },
    /// The run waits for a container.
    Queued {
        /// How many requests wait before it.
        position: usize,
    },
    /// A stage begins.
    Stage {
        /// The stage.
        stage: Stage,
    },
    /// A stage printed output.
    Data {
        /// The output stream.
        stream: Stream,
        /// The text. Invalid UTF-8 is replaced by U+FFFD.
        data: String,
    },
    /// A stage has ended.
    Exit {
        /// The stage.
        stage: Stage,
        /// How it ended, and its usage.
        #[serde(flatten)]
        ending: Box<Ending>,
    },
    /// The run has no outcome.
    Error {
        /// The reason.
        message: String,
    },
}

impl ServerMessage {
    /// The value of `type`.
    fn kind(&self) -> &'static str {
        match self {
            ServerMessage::Runtime { .. } => "runtime",
            ServerMessage::Queued { .. } => "queued",
            ServerMessage::Stage { .. } => "stage",
            ServerMessage::Data { .. } => "data",
            ServerMessage::Exit { .. } => "exit",
            ServerMessage::Error { .. } => "error",
        }
    }
}

/// Turns events into messages. Sends a character that arrived in two pieces as a whole.
#[derive(Debug, Default)]
pub struct MessageEncoder {
    partial: [Vec<u8>; 2],
}

impl MessageEncoder {
    /// The messages for an event.
    pub fn encode(&mut self, event: Event) -> Vec<ServerMessage> {
        match event {
            Event::Queued(position) => vec![ServerMessage::Queued { position }],
            Event::Started(stage) => vec![ServerMessage::Stage { stage }],
            Event::Output(_, stream, bytes) => self.data(stream, &bytes).into_iter().collect(),
            Event::Ended(stage) => self.ended(&stage),
        }
    }

    fn ended(&mut self, stage: &StageOutcome) -> Vec<ServerMessage> {
        let rest = [Stream::Stdout, Stream::Stderr].into_iter().filter_map(|stream| self.incomplete(stream));
        let exit = ServerMessage::Exit { stage: stage.stage, ending: Box::new(Ending::from(stage)) };
        rest.collect::<Vec<_>>().into_iter().chain([exit]).collect()
    }

    fn data(&mut self, stream: Stream, bytes: &[u8]) -> Option<ServerMessage> {
        let partial = &mut self.partial[stream as usize];
        partial.extend_from_slice(bytes);
        let rest = partial.split_off(whole_characters(partial));
        let whole = std::mem::replace(partial, rest);
        data_message(stream, &whole)
    }

    /// The rest of a stream that ended within a character.
    fn incomplete(&mut self, stream: Stream) -> Option<ServerMessage> {
        data_message(stream, &std::mem::take(&mut self.partial[stream as usize]))
    }
}

fn data_message(stream: Stream, bytes: &[u8]) -> Option<ServerMessage> {
    (!bytes.is_empty()).then(|| ServerMessage::Data { stream, data: String::from_utf8_lossy(bytes).into_owned() })
}

/// Responds with server-sent events about the run of a job. `result` makes the last event. If the client leaves, the
/// run ends.
pub fn respond<A: Texts>(call: Call, job: Job, result: impl Fn(&Answer) -> A + Send + Sync + 'static) -> Response {
    // Holds one chunk while the connection sends another; everything else waits in the backlog.
    let (sender, mut receiver) = mpsc::channel(1);
    call.spawn(async move |call| {
        let disconnected = sender.clone();
        let mut events = EventWriter { memory: call.memory(), sender, buffer: Vec::new() };
        tokio::select! {
            () = disconnected.closed() => {}
            () = stream_result(&call, job, result, &mut events) => {}
        }
    });
    let mut keep_alive = Box::pin(tokio::time::sleep(KEEP_ALIVE));
    let body = stream::poll_fn(move |context| {
        let next = match receiver.poll_recv(context) {
            Poll::Pending if keep_alive.as_mut().poll(context).is_ready() => Some(Bytes::from_static(b":\n\n")),
            Poll::Pending => return Poll::Pending,
            Poll::Ready(next) => next,
        };
        keep_alive.as_mut().reset(Instant::now() + KEEP_ALIVE);
        Poll::Ready(next.map(Ok::<_, Infallible>))
    });
    let mut response = warp::reply::stream(body).into_response();
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Tells nginx not to buffer the events.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

/// Why a stream of events ends early.
#[derive(Debug)]
enum StreamError {
    /// There is no outcome, or no memory to send it; the message for the client.
    Failed(String),
    /// The client has left.
    ClientLeft,
}

impl From<ApiError> for StreamError {
    fn from(error: ApiError) -> StreamError {
        StreamError::Failed(error.message())
    }
}

impl From<Exhausted> for StreamError {
    fn from(exhausted: Exhausted) -> StreamError {
        ApiError::from(exhausted).into()
    }
}

/// Writes server-sent events.
struct EventWriter {
    memory: Allowance,
    sender: mpsc::Sender<Bytes>,
    buffer: Vec<u8>,
}

impl EventWriter {
    /// Adds an event to the buffer, and sends the buffer when it is full.
    async fn add(&mut self, message: &ServerMessage) -> Result<(), StreamError> {
        self.buffer.extend_from_slice(format!("event:{}\ndata:", message.kind()).as_bytes());
        serde_json::to_writer(&mut self.buffer, message).map_err(ApiError::unserializable)?;
        self.buffer.extend_from_slice(b"\n\n");
        if self.buffer.len() < FLUSH_SIZE { Ok(()) } else { self.send().await }
    }

    /// Sends the buffered events.
    async fn send(&mut self) -> Result<(), StreamError> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let bytes = std::mem::take(&mut self.buffer);
        let lease = Arc::new(self.memory.lease(bytes.capacity()).await?);
        self.pass(Leased::bytes(bytes, lease)).await
    }

    async fn pass(&self, bytes: Bytes) -> Result<(), StreamError> {
        self.sender.send(bytes).await.map_err(|_| StreamError::ClientLeft)
    }
}

/// Runs a job or takes its outcome from the cache; sends the events of the run, then the result or an error.
async fn stream_result<A: Texts>(call: &Call, job: Job, result: impl Fn(&Answer) -> A, events: &mut EventWriter) {
    let sending = async {
        let (answer, lease) = stream_run(call, job, events).await?;
        events.send().await?;
        let json = Writer::new(&mut result(&answer), Fields::Sorted, vec![lease])?;
        // The writer holds what it needs of the answer.
        drop(answer);
        let mut json = json.wrapped(b"event:result\ndata:", b"\n\n");
        while let Some(chunk) = json.chunk() {
            events.pass(chunk).await?;
        }
        Ok(())
    };
    if let Err(StreamError::Failed(message)) = sending.await {
        events.buffer.clear();
        let message = serde_json::to_string(&ServerMessage::Error { message }).unwrap_or_default();
        // Sent without a lease: it is small, and the last event.
        let _ = events.pass(Bytes::from(format!("event:error\ndata:{message}\n\n"))).await;
    }
}

/// Sends the events of a run until there is an outcome. Returns the answer with a lease for sending it.
async fn stream_run(call: &Call, job: Job, events: &mut EventWriter) -> Result<(Answer, Lease), StreamError> {
    let (runner, memory) = (&call.api.runner, events.memory.clone());
    let api_error = |error| call.context.api_error(error);
    if let Some(answer) = runner.cached(&job, call.preferences.reuse).map_err(api_error)? {
        let lease = memory.lease(body::cost(&answer.outcome)).await?;
        replay(&answer.outcome, events).await?;
        return Ok((answer, lease));
    }
    let (event_sender, event_receiver) = mpsc::unbounded_channel();
    let live = Live { events: Some(event_sender), ..Live::default() };
    let backlog = Backlog::new(&memory);
    let sending = async {
        let mut encoder = MessageEncoder::default();
        loop {
            let event = match backlog.try_next() {
                Some(event) => event,
                None => {
                    events.send().await?;
                    match backlog.next().await {
                        Some(event) => event,
                        None => return Ok(()),
                    }
                }
            };
            for message in encoder.encode(event) {
                events.add(&message).await?;
            }
        }
    };
    let running = async {
        let answer = runner.run_live(job, live, &call.context.client).await.map_err(api_error)?;
        // Sending the result may take long after the run has ended.
        let lease = memory.lease(body::cost(&answer.outcome)).await?;
        Ok((answer, lease))
    };
    let collecting = async { backlog.collect(event_receiver).await.map_err(StreamError::from) };
    let (answer, (), ()) = tokio::try_join!(running, collecting, sending)?;
    Ok(answer)
}

/// Sends the events of a cached run.
async fn replay(outcome: &Outcome, events: &mut EventWriter) -> Result<(), StreamError> {
    let mut encoder = MessageEncoder::default();
    for stage in outcome.compile.iter().chain(&outcome.run) {
        events.add(&ServerMessage::Stage { stage: stage.stage }).await?;
        let mut position = Position::default();
        loop {
            let (stream, bytes) = stage.output.read(&mut position, None, FLUSH_SIZE);
            if bytes.is_empty() {
                break;
            }
            if let Some(message) = encoder.data(stream, bytes) {
                events.add(&message).await?;
            }
        }
        for message in encoder.ended(stage) {
            events.add(&message).await?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn split_characters_are_sent_whole() {
        let mut encoder = MessageEncoder::default();
        let mut text = String::new();
        for byte in "aé€𝄞".bytes() {
            for message in encoder.encode(Event::Output(Stage::Run, Stream::Stdout, Bytes::copy_from_slice(&[byte]))) {
                let ServerMessage::Data { data, .. } = message else { panic!("{message:?}") };
                text += &data;
            }
        }
        assert_eq!(text, "aé€𝄞");
        assert!(encoder.encode(Event::Output(Stage::Run, Stream::Stdout, Bytes::from_static(b"\xc3"))).is_empty());
        assert!(encoder.incomplete(Stream::Stdout).is_some());
    }
}
