//! One stage as the server sees it: pipes, deadline, output, and init's word on how it ended.

use std::io::PipeReader;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use nix::libc::PIPE_BUF;
use nix::sys::signal::Signal;
use nix::sys::stat::{Mode, fchmod};
use rustix::buffer::spare_capacity;
use rustix::io::ioctl_fionbio;
use tokio::io::unix::{AsyncFd, AsyncFdReadyGuard};
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::unix::pipe;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout_at};

use crate::host::cgroup::Counters;
use crate::model::job::{Job, Stage, Streams};
use crate::model::language::Language;
use crate::model::outcome::{Ended, StageOutcome, Usage};
use crate::model::output::{Output, Stream};
use crate::sandbox::channel::ChannelError;
use crate::sandbox::protocol::{FromInit, StageSpec, ToInit, micros};
use crate::sandbox::{Event, Live, STAGE_GRACE, Sandbox, SandboxError};

/// How long the pipes may take to end after init said that every process is dead.
const DRAIN_TIME: Duration = Duration::from_secs(1);

/// Size of one read in bytes: that of a pipe.
const CHUNK: usize = 64 * 1024;

/// Pieces of a stream that are told as they come. Further ones are at least [`PIECE_TIME`] apart, or as large as they get:
/// each is an event that is kept for who watches, and takes more room than what it tells.
const PIECES_AT_ONCE: usize = 1000;

/// Time that further pieces are gathered for: shorter than anybody sees.
const PIECE_TIME: Duration = Duration::from_millis(1);

/// Most that gathering a piece may cost, in reads, before the rest of its time is waited out with the pipe holding what
/// comes. In [`PIECE_TIME`] that is a quarter of a CPU, which a program needs all of to cause it.
const PIECE_COST: usize = 256;

/// What it costs to be woken for a read, in reads that find something: 15 us to 0.5 us or so.
const WAKE_COST: usize = 16;

impl Sandbox {
    /// Runs one stage to its end. Whatever it prints is read all the time, so it never waits for us.
    pub(crate) async fn stage(
        &mut self,
        stage: Stage,
        language: &Language,
        job: &Job,
        live: &mut Live,
    ) -> Result<StageOutcome, SandboxError> {
        let pipes = Pipes::new(job.streams).map_err(SandboxError::io("cannot make pipes"))?;
        let order = ToInit::Stage(spec(stage, language, job));
        self.order(&order, &pipes.theirs.each_ref().map(AsFd::as_fd))?;
        let Pipes { theirs, stdin, stdout, stderr } = pipes;
        drop(theirs);
        let begin = || drop(live.events.as_ref().map(|events| events.send(Event::Started(stage))));
        if self.prepared {
            begin();
        }
        let (typed, typing) = match stage {
            Stage::Compile => (Bytes::new(), None),
            Stage::Run => (job.stdin.clone(), live.stdin.as_mut()),
        };
        let feeding = feed(stdin, typed, typing);
        tokio::pin!(feeding);
        let (mut fed, mut killed) = (false, false);

        let started = Instant::now();
        let deadline = started + job.limits.time(stage) + STAGE_GRACE;
        let mut printed = Printed { stage, job, events: live.events.as_ref(), output: Output::default() };
        let mut out = Reader::new(Stream::Stdout, Some(stdout));
        let mut err = Reader::new(Stream::Stderr, stderr);
        let (ended, artifact, usage) = loop {
            tokio::select! {
                // That the files are placed is heard before anything that the program does. What it prints keeps
                // nothing else from its turn, and is not endless.
                biased;
                message = self.channel.receive() => match message? {
                    Some(FromInit::Prepared) if !self.prepared => {
                        self.prepared = true;
                        begin();
                    }
                    Some(FromInit::StageEnded { ended, artifact, usage }) => break (ended, artifact, usage),
                    Some(FromInit::Failed(reason)) => return Err(self.failed(reason)),
                    Some(FromInit::HostMemory) => return Err(SandboxError::HostMemory),
                    Some(_) => {
                        return Err(SandboxError::Init("unexpected message from init".into()));
                    }
                    None => break self.ended_under(started, "its channel is closed")?,
                },
                () = self.gone.cancelled() => break self.ended_under(started, "its container has ended")?,
                () = sleep_until(deadline) => return Err(SandboxError::Silent(STAGE_GRACE)),
                // Nothing that is typed goes to a sandbox that turns out to be lost.
                () = &mut feeding, if self.prepared && !fed => fed = true,
                Some(chunk) = out.next() => printed.take(Stream::Stdout, chunk),
                Some(chunk) = err.next() => printed.take(Stream::Stderr, chunk),
                // More than init has taken yet are as good as one, and may not take the room of its orders.
                Some(signal) = next_signal(&mut live.signals) => if self.channel.has_room() {
                    self.tell(&ToInit::Signal(signal))?;
                },
            }
            if printed.output.overflowed && !killed {
                killed = true;
                self.tell(&ToInit::Kill)?;
            }
        };
        let drained = timeout_at(Instant::now() + DRAIN_TIME, async {
            while out.open() || err.open() {
                tokio::select! {
                    Some(chunk) = out.next() => printed.take(Stream::Stdout, chunk),
                    Some(chunk) = err.next() => printed.take(Stream::Stderr, chunk),
                    else => {}
                }
            }
        });
        if drained.await.is_err() {
            tracing::warn!(?stage, "pipes stayed open after every process had ended");
        }
        self.spent_us += usage.cpu_us;
        let outcome = StageOutcome { stage, ended, artifact, usage, output: printed.output };
        if let Some(events) = &live.events {
            let _ = events.send(Event::Ended(Arc::new(outcome.clone())));
        }
        Ok(outcome)
    }

