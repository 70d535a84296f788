//! Builds: the files that a compile stage leaves, copied from one sandbox to others.
//!
//! Init packs the files when every program is dead. Another init unpacks them with the rights of the programs, which
//! could have created the same files themselves. The server treats a build as opaque bytes: it does not parse them and
//! writes them to no path. It holds them in a sealed memory file, which nobody can change and which each init reads.

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

/// How much longer than [`carry::MAX_TIME`] init's reply may take.
const REPLY_GRACE: Duration = Duration::from_secs(3);

/// Size of the pipe from init to the server, in bytes: the largest that the kernel grants without privileges by
/// default.
const PIPE_SIZE: i32 = 1 << 20;

/// Bytes to move at a time, so that no other task waits for long.
const CHUNK: usize = 256 * 1024;

/// The memory budget of all builds, as a multiple of the largest build.
const MAX_BUILDS: u64 = 4;

/// Compiled files of one sandbox, for use in others.
#[derive(Debug)]
pub struct Build {
    /// Content id of the image that the files were compiled with. They are used with this image only.
    image: String,
    /// Outcome of the compile stage.
    pub compile: StageOutcome,
    /// The packed files, in a sealed memory file.
    packed: File,
    /// Set when a sandbox failed to unpack the build, which is then not used again.
    unusable: AtomicBool,
    _permit: BuildPermit,
}

impl Build {
    /// Whether a job on this image can use the build in place of compiling.
    pub fn is_usable_on(&self, image: &str) -> bool {
        self.image == image && !self.unusable.load(Ordering::Relaxed)
    }
}

/// Compares by identity.
impl PartialEq for Build {
    fn eq(&self, other: &Build) -> bool {
        std::ptr::eq(self, other)
    }
}

/// Memory budget of the builds of all batches together, in bytes. Holds the number of bytes that are reserved.
#[derive(Debug, Clone, Default)]
pub struct BuildBudget(Arc<AtomicU64>);

impl BuildBudget {
    /// Reserves memory for a build of at most `max_bytes`, or as much as is left. The whole budget is [`MAX_BUILDS`]
    /// times `max_bytes`.
    pub fn reserve(&self, max_bytes: u64) -> BuildPermit {
        let mut bytes = 0;
        let _ = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |reserved| {
            bytes = max_bytes.min((max_bytes * MAX_BUILDS).saturating_sub(reserved));
            Some(reserved + bytes)
        });
        BuildPermit { bytes, budget: self.clone() }
    }
}

/// Memory reserved for a build. Dropping it releases the memory.
#[derive(Debug)]
pub struct BuildPermit {
    bytes: u64,
    budget: BuildBudget,
}

impl BuildPermit {
    /// Releases all but the memory that a build of this size takes.
    fn shrink_to(&mut self, bytes: u64) {
        let needed = bytes.next_multiple_of(rustix::param::page_size() as u64).min(self.bytes);
        self.budget.0.fetch_sub(self.bytes - needed, Ordering::Relaxed);
        self.bytes = needed;
    }
}

