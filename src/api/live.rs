//! What those who watch a run are told while it goes on: the messages of the WebSocket and of server-sent events.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use serde::Serialize;
use serde_json::Value;
use tokio::sync::mpsc;
use warp::Reply;
use warp::reply::Response;

use super::error::ApiError;
use super::piston::Ending;
use crate::caller::Caller;
use crate::job::{Job, Outcome, Stage, Stream, whole_characters};
use crate::runner::{Answer, Reuse, Runner};
use crate::sandbox::{Event, Live};

/// Time between two signs of life of a stream on which nothing happens: proxies close silent connections.
const SIGN_OF_LIFE: Duration = Duration::from_secs(15);

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
    /// All is over: the answer that a plain request gets.
    Result(Value),
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
            Told::Result(_) => "result",
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
            Event::Ended(stage) => {
                let rest = [Stream::Stdout, Stream::Stderr].into_iter().filter_map(|stream| self.rest(stream));
                let exit = Told::Exit { stage: stage.stage, ending: Box::new(Ending::from(&*stage)) };
                rest.collect::<Vec<_>>().into_iter().chain([exit]).collect()
            }
        }
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

/// What was told of a run that is over.
fn replay(outcome: &Outcome) -> Vec<Event> {
    let of = |stage: &crate::job::StageOutcome| {
        let printed = stage
            .output
            .chunks()
            .map(|(stream, bytes)| Event::Output(stage.stage, stream, Bytes::copy_from_slice(bytes)));
        let ended = Event::Ended(Arc::new(stage.clone()));
        std::iter::once(Event::Started(stage.stage)).chain(printed).chain([ended]).collect::<Vec<_>>()
    };
    outcome.compile.iter().chain(&outcome.run).flat_map(of).collect()
}

/// A plain run as server-sent events; `result` makes the last one. A client that leaves ends the run.
pub fn events(
    runner: Arc<Runner>,
    job: Job,
    reuse: Reuse,
    result: impl Fn(&Answer) -> Value + Send + 'static,
) -> Response {
    // What is sent is bounded by the output limits.
    let (sender, mut receiver) = mpsc::unbounded_channel();
    tokio::spawn(Caller::pass_on(async move {
        tokio::select! {
            () = sender.closed() => {}
            last = watch(&runner, job, reuse, |told| drop(sender.send(told))) => {
                let last = last.map_or_else(|message| Told::Error { message }, |answer| Told::Result(result(&answer)));
                let _ = sender.send(last);
            }
        }
    }));
    let events = stream::poll_fn(move |context| receiver.poll_recv(context)).map(|told| {
        let data = match &told {
            Told::Result(value) => value.to_string(),
            told => serde_json::to_string(told).unwrap_or_default(),
        };
        Ok::<_, Infallible>(warp::sse::Event::default().event(told.kind()).data(data))
    });
    let mut response = warp::sse::reply(warp::sse::keep_alive().interval(SIGN_OF_LIFE).stream(events)).into_response();
    // nginx would hold the events back.
    response.headers_mut().insert("x-accel-buffering", warp::http::HeaderValue::from_static("no"));
    response
}

/// Runs a job, or takes its outcome from the memo, and tells what happens; the message of what went wrong.
async fn watch(runner: &Runner, job: Job, reuse: Reuse, mut tell: impl FnMut(Told)) -> Result<Answer, String> {
    let message = |error| ApiError::from(error).to_string();
    let mut teller = Teller::default();
    if let Some(answer) = runner.remembered(&job, reuse).map_err(message)? {
        replay(&answer.outcome).into_iter().flat_map(|event| teller.tell(event)).for_each(tell);
        return Ok(answer);
    }
    let (events, mut happening) = mpsc::unbounded_channel();
    let live = Live { events: Some(events), ..Live::default() };
    let telling = async {
        while let Some(event) = happening.recv().await {
            teller.tell(event).into_iter().for_each(&mut tell);
        }
    };
    let (answer, ()) = tokio::join!(runner.run_live(job, live), telling);
    answer.map_err(message)
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
