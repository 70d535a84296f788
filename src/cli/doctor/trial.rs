//! A trial: tries every limit and wall in sandboxes of one engine.

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
use crate::cli::doctor::wall::{Tried, Wall};
use crate::cli::workshop::Workshop;
use crate::model::job::{Job, Streams};
use crate::model::language::Language;
use crate::model::outcome::{Ended, Outcome, StageOutcome, Usage, Verdict};
use crate::sandbox::Enforced;
use crate::sandbox::{Event, HEALTH_SLOT, Live, Sandbox, SandboxError, SandboxSpec, Slot};

/// The slots of the sandboxes: there may be two at once.
const SLOTS: [u32; 2] = [HEALTH_SLOT - 1, HEALTH_SLOT];

/// How long a container may take to be gone after its job.
const GONE_TIME: Duration = Duration::from_secs(60);

/// Time between two looks for processes that should have gone.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// How much more CPU than allowed may be measured: the kernel counts in periods of a tenth of a second.
const CPU_TOLERANCE: f64 = 1.5;

/// The results of a probe, or why there are none.
type Told = Result<Vec<Tried>, String>;

/// Makes sandboxes with one engine, in which probes run.
pub(super) struct Trial<'a> {
    workshop: &'a Workshop,
    language: Arc<Language>,
    image: String,
}

