//! `coderunner run`: one program through the same sandbox, without HTTP.

use std::ffi::OsStr;
use std::io::IsTerminal;
use std::path::{Component, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use bytes::Bytes;
use bytesize::ByteSize;
use clap::builder::styling::AnsiColor;
use indicatif::{ProgressBar, ProgressState, ProgressStyle};
use tokio::io::AsyncReadExt;
use tokio::sync::mpsc;

use crate::cli::serve::Workshop;
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
use crate::model::output::Stream;
use crate::run::cache::MemoCache;
use crate::run::{Runner, Tasks};
use crate::sandbox::podman::Podman;
use crate::sandbox::{Event, Live};
use crate::scheduler::{Image, Pool};

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

/// Time between two pictures of what goes on.
const TICK: Duration = Duration::from_millis(100);

/// What to run.
#[derive(Debug)]
pub struct Once {
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
pub async fn run(once: Once) -> anyhow::Result<u8> {
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
    // Until there is an image nothing is made that would have to be removed.
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
        None => Some(stdin()),
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
    // Where nobody reads what it prints, or a disk is full, it does not run on.
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
                log::say(coloured(&why).trim_end_matches('\n'));
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
        // One from elsewhere is placed beside the program.
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

/// What a person at a terminal sees while nothing else is to be seen: what goes on, and for how long.
struct Waiting(ProgressBar);

impl Waiting {
    /// Hidden unless stderr is a terminal.
    fn new() -> Waiting {
        let seconds = |state: &ProgressState, out: &mut dyn std::fmt::Write| {
            let _ = write!(out, "{:.1} s", state.elapsed().as_secs_f64());
        };
        let style =
            ProgressStyle::with_template("{spinner} {msg} {seconds}").unwrap_or(ProgressStyle::default_spinner());
        let bar = ProgressBar::new_spinner().with_style(style.with_key("seconds", seconds)).with_message("starting");
        bar.enable_steady_tick(TICK);
        Waiting(bar)
    }

    /// Something that takes long; told in lines where nobody sees the spinner.
    fn note(&self, what: String) {
        match self.0.is_hidden() {
            true => log::say(&what),
            false => self.0.set_message(what),
        }
    }

    fn told(&self, event: &Event) {
        match event {
            Event::Queued(_) | Event::Ended(_) => {}
            Event::Started(stage) => {
                self.0.reset_elapsed();
                self.0.set_message(if *stage == Stage::Compile { "compiling" } else { "running" });
                // What is typed is not to be drawn over.
                if *stage == Stage::Run && std::io::stdin().is_terminal() {
                    self.over();
                }
            }
            // From here on the program has the terminal.
            Event::Output(Stage::Run, ..) => self.over(),
            Event::Output(Stage::Compile, ..) => {}
        }
    }

    /// Lets something be printed, however long that takes.
    async fn print(&self, event: Event) -> Result<(), Unprinted> {
        let bar = self.0.clone();
        let printing = tokio::task::spawn_blocking(move || bar.suspend(|| print(event)));
        printing.await.unwrap_or_else(|error| Err(Unprinted::on_stdout(error.into())))
    }

    fn over(&self) {
        self.0.finish_and_clear();
    }
}

/// Our own words, told apart from the program's on a terminal.
fn coloured(words: &str) -> String {
    let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    if plain || !std::io::stderr().is_terminal() {
        return words.to_owned();
    }
    let style = AnsiColor::Yellow.on_default().bold();
    words.lines().map(|line| format!("{style}{line}{style:#}\n")).collect()
}

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

/// What the compiler prints goes to stderr; stdout is the program's.
fn print(event: Event) -> Result<(), Unprinted> {
    match event {
        Event::Output(Stage::Run, Stream::Stdout, bytes) => print::stdout(bytes),
        Event::Output(_, _, bytes) => print::stderr(bytes),
        Event::Queued(_) | Event::Started(_) | Event::Ended(_) => Ok(()),
    }
}

/// Our stdin, in pieces. A terminal is passed on like a pipe.
fn stdin() -> mpsc::Receiver<Bytes> {
    let (typed, receiver) = mpsc::channel(4);
    if std::io::stdin().is_terminal() {
        tracing::debug!("stdin is a terminal: end it with Ctrl-D");
    }
    tokio::spawn(async move {
        let mut stdin = tokio::io::stdin();
        let mut buffer = vec![0; 16 * 1024];
        while let Ok(length @ 1..) = stdin.read(&mut buffer).await {
            if typed.send(Bytes::copy_from_slice(&buffer[..length])).await.is_err() {
                return;
            }
        }
    });
    receiver
}
