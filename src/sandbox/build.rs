//! What compiling left behind: taken out of one sandbox, put into others.
//!
//! Init packs it when every program is dead, and another init unpacks it with the rights of the programs, who could
//! have done the same. To the server it is bytes: it neither looks into them nor writes them to any path.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::oneshot;

use super::protocol::{FromInit, ToInit};
use super::{STAGE_GRACE, Sandbox, SandboxError};
use crate::job::{Built, StageOutcome};

/// Waits for what a run's compile stage makes: nothing, where it cannot be carried elsewhere.
#[derive(Debug)]
pub struct Wanted {
    /// Most bytes that it may be.
    pub most: usize,
    /// Is told when it is there, or will not be. Dropped where it did not compile.
    pub built: oneshot::Sender<Option<Arc<Built>>>,
}

impl Sandbox {
    /// Hands on what was just compiled.
    pub(super) async fn hand_on(&mut self, compile: Option<&StageOutcome>, wanted: Wanted) -> Result<(), SandboxError> {
        let built = match compile {
            Some(compile) => self.pack(wanted.most).await?.map(|packed| {
                Arc::new(Built { image: self.image.clone(), compile: compile.clone(), packed: packed.into() })
            }),
            None => None,
        };
        let _ = wanted.built.send(built);
        Ok(())
    }

    /// What is in the working directory; `None` where it is too large, or such that it cannot be packed.
    async fn pack(&mut self, most: usize) -> Result<Option<Vec<u8>>, SandboxError> {
        let (ours, theirs) = std::io::pipe().map_err(SandboxError::io("cannot make a pipe"))?;
        let ours = pipe::Receiver::from_owned_fd(ours.into()).map_err(SandboxError::io("cannot read a pipe"))?;
        self.order(&ToInit::Pack, &[theirs.as_fd()])?;
        drop(theirs);
        let reading = async move {
            let mut packed = Vec::new();
            let read = ours.take(most as u64 + 1).read_to_end(&mut packed).await;
            // Beyond it nobody reads, and init is told so by the pipe.
            Ok((read.is_ok() && packed.len() <= most).then_some(packed))
        };
        match tokio::try_join!(reading, self.answer())? {
            (packed, FromInit::Packed) => Ok(packed),
            (_, FromInit::Failed(reason)) => {
                tracing::debug!(reason, "what was compiled is not carried to other sandboxes");
                Ok(None)
            }
            _ => Err(SandboxError::Init("an answer to something else".into())),
        }
    }

    /// Has init put what was compiled elsewhere into the working directory.
    pub(super) async fn unpack(&mut self, packed: Bytes) -> Result<(), SandboxError> {
        let (theirs, ours) = std::io::pipe().map_err(SandboxError::io("cannot make a pipe"))?;
        let ours = pipe::Sender::from_owned_fd(OwnedFd::from(ours));
        let mut ours = ours.map_err(SandboxError::io("cannot write to a pipe"))?;
        self.order(&ToInit::Unpack, &[theirs.as_fd()])?;
        drop(theirs);
        let writing = async move {
            // Init says what went wrong.
            let _ = ours.write_all(&packed).await;
            Ok(())
        };
        match tokio::try_join!(writing, self.answer())?.1 {
            FromInit::Prepared => Ok(()),
            FromInit::Failed(reason) => Err(self.failed(reason)),
            _ => Err(SandboxError::Init("an answer to something else".into())),
        }
    }

    /// Init's answer to something that takes it a moment.
    async fn answer(&mut self) -> Result<FromInit, SandboxError> {
        loop {
            let message = tokio::select! {
                message = self.channel.receive() => message?,
                () = self.gone.cancelled() => return Err(self.ended("its container has ended")),
                () = tokio::time::sleep(STAGE_GRACE) => return Err(SandboxError::Silent(STAGE_GRACE)),
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

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::time::Duration;

    use tokio::time::timeout;
    use tokio_util::sync::CancellationToken;

    use super::super::channel::Channel;
    use super::super::protocol::{Enforced, send};
    use super::*;

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
    async fn a_sandbox_is_lost_where_it_fails_before_anything_of_the_job_was_in_it() {
        for (prepared, failed, ended) in [(false, "sandbox_lost", "sandbox_lost"), (true, "init", "sandbox_gone")] {
            let (mut sandbox, init) = self::sandbox(prepared);
            send(init.as_fd(), &FromInit::Failed("no files".into()), &[]).unwrap();
            assert_eq!(sandbox.unpack(Bytes::new()).await.unwrap_err().kind(), failed);
            drop(init);
            assert_eq!(sandbox.unpack(Bytes::new()).await.unwrap_err().kind(), ended);
        }
    }

    #[tokio::test]
    async fn what_is_not_read_or_written_any_more_is_not_waited_for() {
        // Whose end of the pipe stays open beside the message that nobody takes.
        let (mut sandbox, _init) = sandbox(true);
        sandbox.gone.cancel();
        let patience = Duration::from_secs(5);
        let unpacked = timeout(patience, sandbox.unpack(vec![0; 1 << 20].into())).await;
        assert_eq!(unpacked.unwrap().unwrap_err().kind(), "sandbox_gone");
        assert_eq!(timeout(patience, sandbox.pack(1 << 20)).await.unwrap().unwrap_err().kind(), "sandbox_gone");
    }
}
