//! `coderunner run`: one program through the same sandbox, without HTTP.

mod terminal;

use std::ffi::OsStr;
use std::path::{Component, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use bytesize::ByteSize;
use tokio::sync::mpsc;

use crate::cli::workshop::Workshop;
use crate::config::{Overrides, Settings};
use crate::host::log;
use crate::host::print::{self, Unprinted};
use crate::host::signals::{self, Phases};
use crate::http::{PistonAnswer, place};
use crate::images::names;
use crate::model::client::Client;
use crate::model::job::{SourceFile, Stage, Streams};
use crate::model::language::Language;
use crate::model::outcome::{Ended, StageOutcome, Verdict};
use crate::run::cache::MemoCache;
use crate::run::{Runner, Tasks};
use crate::sandbox::Live;
use crate::sandbox::podman::Podman;
use crate::scheduler::{Image, Pool};
use terminal::Waiting;

/// Exit code when the program ran out of time, as `timeout` has it.
const CODE_TIME: u8 = 124;
/// Exit code when the program could not be compiled.
const CODE_COMPILE: u8 = 1;
/// Exit code when the program was killed at another limit, as after SIGKILL.
const CODE_KILLED: u8 = 137;
/// Exit code when we were interrupted, as after SIGINT, whichever signal it was.
const CODE_INTERRUPTED: u8 = 130;
/// Added to the number of the signal that ended the program, as shells do.
const CODE_SIGNAL: i32 = 128;

/// What to run.
#[derive(Debug)]
pub(super) struct Once {
    /// The file with the source.
    pub file: PathBuf,
    /// The language; by default that of the file's name.
    pub language: Option<String>,
    /// Further files.
    pub files: Vec<PathBuf>,
    /// Arguments of the program.
    pub args: Vec<String>,
    /// What it reads; our own stdin where there is none.
    pub stdin: Option<String>,
    /// How long it may run, where that is not the language's.
    pub time: Option<Duration>,
    /// How much memory it may use, where that is not the language's.
    pub memory: Option<ByteSize>,
    /// Whether what became of it is printed as JSON, instead of what it prints.
    pub json: bool,
    /// The configuration.
    pub config: Option<PathBuf>,
}

/// Runs it and returns the exit code: the program's own, where it ended by itself.
pub(super) async fn run(once: Once) -> anyhow::Result<u8> {
    let overrides = Overrides {
        instance: Some(format!("run-{}", std::process::id())),
        containers: Some(1),
        ..Overrides::default()
    };
    let settings = Settings::load(once.config.as_deref(), &overrides)?;
    let name = once.language.clone().or_else(|| settings.language_of(&once.file)).with_context(|| {
        let known = settings.catalogue().collect::<Vec<_>>().join(", ");
        format!("cannot tell the language of {}: name it with -l (one of {known})", once.file.display())
    })?;
    let language = settings.language_with(&name, |limits| {
        limits.run_time = once.time.unwrap_or(limits.run_time);
        limits.run_cpu_time = once.time.unwrap_or(limits.run_cpu_time);
        limits.memory = once.memory.unwrap_or(limits.memory);
    })?;
    let language = Arc::new(language);
    let mut job = language.job_of(files(&language, &once)?, Streams::Separate);
    job.has_room().map_err(anyhow::Error::msg)?;
    job.args = once.args.into();

    let phases = Phases::default();
    let _signals = signals::listen(phases.clone(), None).context("cannot listen for signals")?;
    let waiting = Waiting::new();
    let workshop = Workshop::open(&settings)?;
    // No clean-up if interrupted here: nothing has been made yet that would have to be removed.
    let image = tokio::select! {
        image = image(&workshop.podman, &language, settings.update.pull_timeout, &waiting) => image?,
        () = phases.stop.cancelled() => return Ok(CODE_INTERRUPTED),
    };
    let pool = Arc::new(Pool::new(Arc::clone(&workshop.engine), 1, settings.queue, &[Arc::clone(&language)]));
    pool.set_image(&language.name, Image::Ready(image));
    let runner = Runner::new(
        vec![Arc::clone(&language)],
        MemoCache::new(settings.cache)?,
        Arc::clone(&pool),
        Tasks::default(),
        0,
    );

    let typed = match once.stdin {
        Some(text) => {
            job.stdin = text.into();
            None
        }
        None => Some(terminal::stdin()),
    };
    let (events, mut happening) = mpsc::unbounded_channel();
    let live = Live { events: Some(events), stdin: typed, ..Live::default() };
    let printing = async {
        while let Some(event) = happening.recv().await {
            waiting.told(&event);
            if !once.json {
                waiting.print(event).await?;
            }
        }
        Ok(())
    };
    // If its output cannot be printed, because the reader has gone or a disk is full, the run is cancelled.
    let running = async { Ok::<_, Unprinted>(runner.run_live(job, live, &Client::Ourselves).await) };
    let result = tokio::select! {
        result = async { tokio::try_join!(running, printing) } => Some(result),
        () = phases.stop.cancelled() => None,
    };
    waiting.over();
    drop(runner);
    pool.drain();
    workshop.close().await;
    match result {
        Some(result) => {
            let (answer, ()) = result?;
            let answer = answer?;
            let outcome = &answer.outcome;
            let last = outcome.run.as_ref().or(outcome.compile.as_ref()).context("nothing was run")?;
            if once.json {
                print::stdout(serde_json::to_string(&PistonAnswer::new(&language, &answer))? + "\n")?;
            } else if let Some(why) = last.notes() {
                log::say(terminal::coloured(&why).trim_end_matches('\n'));
            }
            Ok(exit_code(last))
        }
        None => Ok(CODE_INTERRUPTED),
    }
}

/// The content id of the language's image, which is pulled if it is not there.
async fn image(
    podman: &Podman,
    language: &Language,
    pull_timeout: Duration,
    waiting: &Waiting,
) -> anyhow::Result<String> {
    let name = &language.image;
    if let Some(id) = podman.image_id(name).await? {
        return Ok(id);
    }
    if names::is_local(name) {
        bail!("there is no image {name}; build it, or name another one in the configuration")
    }
    waiting.note(format!("pulling {name}"));
    let progress = |line: &str| waiting.note(format!("pulling {name}: {}", line.trim()));
    Ok(podman.pull(name, pull_timeout, progress).await?)
}

/// The program and the files beside it.
fn files(language: &Language, once: &Once) -> anyhow::Result<Vec<SourceFile>> {
    let read = |path: &PathBuf| {
        let content = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        // A file from outside the current directory is placed beside the program.
        let below = path.is_relative() && !path.components().any(|part| matches!(part, Component::ParentDir));
        let name = if below { Some(path.as_os_str()) } else { path.file_name() };
        let name = name.and_then(OsStr::to_str).with_context(|| format!("the name {path:?} is no UTF-8"))?;
        Ok((Some(name.trim_start_matches("./").to_owned()), content))
    };
    let (_, program) = read(&once.file)?;
    let others = once.files.iter().map(read).collect::<anyhow::Result<Vec<_>>>()?;
    let all = std::iter::once((None, program)).chain(others).collect();
    place(language, all, usize::MAX).map_err(|error| anyhow::anyhow!("{error}"))
}

/// The exit code of this command, by the last stage of the program.
fn exit_code(stage: &StageOutcome) -> u8 {
    match (stage.verdict(), &stage.ended) {
        (Verdict::TimeLimit, _) => CODE_TIME,
        (Verdict::MemoryLimit | Verdict::OutputLimit, _) => CODE_KILLED,
        _ if stage.stage == Stage::Compile => CODE_COMPILE,
        (_, Ended::Exited(code)) => u8::try_from(*code).unwrap_or(1),
        (_, Ended::Signalled(number)) => u8::try_from(CODE_SIGNAL + number).unwrap_or(CODE_KILLED),
        (_, Ended::NotStarted(_)) => 127,
        _ => CODE_KILLED,
    }
}
