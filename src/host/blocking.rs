//! System calls that may block for long, run outside of the runtime's worker threads.

use std::io;
use std::time::Duration;

use tokio::task::spawn_blocking;
use tokio::time::timeout;

/// Longest wait for a call. Most take less than a millisecond, and a few milliseconds if many run at once.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Runs a call on a thread that may block. A call that exceeds the timeout continues there, and its result is dropped
/// there.
pub async fn run_blocking<T: Send + 'static>(call: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    let late = || format!("the kernel did not answer within {}", humantime::format_duration(TIMEOUT));
    match timeout(TIMEOUT, spawn_blocking(call)).await {
        Ok(returned) => returned.map_err(io::Error::other),
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, late())),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// Sends to a channel when it is dropped.
    struct NotifyOnDrop(mpsc::Sender<()>);

    impl Drop for NotifyOnDrop {
        fn drop(&mut self) {
            self.0.send(()).unwrap();
        }
    }

    #[tokio::test]
    async fn blocking_call_blocks_no_task_and_late_result_is_dropped() {
        let ((release, blocked), (on_drop, dropped)) = (mpsc::channel::<()>(), mpsc::channel());
        let called = tokio::spawn(run_blocking(move || {
            let _ = blocked.recv();
            NotifyOnDrop(on_drop)
        }));
        tokio::task::yield_now().await;
        // Cancelling the future does not cancel the call: it is running.
        called.abort();
        assert!(called.await.is_err());
        assert!(dropped.try_recv().is_err());
        drop(release);
        dropped.recv_timeout(Duration::from_secs(30)).unwrap();
        assert_eq!(run_blocking(|| 7).await.unwrap(), 7);
    }
}
