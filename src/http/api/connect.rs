//! Piston's WebSocket: an interactive run. The server sends output as it is printed; the client may send input and
//! signals.

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
use crate::http::api::piston::ExecuteRequest;
use crate::http::backlog::Backlog;
use crate::http::budget::Allowance;
use crate::http::error::ApiError;
use crate::http::events::{MessageEncoder, ServerMessage};
use crate::http::inbox::Inbox;
use crate::http::openapi::ErrorResponses;
use crate::http::server::{ClientPermits, ConnectionPermit};
use crate::http::{Api, Context, json};
use crate::model::client::Client;
use crate::run::Live;

/// How long a client may take to send its `init` message.
const INIT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a client may take to answer the close frame.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// Most WebSockets at the same time.
const MAX_SOCKETS: usize = 1000;

/// Most input messages that the program has not read yet. `body_limit` bounds all input in bytes.
const MAX_INPUT_MESSAGES: usize = 1024;

/// Most signals that have not been delivered yet.
const MAX_SIGNALS: usize = 8;

/// A message from the client.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum ClientMessage {
    /// The program to run.
    Init(Box<ExecuteRequest>),
    /// Input for the program.
    Data { stream: String, data: String },
    /// End of input. An addition to Piston's messages.
    Eof,
    /// A signal for the program, by name.
    Signal { signal: String },
    /// Any other message; ignored.
    #[serde(other)]
    Unknown,
}

/// Why the server closes the WebSocket.
#[derive(Debug)]
enum CloseReason {
    Done,
    AlreadyInitialized,
    InitTimeout,
    Failed(String),
    NotInitialized,
    NotStdin,
    InvalidSignal,
    ClientLeft,
}

impl CloseReason {
    /// Piston's close code and its text.
    fn code(&self) -> (u16, &'static str) {
        match self {
            CloseReason::Done => (4999, "Job Completed"),
            CloseReason::AlreadyInitialized => (4000, "Already Initialized"),
            CloseReason::InitTimeout => (4001, "Initialization Timeout"),
            CloseReason::Failed(_) => (4002, "Notified Error"),
            CloseReason::NotInitialized => (4003, "Not yet initialized"),
            CloseReason::NotStdin => (4004, "Can only write to stdin"),
            CloseReason::InvalidSignal => (4005, "Invalid signal"),
            CloseReason::ClientLeft => (1000, ""),
        }
    }
}

/// Limits the WebSockets of a server, in total and per client. The limit per client is needed since a client may hold
/// half of the connections, which may be more than all WebSockets.
pub struct Sockets {
    total: Arc<Semaphore>,
    per_client: Mutex<ClientPermits>,
}

impl Default for Sockets {
    fn default() -> Sockets {
        Sockets {
            total: Arc::new(Semaphore::new(MAX_SOCKETS)),
            per_client: Mutex::new(ClientPermits::new(MAX_SOCKETS)),
        }
    }
}

