//! Signals and panics, as requests to shut down: after a panic the server would be only partly alive.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use futures_util::StreamExt;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook_tokio::{Handle, Signals};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::host::log;

/// The phases of the shutdown that signals have requested so far.
#[derive(Debug, Clone, Default)]
pub struct Shutdown {
    /// Stop accepting requests and wait for running ones: the first SIGTERM or SIGINT, or SIGHUP if that does not
    /// reload.
    pub stop: CancellationToken,
    /// Cancel running requests: the second such signal.
    pub skip_drain: CancellationToken,
}

/// The shutdown of this process, for the panic hook.
static SHUTDOWN: OnceLock<Shutdown> = OnceLock::new();
/// Whether a panic has requested the shutdown.
static PANICKED: AtomicBool = AtomicBool::new(false);

tokio::task_local! {
    static ISOLATED: ();
}

/// Runs work on which nothing else depends, such as a request: a panic in it ends this work alone.
pub async fn isolate_panics<F: Future>(work: F) -> F::Output {
    ISOLATED.scope((), work).await
}

/// Shuts the process down in order, unless the panic is in [`isolate_panics`]: other parts of the server may depend on
/// the task that panicked. The panic hook calls this in that task.
pub fn on_panic() {
    if ISOLATED.try_with(|()| ()).is_err()
        && let Some(shutdown) = SHUTDOWN.get()
    {
        PANICKED.store(true, Ordering::SeqCst);
        shutdown.stop.cancel();
    }
}

/// Whether a panic has requested the shutdown.
pub fn stopped_by_panic() -> bool {
    PANICKED.load(Ordering::SeqCst)
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

/// Starts listening for signals. Sends to `reload` at each SIGHUP. Without `reload`, SIGHUP means that the terminal was
/// closed and counts like SIGTERM, unless the parent process made it ignored, as `nohup` does. A third SIGTERM ends the
/// process at once.
pub fn listen(shutdown: Shutdown, reload: Option<mpsc::Sender<()>>) -> std::io::Result<Listener> {
    let hangup = (reload.is_some() || !is_ignored(SIGHUP)?).then_some(SIGHUP);
    let mut signals = Signals::new([SIGTERM, SIGINT].into_iter().chain(hangup))?;
    let handle = signals.handle();
    let _ = SHUTDOWN.set(shutdown.clone());
    tokio::spawn(async move {
        while let Some(signal) = signals.next().await {
            match (signal, &reload) {
                // The channel is full if a reload is pending already, which covers this one too.
                (SIGHUP, Some(reload)) => drop(reload.try_send(())),
                _ if !shutdown.stop.is_cancelled() => {
                    tracing::info!("stopping: waiting for running requests");
                    shutdown.stop.cancel();
                }
                _ if !shutdown.skip_drain.is_cancelled() => {
                    tracing::info!("stopping now: cancelling running requests");
                    shutdown.skip_drain.cancel();
                }
                _ => {
                    tracing::warn!("exited without clean-up; the next start cleans up");
                    log::flush();
                    std::process::exit(1);
                }
            }
        }
    });
    Ok(Listener { handle })
}

/// Whether this process ignores a signal.
fn is_ignored(signal: i32) -> std::io::Result<bool> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let mask = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("SigIgn:")?.trim(), 16).ok());
    Ok(mask.is_some_and(|mask| mask & (1 << (signal - 1)) != 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn panic_starts_shutdown_except_in_isolated_tasks() {
        let shutdown = Shutdown::default();
        let _listener = listen(shutdown.clone(), Some(mpsc::channel(1).0)).unwrap();
        tokio::spawn(isolate_panics(async { on_panic() })).await.unwrap();
        assert!(!shutdown.stop.is_cancelled() && !stopped_by_panic());
        tokio::spawn(async { on_panic() }).await.unwrap();
        assert!(shutdown.stop.is_cancelled() && stopped_by_panic());
    }
}
