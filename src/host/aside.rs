//! Calls that the kernel may take long over, beside the threads on which all requests go on.

use std::io;
use std::time::Duration;

use tokio::task::spawn_blocking;
use tokio::time::timeout;

/// Longest that one is waited for. Most take less than a millisecond, and a few where many do the same.
const TIME: Duration = Duration::from_secs(10);

/// Makes a call on a thread that may wait. One that is late goes on there, where what it returns is dropped.
pub async fn aside<T: Send + 'static>(call: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    let late = || format!("the kernel did not answer within {}", humantime::format_duration(TIME));
    match timeout(TIME, spawn_blocking(call)).await {
        Ok(returned) => returned.map_err(io::Error::other),
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, late())),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// Is told to a channel when it is dropped.
    struct Told(mpsc::Sender<()>);

    impl Drop for Told {
        fn drop(&mut self) {
            self.0.send(()).unwrap();
        }
    }

    #[tokio::test]
    async fn a_call_keeps_nobody_waiting_and_what_comes_late_is_dropped() {
        let ((go, wait), (told, dropped)) = (mpsc::channel::<()>(), mpsc::channel());
        let called = tokio::spawn(aside(move || {
            let _ = wait.recv();
            Told(told)
        }));
        tokio::task::yield_now().await;
        // Nothing else is dropped where a call is given up: it is under way.
        called.abort();
        assert!(called.await.is_err());
        assert!(dropped.try_recv().is_err());
        drop(go);
        dropped.recv_timeout(Duration::from_secs(30)).unwrap();
        assert_eq!(aside(|| 7).await.unwrap(), 7);
    }
}
