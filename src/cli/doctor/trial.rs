//! A trial: tests every limit and wall in sandboxes of one engine.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use bytesize::ByteSize;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::cli::doctor::image;
use crate::cli::doctor::probe::Probe;
use crate::cli::doctor::wall::{Wall, WallResult};
use crate::cli::session::EngineSession;
use crate::model::job::{Job, Streams};
use crate::model::language::Language;
use crate::model::outcome::{Ended, Outcome, StageOutcome, Usage, Verdict};
use crate::sandbox::Enforced;
use crate::sandbox::{Event, HEALTH_SLOT, Live, Sandbox, SandboxError, SandboxSpec, Slot};

/// The slots of the sandboxes: a trial runs at most two at once.
const SLOTS: [u32; 2] = [HEALTH_SLOT - 1, HEALTH_SLOT];

/// How long the removal of a container, and the end of its processes, may take after its job.
const REMOVAL_TIMEOUT: Duration = Duration::from_secs(60);

/// Time between two checks for remaining processes.
const RECHECK_PAUSE: Duration = Duration::from_millis(100);

/// Factor by which the measured CPU share may exceed the limit: the kernel counts in periods of a tenth of a second.
const CPU_TOLERANCE: f64 = 1.5;

/// The results of a probe, or the reason that there are none.
type ProbeResults = Result<Vec<WallResult>, String>;

/// Runs probes in sandboxes of one engine.
pub(super) struct Trial<'a> {
    session: &'a EngineSession,
    language: Arc<Language>,
    image: String,
}