impl Drop for BuildPermit {
    fn drop(&mut self) {
        self.budget.0.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// Asks a run for a copy of its compiled files.
#[derive(Debug)]
pub struct BuildRequest {
    /// Memory for the build, which limits its size.
    pub permit: BuildPermit,
    /// Receives the build, or `None` if the files cannot be copied. Dropped if the compile stage failed.
    pub build: oneshot::Sender<Option<Arc<Build>>>,
}

impl Sandbox {
    /// Copies the files that were just compiled, and sends them to the requester.
    pub(crate) async fn share_build(
        &mut self,
        compile: Option<&StageOutcome>,
        request: BuildRequest,
    ) -> Result<(), SandboxError> {
        let BuildRequest { mut permit, build } = request;
        let packed = match compile {
            Some(_) if permit.bytes > 0 => self.pack(permit.bytes).await,
            _ => Ok(None),
        };
        let copied = packed.as_ref().ok().and_then(Option::as_ref).zip(compile).and_then(|(packed, compile)| {
            permit.shrink_to(packed.metadata().ok()?.len());
            let (image, compile, packed) = (self.image.clone(), compile.clone(), packed.try_clone().ok()?);
            Some(Arc::new(Build { image, compile, packed, unusable: AtomicBool::new(false), _permit: permit }))
        });
        // Also if this sandbox failed while packing: the requester then compiles in each sandbox.
        let _ = build.send(copied);
        packed.map(drop)
    }

    /// Packs the files that the programs have left; `None` if they are too large or cannot be packed.
    async fn pack(&mut self, max_bytes: u64) -> Result<Option<File>, SandboxError> {
        // Without the resources for a copy the job still succeeds: the copy only saves time.
        let (memory, ours, theirs) = match memfd_and_pipe() {
            Ok(created) => created,
            Err(error) => {
                tracing::warn!(%error, "cannot copy the compiled files to other sandboxes; each input is compiled by itself");
                return Ok(None);
            }
        };
        self.send(&ToInit::Pack { most: max_bytes }, &[theirs.as_fd()])?;
        drop(theirs);
        let reading = async move {
            // If there are more bytes this closes the pipe, and init's next write fails.
            let read = fill(&memory, ours, max_bytes).await.and_then(|()| seal(&memory));
            Ok(read.map(|()| memory))
        };
        let reason = match tokio::try_join!(reading, self.receive_reply())? {
            (Ok(packed), FromInit::Packed) => return Ok(Some(packed)),
            (Err(error), FromInit::Packed) => error.to_string(),
            (_, FromInit::NotCarried(reason)) => reason,
            _ => return Err(SandboxError::Init("unexpected message from init".into())),
        };
        tracing::debug!(reason, "cannot copy the compiled files to other sandboxes; each input is compiled by itself");
        Ok(None)
    }

    /// Has init unpack a build. If that fails, the build is not used again, and the job can run in another sandbox
    /// because nothing of it has run in this one.
    pub(crate) async fn unpack(&mut self, build: &Build) -> Result<(), SandboxError> {
        let unpacked = match self.send(&ToInit::Unpack, &[build.packed.as_fd()]) {
            Ok(()) => self.receive_reply().await,
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
        build.unusable.store(true, Ordering::Relaxed);
        Err(SandboxError::NotCarried)
    }

    /// Waits for init's reply to packing or unpacking. Handles the reply to [`ToInit::Prepare`] that may come before
    /// it.
    async fn receive_reply(&mut self) -> Result<FromInit, SandboxError> {
        let reply_time = carry::MAX_TIME + REPLY_GRACE;
        let late = tokio::time::sleep(reply_time);
        tokio::pin!(late);
        loop {
            let message = tokio::select! {
                message = self.channel.receive() => message?,
                () = self.gone.cancelled() => return Err(self.container_ended("its container has ended")),
                () = &mut late => return Err(SandboxError::Silent(reply_time)),
            };
            match message {
                Some(FromInit::Prepared) if !self.prepared => self.prepared = true,
                Some(FromInit::Failed(reason)) if !self.prepared => return Err(self.init_failure(reason)),
                Some(reply) => return Ok(reply),
                None => return Err(self.container_ended("its channel is closed")),
            }
        }
    }
}

/// Creates a memory file, and a pipe from init to the server that is to fill it.
fn memfd_and_pipe() -> io::Result<(File, pipe::Receiver, OwnedFd)> {
    let memory = memfd_create("build", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let (ours, theirs) = io::pipe()?;
    // Fails if this user's pipes already take too much memory. A smaller pipe works too.
    let _ = fcntl(&ours, FcntlArg::F_SETPIPE_SZ(PIPE_SIZE));
    Ok((memory.into(), pipe::Receiver::from_owned_fd(ours.into())?, theirs.into()))
}

/// Moves all bytes of a pipe into a memory file, without copying them through this process. Fails if there are more
/// than `max_bytes`.
async fn fill(memory: &File, ours: pipe::Receiver, max_bytes: u64) -> io::Result<()> {
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
        if length > max_bytes {
            return Err(io::Error::other("init wrote more than the size limit"));
        }
    }
}

/// Seals a memory file: nobody can change it any more.
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

    fn build() -> Build {
        let (packed, ..) = memfd_and_pipe().unwrap();
        let usage = Usage::default();
        let (stage, ended, output) = (Stage::Compile, Ended::Exited(0), Output::default());
        let compile = StageOutcome { stage, ended, artifact: true, usage, output };
        let permit = BuildBudget::default().reserve(0);
        Build { image: "i".into(), compile, packed, unusable: AtomicBool::new(false), _permit: permit }
    }

    /// A sandbox, and init's end of its channel.
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
            earlier_cpu_us: 0,
            prepared,
            gone: CancellationToken::new(),
            _released: CancellationToken::new().drop_guard(),
        };
        (sandbox, theirs)
    }

