//! Signals, as the phases that they stand for.

use futures_util::StreamExt;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook_tokio::{Handle, Signals};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// What signals have asked for so far.
#[derive(Debug, Clone, Default)]
pub struct Phases {
    /// SIGTERM or SIGINT: stop accepting and let what runs come to its end.
    pub stop: CancellationToken,
    /// The same again: do not wait for what runs.
    pub cut: CancellationToken,
}

/// Listens for signals until dropped.
pub struct Listener {
    handle: Handle,
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.handle.close();
    }
}

/// Starts to listen. Each SIGHUP is told on `reload`; a third SIGTERM ends the process at once.
pub fn listen(phases: Phases, reload: mpsc::Sender<()>) -> std::io::Result<Listener> {
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP])?;
    let handle = signals.handle();
    tokio::spawn(async move {
        while let Some(signal) = signals.next().await {
            match signal {
                // A reload that waits already serves this one too.
                SIGHUP => drop(reload.try_send(())),
                _ if !phases.stop.is_cancelled() => {
                    tracing::info!("stopping: running requests come to their end");
                    phases.stop.cancel();
                }
                _ if !phases.cut.is_cancelled() => {
                    tracing::info!("stopping now: running requests are cut off");
                    phases.cut.cancel();
                }
                _ => {
                    tracing::warn!("ended without cleaning up: the next start does it");
                    std::process::exit(1);
                }
            }
        }
    });
    Ok(Listener { handle })
}
