//! `coderunner run`: one program through the same sandbox, without HTTP.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, bail};
use bytes::Bytes;
use tokio::io::AsyncReadExt;
use tokio::sync::mpsc;

use crate::app::Workshop;
use crate::cache::MemoCache;
use crate::config::{Overrides, Settings};
use crate::image;
use crate::job::{Ended, Stage, StageOutcome, Stream, Streams, Verdict};
use crate::runner::{Runner, Tasks};
use crate::sandbox::pool::{Image, Pool};
use crate::sandbox::{Event, Live};
use crate::shutdown::{self, Phases};

/// Exit code when the program ran out of time, as `timeout` has it.
const CODE_TIME: u8 = 124;
/// Exit code when the program could not be compiled.
const CODE_COMPILE: u8 = 1;
/// Exit code when the program was killed at another limit, as after SIGKILL.
const CODE_KILLED: u8 = 137;
/// Added to the number of the signal that ended the program, as shells do.
const CODE_SIGNAL: i32 = 128;

/// What to run.
#[derive(Debug)]
pub struct Once {
    /// The file with the source.
    pub file: PathBuf,
    /// The language; by default that of the file's name.
    pub language: Option<String>,
    /// Arguments of the program.
    pub args: Vec<String>,
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
    let language = Arc::new(settings.language(&name)?);
    let code = std::fs::read(&once.file).with_context(|| format!("cannot read {}", once.file.display()))?;

    let phases = Phases::default();
    let _signals = shutdown::listen(phases.clone(), mpsc::channel(1).0).context("cannot listen for signals")?;
    let workshop = Workshop::open(&settings)?;
    let image = match workshop.podman.image_id(&language.image).await? {
        Some(id) => id,
        None if image::is_local(&language.image) => {
            bail!("there is no image {}; build it, or name another one in the configuration", language.image)
        }
        None => {
            eprintln!("pulling {}", language.image);
            let progress = |line: &str| eprintln!("{}", line.trim());
            workshop.podman.pull(&language.image, settings.update.pull_timeout, progress).await?
        }
    };
    let pool = Arc::new(Pool::new(Arc::clone(&workshop.engine), 1, settings.queue, &[Arc::clone(&language)]));
    pool.set_image(&language.name, Image::Ready(image));
    let runner =
        Runner::new(vec![Arc::clone(&language)], MemoCache::new(settings.cache)?, Arc::clone(&pool), Tasks::default());

    let mut job = language.job(Bytes::from(code), Streams::Separate);
    job.args = once.args;
    let (events, mut happening) = mpsc::unbounded_channel();
    let live = Live { events: Some(events), stdin: Some(stdin()), ..Live::default() };
    let printing = async {
        while let Some(event) = happening.recv().await {
            print(event);
        }
    };
    let result = tokio::select! {
        (result, ()) = async { tokio::join!(runner.run_live(job, live), printing) } => Some(result),
        () = phases.stop.cancelled() => None,
    };
    drop(runner);
    pool.drain();
    workshop.close().await;
    match result {
        Some(outcome) => {
            let outcome = outcome?.outcome;
            let last = outcome.run.as_ref().or(outcome.compile.as_ref()).context("nothing was run")?;
            if let Some(why) = last.notes() {
                eprint!("{why}");
            }
            Ok(exit_code(last))
        }
        // SIGINT's code, as a shell would tell it.
        None => Ok(130),
    }
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
fn print(event: Event) {
    // Who reads us may have left; the program runs on to its end.
    let _ = match event {
        Event::Output(Stage::Run, Stream::Stdout, bytes) => {
            let mut stdout = std::io::stdout().lock();
            stdout.write_all(&bytes).and_then(|()| stdout.flush())
        }
        Event::Output(_, _, bytes) => std::io::stderr().lock().write_all(&bytes),
        Event::Queued(_) | Event::Started(_) | Event::Ended(_) => Ok(()),
    };
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
