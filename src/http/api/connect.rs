//! Piston's WebSocket: a run whose output comes as it is printed, and that can be typed to.

use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use nix::sys::signal::Signal;
use serde::Deserialize;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::timeout;
use tracing::Instrument;
use warp::filters::BoxedFilter;
use warp::reply::Response;
use warp::ws::{Message, WebSocket, Ws};
use warp::{Filter, Reply};

use crate::host::signals;
use crate::http::api::piston::Request;
use crate::http::backlog::Backlog;
use crate::http::budget::Allowance;
use crate::http::error::ApiError;
use crate::http::events::{Teller, Told};
use crate::http::inbox::Inbox;
use crate::http::openapi::Refused;
use crate::http::server::{Place, Shares};
use crate::http::{Api, Context, json};
use crate::model::client::Client;
use crate::run::Live;

/// How long a client may take to say what it wants.
const INIT_TIME: Duration = Duration::from_secs(5);

/// How long a client may take to agree that it is over.
const CLOSE_TIME: Duration = Duration::from_secs(2);

/// Sockets at once: each may wait in the queue, or for its client.
const MAX_SOCKETS: usize = 1000;

/// What is typed and not yet read, in messages; in bytes it is the largest body.
const MAX_TYPED: usize = 1024;

/// Signals that are not yet sent.
const MAX_SIGNALS: usize = 8;

/// From the client.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum Said {
    /// Run this.
    Init(Box<Request>),
    /// Type this.
    Data { stream: String, data: String },
    /// Nothing more will be typed. An addition to Piston's.
    Eof,
    /// Send this signal to the program.
    Signal { signal: String },
    /// What others may say is none of our business.
    #[serde(other)]
    Else,
}

/// Why the conversation is over.
#[derive(Debug)]
enum Over {
    Done,
    AlreadyInitialized,
    Late,
    Failed(String),
    NotInitialized,
    NotStdin,
    NoSignal,
    Left,
}

impl Over {
    /// Piston's close codes.
    fn code(&self) -> (u16, &'static str) {
        match self {
            Over::Done => (4999, "Job Completed"),
            Over::AlreadyInitialized => (4000, "Already Initialized"),
            Over::Late => (4001, "Initialization Timeout"),
            Over::Failed(_) => (4002, "Notified Error"),
            Over::NotInitialized => (4003, "Not yet initialized"),
            Over::NotStdin => (4004, "Can only write to stdin"),
            Over::NoSignal => (4005, "Invalid signal"),
            Over::Left => (1000, ""),
        }
    }
}

/// The WebSockets of a server, within a bound, and each client's share of them: as a client may have half of the
/// connections, it could have all sockets otherwise.
pub struct Sockets {
    all: Arc<Semaphore>,
    shares: Mutex<Shares>,
}

impl Default for Sockets {
    fn default() -> Sockets {
        Sockets { all: Arc::new(Semaphore::new(MAX_SOCKETS)), shares: Mutex::new(Shares::new(MAX_SOCKETS)) }
    }
}

impl Sockets {
    fn take(&self, client: &Client) -> Result<(OwnedSemaphorePermit, Option<OwnedSemaphorePermit>), ApiError> {
        let overloaded = |whose: &str| ApiError::Overloaded(format!("too many open WebSockets{whose}"));
        let share = match client {
            // Whoever comes through a proxy on this host need not be alone behind its address.
            Client::Address(address) if address.is_loopback() => None,
            Client::Ourselves => None,
            _ => {
                let mut shares = self.shares.lock().unwrap_or_else(PoisonError::into_inner);
                Some(shares.take(client.clone()).ok_or_else(|| overloaded(" of one client"))?)
            }
        };
        let place = Arc::clone(&self.all).try_acquire_owned().map_err(|_| overloaded(""))?;
        Ok((place, share))
    }
}

/// Answers `/api/v2/connect`.
pub fn filter(api: &Arc<Api>) -> BoxedFilter<(Response,)> {
    let api = Arc::clone(api);
    let open = move |upgrade, context, connection| {
        open(upgrade, context, connection, Arc::clone(&api)).unwrap_or_else(Reply::into_response)
    };
    let socket = warp::ws().and(warp::ext::get::<Context>()).and(warp::ext::optional()).map(open);
    let other = warp::any().map(|| {
        ApiError::BadRequest("this path is a WebSocket: connect with an upgrade request".into()).into_response()
    });
    socket.or(other).unify().boxed()
}

