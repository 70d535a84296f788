//! A fake engine for tests: the test decides the result of each start, and plays the part of each init.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use tempfile::TempDir;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::model::language::Language;
use crate::model::outcome::{Ended, Usage};
use crate::sandbox::channel::Channel;
use crate::sandbox::protocol::{Enforced, FromInit, ToInit};
use crate::sandbox::{Engine, Sandbox, SandboxError, SandboxSpec, Slot};

/// Longest that a test on the paused clock may take, in real time.
const PATIENCE: Duration = Duration::from_secs(30);

/// Hands each start to a test.
pub struct Fake(mpsc::UnboundedSender<Start>);

/// A fake engine, and a receiver of the starts that it is asked for.
pub fn engine() -> (Arc<dyn Engine>, mpsc::UnboundedReceiver<Start>) {
    let (starts, begun) = mpsc::unbounded_channel();
    (Arc::new(Fake(starts)), begun)
}

/// A requested sandbox. Dropping it fails the start and releases the slot.
pub struct Start {
    pub spec: SandboxSpec,
    result: oneshot::Sender<Result<Sandbox, SandboxError>>,
}

impl Engine for Fake {
    fn start(&self, spec: SandboxSpec) -> BoxFuture<'_, Result<Sandbox, SandboxError>> {
        let (result, received) = oneshot::channel();
        let _ = self.0.send(Start { spec, result });
        Box::pin(async { received.await.unwrap_or(Err(SandboxError::Silent(Duration::ZERO))) })
    }

    fn release<'a>(&'a self, _: Option<&'a str>) -> BoxFuture<'a, ()> {
        Box::pin(std::future::ready(()))
    }

    fn keep_only(&self, _: &[Arc<Language>]) {}
}

impl Start {
    /// Creates the sandbox, with an init that is ready.
    pub fn succeed(self) -> Init {
        let (channel, theirs) = Channel::pair().unwrap();
        let job_dir = tempfile::tempdir().unwrap();
        let (gone, released) = (CancellationToken::new(), CancellationToken::new());
        let sandbox = Sandbox {
            channel,
            job_dir: job_dir.path().to_owned(),
            uid: 10_000,
            number: self.spec.slot.number,
            image: self.spec.image,
            user: String::new(),
            enforced: Enforced::default(),
            own_cgroup: false,
            cgroup: None,
            earlier_cpu_us: 0,
            prepared: false,
            gone: gone.clone(),
            _released: released.clone().drop_guard(),
        };
        let _ = self.result.send(Ok(sandbox));
        Init { channel: Channel::from_fd(theirs).unwrap(), gone, released, _job_dir: job_dir, slot: self.spec.slot }
    }
}

/// The init and the supervisor of a sandbox. Dropping it ends the container and releases the slot.
pub struct Init {
    channel: Channel,
    gone: CancellationToken,
    released: CancellationToken,
    _job_dir: TempDir,
    slot: Slot,
}

impl Init {
    /// The next message from the server.
    pub async fn receive(&self) -> Option<ToInit> {
        self.channel.receive().await.unwrap()
    }

    /// Sends the server a message.
    pub fn send(&self, message: &FromInit) {
        self.channel.send(message, &[]).unwrap();
    }

    /// Accepts a job and starts its run stage, which does not end yet.
    pub async fn begin(&self) {
        assert!(matches!(self.receive().await, Some(ToInit::Prepare { .. })));
        self.send(&FromInit::Prepared);
        assert!(matches!(self.receive().await, Some(ToInit::Stage(_))));
    }

    /// Ends the running stage with exit code 0.
    pub fn end_well(&self) {
        self.send(&FromInit::StageEnded { ended: Ended::Exited(0), artifact: true, usage: Usage::default() });
    }

    /// The number of the slot.
    pub fn slot(&self) -> u32 {
        self.slot.number
    }

    /// Waits until the server has released the sandbox.
    pub async fn released(&self) {
        self.released.cancelled().await;
    }

    /// Closes the channel, as if init had been killed and the supervisor had not noticed it yet.
    pub fn close_channel(&mut self) {
        self.channel = Channel::pair().unwrap().0;
    }
}

impl Drop for Init {
    fn drop(&mut self) {
        self.gone.cancel();
    }
}

/// Runs a test on tokio's paused clock, which advances when all tasks wait. Panics if the test takes longer than
/// [`PATIENCE`]: then a task spins, or blocks the only thread.
pub fn on_paused_clock<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    let (ended, end) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        runtime.block_on(test());
        ended.send(()).unwrap();
    });
    match end.recv_timeout(PATIENCE) {
        Err(std::sync::mpsc::RecvTimeoutError::Timeout) => panic!("something spins or blocks"),
        _ => thread.join().unwrap(),
    }
}

/// An observer that does nothing.
#[derive(Debug)]
pub struct NoopObserver;

impl crate::sandbox::Observer for NoopObserver {
    fn removed(&self, _forced: bool) {}
    fn swept(&self, _removed: Option<usize>) {}
}
