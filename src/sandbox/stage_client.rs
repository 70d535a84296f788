//! The server's side of a stage: its deadline, its input and output, and init's report of its end.

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
use crate::sandbox::stage_pipes::{Pipes, Reader, write_stdin};
use crate::sandbox::{Event, Live, STAGE_GRACE, Sandbox, SandboxError};

/// How long the output pipes may stay open after init has reported that every process is dead.
const DRAIN_TIME: Duration = Duration::from_secs(1);

impl Sandbox {
    /// Runs one stage to its end. Reads its output all the time, so the program never waits for the server.
    pub(crate) async fn stage(
        &mut self,
        stage: Stage,
        language: &Language,
        job: &Job,
        live: &mut Live,
    ) -> Result<StageOutcome, SandboxError> {
        let pipes = Pipes::new(job.streams).map_err(SandboxError::io("cannot make pipes"))?;
        let message = ToInit::Stage(spec(stage, language, job));
        self.send(&message, &pipes.program_ends.each_ref().map(AsFd::as_fd))?;
        let Pipes { program_ends, stdin, stdout, stderr } = pipes;
        drop(program_ends);
        let report_start = || drop(live.events.as_ref().map(|events| events.send(Event::Started(stage))));
        if self.prepared {
            report_start();
        }
        let (job_input, live_input) = match stage {
            Stage::Compile => (Bytes::new(), None),
            Stage::Run => (job.stdin.clone(), live.stdin.as_mut()),
        };
        let writing = write_stdin(stdin, job_input, live_input);
        tokio::pin!(writing);
        let (mut stdin_done, mut killed) = (false, false);

        let started = Instant::now();
        let deadline = started + job.limits.time(stage) + STAGE_GRACE;
        let mut collector = OutputCollector { stage, job, events: live.events.as_ref(), output: Output::default() };
        let mut out = Reader::new(Stream::Stdout, Some(stdout));
        let mut err = Reader::new(Stream::Stderr, stderr);
        let (ended, artifact, usage) = loop {
            tokio::select! {
                // Biased, so that init's `Prepared` is handled before any output of the program. Output comes late in
                // the order, so it delays nothing else, and the output limit ends it.
                biased;
                message = self.channel.receive() => match message? {
                    Some(FromInit::Prepared) if !self.prepared => {
                        self.prepared = true;
                        report_start();
                    }
                    Some(FromInit::StageEnded { ended, artifact, usage }) => break (ended, artifact, usage),
                    Some(FromInit::Failed(reason)) => return Err(self.init_failure(reason)),
                    Some(FromInit::HostMemory) => return Err(SandboxError::HostMemory),
                    Some(_) => {
                        return Err(SandboxError::Init("unexpected message from init".into()));
                    }
                    None => break self.ended_without_report(started, "its channel is closed")?,
                },
                () = self.gone.cancelled() => break self.ended_without_report(started, "its container has ended")?,
                () = sleep_until(deadline) => return Err(SandboxError::Silent(STAGE_GRACE)),
                // Not before `Prepared`: a retry in another sandbox needs the live input if this one turns out to be
                // lost.
                () = &mut writing, if self.prepared && !stdin_done => stdin_done = true,
                Some(chunk) = out.next() => collector.push(Stream::Stdout, chunk),
                Some(chunk) = err.next() => collector.push(Stream::Stderr, chunk),
                // Drops signals while init has not received the earlier ones, to keep room in the channel for other
                // messages.
                Some(signal) = next_signal(&mut live.signals) => if self.channel.has_room() {
                    self.send_unless_closed(&ToInit::Signal(signal))?;
                },
            }
            if collector.output.overflowed && !killed {
                killed = true;
                self.send_unless_closed(&ToInit::Kill)?;
            }
        };
        let drained = timeout_at(Instant::now() + DRAIN_TIME, async {
            while out.is_open() || err.is_open() {
                tokio::select! {
                    Some(chunk) = out.next() => collector.push(Stream::Stdout, chunk),
                    Some(chunk) = err.next() => collector.push(Stream::Stderr, chunk),
                    else => {}
                }
            }
        });
        if drained.await.is_err() {
            tracing::warn!(?stage, "pipes stayed open after every process had ended");
        }
        self.earlier_cpu_us += usage.cpu_us;
        let outcome = StageOutcome { stage, ended, artifact, usage, output: collector.output };
        if let Some(events) = &live.events {
            let _ = events.send(Event::Ended(Arc::new(outcome.clone())));
        }
        Ok(outcome)
    }

    /// Sends a message during a stage. Ignores a closed channel, because the loop of the stage notices it too.
    fn send_unless_closed(&self, message: &ToInit) -> Result<(), SandboxError> {
        match self.channel.send(message, &[]) {
            Err(ChannelError::Closed) => Ok(()),
            sent => Ok(sent?),
        }
    }

    /// The end of a stage whose container ended before init reported it: out of memory if the cgroup counted an OOM
    /// kill, else an error. At the memory limit the kernel may kill init, and so all other processes, as the largest
    /// process: a program that holds its memory in files is not larger than init.
    fn ended_without_report(&self, started: Instant, cause: &str) -> Result<(Ended, bool, Usage), SandboxError> {
        let counters = self.cgroup.as_ref().filter(|_| self.prepared).map(|own| own.counters());
        let Some(counters) = counters.filter(|counters| counters.oom_kills > 0) else {
            return Err(self.container_ended(cause));
        };
        if counters.starved_since(&Counters::default()) {
            return Err(SandboxError::HostMemory);
        }
        let usage = Usage {
            wall_us: micros(started.elapsed()),
            cpu_us: micros(counters.cpu.unwrap_or_default()).saturating_sub(self.earlier_cpu_us),
            memory: counters.peak.unwrap_or_default(),
            oom_kills: counters.oom_kills,
            forks_refused: counters.forks_refused,
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

/// Collects the output of a stage for its outcome, and reports it as events.
struct OutputCollector<'a> {
    stage: Stage,
    job: &'a Job,
    events: Option<&'a mpsc::UnboundedSender<Event>>,
    output: Output,
}

impl OutputCollector<'_> {
    fn push(&mut self, stream: Stream, chunk: Vec<u8>) {
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