impl Sockets {
    fn acquire(&self, client: &Client) -> Result<(OwnedSemaphorePermit, Option<OwnedSemaphorePermit>), ApiError> {
        let overloaded = |whose: &str| ApiError::Overloaded(format!("too many open WebSockets{whose}"));
        let client_permit = match client {
            // Clients behind a proxy on this host share its address.
            Client::Address(address) if address.is_loopback() => None,
            Client::Unidentified => None,
            _ => {
                let mut per_client = self.per_client.lock().unwrap_or_else(PoisonError::into_inner);
                Some(per_client.try_acquire(client.clone()).ok_or_else(|| overloaded(" of one client"))?)
            }
        };
        let permit = Arc::clone(&self.total).try_acquire_owned().map_err(|_| overloaded(""))?;
        Ok((permit, client_permit))
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

/// Accepts the upgrade if the limits allow another WebSocket.
fn open(
    upgrade: Ws,
    context: Context,
    connection: Option<ConnectionPermit>,
    api: Arc<Api>,
) -> Result<Response, ApiError> {
    let permit = api.sockets.acquire(&context.client)?;
    let upgrade = upgrade.max_message_size(api.body_limit).max_frame_size(api.body_limit);
    let inbox = connection.as_ref().map(|permit| permit.inbox.clone()).unwrap_or_default();
    inbox.open(api.bodies.for_client(&context.client));
    // Created here, so that it runs in the span of the request. It gets the socket later, in a task of its own.
    let (hand_over, socket) = oneshot::channel();
    let serving = async move {
        if let Ok(socket) = socket.await {
            serve(socket, inbox, api, context).await;
        }
        // hyper is done with the connection after the upgrade, so its permit is held here.
        drop((permit, connection));
    };
    // Boxed: the state is large and would be copied on the stack from one wrapper into the next.
    let serving = signals::isolate_panics(Box::pin(serving)).in_current_span();
    let upgraded = upgrade.on_upgrade(move |socket| {
        let _ = hand_over.send(socket);
        serving
    });
    Ok(upgraded.into_response())
}

/// Run a program interactively, by WebSocket
///
/// The client sends `init` with the fields of a program, then `data` for `stdin`, `eof` and `signal`; the server sends
/// `runtime`, `queued`, `stage`, `data`, `exit` and `error`, and closes with 4999 when the program is done.
#[utoipa::path(
    get, path = "/api/v2/connect", operation_id = "connect",
    responses((status = 101, description = "The connection becomes a WebSocket"), ErrorResponses)
)]
async fn serve(socket: WebSocket, inbox: Inbox, api: Arc<Api>, context: Context) {
    let memory = api.answers.for_client(&context.client);
    let (mut sink, messages) = socket.split();
    let mut stream = MessageReader { messages, inbox };
    let reason = run_interactive(&mut sink, &mut stream, &api, &context, &memory).await;
    if let CloseReason::Failed(message) = &reason {
        let message = ServerMessage::Error { message: message.clone() };
        let _ = timeout(CLOSE_TIMEOUT, send(&mut sink, &message, &memory)).await;
    }
    let (code, text) = reason.code();
    let closing = async {
        if sink.send(Message::close_with(code, text)).await.is_ok() {
            while let Some(Ok(_)) = stream.messages.next().await {}
        }
    };
    let _ = timeout(CLOSE_TIMEOUT, closing).await;
}

type Sink = SplitSink<WebSocket, Message>;

async fn run_interactive(
    sink: &mut Sink,
    stream: &mut MessageReader,
    api: &Api,
    context: &Context,
    memory: &Allowance,
) -> CloseReason {
    let request = match timeout(INIT_TIMEOUT, read_init(stream)).await {
        Ok(Ok(request)) => request,
        Ok(Err(reason)) => return reason,
        Err(_) => return CloseReason::InitTimeout,
    };
    let (language, job) = match request.into_job(api.runner.languages(), api.source_limit) {
        Ok(converted) => converted,
        Err(error) => return CloseReason::Failed(error.message()),
    };
    let runtime = ServerMessage::Runtime { language: language.name.clone(), version: language.version.to_string() };
    if let Err(reason) = send(sink, &runtime, memory).await {
        return reason;
    }
    let (events, received) = mpsc::unbounded_channel();
    let (stdin, stdin_receiver) = mpsc::channel(MAX_INPUT_MESSAGES);
    let (signals, signal_receiver) = mpsc::channel(MAX_SIGNALS);
    let input = ProgramInput { stdin: Some(stdin), left: api.body_limit, signals };
    let live =
        Live { events: Some(events), stdin: Some(stdin_receiver), signals: Some(signal_receiver), ..Live::default() };
    let backlog = Backlog::new(memory);
    let running = async {
        let ran = api.runner.run_live(job, live, &context.client).await;
        ran.map_err(|error| failure(context.api_error(error)))
    };
    let collecting = async { backlog.collect(received).await.map_err(|exhausted| failure(exhausted.into())) };
    let sending = async {
        let mut encoder = MessageEncoder::default();
        while let Some(event) = backlog.next().await {
            for message in encoder.encode(event) {
                send(sink, &message, memory).await?;
            }
        }
        Ok(())
    };
    // Concurrently, so that a client that reads slowly does not slow the program down.
    tokio::select! {
        done = async { tokio::try_join!(async { running.await.map(drop) }, collecting, sending) } => match done {
            Ok(_) => CloseReason::Done,
            Err(reason) => reason,
        },
        reason = input.forward(stream) => reason,
    }
}

fn failure(error: ApiError) -> CloseReason {
    CloseReason::Failed(error.message())
}

/// Reads messages up to `init`.
async fn read_init(stream: &mut MessageReader) -> Result<ExecuteRequest, CloseReason> {
    loop {
        match stream.next().await? {
            ClientMessage::Init(request) => return Ok(*request),
            ClientMessage::Data { .. } | ClientMessage::Eof | ClientMessage::Signal { .. } => {
                return Err(CloseReason::NotInitialized);
            }
            ClientMessage::Unknown => {}
        }
    }
}