/// Agrees to the upgrade, if there is a place for another socket.
fn open(upgrade: Ws, context: Context, connection: Option<Place>, api: Arc<Api>) -> Result<Response, ApiError> {
    let place = api.sockets.take(&context.client)?;
    let upgrade = upgrade.max_message_size(api.body_limit).max_frame_size(api.body_limit);
    let inbox = connection.as_ref().map(|place| place.inbox.clone()).unwrap_or_default();
    inbox.open(api.bodies.of(&context.client));
    // Made here, in the span of the request; the socket comes later, in a task of its own.
    let (hand_over, socket) = oneshot::channel();
    let serving = async move {
        if let Ok(socket) = socket.await {
            serve(socket, inbox, api, context).await;
        }
        // The connection has ended for the server when this began; its place is taken until now.
        drop((place, connection));
    };
    // Its state is large, and would be copied from one wrapper into the next on the stack.
    let serving = signals::isolate_panics(Box::pin(serving)).in_current_span();
    let upgraded = upgrade.on_upgrade(move |socket| {
        let _ = hand_over.send(socket);
        serving
    });
    Ok(upgraded.into_response())
}

/// Run a program interactively, by WebSocket
///
/// The client says `init` with the fields of a program, then `data` for `stdin`, `eof` and `signal`; the server says
/// `runtime`, `queued`, `stage`, `data`, `exit` and `error`, and closes with 4999 when the program is done.
#[utoipa::path(
    get, path = "/api/v2/connect", operation_id = "connect",
    responses((status = 101, description = "The conversation begins"), Refused)
)]
async fn serve(socket: WebSocket, inbox: Inbox, api: Arc<Api>, context: Context) {
    let memory = api.answers.of(&context.client);
    let (mut sink, messages) = socket.split();
    let mut stream = Messages { messages, inbox };
    let over = converse(&mut sink, &mut stream, &api, &context, &memory).await;
    if let Over::Failed(message) = &over {
        let told = Told::Error { message: message.clone() };
        let _ = timeout(CLOSE_TIME, send(&mut sink, &told, &memory)).await;
    }
    let (code, reason) = over.code();
    let closing = async {
        if sink.send(Message::close_with(code, reason)).await.is_ok() {
            while let Some(Ok(_)) = stream.messages.next().await {}
        }
    };
    let _ = timeout(CLOSE_TIME, closing).await;
}

type Sink = SplitSink<WebSocket, Message>;

async fn converse(sink: &mut Sink, stream: &mut Messages, api: &Api, context: &Context, memory: &Allowance) -> Over {
    let request = match timeout(INIT_TIME, first(stream)).await {
        Ok(Ok(request)) => request,
        Ok(Err(over)) => return over,
        Err(_) => return Over::Late,
    };
    let (language, job) = match request.into_job(api.runner.languages(), api.source_limit) {
        Ok(asked) => asked,
        Err(error) => return Over::Failed(error.message()),
    };
    let runtime = Told::Runtime { language: language.name.clone(), version: language.version.to_string() };
    if let Err(over) = send(sink, &runtime, memory).await {
        return over;
    }
    let (events, happening) = mpsc::unbounded_channel();
    let (typing, typed) = mpsc::channel(MAX_TYPED);
    let (signalling, signals) = mpsc::channel(MAX_SIGNALS);
    let keyboard = Keyboard { typing: Some(typing), left: api.body_limit, signalling };
    let live = Live { events: Some(events), stdin: Some(typed), signals: Some(signals), ..Live::default() };
    let backlog = Backlog::new(memory);
    let running = async {
        let ran = api.runner.run_live(job, live, &context.client).await;
        ran.map_err(|error| failed(context.refusal(error)))
    };
    let taking = async { backlog.take(happening).await.map_err(|exhausted| failed(exhausted.into())) };
    let telling = async {
        let mut teller = Teller::default();
        while let Some(event) = backlog.next().await {
            for told in teller.tell(event) {
                send(sink, &told, memory).await?;
            }
        }
        Ok(())
    };
    // Side by side: a client that reads slowly does not slow the program down.
    tokio::select! {
        done = async { tokio::try_join!(async { running.await.map(drop) }, taking, telling) } => match done {
            Ok(_) => Over::Done,
            Err(over) => over,
        },
        over = keyboard.listen(stream) => over,
    }
}

