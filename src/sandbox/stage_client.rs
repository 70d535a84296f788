//! One stage as the server sees it: deadline, output, and what init reports of its end.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use nix::sys::signal::Signal;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout_at};

use crate::host::cgroup::Counters;
use crate::model::job::{Job, Stage};
use crate::model::language::Language;
use crate::model::outcome::{Ended, StageOutcome, Usage};
use crate::model::output::{Output, Stream};
use crate::sandbox::channel::ChannelError;
use crate::sandbox::protocol::{FromInit, StageSpec, ToInit, micros};
use crate::sandbox::stage_pipes::{Pipes, Reader, feed};
use crate::sandbox::{Event, Live, STAGE_GRACE, Sandbox, SandboxError};

/// How long the pipes may take to end after init said that every process is dead.
const DRAIN_TIME: Duration = Duration::from_secs(1);

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
