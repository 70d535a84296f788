//! What those who watch a run are told while it goes on: the messages of the WebSocket and of server-sent events.

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
use crate::model::output::{Place, Stream, whole_characters};
use crate::run::{Answer, Event, Live};

/// Time between two signs of life of a stream on which nothing happens: proxies close silent connections.
const SIGN_OF_LIFE: Duration = Duration::from_secs(15);

/// Bytes of events that are sent together where many wait. One more may be as much as [`body::CHUNK`].
const FRAMES: usize = 8 * 1024;

/// One message. Piston's are `runtime`, `stage`, `data`, `exit` and `error`.
#[derive(Debug, Serialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum Told {
    /// The request was understood; this will run it.
    Runtime {
        /// The language's name.
        language: String,
        /// The language's version.
        version: String,
    },
    /// The run waits for a container.
    Queued {
        /// How many wait before it.
        position: usize,
    },
    /// A stage begins.
    Stage {
        /// Which one.
        stage: Stage,
    },
    /// A stage printed this.
    Data {
        /// Where.
        stream: Stream,
        /// What. Bytes that are no UTF-8 are U+FFFD.
        data: String,
    },
    /// A stage has ended.
    Exit {
        /// Which one.
        stage: Stage,
        /// How.
        #[serde(flatten)]
        ending: Box<Ending>,
    },
    /// There is no outcome.
    Error {
        /// Why.
        message: String,
    },
}

impl Told {
    /// The name of its kind, as in `type`.
    fn kind(&self) -> &'static str {
        match self {
            Told::Runtime { .. } => "runtime",
            Told::Queued { .. } => "queued",
            Told::Stage { .. } => "stage",
            Told::Data { .. } => "data",
            Told::Exit { .. } => "exit",
            Told::Error { .. } => "error",
        }
    }
}

/// Turns events into messages. A character that came in two pieces is told in one.
#[derive(Debug, Default)]
pub struct Teller {
    begun: [Vec<u8>; 2],
}

impl Teller {
    /// What is to be told of an event.
    pub fn tell(&mut self, event: Event) -> Vec<Told> {
        match event {
            Event::Queued(position) => vec![Told::Queued { position }],
            Event::Started(stage) => vec![Told::Stage { stage }],
            Event::Output(_, stream, bytes) => self.data(stream, &bytes).into_iter().collect(),
            Event::Ended(stage) => self.ended(&stage),
        }
    }

    fn ended(&mut self, stage: &StageOutcome) -> Vec<Told> {
        let rest = [Stream::Stdout, Stream::Stderr].into_iter().filter_map(|stream| self.rest(stream));
        let exit = Told::Exit { stage: stage.stage, ending: Box::new(Ending::from(stage)) };
        rest.collect::<Vec<_>>().into_iter().chain([exit]).collect()
    }

    fn data(&mut self, stream: Stream, bytes: &[u8]) -> Option<Told> {
        let begun = &mut self.begun[stream as usize];
        begun.extend_from_slice(bytes);
        let rest = begun.split_off(whole_characters(begun));
        let whole = std::mem::replace(begun, rest);
        told(stream, &whole)
    }

    /// A character that never came whole.
    fn rest(&mut self, stream: Stream) -> Option<Told> {
        told(stream, &std::mem::take(&mut self.begun[stream as usize]))
    }
}

fn told(stream: Stream, bytes: &[u8]) -> Option<Told> {
    (!bytes.is_empty()).then(|| Told::Data { stream, data: String::from_utf8_lossy(bytes).into_owned() })
}