fn failed(error: ApiError) -> Over {
    Over::Failed(error.message())
}

/// What the client wants to be run.
async fn first(stream: &mut Messages) -> Result<Request, Over> {
    loop {
        match stream.next().await? {
            Said::Init(request) => return Ok(*request),
            Said::Data { .. } | Said::Eof | Said::Signal { .. } => return Err(Over::NotInitialized),
            Said::Else => {}
        }
    }
}

/// What comes from the client while its program runs.
struct Keyboard {
    typing: Option<mpsc::Sender<Bytes>>,
    /// Bytes that may still be typed.
    left: usize,
    signalling: mpsc::Sender<i32>,
}

impl Keyboard {
    /// Passes on what is said until something ends the conversation.
    async fn listen(mut self, stream: &mut Messages) -> Over {
        loop {
            let said = match stream.next().await {
                Ok(said) => said,
                Err(over) => return over,
            };
            match said {
                Said::Init(_) => return Over::AlreadyInitialized,
                Said::Data { stream, data } if stream == "stdin" => {
                    if let Err(over) = self.type_in(data.into()) {
                        return over;
                    }
                }
                Said::Data { .. } => return Over::NotStdin,
                Said::Eof => self.typing = None,
                Said::Signal { signal } => match Signal::from_str(&signal) {
                    // More than the program can have taken yet are as good as one.
                    Ok(signal) => drop(self.signalling.try_send(signal as i32)),
                    Err(_) => return Over::NoSignal,
                },
                Said::Else => {}
            }
        }
    }

    /// Never waits for the program: that the client leaves is to be noticed at any time.
    fn type_in(&mut self, bytes: Bytes) -> Result<(), Over> {
        let Some(typing) = self.typing.as_ref().filter(|_| !bytes.is_empty()) else { return Ok(()) };
        self.left = self.left.checked_sub(bytes.len()).ok_or_else(|| Over::Failed("too much was typed".into()))?;
        match typing.try_send(bytes) {
            Err(mpsc::error::TrySendError::Full(_)) => Err(Over::Failed("the program does not read its input".into())),
            // A program that does not read any more is no error.
            _ => Ok(()),
        }
    }
}

/// What comes from the client.
struct Messages {
    messages: SplitStream<WebSocket>,
    inbox: Inbox,
}

impl Messages {
    /// The next message.
    async fn next(&mut self) -> Result<Said, Over> {
        loop {
            let message = match self.messages.next().await {
                Some(Ok(message)) if !message.is_close() => message,
                _ => return Err(self.inbox.exhausted().map_or(Over::Left, |exhausted| failed(exhausted.into()))),
            };
            self.inbox.complete();
            if message.is_text() || message.is_binary() {
                return json::parse(message.as_bytes())
                    .map_err(|error| failed(ApiError::BadRequest(error.to_string())));
            }
        }
    }
}

/// Sends a message, within the budget until the client has taken it: that it does is seen to by its socket.
async fn send(sink: &mut Sink, told: &Told, memory: &Allowance) -> Result<(), Over> {
    let text = serde_json::to_string(told).map_err(|error| failed(ApiError::unwritten(error)))?;
    // The frame around it is a copy.
    let _lease = memory.lease(2 * text.len()).await.map_err(|exhausted| failed(exhausted.into()))?;
    sink.send(Message::text(text)).await.map_err(|_| Over::Left)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_client_takes_more_than_half_of_the_sockets() {
        let sockets = Sockets::default();
        let alice = || sockets.take(&Client::Key("alice".into()));
        let mut held: Vec<_> = (0..MAX_SOCKETS).map_while(|_| alice().ok()).collect();
        assert_eq!(held.len(), MAX_SOCKETS / 2);
        let elsewhere = Client::at([192, 0, 2, 1].into());
        held.push(sockets.take(&elsewhere).ok().unwrap());
        // Those behind a proxy on this host have what is left, and no more.
        let local = || sockets.take(&Client::at([127, 0, 0, 1].into()));
        let rest: Vec<_> = (0..MAX_SOCKETS).map_while(|_| local().ok()).collect();
        assert_eq!(rest.len(), MAX_SOCKETS / 2 - 1);
        drop(rest);
        drop(held.remove(0));
        assert!(alice().is_ok(), "what is given back can be had again");
    }
}
