//! Responses of Piston's API, with additional fields.

use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use utoipa::ToSchema;

use crate::http::text::{Text, Texts};
use crate::model::job::Stage;
use crate::model::language::Language;
use crate::model::outcome::{Ended, Outcome, StageOutcome, Verdict};
use crate::model::output::Stream;
use crate::run;

/// Exit code of a command that could not be started, as in shells.
const CODE_NOT_STARTED: i32 = 127;

/// An enabled language.
#[derive(Debug, Serialize, ToSchema)]
pub struct Runtime {
    /// Its name.
    pub language: String,
    /// Its version.
    pub version: String,
    /// Aliases, which requests may use as well.
    pub aliases: Vec<String>,
}

impl From<&Language> for Runtime {
    fn from(language: &Language) -> Runtime {
        Runtime {
            language: language.name.clone(),
            version: language.version.to_string(),
            aliases: language.aliases.clone(),
        }
    }
}

/// The response.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ProgramAnswer)]
pub struct ExecuteResponse {
    /// The language's name.
    pub language: String,
    /// The language's version.
    pub version: String,
    /// The compile stage, if the language has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compile: Option<StageResult>,
    /// The run.
    #[serde(flatten)]
    pub ran: RunResult,
}

/// The result of a program on one input.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Ran)]
pub struct RunResult {
    /// The run stage, unless compiling failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run: Option<StageResult>,
    /// The verdict on the program.
    pub verdict: Verdict,
    /// Whether this is the cached outcome of an earlier run.
    pub cached: bool,
    /// Age of the cached outcome, in milliseconds.
    pub age: Option<u64>,
    /// How long the run waited for its container, in milliseconds.
    pub queued: u64,
    /// Whether some output was left out.
    pub truncated: bool,
}

/// The result of a stage.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = StageAnswer)]
pub struct StageResult {
    /// Standard output. Invalid UTF-8 is replaced by U+FFFD.
    #[schema(value_type = String)]
    pub stdout: Text,
    /// Standard error.
    #[schema(value_type = String)]
    pub stderr: Text,
    /// Both streams in order of arrival.
    #[schema(value_type = String)]
    pub output: Text,
    /// How the stage ended.
    #[serde(flatten)]
    pub ending: Ending,
}

/// How a stage ended, and its resource usage.
#[derive(Debug, Serialize, ToSchema)]
pub struct Ending {
    /// The exit code; null if a signal ended it.
    pub code: Option<i32>,
    /// The signal's name; null if it ended by itself.
    pub signal: Option<String>,
    /// Why it failed or was cut short.
    pub message: Option<String>,
    /// Piston's code for a failure; null if there was none.
    pub status: Option<PistonStatus>,
    /// CPU time in milliseconds, all processes together.
    pub cpu_time: u64,
    /// Wall time in milliseconds.
    pub wall_time: u64,
    /// Peak memory in bytes.
    pub memory: u64,
    /// The verdict on the stage.
    pub verdict: Verdict,
    /// Whether some output was left out.
    pub truncated: bool,
    /// Bytes printed on stdout, kept or not.
    pub stdout_bytes: u64,
    /// Bytes printed on stderr, kept or not.
    pub stderr_bytes: u64,
}