impl Trial<'_> {
    /// Makes the image, to be removed by [`image::remove`].
    pub async fn begin(workshop: &Workshop) -> Result<Trial<'_>, SandboxError> {
        let language = Arc::new(image::language()?);
        let image = image::make(workshop).await?;
        Ok(Trial { workshop, language, image })
    }

    /// Tells which limits the kernel enforces for a sandbox; nothing runs in it.
    pub async fn enforced(&self) -> Result<Enforced, SandboxError> {
        let (sandbox, gone) = self.sandbox(SLOTS[0]).await?;
        let enforced = sandbox.enforced;
        drop(sandbox);
        // A container that is late to go is reported by the trials of `run`.
        let _ = gone.wait().await;
        Ok(enforced)
    }

    /// Tries everything, one thing after the other.
    pub async fn run(&self, enforced: Enforced) -> Vec<Tried> {
        let trials: [(&[Wall], BoxFuture<'_, Told>); 8] = [
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
        for (walls, trial) in trials {
            let untried = |reason: &str| {
                let tried = |wall: &Wall| Tried::new(*wall, false, "that it can be tried", reason.to_owned());
                walls.iter().map(tried).collect::<Vec<_>>()
            };
            let mut tried = trial.await.unwrap_or_else(|reason| untried(&reason));
            let missing = untried("its probe told nothing of it");
            tried.extend(
                missing.into_iter().filter(|one| tried.iter().all(|other| other.wall != one.wall)).collect::<Vec<_>>(),
            );
            all.extend(tried);
        }
        all
    }

    async fn memory(&self) -> Told {
        let memory = self.language.limits.memory;
        let run = self.probe(Probe::Memory, &(2 * memory.as_u64()).to_string()).await?;
        let seen = match run.verdict() {
            Verdict::MemoryLimit => format!("killed with {}", ByteSize(run.usage.memory)),
            _ => format!("{}, used {}", ended(&run), run.output.text().trim()),
        };
        let holds = run.verdict() == Verdict::MemoryLimit && run.usage.memory <= memory.as_u64() + (4 << 20);
        Ok(vec![Tried::new(Wall::Memory, holds, format!("killed with {memory}"), seen)])
    }

    async fn processes(&self) -> Told {
        let processes = self.language.limits.processes;
        let run = self.probe(Probe::Threads, &(2 * processes).to_string()).await?;
        let seen = format!("{} at once, {} refusals counted", run.output.text().trim(), run.usage.forks_refused);
        let holds = run.verdict() == Verdict::ProcessLimit;
        Ok(vec![Tried::new(Wall::Processes, holds, format!("{processes} at once, more refused and counted"), seen)])
    }

    /// The share of the CPUs and the time on them: a program that spins is slowed down, and then killed.
    async fn cpu(&self, enforced: Enforced) -> Told {
        let mut job = self.job(Probe::Spin, "");
        job.limits.run_cpu_time = Duration::from_millis(500);
        let run = self.run_job(job.clone(), &mut Live::default(), SLOTS[0]).await?;
        let Usage { cpu_us, wall_us, .. } = run.usage;
        let (share, most) = (cpu_us as f64 / wall_us as f64, self.language.limits.cpus);
        let kernel = if enforced.cpu { "" } else { ", not limited by the kernel" };
        let limit = humantime::format_duration(job.limits.run_cpu_time);
        Ok(vec![
            // Measured alone it could be the work of a busy machine.
            Tried::new(
                Wall::Cpu,
                enforced.cpu && share <= most * CPU_TOLERANCE,
                format!("{most} CPUs"),
                format!("{share:.2} CPUs{kernel}"),
            ),
            Tried::new(Wall::CpuTime, run.ended == Ended::CpuTime, format!("killed after {limit}"), ended(&run)),
        ])
    }

    async fn wall_time(&self) -> Told {
        let mut job = self.job(Probe::Sleep, "");
        job.limits.run_time = Duration::from_secs(1);
        let run = self.run_job(job, &mut Live::default(), SLOTS[0]).await?;
        Ok(vec![Tried::new(Wall::Time, run.ended == Ended::WallTime, "killed after 1s", ended(&run))])
    }

    async fn output(&self) -> Told {
        let limits = &self.language.limits;
        let run = self.probe(Probe::Print, "").await?;
        let kept = ByteSize(run.output.kept() as u64);
        let holds = run.verdict() == Verdict::OutputLimit && kept == limits.output;
        let expected = format!("killed after {}, {} kept", limits.output_total, limits.output);
        let seen = format!("{} after {}, {kept} kept", ended(&run), ByteSize(run.output.total_both()));
        Ok(vec![Tried::new(Wall::Output, holds, expected, seen)])
    }

    async fn inside(&self) -> Told {
        let limits = serde_json::to_string(&self.language.limits).map_err(|error| error.to_string())?;
        told(&self.probe(Probe::Walls, &limits).await?)
    }

    /// Whether one of two sandboxes that run at the same time sees the marks of the other.
    async fn neighbour(&self) -> Told {
        let mark = &self.workshop.instance.name;
        let (events, mut shown) = mpsc::unbounded_channel();
        let (typed, stdin) = mpsc::channel(1);
        let mut live = Live { events: Some(events), stdin: Some(stdin), ..Live::default() };
        let showing = async {
            let run = self.run_job(self.job(Probe::Show, mark), &mut live, SLOTS[1]).await;
            // So that the other one does not wait for its output any longer.
            live.events = None;
            run
        };
        let looking = async {
            while let Some(event) = shown.recv().await {
                if matches!(event, Event::Output(..)) {
                    let looked = self.probe(Probe::Look, mark).await;
                    drop(typed);
                    return looked;
                }
            }
            Err("it put nothing up".to_owned())
        };
        let (shown, looked) = tokio::join!(showing, looking);
        match shown? {
            run if run.verdict() == Verdict::Ok => told(&looked?),
            run => Err(format!("the one to be seen {}: {}", ended(&run), run.output.text().trim())),
        }
    }

    /// Whether anything is left of a run: the next one in the same slot looks for it, and so does this process.
    async fn leftovers(&self) -> Told {
        let instance = &self.workshop.instance;
        let left = self.probe(Probe::Leave, &instance.name).await?;
        if left.verdict() != Verdict::Ok {
            return Err(format!("the one to leave something {}: {}", ended(&left), left.output.text().trim()));
        }
        let mut tried = told(&self.probe(Probe::Look, &instance.name).await?)?;
        self.workshop.engine.release(Some(&self.image)).await;
        let containers = self.workshop.podman.list(&instance.name).await.map_err(|error| error.to_string())?;
        let directories = names(&instance.jobs()).map_err(|error| format!("{}: {error}", instance.jobs().display()))?;
        let looked = Instant::now();
        let processes = loop {
            let found = processes(&instance.name).map_err(|error| format!("/proc: {error}"))?;
            // podman's own clean-up after a container that it no longer lists takes a moment.
            if found.is_empty() || looked.elapsed() > GONE_TIME {
                break found;
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        };
        for one in &mut tried {
            one.wall = Wall::Leftovers;
            let on_host = [("containers", &containers), ("directories", &directories), ("processes", &processes)];
            for (kind, found) in on_host.into_iter().filter(|(_, found)| !found.is_empty()) {
                (one.holds, one.seen) = (false, format!("{kind} {}", found.join(" ")));
            }
            one.expected = "nothing is left of a run".into();
            if one.holds {
                one.seen.clone_from(&one.expected);
            }
        }
        Ok(tried)
    }

    fn job(&self, probe: Probe, word: &str) -> Job {
        let mut job = self.language.job(Bytes::new(), Streams::Merged);
        job.args = vec![probe.word(), word.to_owned()].into();
        job
    }

    async fn probe(&self, probe: Probe, word: &str) -> Result<StageOutcome, String> {
        self.run_job(self.job(probe, word), &mut Live::default(), SLOTS[0]).await
    }

    /// Runs a job, and waits until its container is gone.
    async fn run_job(&self, job: Job, live: &mut Live, slot: u32) -> Result<StageOutcome, String> {
        let (sandbox, gone) = self.sandbox(slot).await.map_err(|error| error.to_string())?;
        let outcome = sandbox.run(&self.language, &job, live).await;
        gone.wait().await?;
        let Outcome { run, .. } = outcome.map_err(|error| error.to_string())?;
        run.ok_or_else(|| "it was not run".into())
    }

    async fn sandbox(&self, slot: u32) -> Result<(Sandbox, Gone), SandboxError> {
        let (free, freed) = mpsc::unbounded_channel();
        let spec = SandboxSpec {
            language: Arc::clone(&self.language),
            image: self.image.clone(),
            slot: Slot::new(slot, free),
        };
        Ok((self.workshop.engine.start(spec).await?, Gone(freed)))
    }
}

/// Waits for the end of a container.
struct Gone(mpsc::UnboundedReceiver<u32>);

impl Gone {
    async fn wait(mut self) -> Result<(), String> {
        let late = || format!("its container was not gone within {}", humantime::format_duration(GONE_TIME));
        timeout(GONE_TIME, self.0.recv()).await.map(drop).map_err(|_| late())
    }
}

/// Reads what a probe printed of the walls that it tried.
fn told(run: &StageOutcome) -> Told {
    let text = run.output.text();
    let tried: Result<Vec<Tried>, _> = text.lines().map(serde_json::from_str).collect();
    match tried {
        Ok(tried) if run.verdict() == Verdict::Ok => Ok(tried),
        _ => Err(format!("{}: {}", ended(run), text.trim())),
    }
}

/// How a run ended, in words.
fn ended(run: &StageOutcome) -> String {
    let after = |us: u64| humantime::format_duration(Duration::from_millis(us / 1000)).to_string();
    match &run.ended {
        Ended::Exited(0) => "ended by itself".into(),
        Ended::Exited(code) => format!("ended with code {code}"),
        Ended::Signalled(signal) => format!("ended by signal {signal}"),
        Ended::WallTime => format!("killed after {}", after(run.usage.wall_us)),
        Ended::CpuTime => format!("killed after {}", after(run.usage.cpu_us)),
        Ended::Memory => "killed for its memory".into(),
        Ended::Killed => "killed".into(),
        Ended::NotStarted(reason) => reason.clone(),
    }
}

/// The names in a directory.
fn names(directory: &Path) -> std::io::Result<Vec<String>> {
    std::fs::read_dir(directory)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

/// Processes of the host whose command line contains this mark.
fn processes(mark: &str) -> std::io::Result<Vec<String>> {
    let marked = |process: &String| {
        // A process that has gone meanwhile is not left.
        std::fs::read(format!("/proc/{process}/cmdline"))
            .is_ok_and(|line| String::from_utf8_lossy(&line).contains(mark))
    };
    Ok(names(Path::new("/proc"))?.into_iter().filter(marked).collect())
}