/// A plain run as server-sent events; `result` makes the last one. A client that leaves ends the run.
pub fn events<A: Texts>(call: Call, job: Job, result: impl Fn(&Answer) -> A + Send + Sync + 'static) -> Response {
    // One piece, while the connection has another: the rest waits in the backlog.
    let (sender, mut receiver) = mpsc::channel(1);
    call.spawn(async move |call| {
        let left = sender.clone();
        let mut frames = Frames { memory: call.memory(), sender, begun: Vec::new() };
        tokio::select! {
            () = left.closed() => {}
            () = tell(&call, job, result, &mut frames) => {}
        }
    });
    let mut silence = Box::pin(tokio::time::sleep(SIGN_OF_LIFE));
    let events = stream::poll_fn(move |context| {
        let next = match receiver.poll_recv(context) {
            Poll::Pending if silence.as_mut().poll(context).is_ready() => Some(Bytes::from_static(b":\n\n")),
            Poll::Pending => return Poll::Pending,
            Poll::Ready(next) => next,
        };
        silence.as_mut().reset(Instant::now() + SIGN_OF_LIFE);
        Poll::Ready(next.map(Ok::<_, Infallible>))
    });
    let mut response = warp::reply::stream(events).into_response();
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // nginx would hold the events back.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

/// Why nothing more is told.
#[derive(Debug)]
enum Untold {
    /// There is no outcome, or no memory to tell it.
    Failed(String),
    /// There is nobody to be told.
    Left,
}

impl From<ApiError> for Untold {
    fn from(error: ApiError) -> Untold {
        Untold::Failed(error.message())
    }
}

impl From<Exhausted> for Untold {
    fn from(exhausted: Exhausted) -> Untold {
        ApiError::from(exhausted).into()
    }
}

/// Server-sent events on their way.
struct Frames {
    memory: Allowance,
    sender: mpsc::Sender<Bytes>,
    begun: Vec<u8>,
}

impl Frames {
    /// Adds an event; many small ones are sent together.
    async fn add(&mut self, told: &Told) -> Result<(), Untold> {
        self.begun.extend_from_slice(format!("event:{}\ndata:", told.kind()).as_bytes());
        serde_json::to_writer(&mut self.begun, told).map_err(ApiError::unwritten)?;
        self.begun.extend_from_slice(b"\n\n");
        if self.begun.len() < FRAMES { Ok(()) } else { self.send().await }
    }

    /// Sends what was added.
    async fn send(&mut self) -> Result<(), Untold> {
        if self.begun.is_empty() {
            return Ok(());
        }
        let bytes = std::mem::take(&mut self.begun);
        let lease = Arc::new(self.memory.lease(bytes.capacity()).await?);
        self.pass(Leased::bytes(bytes, lease)).await
    }

    async fn pass(&self, bytes: Bytes) -> Result<(), Untold> {
        self.sender.send(bytes).await.map_err(|_| Untold::Left)
    }
}

/// Runs a job, or takes its outcome from the memo, and tells what happens and what came of it.
async fn tell<A: Texts>(call: &Call, job: Job, result: impl Fn(&Answer) -> A, frames: &mut Frames) {
    let telling = async {
        let (answer, lease) = watch(call, job, frames).await?;
        frames.send().await?;
        let writer = Writer::new(&mut result(&answer), Fields::Sorted, vec![lease])?;
        // What it is made of is the writer's now.
        drop(answer);
        let mut writer = writer.between(b"event:result\ndata:", b"\n\n");
        while let Some(chunk) = writer.chunk() {
            frames.pass(chunk).await?;
        }
        Ok(())
    };
    if let Err(Untold::Failed(message)) = telling.await {
        frames.begun.clear();
        let told = serde_json::to_string(&Told::Error { message }).unwrap_or_default();
        // Sent in any case: it is small, and the last.
        let _ = frames.pass(Bytes::from(format!("event:error\ndata:{told}\n\n"))).await;
    }
}

/// Tells what happens until there is an outcome; with the memory to tell that.
async fn watch(call: &Call, job: Job, frames: &mut Frames) -> Result<(Answer, Lease), Untold> {
    let (runner, memory) = (&call.api.runner, frames.memory.clone());
    let refused = |error| call.context.refusal(error);
    if let Some(answer) = runner.remembered(&job, call.wishes.reuse).map_err(refused)? {
        let lease = memory.lease(body::cost(&answer.outcome)).await?;
        replay(&answer.outcome, frames).await?;
        return Ok((answer, lease));
    }
    let (events, happening) = mpsc::unbounded_channel();
    let live = Live { events: Some(events), ..Live::default() };
    let backlog = Backlog::new(&memory);
    let telling = async {
        let mut teller = Teller::default();
        loop {
            let event = match backlog.next_now() {
                Some(event) => event,
                None => {
                    frames.send().await?;
                    match backlog.next().await {
                        Some(event) => event,
                        None => return Ok(()),
                    }
                }
            };
            for told in teller.tell(event) {
                frames.add(&told).await?;
            }
        }
    };
    let running = async {
        let answer = runner.run_live(job, live, &call.context.client).await.map_err(refused)?;
        // It may be told for long after it has ended.
        let lease = memory.lease(body::cost(&answer.outcome)).await?;
        Ok((answer, lease))
    };
    let taking = async { backlog.take(happening).await.map_err(Untold::from) };
    let (told, (), ()) = tokio::try_join!(running, taking, telling)?;
    Ok(told)
}

/// Tells what was told of a run that is over.
async fn replay(outcome: &Outcome, frames: &mut Frames) -> Result<(), Untold> {
    let mut teller = Teller::default();
    for stage in outcome.compile.iter().chain(&outcome.run) {
        frames.add(&Told::Stage { stage: stage.stage }).await?;
        let mut place = Place::default();
        loop {
            let (stream, bytes) = stage.output.read(&mut place, None, FRAMES);
            if bytes.is_empty() {
                break;
            }
            if let Some(told) = teller.data(stream, bytes) {
                frames.add(&told).await?;
            }
        }
        for told in teller.ended(stage) {
            frames.add(&told).await?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_character_in_two_pieces_is_told_in_one() {
        let mut teller = Teller::default();
        let mut text = String::new();
        for byte in "aé€𝄞".bytes() {
            for told in teller.tell(Event::Output(Stage::Run, Stream::Stdout, Bytes::copy_from_slice(&[byte]))) {
                let Told::Data { data, .. } = told else { panic!("{told:?}") };
                text += &data;
            }
        }
        assert_eq!(text, "aé€𝄞");
        assert!(teller.tell(Event::Output(Stage::Run, Stream::Stdout, Bytes::from_static(b"\xc3"))).is_empty());
        assert!(teller.rest(Stream::Stdout).is_some());
    }
}