    /// An order during a stage. Of an init that has gone the channel tells.
    fn tell(&self, order: &ToInit) -> Result<(), SandboxError> {
        match self.channel.send(order, &[]) {
            Err(ChannelError::Closed) => Ok(()),
            sent => Ok(sent?),
        }
    }

    /// What it means that the container ended under a stage. At the memory limit the kernel may take init for the largest
    /// process, with which all others end: a program can hold its memory in files and be no larger.
    fn ended_under(&self, started: Instant, seen: &str) -> Result<(Ended, bool, Usage), SandboxError> {
        let counted = self.cgroup.as_ref().filter(|_| self.prepared).map(|own| own.counters());
        let Some(counted) = counted.filter(|counted| counted.oom_kills > 0) else { return Err(self.ended(seen)) };
        if counted.starved_since(&Counters::default()) {
            return Err(SandboxError::HostMemory);
        }
        let usage = Usage {
            wall_us: micros(started.elapsed()),
            cpu_us: micros(counted.cpu.unwrap_or_default()).saturating_sub(self.spent_us),
            memory: counted.peak.unwrap_or_default(),
            oom_kills: counted.oom_kills,
            forks_refused: counted.forks_refused,
        };
        Ok((Ended::Signalled(Signal::SIGKILL as i32), false, usage))
    }
}

fn spec(stage: Stage, language: &Language, job: &Job) -> StageSpec {
    let mut argv = language.command(stage).unwrap_or_default().to_vec();
    if stage == Stage::Run {
        argv.extend(job.args.iter().cloned());
    }
    StageSpec {
        argv,
        env: language.environment(),
        artifact: language.artifact(stage).map(str::to_owned),
        time_us: micros(job.limits.time(stage)),
        cpu_time_us: micros(job.limits.cpu_time(stage)),
        memory: job.memory.of(stage),
        open_files: job.limits.open_files,
        file_size: job.limits.directory_size(),
        processes: u64::from(job.limits.processes),
    }
}

/// The three pipes of a stage, both ends.
struct Pipes {
    theirs: [OwnedFd; 3],
    stdin: pipe::Sender,
    stdout: AsyncFd<OwnedFd>,
    stderr: Option<AsyncFd<OwnedFd>>,
}

