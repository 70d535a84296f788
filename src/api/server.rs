//! Connections: accepted within a bound, each with the configuration of its time, closed gracefully.

use std::time::Duration;

use hyper_util::rt::{TokioIo, TokioTimer};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{setsockopt, sockopt::TcpUserTimeout};
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::front::Front;

/// Connections at once, where there are descriptors for twice as many; further ones wait to be accepted.
const MAX_CONNECTIONS: usize = 10_000;

/// How long a client may take for the head of a request, the wait between two requests included.
const HEADER_TIME: Duration = Duration::from_secs(30);

/// How long a client may take none of its answer, in milliseconds: else those that never read would keep their places,
/// and their answers in memory.
const UNTAKEN_TIME: u32 = 20_000;

/// How long to wait after a failed accept: descriptors may have run out, and come back.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Largest head of a request in bytes.
const MAX_HEAD: usize = 32 * 1024;

/// How long connections may take to close once their requests are answered.
const CLOSE_TIME: Duration = Duration::from_secs(2);

/// How long after the last accept a connection may take to bring its request: hyper would close it unread, and
/// with a socket that systemd holds its client need not notice a restart.
const UNREAD_TIME: Duration = Duration::from_millis(250);

/// A connection's place among all; it is taken as long as anybody holds it.
#[derive(Debug, Clone)]
pub struct Place(#[expect(dead_code, reason = "held")] Arc<Result<OwnedSemaphorePermit, AcquireError>>);

/// Accepts until `stop`, then returns a future that ends when all connections have closed.
pub async fn serve(
    listener: TcpListener,
    front: watch::Receiver<Arc<Front>>,
    stop: CancellationToken,
) -> impl Future<Output = ()> {
    let (closing, connections) = (CancellationToken::new(), TaskTracker::new());
    let places = Arc::new(Semaphore::new(places()));
    loop {
        let accepted = tokio::select! {
            accepted = async {
                let place = Arc::clone(&places).acquire_owned().await;
                (listener.accept().await, place)
            } => accepted,
            () = stop.cancelled() => break,
        };
        let (stream, peer, place) = match accepted {
            (Ok((stream, peer)), place) => (stream, peer, Place(Arc::new(place))),
            (Err(error), _) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        // Answers are small, and the client waits for them.
        let _ = stream.set_nodelay(true);
        let _ = setsockopt(&stream, TcpUserTimeout, &UNTAKEN_TIME);
        let service = Arc::clone(&front.borrow()).service(Some(peer.ip()), place.clone());
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_TIME)
            .max_buf_size(MAX_HEAD)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades();
        let closing = closing.clone();
        connections.spawn(async move {
            let mut connection = std::pin::pin!(connection);
            let ended = tokio::select! {
                ended = connection.as_mut() => ended,
                () = closing.cancelled() => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            };
            // A client that breaks off is its own business.
            drop((ended, place));
        });
    }
    drop(listener);
    async move {
        tokio::time::sleep(UNREAD_TIME).await;
        closing.cancel();
        connections.close();
        if tokio::time::timeout(CLOSE_TIME, connections.wait()).await.is_err() {
            tracing::info!("some connections did not close in time");
        }
    }
}

/// How many connections there may be. Descriptors are allowed as far as they can be, and half of them kept for all
/// else: whoever floods the server with connections keeps it from no run.
fn places() -> usize {
    let allowed = getrlimit(Resource::RLIMIT_NOFILE).map(|(soft, hard)| {
        let raised = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
        raised.map_or(soft, |()| hard)
    });
    let half = allowed.map_or(MAX_CONNECTIONS, |allowed| usize::try_from(allowed / 2).unwrap_or(usize::MAX));
    half.clamp(1, MAX_CONNECTIONS)
}