/// Forwards input and signals from the client to the program.
struct ProgramInput {
    stdin: Option<mpsc::Sender<Bytes>>,
    /// Bytes of input that the client may still send.
    left: usize,
    signals: mpsc::Sender<i32>,
}

impl ProgramInput {
    /// Forwards messages until one of them, or the end of the connection, closes the WebSocket.
    async fn forward(mut self, stream: &mut MessageReader) -> CloseReason {
        loop {
            let message = match stream.next().await {
                Ok(message) => message,
                Err(reason) => return reason,
            };
            match message {
                ClientMessage::Init(_) => return CloseReason::AlreadyInitialized,
                ClientMessage::Data { stream, data } if stream == "stdin" => {
                    if let Err(reason) = self.write_stdin(data.into()) {
                        return reason;
                    }
                }
                ClientMessage::Data { .. } => return CloseReason::NotStdin,
                ClientMessage::Eof => self.stdin = None,
                ClientMessage::Signal { signal } => match Signal::from_str(&signal) {
                    // If many signals are pending, dropping one makes no difference.
                    Ok(signal) => drop(self.signals.try_send(signal as i32)),
                    Err(_) => return CloseReason::InvalidSignal,
                },
                ClientMessage::Unknown => {}
            }
        }
    }

    /// Queues input for the program. Does not wait for it, so that the server notices when the client leaves.
    fn write_stdin(&mut self, bytes: Bytes) -> Result<(), CloseReason> {
        let Some(stdin) = self.stdin.as_ref().filter(|_| !bytes.is_empty()) else { return Ok(()) };
        self.left =
            self.left.checked_sub(bytes.len()).ok_or_else(|| CloseReason::Failed("too much input was sent".into()))?;
        match stdin.try_send(bytes) {
            Err(mpsc::error::TrySendError::Full(_)) => {
                Err(CloseReason::Failed("the program does not read its input".into()))
            }
            // The program may have closed its input, which is no error.
            _ => Ok(()),
        }
    }
}

/// Reads messages from the client.
struct MessageReader {
    messages: SplitStream<WebSocket>,
    inbox: Inbox,
}

impl MessageReader {
    /// The next message.
    async fn next(&mut self) -> Result<ClientMessage, CloseReason> {
        loop {
            let message = match self.messages.next().await {
                Some(Ok(message)) if !message.is_close() => message,
                _ => {
                    return Err(self
                        .inbox
                        .exhausted()
                        .map_or(CloseReason::ClientLeft, |exhausted| failure(exhausted.into())));
                }
            };
            self.inbox.complete();
            if message.is_text() || message.is_binary() {
                return json::parse(message.as_bytes())
                    .map_err(|error| failure(ApiError::BadRequest(error.to_string())));
            }
        }
    }
}

/// Sends a message, whose memory is leased until the client has taken it. The socket enforces the deadline for that.
async fn send(sink: &mut Sink, message: &ServerMessage, memory: &Allowance) -> Result<(), CloseReason> {
    let text = serde_json::to_string(message).map_err(|error| failure(ApiError::unserializable(error)))?;
    // Twice the size: the frame holds a copy.
    let _lease = memory.lease(2 * text.len()).await.map_err(|exhausted| failure(exhausted.into()))?;
    sink.send(Message::text(text)).await.map_err(|_| CloseReason::ClientLeft)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_client_gets_at_most_half_of_the_sockets() {
        let sockets = Sockets::default();
        let alice = || sockets.acquire(&Client::Key("alice".into()));
        let mut held: Vec<_> = (0..MAX_SOCKETS).map_while(|_| alice().ok()).collect();
        assert_eq!(held.len(), MAX_SOCKETS / 2);
        let elsewhere = Client::at([192, 0, 2, 1].into());
        held.push(sockets.acquire(&elsewhere).ok().unwrap());
        // Clients behind a proxy on this host can use the rest of the total.
        let local = || sockets.acquire(&Client::at([127, 0, 0, 1].into()));
        let rest: Vec<_> = (0..MAX_SOCKETS).map_while(|_| local().ok()).collect();
        assert_eq!(rest.len(), MAX_SOCKETS / 2 - 1);
        drop(rest);
        drop(held.remove(0));
        assert!(alice().is_ok(), "a released permit can be acquired again");
    }
}
