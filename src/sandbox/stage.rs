//! One stage as the server sees it: pipes, deadline, output, and init's word on how it ended.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use nix::sys::signal::Signal;
use nix::sys::stat::{Mode, fchmod};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout_at};

use super::protocol::{FromInit, StageSpec, ToInit};
use super::{Event, Live, STAGE_GRACE, Sandbox, SandboxError, micros};
use crate::cgroup::Counters;
use crate::job::{Ended, Job, Output, Stage, StageOutcome, Stream, Streams, Usage};
use crate::language::Language;

/// How long the pipes may take to end after init said that every process is dead.
const DRAIN_TIME: Duration = Duration::from_secs(1);

/// Size of one read in bytes: that of a pipe.
const CHUNK: usize = 64 * 1024;

/// Reads of a pipe that follow each other at once. What prints in smaller pieces for longer is read once in
/// [`READ_PAUSE`]: each read is a piece that is told and kept, and costs this server more than the program.
const READS_AT_ONCE: usize = 1000;

/// Time between two further reads: shorter than anybody sees, and a pipe holds what comes meanwhile.
const READ_PAUSE: Duration = Duration::from_millis(1);

/// Packets in one piece after a pause: as many as the largest pipe of an ordinary user holds (1 MiB of pages).
const PACKETS: usize = 256;

impl Sandbox {
    /// Runs one stage to its end. Whatever it prints is read all the time, so it never waits for us.
    pub(super) async fn stage(
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
                    Some(FromInit::Ready { .. } | FromInit::Prepared | FromInit::Packed) => {
                        return Err(SandboxError::Init("an answer to something else".into()));
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
            Err(SandboxError::Gone(_)) => Ok(()),
            sent => sent,
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
    stdout: pipe::Receiver,
    stderr: Option<pipe::Receiver>,
}

impl Pipes {
    fn new(streams: Streams) -> std::io::Result<Pipes> {
        // std makes them close-on-exec and blocking, as programs expect theirs; tokio sets ours to non-blocking.
        let (in_reader, in_writer) = std::io::pipe()?;
        let (out_reader, out_writer) = std::io::pipe()?;
        let (stderr, err_writer) = match streams {
            Streams::Merged => (None, out_writer.try_clone()?),
            Streams::Separate => {
                let (reader, writer) = std::io::pipe()?;
                (Some(pipe::Receiver::from_owned_fd(reader.into())?), writer)
            }
        };
        let theirs: [OwnedFd; 3] = [in_reader.into(), out_writer.into(), err_writer.into()];
        // The pipes are this user's, the programs another's: they could not open /dev/stdin, /dev/stdout and /dev/stderr.
        theirs.iter().try_for_each(|pipe| fchmod(pipe, Mode::from_bits_truncate(0o666)))?;
        Ok(Pipes {
            theirs,
            stdin: pipe::Sender::from_owned_fd(in_writer.into())?,
            stdout: pipe::Receiver::from_owned_fd(out_reader.into())?,
            stderr,
        })
    }
}

/// Our end of an output pipe, until it ends.
struct Reader {
    stream: Stream,
    pipe: Option<pipe::Receiver>,
    buffer: Vec<u8>,
    reads: usize,
    /// When the next one may be.
    next: Instant,
}

impl Reader {
    fn new(stream: Stream, pipe: Option<pipe::Receiver>) -> Reader {
        Reader { stream, pipe, buffer: Vec::new(), reads: 0, next: Instant::now() }
    }

    fn open(&self) -> bool {
        self.pipe.is_some()
    }

    /// The next bytes; `None` at the end and ever after. Safe to cancel.
    async fn next(&mut self) -> Option<Vec<u8>> {
        let pipe = self.pipe.as_mut()?;
        if self.reads > READS_AT_ONCE {
            sleep_until(self.next).await;
        }
        self.buffer.clear();
        self.buffer.reserve(CHUNK);
        match pipe.read_buf(&mut self.buffer).await {
            Ok(1..) => {
                self.reads += 1;
                if self.reads > READS_AT_ONCE {
                    // A pipe told to keep packets apart gives one in each read: those of the pause are read now. Of
                    // a packet that the buffer has no room for the rest would be lost.
                    for _ in 1..PACKETS {
                        let room = self.buffer.capacity() - self.buffer.len();
                        if room < nix::libc::PIPE_BUF || !matches!(pipe.try_read_buf(&mut self.buffer), Ok(1..)) {
                            break;
                        }
                    }
                    self.next = Instant::now() + READ_PAUSE;
                }
                Some(std::mem::take(&mut self.buffer))
            }
            Ok(0) => {
                self.pipe = None;
                None
            }
            Err(error) => {
                tracing::warn!(stream = ?self.stream, %error, "cannot read a pipe");
                self.pipe = None;
                None
            }
        }
    }
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
