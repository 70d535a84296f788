//! Connections: accepted within a bound, closed gracefully.

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
use crate::http::socket::{Ends, Socket};
use crate::model::client::Client;

/// Connections at once, where there are descriptors for twice as many; further ones wait to be accepted.
const MAX_CONNECTIONS: usize = 10_000;

/// How long a client may take for the head of a request, the wait between two requests included.
const HEADER_TIME: Duration = Duration::from_secs(30);

/// How long to wait after a failed accept: descriptors may have run out, and come back.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Largest head of a request in bytes.
pub const MAX_HEAD: usize = 32 * 1024;

/// How long connections may take to close once their requests are answered.
const CLOSE_TIME: Duration = Duration::from_secs(2);

/// How long after the last accept a connection may take to bring its request: hyper would close it unread, and
/// with a socket that systemd holds its client need not notice a restart.
const UNREAD_TIME: Duration = Duration::from_millis(250);

/// A connection's place among all, and among those of its address; they are taken as long as anybody holds this.
#[derive(Debug, Clone)]
pub struct Place {
    _among_all: Arc<Result<OwnedSemaphorePermit, AcquireError>>,
    _of_address: Option<Arc<OwnedSemaphorePermit>>,
    /// What a WebSocket receives there.
    pub inbox: Inbox,
}

/// How many places each client has left: half of all, so that none keeps out all others.
pub(crate) struct Shares {
    places: usize,
    left: HashMap<Client, Arc<Semaphore>>,
}

/// Accepts until `stop`, then returns a future that ends when all connections have closed.
pub async fn serve(
    listener: TcpListener,
    apps: watch::Receiver<Arc<App>>,
    stop: CancellationToken,
) -> impl Future<Output = ()> {
    let (closing, connections) = (CancellationToken::new(), TaskTracker::new());
    let count = places();
    let (places, mut shares) = (Arc::new(Semaphore::new(count)), Shares::new(count));
    loop {
        let accepted = tokio::select! {
            accepted = async {
                let place = Arc::clone(&places).acquire_owned().await;
                (listener.accept().await, place)
            } => accepted,
            () = stop.cancelled() => break,
        };
        let (stream, peer, among_all) = match accepted {
            (Ok((stream, peer)), place) => (stream, peer.ip().to_canonical(), place),
            (Err(error), _) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        // Whoever comes through a proxy of ours is not alone behind its address.
        let of_address = match peer.is_loopback() || apps.borrow().gate.trusts(peer) {
            true => None,
            false => match shares.take(Client::at(peer)) {
                Some(share) => Some(Arc::new(share)),
                None => {
                    tracing::debug!(%peer, "no more connections of one address");
                    continue;
                }
            },
        };
        let place = Place { _among_all: Arc::new(among_all), _of_address: of_address, inbox: Inbox::default() };
        let ends = Ends { tracker: connections.clone(), closing: closing.clone(), place: place.clone() };
        let service = middleware::service(apps.clone(), Some(peer), place.clone());
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_TIME)
            .max_buf_size(MAX_HEAD)
            .serve_connection(TokioIo::new(Socket::new(stream, ends)), service)
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
            // A client that breaks off is its own business.
            drop((ended, place));
        }));
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

impl Shares {
    /// Those of so many places in all.
    pub fn new(places: usize) -> Shares {
        Shares { places, left: HashMap::new() }
    }

    /// A place of this client, if it has one left.
    pub fn take(&mut self, client: Client) -> Option<OwnedSemaphorePermit> {
        let share = self.places.div_ceil(2);
        if self.left.len() >= self.places {
            self.left.retain(|_, left| left.available_permits() < share);
        }
        let left = self.left.entry(client).or_insert_with(|| Arc::new(Semaphore::new(share)));
        Arc::clone(left).try_acquire_owned().ok()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_address_takes_more_than_half_of_the_places() {
        let mut shares = Shares::new(10);
        let mut take = |address: &str| shares.take(Client::at(address.parse().unwrap()));
        let mut held: Vec<_> = (0..5).filter_map(|_| take("192.0.2.1")).collect();
        assert_eq!(held.len(), 5);
        assert!(take("192.0.2.1").is_none() && take("::ffff:192.0.2.1").is_none());
        assert!(take("192.0.2.2").is_some());
        held.pop();
        assert!(take("192.0.2.1").is_some(), "what is given back can be had again");
    }

    #[test]
    fn addresses_that_have_left_are_forgotten() {
        let mut shares = Shares::new(10);
        let _stays = shares.take(Client::at([192, 0, 2, 1].into()));
        (0..=255).for_each(|last| drop(shares.take(Client::at([198, 51, 100, last].into()))));
        assert!(shares.left.len() <= 10);
        assert!(shares.left.contains_key(&Client::at([192, 0, 2, 1].into())));
    }
}
