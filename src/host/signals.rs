//! Signals, as the phases that they stand for; and panics, which end what would be half alive after them.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use futures_util::StreamExt;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook_tokio::{Handle, Signals};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::host::log;

/// What signals have asked for so far.
#[derive(Debug, Clone, Default)]
pub struct Phases {
    /// SIGTERM, SIGINT, or SIGHUP where that asks for no reload: stop accepting and let what runs come to its end.
    pub stop: CancellationToken,
    /// The same again: do not wait for what runs.
    pub cut: CancellationToken,
}

/// Those of this process, for panics.
static PHASES: OnceLock<Phases> = OnceLock::new();
/// Whether a task panicked that others need.
static PANICKED: AtomicBool = AtomicBool::new(false);

tokio::task_local! {
    static APART: ();
}

/// Does something that nothing but itself needs, as what a request asks for: a panic in it is the end of it alone.
pub async fn apart<F: Future>(work: F) -> F::Output {
    APART.scope((), work).await
}

/// Of a panic in any other task the process comes to its end, in order: nobody knows what does not work without it.
/// Called by the hook of panics, where they happen.
pub fn panicked() {
    if APART.try_with(|()| ()).is_err()
        && let Some(phases) = PHASES.get()
    {
        PANICKED.store(true, Ordering::SeqCst);
        phases.stop.cancel();
    }
}

/// Whether a panic ended it.
pub fn by_panic() -> bool {
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

/// Starts to listen. Each SIGHUP is told on `reload`; without one, the terminal was closed, which is an end as SIGTERM is,
/// unless whoever started us had it ignored, as `nohup` does. A third SIGTERM ends the process at once.
pub fn listen(phases: Phases, reload: Option<mpsc::Sender<()>>) -> std::io::Result<Listener> {
    let hangup = (reload.is_some() || !is_ignored(SIGHUP)?).then_some(SIGHUP);
    let mut signals = Signals::new([SIGTERM, SIGINT].into_iter().chain(hangup))?;
    let handle = signals.handle();
    let _ = PHASES.set(phases.clone());
    tokio::spawn(async move {
        while let Some(signal) = signals.next().await {
            match (signal, &reload) {
                // A reload that waits already serves this one too.
                (SIGHUP, Some(reload)) => drop(reload.try_send(())),
                _ if !phases.stop.is_cancelled() => {
                    tracing::info!("stopping: waiting for running requests");
                    phases.stop.cancel();
                }
                _ if !phases.cut.is_cancelled() => {
                    tracing::info!("stopping now: cancelling running requests");
                    phases.cut.cancel();
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
    async fn a_panic_ends_the_process_in_order_but_for_one_in_work_apart() {
        let phases = Phases::default();
        let _listener = listen(phases.clone(), Some(mpsc::channel(1).0)).unwrap();
        tokio::spawn(apart(async { panicked() })).await.unwrap();
        assert!(!phases.stop.is_cancelled() && !by_panic());
        tokio::spawn(async { panicked() }).await.unwrap();
        assert!(phases.stop.is_cancelled() && by_panic());
    }
}
