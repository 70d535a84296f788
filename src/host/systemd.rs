//! systemd's side of a server: what the service manager is told, and the socket that it may have passed.
//!
//! Without a manager (no `NOTIFY_SOCKET`, no `LISTEN_FDS`) nothing here does anything.

use std::io;
use std::time::Duration;

use listenfd::ListenFd;
use sd_notify::NotifyState;
use tokio::net::TcpListener;
use tokio_util::task::AbortOnDropHandle;

/// Time between two status lines.
const STATUS_INTERVAL: Duration = Duration::from_secs(5);

/// The first socket that was passed, listening already. To be called before anything is started that could
/// inherit it.
pub fn passed_listener() -> io::Result<Option<TcpListener>> {
    let Some(listener) = ListenFd::from_env().take_tcp_listener(0)? else { return Ok(None) };
    listener.set_nonblocking(true)?;
    TcpListener::from_std(listener).map(Some)
}

/// Requests are accepted, or the new configuration is in effect.
pub fn ready() {
    tell(&[NotifyState::Ready]);
}

/// A new configuration is about to be read; [`ready`] ends it.
pub fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => tell(&[NotifyState::Reloading, now]),
        Err(error) => tracing::warn!(%error, "cannot notify systemd of a reload"),
    }
}

/// The end has begun.
pub fn stopping() {
    tell(&[NotifyState::Stopping, NotifyState::Status("stopping: waiting for running requests")]);
}

/// Keeps the status line and the watchdog until dropped. `status` takes the locks that requests take: where it
/// hangs, so do they, and the manager ends a server that is silent for too long.
pub fn report(status: impl Fn() -> String + Send + 'static) -> AbortOnDropHandle<()> {
    let watchdog = sd_notify::watchdog_enabled();
    let pause = watchdog.map_or(STATUS_INTERVAL, |limit| STATUS_INTERVAL.min(limit / 3));
    AbortOnDropHandle::new(tokio::spawn(async move {
        loop {
            tell(&[NotifyState::Status(&status()), NotifyState::Watchdog]);
            tokio::time::sleep(pause).await;
        }
    }))
}

fn tell(state: &[NotifyState]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "cannot notify systemd of the status");
    }
}