impl Pipes {
    fn new(streams: Streams) -> std::io::Result<Pipes> {
        // std makes them close-on-exec and blocking, as programs expect theirs; ours are non-blocking.
        let (in_reader, in_writer) = std::io::pipe()?;
        let (out_reader, out_writer) = std::io::pipe()?;
        let (stderr, err_writer) = match streams {
            Streams::Merged => (None, out_writer.try_clone()?),
            Streams::Separate => {
                let (reader, writer) = std::io::pipe()?;
                (Some(readable(reader)?), writer)
            }
        };
        let theirs: [OwnedFd; 3] = [in_reader.into(), out_writer.into(), err_writer.into()];
        // The pipes are this user's, the programs another's: they could not open /dev/stdin, /dev/stdout and /dev/stderr.
        theirs.iter().try_for_each(|pipe| fchmod(pipe, Mode::from_bits_truncate(0o666)))?;
        Ok(Pipes {
            theirs,
            stdin: pipe::Sender::from_owned_fd(in_writer.into())?,
            stdout: readable(out_reader)?,
            stderr,
        })
    }
}

fn readable(pipe: PipeReader) -> std::io::Result<AsyncFd<OwnedFd>> {
    ioctl_fionbio(&pipe, true)?;
    // SAFETY: an OwnedFd is one and the same descriptor until it is dropped.
    unsafe { AsyncFd::register_with_interest(OwnedFd::from(pipe), Interest::READABLE) }.map_err(Into::into)
}

/// Our end of an output pipe, until it ends.
struct Reader {
    stream: Stream,
    pipe: Option<AsyncFd<OwnedFd>>,
    /// The piece that is gathered.
    buffer: Vec<u8>,
    /// What that has cost, in reads.
    cost: usize,
    /// Pieces before it.
    pieces: usize,
    /// When it is due.
    due: Instant,
}

impl Reader {
    fn new(stream: Stream, pipe: Option<AsyncFd<OwnedFd>>) -> Reader {
        Reader { stream, pipe, buffer: Vec::new(), cost: 0, pieces: 0, due: Instant::now() }
    }

    fn open(&self) -> bool {
        self.pipe.is_some()
    }

    /// The next piece; `None` at the end and ever after. Safe to cancel.
    async fn next(&mut self) -> Option<Vec<u8>> {
        loop {
            let is_due = self.pieces < PIECES_AT_ONCE || Instant::now() >= self.due;
            if !self.buffer.is_empty() && (is_due || !has_room(&self.buffer) || !self.open()) {
                (self.cost, self.pieces, self.due) = (0, self.pieces + 1, Instant::now() + PIECE_TIME);
                return Some(std::mem::take(&mut self.buffer));
            }
            let pipe = self.pipe.as_ref()?;
            let ready = match self.buffer.is_empty() {
                true => pipe.readable().await,
                false if self.cost >= PIECE_COST => {
                    sleep_until(self.due).await;
                    continue;
                }
                false => match timeout_at(self.due, pipe.readable()).await {
                    Ok(ready) => ready,
                    Err(_) => continue,
                },
            };
            match ready.and_then(|ready| gather(ready, &mut self.buffer, &mut self.cost)) {
                Ok(true) => {}
                Ok(false) => self.pipe = None,
                Err(error) => {
                    tracing::warn!(stream = ?self.stream, %error, "cannot read a pipe");
                    self.pipe = None;
                }
            }
        }
    }
}

/// A pipe told to keep packets apart gives one in each read, and of one that there is no room for the rest is lost.
fn has_room(buffer: &[u8]) -> bool {
    buffer.len() + PIPE_BUF <= CHUNK
}