    #[tokio::test]
    async fn build_is_discarded_only_if_a_prepared_sandbox_cannot_unpack_it() {
        let failures = || [FromInit::Failed("no files".into()), FromInit::NotCarried("no room".into())];
        for (prepared, failed, ended) in [(false, "sandbox_lost", "sandbox_lost"), (true, "not_carried", "not_carried")]
        {
            for failure in failures().into_iter().take(1 + usize::from(prepared)) {
                let (mut sandbox, init) = self::sandbox(prepared);
                let build = build();
                send(init.as_fd(), &failure, &[]).unwrap();
                assert_eq!(sandbox.unpack(&build).await.unwrap_err().kind(), failed);
                assert_eq!(build.is_usable_on("i"), !prepared, "{failure:?}");
                drop(init);
                assert_eq!(sandbox.unpack(&build).await.unwrap_err().kind(), ended);
            }
        }
    }

    #[tokio::test]
    async fn unpack_and_pack_fail_at_once_if_the_sandbox_is_gone() {
        // Init's end of the pipe stays open in the message, which nobody receives.
        let (mut sandbox, _init) = sandbox(true);
        sandbox.gone.cancel();
        let patience = Duration::from_secs(5);
        let unpacked = timeout(patience, sandbox.unpack(&build())).await;
        assert_eq!(unpacked.unwrap().unwrap_err().kind(), "not_carried");
        assert_eq!(timeout(patience, sandbox.pack(1 << 20)).await.unwrap().unwrap_err().kind(), "sandbox_gone");
    }

    #[tokio::test]
    async fn failed_pack_lets_the_other_sandboxes_compile() {
        let (mut sandbox, init) = sandbox(true);
        drop(init);
        let (sender, receiver) = oneshot::channel();
        let request = BuildRequest { permit: BuildBudget::default().reserve(1 << 20), build: sender };
        let compile = build().compile;
        assert_eq!(sandbox.share_build(Some(&compile), request).await.unwrap_err().kind(), "sandbox_gone");
        assert!(receiver.await.unwrap().is_none());
    }

    #[test]
    fn memory_of_all_builds_is_bounded() {
        let budget = BuildBudget::default();
        let mut permits: Vec<BuildPermit> = (0..MAX_BUILDS).map(|_| budget.reserve(1 << 20)).collect();
        assert_eq!((permits[0].bytes, budget.reserve(1 << 20).bytes), (1 << 20, 0));
        permits[0].shrink_to(5000);
        assert_eq!(budget.reserve(1 << 20).bytes, (1 << 20) - 8192);
        drop(permits);
        assert_eq!(budget.0.load(Ordering::Relaxed), 0);
    }

    #[tokio::test]
    async fn stored_builds_are_bounded_and_sealed() {
        use std::io::Write;
        use std::os::unix::fs::FileExt;
        for (max_bytes, fits) in [(100_000, true), (99_999, false)] {
            let (memory, ours, theirs) = memfd_and_pipe().unwrap();
            let writing = std::thread::spawn(move || File::from(theirs).write_all(&[7; 100_000]));
            assert_eq!(fill(&memory, ours, max_bytes).await.is_ok(), fits);
            assert!(writing.join().unwrap().is_ok());
            seal(&memory).unwrap();
            assert!(memory.write_at(b"x", 0).is_err() && memory.set_len(0).is_err());
        }
    }
}