impl Trial<'_> {
    /// Makes the image. The caller has to call [`image::remove`].
    pub async fn begin(session: &EngineSession) -> Result<Trial<'_>, SandboxError> {
        let language = Arc::new(image::language()?);
        let image = image::make(session).await?;
        Ok(Trial { session, language, image })
    }

    /// Makes a sandbox, and returns the limits that the kernel enforces for it.
    pub async fn enforced(&self) -> Result<Enforced, SandboxError> {
        let (sandbox, removal) = self.sandbox(SLOTS[0]).await?;
        let enforced = sandbox.enforced;
        drop(sandbox);
        // Ignores a timeout: the tests of `run` report late containers.
        let _ = removal.wait().await;
        Ok(enforced)
    }

    /// Tests all walls, one after the other.
    pub async fn run(&self, enforced: Enforced) -> Vec<WallResult> {
        let tests: [(&[Wall], BoxFuture<'_, ProbeResults>); 8] = [
            (&[Wall::Memory], self.memory().boxed()),
            (&[Wall::Processes], self.processes().boxed()),
            (&[Wall::Cpu, Wall::CpuTime], self.cpu(enforced).boxed()),
            (&[Wall::Time], self.wall_time().boxed()),
            (&[Wall::Output], self.output().boxed()),
            (&Wall::INSIDE, self.inside().boxed()),
            (&[Wall::Neighbour], self.neighbour().boxed()),
            (&[Wall::Leftovers], self.leftovers().boxed()),
        ];
        let mut all = Vec::new();
        for (walls, test) in tests {
            let untested = |reason: &str| {
                let result = |wall: &Wall| WallResult::new(*wall, false, "can be tested", reason.to_owned());
                walls.iter().map(result).collect::<Vec<_>>()
            };
            let mut results = test.await.unwrap_or_else(|reason| untested(&reason));
            let missing = untested("its probe printed no result");
            results.extend(
                missing
                    .into_iter()
                    .filter(|one| results.iter().all(|other| other.wall != one.wall))
                    .collect::<Vec<_>>(),
            );
            all.extend(results);
        }
        all
    }

    async fn memory(&self) -> ProbeResults {
        let memory = self.language.limits.memory;
        let run = self.probe(Probe::Memory, &(2 * memory.as_u64()).to_string()).await?;
        let seen = match run.verdict() {
            Verdict::MemoryLimit => format!("killed with {}", ByteSize(run.usage.memory)),
            _ => format!("{}, used {}", end_text(&run), run.output.text().trim()),
        };
        let holds = run.verdict() == Verdict::MemoryLimit && run.usage.memory <= memory.as_u64() + (4 << 20);
        Ok(vec![WallResult::new(Wall::Memory, holds, format!("killed with {memory}"), seen)])
    }

    async fn processes(&self) -> ProbeResults {
        let processes = self.language.limits.processes;
        let run = self.probe(Probe::Threads, &(2 * processes).to_string()).await?;
        let seen = format!("{} at once, {} refusals counted", run.output.text().trim(), run.usage.forks_refused);
        let holds = run.verdict() == Verdict::ProcessLimit;
        Ok(vec![WallResult::new(
            Wall::Processes,
            holds,
            format!("{processes} at once, more refused and counted"),
            seen,
        )])
    }

    /// Tests the limits of CPUs and of CPU time: a busy loop has to be throttled, and then killed.
    async fn cpu(&self, enforced: Enforced) -> ProbeResults {
        let mut job = self.job(Probe::Spin, "");
        job.limits.run_cpu_time = Duration::from_millis(500);
        let run = self.run_job(job.clone(), &mut Live::default(), SLOTS[0]).await?;
        let Usage { cpu_us, wall_us, .. } = run.usage;
        let (share, most) = (cpu_us as f64 / wall_us as f64, self.language.limits.cpus);
        let kernel = if enforced.cpu { "" } else { ", not limited by the kernel" };
        let limit = humantime::format_duration(job.limits.run_cpu_time);
        Ok(vec![
            // A low share alone could be due to a busy machine, so the limit must also be enforced.
            WallResult::new(
                Wall::Cpu,
                enforced.cpu && share <= most * CPU_TOLERANCE,
                format!("{most} CPUs"),
                format!("{share:.2} CPUs{kernel}"),
            ),
            WallResult::new(
                Wall::CpuTime,
                run.ended == Ended::CpuTime,
                format!("killed after {limit}"),
                end_text(&run),
            ),
        ])
    }

    async fn wall_time(&self) -> ProbeResults {
        let mut job = self.job(Probe::Sleep, "");
        job.limits.run_time = Duration::from_secs(1);
        let run = self.run_job(job, &mut Live::default(), SLOTS[0]).await?;
        Ok(vec![WallResult::new(Wall::Time, run.ended == Ended::WallTime, "killed after 1s", end_text(&run))])
    }

    async fn output(&self) -> ProbeResults {
        let limits = &self.language.limits;
        let run = self.probe(Probe::Print, "").await?;
        let kept = ByteSize(run.output.kept() as u64);
        let holds = run.verdict() == Verdict::OutputLimit && kept == limits.output;
        let expected = format!("killed after {}, {} kept", limits.output_total, limits.output);
        let seen = format!("{} after {}, {kept} kept", end_text(&run), ByteSize(run.output.total_both()));
        Ok(vec![WallResult::new(Wall::Output, holds, expected, seen)])
    }

    async fn inside(&self) -> ProbeResults {
        let limits = serde_json::to_string(&self.language.limits).map_err(|error| error.to_string())?;
        parse_results(&self.probe(Probe::Walls, &limits).await?)
    }

    /// Tests whether one of two concurrent sandboxes can find the marks of the other.
    async fn neighbour(&self) -> ProbeResults {
        let mark = &self.session.instance.name;
        let (events, mut received) = mpsc::unbounded_channel();
        let (open_stdin, stdin) = mpsc::channel(1);
        let mut live = Live { events: Some(events), stdin: Some(stdin), ..Live::default() };
        let showing = async {
            let run = self.run_job(self.job(Probe::Show, mark), &mut live, SLOTS[1]).await;
            // Closes the channel of events, so that `looking` stops waiting for output.
            live.events = None;
            run
        };
        let looking = async {
            while let Some(event) = received.recv().await {
                if matches!(event, Event::Output(..)) {
                    let looked = self.probe(Probe::Look, mark).await;
                    // The other probe exits at the end of its input.
                    drop(open_stdin);
                    return looked;
                }
            }
            Err("the probe that leaves marks printed nothing".to_owned())
        };
        let (shown, looked) = tokio::join!(showing, looking);
        match shown? {
            run if run.verdict() == Verdict::Ok => parse_results(&looked?),
            run => Err(format!("the probe that leaves marks {}: {}", end_text(&run), run.output.text().trim())),
        }
    }

    /// Tests whether a run leaves anything behind: the next sandbox in the same slot looks for it, and so does this
    /// process on the host.
    async fn leftovers(&self) -> ProbeResults {
        let instance = &self.session.instance;
        let left = self.probe(Probe::Leave, &instance.name).await?;
        if left.verdict() != Verdict::Ok {
            return Err(format!("the probe that leaves marks {}: {}", end_text(&left), left.output.text().trim()));
        }
        let mut results = parse_results(&self.probe(Probe::Look, &instance.name).await?)?;
        self.session.engine.release(Some(&self.image)).await;
        let containers = self.session.podman.list(&instance.name).await.map_err(|error| error.to_string())?;
        let directories = names(&instance.jobs()).map_err(|error| format!("{}: {error}", instance.jobs().display()))?;
        let start = Instant::now();
        let processes = loop {
            let found = processes(&instance.name).map_err(|error| format!("/proc: {error}"))?;
            // podman's clean-up processes may outlive the container in podman's list for a moment.
            if found.is_empty() || start.elapsed() > REMOVAL_TIMEOUT {
                break found;
            }
            tokio::time::sleep(RECHECK_PAUSE).await;
        };
        for result in &mut results {
            result.wall = Wall::Leftovers;
            let on_host = [("containers", &containers), ("directories", &directories), ("processes", &processes)];
            for (kind, found) in on_host.into_iter().filter(|(_, found)| !found.is_empty()) {
                (result.holds, result.seen) = (false, format!("{kind} {}", found.join(" ")));
            }
            result.expected = "nothing is left of a run".into();
            if result.holds {
                result.seen.clone_from(&result.expected);
            }
        }
        Ok(results)
    }

    fn job(&self, probe: Probe, word: &str) -> Job {
        let mut job = self.language.job(Bytes::new(), Streams::Merged);
        job.args = vec![probe.word(), word.to_owned()].into();
        job
    }

    async fn probe(&self, probe: Probe, word: &str) -> Result<StageOutcome, String> {
        self.run_job(self.job(probe, word), &mut Live::default(), SLOTS[0]).await
    }

    /// Runs a job, and waits until its container is removed.
    async fn run_job(&self, job: Job, live: &mut Live, slot: u32) -> Result<StageOutcome, String> {
        let (sandbox, removal) = self.sandbox(slot).await.map_err(|error| error.to_string())?;
        let outcome = sandbox.run(&self.language, &job, live).await;
        removal.wait().await?;
        let Outcome { run, .. } = outcome.map_err(|error| error.to_string())?;
        run.ok_or_else(|| "the probe was not run".into())
    }

    async fn sandbox(&self, slot: u32) -> Result<(Sandbox, Removal), SandboxError> {
        let (free, freed) = mpsc::unbounded_channel();
        let spec = SandboxSpec {
            language: Arc::clone(&self.language),
            image: self.image.clone(),
            slot: Slot::new(slot, free),
        };
        Ok((self.session.engine.start(spec).await?, Removal(freed)))
    }
}

