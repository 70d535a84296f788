//! The standard streams of this command: a progress line, the output of the program, and its input.

use std::io::IsTerminal;
use std::time::Duration;

use bytes::Bytes;
use clap::builder::styling::AnsiColor;
use indicatif::{ProgressBar, ProgressState, ProgressStyle};
use tokio::io::AsyncReadExt;
use tokio::sync::mpsc;

use crate::host::log;
use crate::host::print::{self, Unprinted};
use crate::model::job::Stage;
use crate::model::output::Stream;
use crate::sandbox::Event;

/// Time between two frames of the spinner.
const TICK: Duration = Duration::from_millis(100);

/// A progress line with a spinner, for a terminal that shows no output yet: what is done, and for how long.
pub(super) struct Waiting(ProgressBar);

impl Waiting {
    /// Hidden unless stderr is a terminal.
    pub(super) fn new() -> Waiting {
        let seconds = |state: &ProgressState, out: &mut dyn std::fmt::Write| {
            let _ = write!(out, "{:.1} s", state.elapsed().as_secs_f64());
        };
        let style =
            ProgressStyle::with_template("{spinner} {msg} {seconds}").unwrap_or(ProgressStyle::default_spinner());
        let bar = ProgressBar::new_spinner().with_style(style.with_key("seconds", seconds)).with_message("starting");
        bar.enable_steady_tick(TICK);
        Waiting(bar)
    }

    /// Shows something that takes long; as a line of its own where the spinner is hidden.
    pub(super) fn note(&self, what: String) {
        match self.0.is_hidden() {
            true => log::say(&what),
            false => self.0.set_message(what),
        }
    }

    /// Shows the stage that has started, and ends at the first output of the program.
    pub(super) fn told(&self, event: &Event) {
        match event {
            Event::Queued(_) | Event::Ended(_) => {}
            Event::Started(stage) => {
                self.0.reset_elapsed();
                self.0.set_message(if *stage == Stage::Compile { "compiling" } else { "running" });
                // So that the spinner does not draw over what is typed.
                if *stage == Stage::Run && std::io::stdin().is_terminal() {
                    self.over();
                }
            }
            // From here on the terminal belongs to the program.
            Event::Output(Stage::Run, ..) => self.over(),
            Event::Output(Stage::Compile, ..) => {}
        }
    }

    /// Prints what an event brings without blocking the runtime, with the spinner suspended.
    pub(super) async fn print(&self, event: Event) -> Result<(), Unprinted> {
        let bar = self.0.clone();
        let printing = tokio::task::spawn_blocking(move || bar.suspend(|| print(event)));
        printing.await.unwrap_or_else(|error| Err(Unprinted::on_stdout(error.into())))
    }

    /// Removes the progress line.
    pub(super) fn over(&self) {
        self.0.finish_and_clear();
    }
}

/// Prints output. That of the compiler goes to stderr; stdout is for the program.
fn print(event: Event) -> Result<(), Unprinted> {
    match event {
        Event::Output(Stage::Run, Stream::Stdout, bytes) => print::stdout(bytes),
        Event::Output(_, _, bytes) => print::stderr(bytes),
        Event::Queued(_) | Event::Started(_) | Event::Ended(_) => Ok(()),
    }
}

/// Colours our own words on a terminal, to tell them apart from those of the program.
pub(super) fn coloured(words: &str) -> String {
    let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    if plain || !std::io::stderr().is_terminal() {
        return words.to_owned();
    }
    let style = AnsiColor::Yellow.on_default().bold();
    words.lines().map(|line| format!("{style}{line}{style:#}\n")).collect()
}

/// Reads our stdin in pieces. A terminal is passed on like a pipe.
pub(super) fn stdin() -> mpsc::Receiver<Bytes> {
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
