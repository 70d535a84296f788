//! Accepts connections up to a limit, serves them, and closes them gracefully at shutdown.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::{TokioIo, TokioTimer};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::net::TcpListener;
use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::host::signals;
use crate::http::inbox::Inbox;
use crate::http::middleware::{self, App};
use crate::http::socket::{CloseContext, Socket};
use crate::model::client::Client;

/// Most connections at the same time; fewer if there are not twice as many descriptors. Further connections wait to be
/// accepted.
const MAX_CONNECTIONS: usize = 10_000;

/// How long a client may take to send the head of a request, idle time between two requests included.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);

/// Pause after a failed accept: the process may be out of descriptors for a while.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Largest head of a request in bytes.
pub const MAX_HEAD: usize = 32 * 1024;

/// How long connections may take to close once their requests are answered.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// How long connections may still send a request after the last accept. Without it hyper would close a connection whose
/// request has not been read yet; a client of a socket that systemd holds should not notice a restart.
const UNREAD_GRACE: Duration = Duration::from_millis(250);

/// Permits of a connection: one of the total and one of its address. Released when all clones are dropped.
#[derive(Debug, Clone)]
pub struct ConnectionPermit {
    _total: Arc<Result<OwnedSemaphorePermit, AcquireError>>,
    _per_address: Option<Arc<OwnedSemaphorePermit>>,
    /// Counts what a WebSocket receives on this connection.
    pub inbox: Inbox,
}

/// Permits per client: each client may hold half of the total, so that no client keeps out all others.
pub(crate) struct ClientPermits {
    total: usize,
    left: HashMap<Client, Arc<Semaphore>>,
}

/// Accepts connections until `stop`. Returns a future that completes when all connections have closed.
pub async fn serve(
    listener: TcpListener,
    apps: watch::Receiver<Arc<App>>,
    stop: CancellationToken,
) -> impl Future<Output = ()> {
    let (closing, connections) = (CancellationToken::new(), TaskTracker::new());
    let max = max_connections();
    let (permits, mut per_address) = (Arc::new(Semaphore::new(max)), ClientPermits::new(max));
    loop {
        let accepted = tokio::select! {
            accepted = async {
                let permit = Arc::clone(&permits).acquire_owned().await;
                (listener.accept().await, permit)
            } => accepted,
            () = stop.cancelled() => break,
        };
        let (stream, peer, total_permit) = match accepted {
            (Ok((stream, peer)), permit) => (stream, peer.ip().to_canonical(), permit),
            (Err(error), _) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        // Clients behind a trusted proxy share its address.
        let address_permit = match peer.is_loopback() || apps.borrow().gate.trusts(peer) {
            true => None,
            false => match per_address.try_acquire(Client::at(peer)) {
                Some(permit) => Some(Arc::new(permit)),
                None => {
                    tracing::debug!(%peer, "connection closed: too many connections from one address");
                    continue;
                }
            },
        };
        let permit =
            ConnectionPermit { _total: Arc::new(total_permit), _per_address: address_permit, inbox: Inbox::default() };
        let close_context =
            CloseContext { tracker: connections.clone(), stop_lingering: closing.clone(), permit: permit.clone() };
        let service = middleware::service(apps.clone(), Some(peer), permit.clone());
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_TIMEOUT)
            .max_buf_size(MAX_HEAD)
            .serve_connection(TokioIo::new(Socket::new(stream, close_context)), service)
            .with_upgrades();
        let closing = closing.clone();
        connections.spawn(signals::isolate_panics(async move {
            let mut connection = std::pin::pin!(connection);
            let ended = tokio::select! {
                ended = connection.as_mut() => ended,
                () = closing.cancelled() => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            };
            // A client may close its connection at any time, which is no error of the server.
            drop((ended, permit));
        }));
    }
    drop(listener);
    async move {
        tokio::time::sleep(UNREAD_GRACE).await;
        closing.cancel();
        connections.close();
        if tokio::time::timeout(CLOSE_TIMEOUT, connections.wait()).await.is_err() {
            tracing::info!("some connections did not close in time");
        }
    }
}

impl ClientPermits {
    /// Permits per client for this total.
    pub fn new(total: usize) -> ClientPermits {
        ClientPermits { total, left: HashMap::new() }
    }

    /// A permit for this client, if it has one left.
    pub fn try_acquire(&mut self, client: Client) -> Option<OwnedSemaphorePermit> {
        let limit = self.total.div_ceil(2);
        if self.left.len() >= self.total {
            self.left.retain(|_, left| left.available_permits() < limit);
        }
        let left = self.left.entry(client).or_insert_with(|| Arc::new(Semaphore::new(limit)));
        Arc::clone(left).try_acquire_owned().ok()
    }
}

/// The limit of connections. Raises the descriptor limit as far as allowed, and keeps half of the descriptors for
/// everything else, so that a flood of connections cannot stop runs.
fn max_connections() -> usize {
    let allowed = getrlimit(Resource::RLIMIT_NOFILE).map(|(soft, hard)| {
        let raised = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
        raised.map_or(soft, |()| hard)
    });
    let half = allowed.map_or(MAX_CONNECTIONS, |allowed| usize::try_from(allowed / 2).unwrap_or(usize::MAX));
    half.clamp(1, MAX_CONNECTIONS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_gets_at_most_half_of_the_connections() {
        let mut per_address = ClientPermits::new(10);
        let mut take = |address: &str| per_address.try_acquire(Client::at(address.parse().unwrap()));
        let mut held: Vec<_> = (0..5).filter_map(|_| take("192.0.2.1")).collect();
        assert_eq!(held.len(), 5);
        assert!(take("192.0.2.1").is_none() && take("::ffff:192.0.2.1").is_none());
        assert!(take("192.0.2.2").is_some());
        held.pop();
        assert!(take("192.0.2.1").is_some(), "a released permit can be acquired again");
    }

    #[test]
    fn addresses_without_connections_are_forgotten() {
        let mut per_address = ClientPermits::new(10);
        let _stays = per_address.try_acquire(Client::at([192, 0, 2, 1].into()));
        (0..=255).for_each(|last| drop(per_address.try_acquire(Client::at([198, 51, 100, last].into()))));
        assert!(per_address.left.len() <= 10);
        assert!(per_address.left.contains_key(&Client::at([192, 0, 2, 1].into())));
    }
}