/// Reads what a pipe holds, as far as there is room and it does not cost too much; false at its end.
fn gather(mut ready: AsyncFdReadyGuard<'_, OwnedFd>, buffer: &mut Vec<u8>, cost: &mut usize) -> std::io::Result<bool> {
    buffer.reserve_exact(CHUNK - buffer.len());
    // That nothing was found costs no piece anything.
    *cost = if buffer.is_empty() { WAKE_COST } else { *cost + WAKE_COST };
    // Until it is empty: tokio's own pipe takes it for empty after any read that does not fill the buffer, and a writer of
    // packets then has each of them waited for.
    while has_room(buffer) && *cost < PIECE_COST {
        match rustix::io::read(ready.get_inner(), spare_capacity(buffer)) {
            Ok(0) => return Ok(false),
            Ok(_) => *cost += 1,
            Err(rustix::io::Errno::AGAIN) => {
                ready.clear_ready();
                break;
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(true)
}

/// Where the output of a stage goes: into the outcome, and to who watches.
struct Printed<'a> {
    stage: Stage,
    job: &'a Job,
    events: Option<&'a mpsc::UnboundedSender<Event>>,
    output: Output,
}

impl Printed<'_> {
    fn take(&mut self, stream: Stream, chunk: Vec<u8>) {
        let cap = usize::try_from(self.job.limits.output.as_u64()).unwrap_or(usize::MAX);
        let kept = self.output.push(stream, &chunk, cap);
        self.output.overflowed = self.output.total_both() > self.job.limits.output_total.as_u64();
        if let (Some(events), false) = (self.events, kept.is_empty()) {
            let _ = events.send(Event::Output(self.stage, stream, Bytes::copy_from_slice(kept)));
        }
    }
}

async fn next_signal(signals: &mut Option<mpsc::Receiver<i32>>) -> Option<i32> {
    signals.as_mut()?.recv().await
}

/// Writes what is to be read on stdin, then closes it. A program that does not read is no error.
async fn feed(mut stdin: pipe::Sender, first: Bytes, typing: Option<&mut mpsc::Receiver<Bytes>>) {
    if stdin.write_all(&first).await.is_err() {
        return;
    }
    let Some(typing) = typing else { return };
    while let Some(bytes) = typing.recv().await {
        if stdin.write_all(&bytes).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{PipeWriter, Write};

    use nix::fcntl::{FcntlArg, OFlag, fcntl};

    use super::*;

    fn pipe() -> (Reader, PipeWriter) {
        let (reader, writer) = std::io::pipe().unwrap();
        (Reader::new(Stream::Stdout, Some(readable(reader).unwrap())), writer)
    }

    async fn next(reader: &mut Reader) -> Option<Vec<u8>> {
        tokio::time::timeout(Duration::from_secs(60), reader.next()).await.unwrap()
    }

    #[tokio::test]
    async fn packets_that_a_pipe_holds_are_one_piece() {
        let (mut reader, mut writer) = pipe();
        fcntl(&writer, FcntlArg::F_SETFL(OFlag::O_WRONLY | OFlag::O_DIRECT)).unwrap();
        for round in 0..PIECES_AT_ONCE + 10 {
            (0..10).for_each(|_| writer.write_all(b"x").unwrap());
            assert_eq!(next(&mut reader).await.unwrap(), b"xxxxxxxxxx", "{round}");
        }
        drop(writer);
        assert!(next(&mut reader).await.is_none());
        assert!(next(&mut reader).await.is_none());
    }

    #[tokio::test]
    async fn small_pieces_are_told_one_by_one_and_then_together() {
        let (mut reader, mut writer) = pipe();
        let writes = 20_000;
        let mut told = 0;
        for _ in 0..PIECES_AT_ONCE {
            writer.write_all(b"x").unwrap();
            assert_eq!(next(&mut reader).await.unwrap(), b"x");
        }
        let started = Instant::now();
        let writing = std::thread::spawn(move || (0..writes).for_each(|_| writer.write_all(b"y").unwrap()));
        let mut pieces = 0;
        while let Some(piece) = next(&mut reader).await {
            told += piece.len();
            pieces += 1;
        }
        writing.join().unwrap();
        assert_eq!(told, writes);
        // One that is as large as it can be needs no time, and the last one neither.
        assert!(pieces <= started.elapsed().as_millis() + 3, "{pieces} in {:?}", started.elapsed());
    }

    #[tokio::test]
    async fn what_was_gathered_is_not_lost_when_nobody_waits_for_it() {
        let (mut reader, mut writer) = pipe();
        reader.pieces = PIECES_AT_ONCE;
        reader.due = Instant::now() + Duration::from_secs(1000);
        writer.write_all(b"kept").unwrap();
        assert!(tokio::time::timeout(Duration::from_millis(50), reader.next()).await.is_err());
        writer.write_all(b" all").unwrap();
        drop(writer);
        assert_eq!(next(&mut reader).await.unwrap(), b"kept all");
        assert!(next(&mut reader).await.is_none());
    }
}
