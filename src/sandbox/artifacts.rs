//! What compiling left behind: taken out of one sandbox, put into others.
//!
//! Init packs it when every program is dead, and another init unpacks it with the rights of the programs, who could
//! have done the same. To the server it is bytes: it neither looks into them nor writes them to any path. It holds them in
//! a memory file that nobody can change any more, and of which each init reads what it needs.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use nix::fcntl::{FcntlArg, fcntl};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use rustix::pipe::{SpliceFlags, splice};
use tokio::net::unix::pipe;
use tokio::sync::oneshot;

use crate::model::outcome::StageOutcome;
use crate::sandbox::init::carry;
use crate::sandbox::protocol::{FromInit, ToInit};
use crate::sandbox::{Sandbox, SandboxError};

/// How much longer than [`carry::MAX_TIME`] init's answer may take.
const ANSWER_GRACE: Duration = Duration::from_secs(3);

/// Room of the pipe between an init and the server, in bytes: as much as the kernel gives anyone who asks.
const PIPE: i32 = 1 << 20;

/// Bytes that are moved at a time, so that no other task waits for long.
const CHUNK: usize = 256 * 1024;

/// How many of the largest builds there is memory for.
const TOGETHER: u64 = 4;

/// What compiling made in one sandbox, for others.
#[derive(Debug)]
pub struct Built {
    /// Content id of the image that it was made with, and works with.
    image: String,
    /// How compiling went.
    pub compile: StageOutcome,
    /// A sealed memory file.
    packed: File,
    /// Whether a sandbox could not be given it: none will.
    refused: AtomicBool,
    _room: Room,
}

impl Built {
    /// Whether a job on this image need not be compiled.
    pub fn is_of_use(&self, image: &str) -> bool {
        self.image == image && !self.refused.load(Ordering::Relaxed)
    }
}

/// None is like another one.
impl PartialEq for Built {
    fn eq(&self, other: &Built) -> bool {
        std::ptr::eq(self, other)
    }
}

/// Memory that what has been compiled takes, of all batches together.
#[derive(Debug, Clone, Default)]
pub struct Builds(Arc<AtomicU64>);

impl Builds {
    /// Takes room for a build of at most so many bytes, or as much as there is left: [`TOGETHER`] times as much is there in
    /// all.
    pub fn take(&self, most: u64) -> Room {
        let mut bytes = 0;
        let _ = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |taken| {
            bytes = most.min((most * TOGETHER).saturating_sub(taken));
            Some(taken + bytes)
        });
        Room { bytes, of: self.clone() }
    }
}

/// Room for a build; dropping it gives it back.
#[derive(Debug)]
pub struct Room {
    bytes: u64,
    of: Builds,
}