/// Piston's codes for failures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = Status)]
pub enum PistonStatus {
    /// An exit code other than 0.
    RE,
    /// Ended by a signal.
    SG,
    /// Out of time.
    TO,
    /// Too much on stdout.
    OL,
    /// Too much on stderr.
    EL,
    /// The server failed.
    XX,
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

impl ExecuteResponse {
    /// The response for an answer.
    pub fn new(language: &Language, answer: &run::Answer) -> ExecuteResponse {
        ExecuteResponse {
            language: language.name.clone(),
            version: language.version.to_string(),
            compile: StageResult::of(&answer.outcome, Stage::Compile),
            ran: RunResult::from(answer),
        }
    }
}

impl From<&run::Answer> for RunResult {
    fn from(answer: &run::Answer) -> RunResult {
        let outcome = &answer.outcome;
        let stages = || outcome.compile.iter().chain(&outcome.run);
        RunResult {
            run: StageResult::of(outcome, Stage::Run),
            verdict: outcome.verdict(),
            cached: answer.cached.is_some(),
            age: answer.cached.map(millis),
            queued: millis(answer.queued),
            truncated: stages().any(|stage| stage.output.truncated()),
        }
    }
}

impl RunResult {
    /// Cuts the output to about `max_json` bytes of JSON.
    pub fn cut(&mut self, max_json: usize) {
        self.truncated |= self.run.as_mut().is_some_and(|run| run.cut(max_json));
    }
}

impl StageResult {
    /// The result of a stage, if it ran.
    pub fn of(outcome: &Arc<Outcome>, stage: Stage) -> Option<StageResult> {
        let ending = Ending::from(outcome.stage(stage)?);
        let text = |stream| Text::new(outcome, stage, stream);
        let (stdout, stderr) = (text(Some(Stream::Stdout)), text(Some(Stream::Stderr)));
        Some(StageResult { stdout, stderr, output: text(None), ending })
    }

    /// Cuts the output to about `max_json` bytes of JSON. Returns whether anything was left out.
    pub fn cut(&mut self, max_json: usize) -> bool {
        let cut = [self.stdout.cut(max_json / 4), self.stderr.cut(max_json / 4), self.output.cut(max_json / 2)]
            .contains(&true);
        self.ending.truncated |= cut;
        cut
    }
}

impl Texts for StageResult {
    fn each_text(&mut self, visit: &mut dyn FnMut(&mut Text)) {
        [&mut self.stdout, &mut self.stderr, &mut self.output].into_iter().for_each(visit);
    }
}

impl Texts for RunResult {
    fn each_text(&mut self, visit: &mut dyn FnMut(&mut Text)) {
        self.run.iter_mut().for_each(|run| run.each_text(visit));
    }
}

impl Texts for ExecuteResponse {
    fn each_text(&mut self, visit: &mut dyn FnMut(&mut Text)) {
        self.compile.iter_mut().for_each(|compile| compile.each_text(visit));
        self.ran.each_text(visit);
    }
}

impl From<&StageOutcome> for Ending {
    fn from(stage: &StageOutcome) -> Ending {
        let (output, verdict) = (&stage.output, stage.verdict());
        let (code, signal) = match stage.ended {
            // Clients take exit code 0 to mean that there is a program.
            Ended::Exited(0) if stage.stage == Stage::Compile && !stage.artifact => (Some(1), None),
            Ended::Exited(code) => (Some(code), None),
            Ended::NotStarted(_) => (Some(CODE_NOT_STARTED), None),
            Ended::Signalled(number) => (None, Some(signal_name(number))),
            Ended::WallTime | Ended::CpuTime | Ended::Memory | Ended::Killed => (None, Some("SIGKILL".to_owned())),
        };
        let status = match verdict {
            Verdict::Ok => None,
            Verdict::TimeLimit => Some(PistonStatus::TO),
            Verdict::OutputLimit => match output.total(Stream::Stderr) > output.total(Stream::Stdout) {
                true => Some(PistonStatus::EL),
                false => Some(PistonStatus::OL),
            },
            Verdict::InternalError => Some(PistonStatus::XX),
            _ if signal.is_some() => Some(PistonStatus::SG),
            _ => Some(PistonStatus::RE),
        };
        Ending {
            code,
            signal,
            message: stage.why(),
            status,
            cpu_time: stage.usage.cpu_us.div_ceil(1000),
            wall_time: stage.usage.wall_us.div_ceil(1000),
            memory: stage.usage.memory,
            verdict,
            truncated: output.truncated(),
            stdout_bytes: output.total(Stream::Stdout),
            stderr_bytes: output.total(Stream::Stderr),
        }
    }
}

fn signal_name(number: i32) -> String {
    nix::sys::signal::Signal::try_from(number)
        .map_or_else(|_| format!("SIG{number}"), |signal| signal.as_str().to_owned())
}
