//! The interface to systemd: notifications to the service manager, and the socket that it may have passed.
//!
//! Everything here is a no-op without a service manager (no `NOTIFY_SOCKET`, no `LISTEN_FDS`).

use std::io;
use std::time::Duration;

use listenfd::ListenFd;
use sd_notify::NotifyState;
use tokio::net::TcpListener;
use tokio_util::task::AbortOnDropHandle;

/// Time between two status lines.
const STATUS_INTERVAL: Duration = Duration::from_secs(5);

/// The first socket that systemd passed, which listens already. Call it before anything starts that could inherit the
/// socket.
pub fn passed_listener() -> io::Result<Option<TcpListener>> {
    let Some(listener) = ListenFd::from_env().take_tcp_listener(0)? else { return Ok(None) };
    listener.set_nonblocking(true)?;
    TcpListener::from_std(listener).map(Some)
}

/// Notifies systemd that requests are accepted, or that a reload has finished.
pub fn ready() {
    notify(&[NotifyState::Ready]);
}

/// Notifies systemd that a reload of the configuration starts; [`ready`] ends it.
pub fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => notify(&[NotifyState::Reloading, now]),
        Err(error) => tracing::warn!(%error, "cannot notify systemd of a reload"),
    }
}

/// Notifies systemd that the shutdown has started.
pub fn stopping() {
    notify(&[NotifyState::Stopping, NotifyState::Status("stopping: waiting for running requests")]);
}

/// Sends the status line and the watchdog's keep-alive until dropped. `status` takes the locks that requests take: if
/// it hangs, so do they, and systemd kills the silent server.
pub fn report(status: impl Fn() -> String + Send + 'static) -> AbortOnDropHandle<()> {
    let watchdog = sd_notify::watchdog_enabled();
    let pause = watchdog.map_or(STATUS_INTERVAL, |limit| STATUS_INTERVAL.min(limit / 3));
    AbortOnDropHandle::new(tokio::spawn(async move {
        loop {
            notify(&[NotifyState::Status(&status()), NotifyState::Watchdog]);
            tokio::time::sleep(pause).await;
        }
    }))
}

fn notify(state: &[NotifyState]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "cannot notify systemd");
    }
}