/// Receives the slot of a container once the container is removed.
struct Removal(mpsc::UnboundedReceiver<u32>);

impl Removal {
    async fn wait(mut self) -> Result<(), String> {
        let late = || format!("its container was not removed within {}", humantime::format_duration(REMOVAL_TIMEOUT));
        timeout(REMOVAL_TIMEOUT, self.0.recv()).await.map(drop).map_err(|_| late())
    }
}

/// Parses the results that a probe printed.
fn parse_results(run: &StageOutcome) -> ProbeResults {
    let text = run.output.text();
    let results: Result<Vec<WallResult>, _> = text.lines().map(serde_json::from_str).collect();
    match results {
        Ok(results) if run.verdict() == Verdict::Ok => Ok(results),
        _ => Err(format!("{}: {}", end_text(run), text.trim())),
    }
}

/// How a run ended, in words.
fn end_text(run: &StageOutcome) -> String {
    let after = |us: u64| humantime::format_duration(Duration::from_millis(us / 1000)).to_string();
    match &run.ended {
        Ended::Exited(0) => "ended by itself".into(),
        Ended::Exited(code) => format!("ended with code {code}"),
        Ended::Signalled(signal) => format!("ended by signal {signal}"),
        Ended::WallTime => format!("killed after {}", after(run.usage.wall_us)),
        Ended::CpuTime => format!("killed after {}", after(run.usage.cpu_us)),
        Ended::Memory => "killed at the memory limit".into(),
        Ended::Killed => "killed".into(),
        Ended::NotStarted(reason) => reason.clone(),
    }
}

/// The names of the entries of a directory.
fn names(directory: &Path) -> std::io::Result<Vec<String>> {
    std::fs::read_dir(directory)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

/// The ids of the host's processes whose command line contains this mark.
fn processes(mark: &str) -> std::io::Result<Vec<String>> {
    let marked = |process: &String| {
        // A process that ends meanwhile does not count.
        std::fs::read(format!("/proc/{process}/cmdline"))
            .is_ok_and(|line| String::from_utf8_lossy(&line).contains(mark))
    };
    Ok(names(Path::new("/proc"))?.into_iter().filter(marked).collect())
}
