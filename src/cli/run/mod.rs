//! `coderunner run`: runs one program in a sandbox as the server does, without HTTP.

mod terminal;

use std::ffi::OsStr;
use std::path::{Component, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use bytesize::ByteSize;
use tokio::sync::mpsc;

use crate::cli::session::EngineSession;
use crate::config::{Overrides, Settings};
use crate::host::log;
use crate::host::print::{self, PrintError};
use crate::host::signals::{self, Shutdown};
use crate::http::{ExecuteResponse, job_files};
use crate::images::names;
use crate::model::client::Client;
use crate::model::job::{SourceFile, Stage, Streams};
use crate::model::language::Language;
use crate::model::outcome::{Ended, StageOutcome, Verdict};
use crate::run::cache::OutcomeCache;
use crate::run::{Runner, Tasks};
use crate::sandbox::Live;
use crate::sandbox::podman::Podman;
use crate::scheduler::{Image, Pool};
use terminal::Progress;

/// Exit code if the program ran out of time, the same as that of `timeout`.
const CODE_TIME: u8 = 124;
/// Exit code if the program could not be compiled.
const CODE_COMPILE: u8 = 1;
/// Exit code if the program could not be started, the same as that of shells.
const CODE_NOT_STARTED: u8 = 127;
/// Exit code if the program was killed at another limit, as after SIGKILL.
const CODE_KILLED: u8 = 137;
/// Exit code if any signal interrupted this command, as after SIGINT.
const CODE_INTERRUPTED: u8 = 130;
/// Added to the number of the signal that ended the program, as shells do.
const CODE_SIGNAL: i32 = 128;

/// The arguments of `coderunner run`.
#[derive(Debug)]
pub(super) struct RunArgs {
    /// The source file.
    pub file: PathBuf,
    /// The language; by default that of the file name extension.
    pub language: Option<String>,
    /// Additional files.
    pub files: Vec<PathBuf>,
    /// Arguments of the program.
    pub args: Vec<String>,
    /// Input of the program; by default the stdin of this process.
    pub stdin: Option<String>,
    /// Time limit, real and CPU; by default those of the language.
    pub time: Option<Duration>,
    /// Memory limit; by default that of the language.
    pub memory: Option<ByteSize>,
    /// Whether to print the result as JSON instead of the program's output.
    pub json: bool,
    /// The configuration file.
    pub config: Option<PathBuf>,
}

/// Runs the program and returns the exit code: the program's own, if it exited by itself.
pub(super) async fn run(args: RunArgs) -> anyhow::Result<u8> {
    let overrides = Overrides {
        instance: Some(format!("run-{}", std::process::id())),
        containers: Some(1),
        ..Overrides::default()
    };
    let settings = Settings::load(args.config.as_deref(), &overrides)?;
    let name = args.language.clone().or_else(|| settings.language_of(&args.file)).with_context(|| {
        let known = settings.catalogue().collect::<Vec<_>>().join(", ");
        format!("cannot tell the language of {}: name it with -l (one of {known})", args.file.display())
    })?;
    let language = settings.language_with(&name, |limits| {
        limits.run_time = args.time.unwrap_or(limits.run_time);
        limits.run_cpu_time = args.time.unwrap_or(limits.run_cpu_time);
        limits.memory = args.memory.unwrap_or(limits.memory);
    })?;
    let language = Arc::new(language);
    let mut job = language.job_of(files(&language, &args)?, Streams::Separate);
    job.has_room().map_err(anyhow::Error::msg)?;
    job.args = args.args.into();

    let shutdown = Shutdown::default();
    let _signals = signals::listen(shutdown.clone(), None).context("cannot listen for signals")?;
    let progress = Progress::new();
    let session = EngineSession::open(&settings)?;
    // An interruption here needs no clean-up: no container exists yet.
    let image = tokio::select! {
        image = image(&session.podman, &language, settings.update.pull_timeout, &progress) => image?,
        () = shutdown.stop.cancelled() => return Ok(CODE_INTERRUPTED),
    };
    let pool = Arc::new(Pool::new(Arc::clone(&session.engine), 1, settings.queue, &[Arc::clone(&language)]));
    pool.set_image(&language.name, Image::Ready(image));
    let runner = Runner::new(
        vec![Arc::clone(&language)],
        OutcomeCache::new(settings.cache)?,
        Arc::clone(&pool),
        Tasks::default(),
        0,
    );

    let stdin = match args.stdin {
        Some(text) => {
            job.stdin = text.into();
            None
        }
        None => Some(terminal::stdin()),
    };
    let (events, mut received) = mpsc::unbounded_channel();
    let live = Live { events: Some(events), stdin, ..Live::default() };
    let printing = async {
        while let Some(event) = received.recv().await {
            progress.on_event(&event);
            if !args.json {
                progress.print(event).await?;
            }
        }
        Ok(())
    };
    // `try_join` cancels the run if its output cannot be printed: the reader has closed the pipe, or a disk is full.
    let running = async { Ok::<_, PrintError>(runner.run_live(job, live, &Client::Unidentified).await) };
    let result = tokio::select! {
        result = async { tokio::try_join!(running, printing) } => Some(result),
        () = shutdown.stop.cancelled() => None,
    };
    progress.finish();
    drop(runner);
    pool.drain();
    session.close().await;
    match result {
        Some(result) => {
            let (answer, ()) = result?;
            let answer = answer?;
            let outcome = &answer.outcome;
            let last = outcome.run.as_ref().or(outcome.compile.as_ref()).context("nothing was run")?;
            if args.json {
                print::stdout(serde_json::to_string(&ExecuteResponse::new(&language, &answer))? + "\n")?;
            } else if let Some(why) = last.notes() {
                log::print(terminal::coloured(&why).trim_end_matches('\n'));
            }
            Ok(exit_code(last))
        }
        None => Ok(CODE_INTERRUPTED),
    }
}

/// The content id of the language's image. Pulls the image if it is missing.
async fn image(
    podman: &Podman,
    language: &Language,
    pull_timeout: Duration,
    progress: &Progress,
) -> anyhow::Result<String> {
    let name = &language.image;
    if let Some(id) = podman.image_id(name).await? {
        return Ok(id);
    }
    if names::is_local(name) {
        bail!("there is no image {name}; build it, or name another one in the configuration")
    }
    progress.step(format!("pulling {name}"));
    let on_line = |line: &str| progress.step(format!("pulling {name}: {}", line.trim()));
    Ok(podman.pull(name, pull_timeout, on_line).await?)
}

/// The program and the files beside it.
fn files(language: &Language, args: &RunArgs) -> anyhow::Result<Vec<SourceFile>> {
    let read = |path: &PathBuf| {
        let content = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        // A file outside of the current directory is placed beside the program.
        let below = path.is_relative() && !path.components().any(|part| matches!(part, Component::ParentDir));
        let name = if below { Some(path.as_os_str()) } else { path.file_name() };
        let name = name.and_then(OsStr::to_str).with_context(|| format!("the name {path:?} is not UTF-8"))?;
        Ok((Some(name.trim_start_matches("./").to_owned()), content))
    };
    let (_, program) = read(&args.file)?;
    let others = args.files.iter().map(read).collect::<anyhow::Result<Vec<_>>>()?;
    let all = std::iter::once((None, program)).chain(others).collect();
    job_files(language, all, usize::MAX).map_err(|error| anyhow::anyhow!("{error}"))
}

/// The exit code of this command, by the last stage of the program.
fn exit_code(stage: &StageOutcome) -> u8 {
    match (stage.verdict(), &stage.ended) {
        (Verdict::TimeLimit, _) => CODE_TIME,
        (Verdict::MemoryLimit | Verdict::OutputLimit, _) => CODE_KILLED,
        _ if stage.stage == Stage::Compile => CODE_COMPILE,
        (_, Ended::Exited(code)) => u8::try_from(*code).unwrap_or(1),
        (_, Ended::Signalled(number)) => u8::try_from(CODE_SIGNAL + number).unwrap_or(CODE_KILLED),
        (_, Ended::NotStarted(_)) => CODE_NOT_STARTED,
        _ => CODE_KILLED,
    }
}