impl Room {
    /// Gives back what is not needed.
    fn keep(&mut self, bytes: u64) {
        let needed = bytes.next_multiple_of(rustix::param::page_size() as u64).min(self.bytes);
        self.of.0.fetch_sub(self.bytes - needed, Ordering::Relaxed);
        self.bytes = needed;
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.of.0.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// Waits for what a run's compile stage makes: nothing, where it cannot be carried elsewhere.
#[derive(Debug)]
pub struct Wanted {
    /// As large as it may be.
    pub room: Room,
    /// Is told when it is there, or will not be. Dropped where it did not compile.
    pub built: oneshot::Sender<Option<Arc<Built>>>,
}

impl Sandbox {
    /// Hands on what was just compiled.
    pub(crate) async fn hand_on(&mut self, compile: Option<&StageOutcome>, wanted: Wanted) -> Result<(), SandboxError> {
        let Wanted { mut room, built } = wanted;
        let packed = match compile {
            Some(_) if room.bytes > 0 => self.pack(room.bytes).await,
            _ => Ok(None),
        };
        let made = packed.as_ref().ok().and_then(Option::as_ref).zip(compile).and_then(|(packed, compile)| {
            room.keep(packed.metadata().ok()?.len());
            let (image, compile, packed) = (self.image.clone(), compile.clone(), packed.try_clone().ok()?);
            Some(Arc::new(Built { image, compile, packed, refused: AtomicBool::new(false), _room: room }))
        });
        // Where this sandbox has failed over it the others compile for themselves.
        let _ = built.send(made);
        packed.map(drop)
    }

    /// What the programs have left; `None` where it is too large, or such that it cannot be packed.
    async fn pack(&mut self, most: u64) -> Result<Option<File>, SandboxError> {
        // A host that has no room for this has none for a short cut.
        let (memory, ours, theirs) = match files() {
            Ok(files) => files,
            Err(error) => {
                tracing::warn!(%error, "cannot copy the compiled files to other sandboxes; each input is compiled by itself");
                return Ok(None);
            }
        };
        self.order(&ToInit::Pack { most }, &[theirs.as_fd()])?;
        drop(theirs);
        let reading = async move {
            // Beyond that nobody reads, and init is told so by the pipe.
            let read = fill(&memory, ours, most).await.and_then(|()| seal(&memory));
            Ok(read.map(|()| memory))
        };
        let refused = match tokio::try_join!(reading, self.answer())? {
            (Ok(packed), FromInit::Packed) => return Ok(Some(packed)),
            (Err(error), FromInit::Packed) => error.to_string(),
            (_, FromInit::NotCarried(reason)) => reason,
            _ => return Err(SandboxError::Init("unexpected message from init".into())),
        };
        tracing::debug!(
            reason = refused,
            "cannot copy the compiled files to other sandboxes; each input is compiled by itself"
        );
        Ok(None)
    }

    /// Has init make what was compiled elsewhere. Where that fails, of a sandbox in which nothing of the job has run, another
    /// one will do, and none is given it again.
    pub(crate) async fn unpack(&mut self, built: &Built) -> Result<(), SandboxError> {
        let unpacked = match self.order(&ToInit::Unpack, &[built.packed.as_fd()]) {
            Ok(()) => self.answer().await,
            Err(error) => Err(error),
        };
        let reason = match unpacked {
            Ok(FromInit::Unpacked) => return Ok(()),
            Err(SandboxError::Lost) => return Err(SandboxError::Lost),
            Ok(FromInit::NotCarried(reason)) => reason,
            Ok(_) => "unexpected message from init".into(),
            Err(error) => error.to_string(),
        };
        tracing::warn!(reason, "cannot use the compiled files of another sandbox; compiling again");
        built.refused.store(true, Ordering::Relaxed);
        Err(SandboxError::NotCarried)
    }

    /// Init's answer to something that takes it a moment.
    async fn answer(&mut self) -> Result<FromInit, SandboxError> {
        let patience = carry::MAX_TIME + ANSWER_GRACE;
        let silent = tokio::time::sleep(patience);
        tokio::pin!(silent);
        loop {
            let message = tokio::select! {
                message = self.channel.receive() => message?,
                () = self.gone.cancelled() => return Err(self.ended("its container has ended")),
                () = &mut silent => return Err(SandboxError::Silent(patience)),
            };
            match message {
                Some(FromInit::Prepared) if !self.prepared => self.prepared = true,
                Some(FromInit::Failed(reason)) if !self.prepared => return Err(self.failed(reason)),
                Some(answer) => return Ok(answer),
                None => return Err(self.ended("its channel is closed")),
            }
        }
    }
}

/// A memory file, and the two ends of a pipe for what comes into it.
fn files() -> io::Result<(File, pipe::Receiver, OwnedFd)> {
    let memory = memfd_create("build", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let (ours, theirs) = io::pipe()?;
    // A user who has many has to do with less.
    let _ = fcntl(&ours, FcntlArg::F_SETPIPE_SZ(PIPE));
    Ok((memory.into(), pipe::Receiver::from_owned_fd(ours.into())?, theirs.into()))
}

/// Moves all that comes into a memory file, and through no memory of ours. Fails where it is more than `most` bytes.
async fn fill(memory: &File, ours: pipe::Receiver, most: u64) -> io::Result<()> {
    let mut length = 0;
    loop {
        ours.readable().await?;
        let mut end = length;
        let moved = ours.try_io(|| Ok(splice(&ours, None, memory, Some(&mut end), CHUNK, SpliceFlags::NONBLOCK)?));
        match moved {
            Ok(0) => return Ok(()),
            Ok(moved) => length += moved as u64,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        if length > most {
            return Err(io::Error::other("it is larger than init was told"));
        }
    }
}

/// Has a memory file stay as it is.
fn seal(memory: &File) -> io::Result<()> {
    Ok(fcntl_add_seals(memory, SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::time::Duration;

    use tokio::time::timeout;
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::model::job::Stage;
    use crate::model::outcome::{Ended, Usage};
    use crate::model::output::Output;
    use crate::sandbox::channel::Channel;
    use crate::sandbox::protocol::{Enforced, send};

    fn built() -> Built {
        let (packed, ..) = files().unwrap();
        let usage = Usage::default();
        let (stage, ended, output) = (Stage::Compile, Ended::Exited(0), Output::default());
        let compile = StageOutcome { stage, ended, artifact: true, usage, output };
        Built { image: "i".into(), compile, packed, refused: AtomicBool::new(false), _room: Builds::default().take(0) }
    }

    /// A sandbox, and its init's end of the channel.
    fn sandbox(prepared: bool) -> (Sandbox, OwnedFd) {
        let (channel, theirs) = Channel::pair().unwrap();
        let sandbox = Sandbox {
            channel,
            job_dir: PathBuf::new(),
            uid: 10_000,
            user: String::new(),
            number: 0,
            image: String::new(),
            enforced: Enforced::default(),
            own_cgroup: false,
            cgroup: None,
            spent_us: 0,
            prepared,
            gone: CancellationToken::new(),
            _released: CancellationToken::new().drop_guard(),
        };
        (sandbox, theirs)
    }

    #[tokio::test]
    async fn what_cannot_be_unpacked_is_compiled_again_and_a_sandbox_that_fails_before_is_lost() {
        let failures = || [FromInit::Failed("no files".into()), FromInit::NotCarried("no room".into())];
        for (prepared, failed, ended) in [(false, "sandbox_lost", "sandbox_lost"), (true, "not_carried", "not_carried")]
        {
            for failure in failures().into_iter().take(1 + usize::from(prepared)) {
                let (mut sandbox, init) = self::sandbox(prepared);
                let built = built();
                send(init.as_fd(), &failure, &[]).unwrap();
                assert_eq!(sandbox.unpack(&built).await.unwrap_err().kind(), failed);
                assert_eq!(built.is_of_use("i"), !prepared, "{failure:?}");
                drop(init);
                assert_eq!(sandbox.unpack(&built).await.unwrap_err().kind(), ended);
            }
        }
    }

    #[tokio::test]
    async fn what_is_not_read_or_written_any_more_is_not_waited_for() {
        // Whose end of the pipe stays open beside the message that nobody takes.
        let (mut sandbox, _init) = sandbox(true);
        sandbox.gone.cancel();
        let patience = Duration::from_secs(5);
        let unpacked = timeout(patience, sandbox.unpack(&built())).await;
        assert_eq!(unpacked.unwrap().unwrap_err().kind(), "not_carried");
        assert_eq!(timeout(patience, sandbox.pack(1 << 20)).await.unwrap().unwrap_err().kind(), "sandbox_gone");
    }

    #[tokio::test]
    async fn a_sandbox_that_fails_over_packing_leaves_the_others_to_compile() {
        let (mut sandbox, init) = sandbox(true);
        drop(init);
        let (sender, receiver) = oneshot::channel();
        let wanted = Wanted { room: Builds::default().take(1 << 20), built: sender };
        let compile = built().compile;
        assert_eq!(sandbox.hand_on(Some(&compile), wanted).await.unwrap_err().kind(), "sandbox_gone");
        assert!(receiver.await.unwrap().is_none());
    }

    #[test]
    fn all_builds_together_have_a_bound() {
        let builds = Builds::default();
        let mut rooms: Vec<Room> = (0..TOGETHER).map(|_| builds.take(1 << 20)).collect();
        assert_eq!((rooms[0].bytes, builds.take(1 << 20).bytes), (1 << 20, 0));
        rooms[0].keep(5000);
        assert_eq!(builds.take(1 << 20).bytes, (1 << 20) - 8192);
        drop(rooms);
        assert_eq!(builds.0.load(Ordering::Relaxed), 0);
    }

    #[tokio::test]
    async fn what_is_kept_is_bounded_and_cannot_be_changed() {
        use std::io::Write;
        use std::os::unix::fs::FileExt;
        for (most, fits) in [(100_000, true), (99_999, false)] {
            let (memory, ours, theirs) = files().unwrap();
            let writing = std::thread::spawn(move || File::from(theirs).write_all(&[7; 100_000]));
            assert_eq!(fill(&memory, ours, most).await.is_ok(), fits);
            assert!(writing.join().unwrap().is_ok());
            seal(&memory).unwrap();
            assert!(memory.write_at(b"x", 0).is_err() && memory.set_len(0).is_err());
        }
    }
}
