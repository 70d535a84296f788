//! The standard streams of this command: a progress line, the output of the program, and its input.

use std::io::IsTerminal;
use std::time::Duration;

use bytes::Bytes;
use clap::builder::styling::AnsiColor;
use indicatif::{ProgressBar, ProgressState, ProgressStyle};
use tokio::io::AsyncReadExt;
use tokio::sync::mpsc;

use crate::host::log;
use crate::host::print::{self, PrintError};
use crate::model::job::Stage;
use crate::model::output::Stream;
use crate::sandbox::Event;

/// Time between two frames of the spinner.
const TICK: Duration = Duration::from_millis(100);

/// A progress line, shown until the program prints: a spinner, the current step and its time.
pub(super) struct Progress(ProgressBar);

impl Progress {
    /// Starts the line; hidden unless stderr is a terminal.
    pub(super) fn new() -> Progress {
        let seconds = |state: &ProgressState, out: &mut dyn std::fmt::Write| {
            let _ = write!(out, "{:.1} s", state.elapsed().as_secs_f64());
        };
        let style =
            ProgressStyle::with_template("{spinner} {msg} {seconds}").unwrap_or(ProgressStyle::default_spinner());
        let bar = ProgressBar::new_spinner().with_style(style.with_key("seconds", seconds)).with_message("starting");
        bar.enable_steady_tick(TICK);
        Progress(bar)
    }

    /// Shows a step that takes long; prints it as a line of its own if the progress line is hidden.
    pub(super) fn step(&self, text: String) {
        match self.0.is_hidden() {
            true => log::print(&text),
            false => self.0.set_message(text),
        }
    }

    /// Shows the stage that has started, and removes the progress line at the first output of the program.
    pub(super) fn on_event(&self, event: &Event) {
        match event {
            Event::Queued(_) | Event::Ended(_) => {}
            Event::Started(stage) => {
                self.0.reset_elapsed();
                self.0.set_message(if *stage == Stage::Compile { "compiling" } else { "running" });
                // The spinner would draw over the input that the user types.
                if *stage == Stage::Run && std::io::stdin().is_terminal() {
                    self.finish();
                }
            }
            Event::Output(Stage::Run, ..) => self.finish(),
            Event::Output(Stage::Compile, ..) => {}
        }
    }

    /// Prints the output of an event without blocking the runtime, with the spinner suspended.
    pub(super) async fn print(&self, event: Event) -> Result<(), PrintError> {
        let bar = self.0.clone();
        let printing = tokio::task::spawn_blocking(move || bar.suspend(|| print(event)));
        printing.await.unwrap_or_else(|error| Err(PrintError::on_stdout(error.into())))
    }

    /// Removes the progress line.
    pub(super) fn finish(&self) {
        self.0.finish_and_clear();
    }
}

/// Prints output: that of the compiler to stderr, that of the program to the stream that it used.
fn print(event: Event) -> Result<(), PrintError> {
    match event {
        Event::Output(Stage::Run, Stream::Stdout, bytes) => print::stdout(bytes),
        Event::Output(_, _, bytes) => print::stderr(bytes),
        Event::Queued(_) | Event::Started(_) | Event::Ended(_) => Ok(()),
    }
}

/// Colours messages of this command on a terminal, to distinguish them from the output of the program.
pub(super) fn coloured(message: &str) -> String {
    let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    if plain || !std::io::stderr().is_terminal() {
        return message.to_owned();
    }
    let style = AnsiColor::Yellow.on_default().bold();
    message.lines().map(|line| format!("{style}{line}{style:#}\n")).collect()
}

/// Reads stdin in chunks, from a terminal as from a pipe. The channel closes at the end of the input.
pub(super) fn stdin() -> mpsc::Receiver<Bytes> {
    let (sender, receiver) = mpsc::channel(4);
    if std::io::stdin().is_terminal() {
        tracing::debug!("stdin is a terminal: end it with Ctrl-D");
    }
    tokio::spawn(async move {
        let mut stdin = tokio::io::stdin();
        let mut buffer = vec![0; 16 * 1024];
        while let Ok(length @ 1..) = stdin.read(&mut buffer).await {
            if sender.send(Bytes::copy_from_slice(&buffer[..length])).await.is_err() {
                return;
            }
        }
    });
    receiver
}
