//! An engine for tests: each start is a test's to decide, and each init a test's to play.

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

/// How long a test may take that takes a moment, on a clock that does not stand still.
const PATIENCE: Duration = Duration::from_secs(30);

/// Hands each start to a test.
pub struct Fake(mpsc::UnboundedSender<Start>);

/// An engine, and its starts.
pub fn engine() -> (Arc<dyn Engine>, mpsc::UnboundedReceiver<Start>) {
    let (starts, begun) = mpsc::unbounded_channel();
    (Arc::new(Fake(starts)), begun)
}

/// A sandbox that is to be made. Dropped, it is not made, and its slot given back.
pub struct Start {
    pub spec: SandboxSpec,
    made: oneshot::Sender<Result<Sandbox, SandboxError>>,
}

impl Engine for Fake {
    fn start(&self, spec: SandboxSpec) -> BoxFuture<'_, Result<Sandbox, SandboxError>> {
        let (made, answer) = oneshot::channel();
        let _ = self.0.send(Start { spec, made });
        Box::pin(async { answer.await.unwrap_or(Err(SandboxError::Silent(Duration::ZERO))) })
    }

    fn release<'a>(&'a self, _: Option<&'a str>) -> BoxFuture<'a, ()> {
        Box::pin(std::future::ready(()))
    }

    fn keep_only(&self, _: &[Arc<Language>]) {}
}

impl Start {
    /// Makes it, with an init that is ready.
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
            spent_us: 0,
            prepared: false,
            gone: gone.clone(),
            _released: released.clone().drop_guard(),
        };
        let _ = self.made.send(Ok(sandbox));
        Init { channel: Channel::from_fd(theirs).unwrap(), gone, released, _job_dir: job_dir, slot: self.spec.slot }
    }
}

/// The init of a sandbox, and its supervisor. When it is dropped the container has ended and its slot is given back.
pub struct Init {
    channel: Channel,
    gone: CancellationToken,
    released: CancellationToken,
    _job_dir: TempDir,
    slot: Slot,
}

impl Init {
    /// What the server says next.
    pub async fn hear(&self) -> Option<ToInit> {
        self.channel.receive().await.unwrap()
    }

    pub fn say(&self, message: &FromInit) {
        self.channel.send(message, &[]).unwrap();
    }

    /// Takes a job and its run stage, which does not end yet.
    pub async fn begin(&self) {
        assert!(matches!(self.hear().await, Some(ToInit::Prepare { .. })));
        self.say(&FromInit::Prepared);
        assert!(matches!(self.hear().await, Some(ToInit::Stage(_))));
    }

    /// Ends the run stage that was begun.
    pub fn end_well(&self) {
        self.say(&FromInit::StageEnded { ended: Ended::Exited(0), artifact: true, usage: Usage::default() });
    }

    /// The number of its slot.
    pub fn slot(&self) -> u32 {
        self.slot.number
    }

    /// Waits until the sandbox was given up.
    pub async fn released(&self) {
        self.released.cancelled().await;
    }

    /// Closes its channel, as one that was killed; nobody has noticed otherwise yet.
    pub fn close_channel(&mut self) {
        self.channel = Channel::pair().unwrap().0;
    }
}

impl Drop for Init {
    fn drop(&mut self) {
        self.gone.cancel();
    }
}

/// Runs a test on a clock that jumps whenever all others wait, and fails where that never comes about: something spins
/// then, or blocks the only thread.
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

/// Nobody hears of anything.
#[derive(Debug)]
pub struct Unheard;

impl crate::sandbox::Observer for Unheard {
    fn removed(&self, _forced: bool) {}
    fn swept(&self, _removed: Option<usize>) {}
}
