//! What clients of Piston's API read, and what we add beside its fields.

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

/// Exit code of what could not be started, as shells have it.
const CODE_NOT_STARTED: i32 = 127;

/// A language that is served.
#[derive(Debug, Serialize, ToSchema)]
pub struct Runtime {
    /// Its name.
    pub language: String,
    /// Its version.
    pub version: String,
    /// Other names of it.
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

/// What is answered.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ProgramAnswer)]
pub struct Answer {
    /// The language's name.
    pub language: String,
    /// The language's version.
    pub version: String,
    /// Compiling, where the language has that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compile: Option<StageAnswer>,
    /// The rest.
    #[serde(flatten)]
    pub ran: Ran,
}

/// What became of a program on one input.
#[derive(Debug, Serialize, ToSchema)]
pub struct Ran {
    /// Running, unless compiling failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run: Option<StageAnswer>,
    /// What became of the program.
    pub verdict: Verdict,
    /// Whether this is the outcome of an earlier run.
    pub cached: bool,
    /// How long ago that was, in milliseconds.
    pub age: Option<u64>,
    /// How long the run waited for its container, in milliseconds.
    pub queued: u64,
    /// Whether something was printed that is not here.
    pub truncated: bool,
}

/// What became of a stage.
#[derive(Debug, Serialize, ToSchema)]
pub struct StageAnswer {
    /// What it printed there. Bytes that are no UTF-8 are U+FFFD.
    #[schema(value_type = String)]
    pub stdout: Text,
    /// What it printed there.
    #[schema(value_type = String)]
    pub stderr: Text,
    /// Both in order of arrival.
    #[schema(value_type = String)]
    pub output: Text,
    /// The rest.
    #[serde(flatten)]
    pub ending: Ending,
}

/// How a stage ended and what it used.
#[derive(Debug, Serialize, ToSchema)]
pub struct Ending {
    /// The exit code; null if a signal ended it.
    pub code: Option<i32>,
    /// The signal's name; null if it ended by itself.
    pub signal: Option<String>,
    /// Why it was cut short.
    pub message: Option<String>,
    /// Piston's word for what went wrong; null if nothing did.
    pub status: Option<Status>,
    /// CPU time in milliseconds, all processes together.
    pub cpu_time: u64,
    /// Wall time in milliseconds.
    pub wall_time: u64,
    /// Peak memory in bytes.
    pub memory: u64,
    /// What became of it.
    pub verdict: Verdict,
    /// Whether something was printed that is not here.
    pub truncated: bool,
    /// Bytes printed there, kept or not.
    pub stdout_bytes: u64,
    /// Bytes printed there, kept or not.
    pub stderr_bytes: u64,
}

/// Piston's words for what went wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
pub enum Status {
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
    /// The server's fault.
    XX,
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

impl Answer {
    /// An answer in Piston's form.
    pub fn new(language: &Language, answer: &run::Answer) -> Answer {
        Answer {
            language: language.name.clone(),
            version: language.version.to_string(),
            compile: StageAnswer::of(&answer.outcome, Stage::Compile),
            ran: Ran::from(answer),
        }
    }
}

impl From<&run::Answer> for Ran {
    fn from(answer: &run::Answer) -> Ran {
        let outcome = &answer.outcome;
        let stages = || outcome.compile.iter().chain(&outcome.run);
        Ran {
            run: StageAnswer::of(outcome, Stage::Run),
            verdict: outcome.verdict(),
            cached: answer.cached.is_some(),
            age: answer.cached.map(millis),
            queued: millis(answer.queued),
            truncated: stages().any(|stage| stage.output.truncated()),
        }
    }
}

impl Ran {
    /// Cuts what was printed so that it takes no more than about so many bytes as JSON.
    pub fn cut(&mut self, most: usize) {
        self.truncated |= self.run.as_mut().is_some_and(|run| run.cut(most));
    }
}

impl StageAnswer {
    /// What became of a stage, if there was one.
    pub fn of(outcome: &Arc<Outcome>, stage: Stage) -> Option<StageAnswer> {
        let ending = Ending::from(outcome.stage(stage)?);
        let text = |of| Text::new(outcome, stage, of);
        let (stdout, stderr) = (text(Some(Stream::Stdout)), text(Some(Stream::Stderr)));
        Some(StageAnswer { stdout, stderr, output: text(None), ending })
    }

    /// Cuts what was printed so that it takes no more than about so many bytes as JSON; whether something is missing now.
    pub fn cut(&mut self, most: usize) -> bool {
        let cut = [self.stdout.cut(most / 4), self.stderr.cut(most / 4), self.output.cut(most / 2)].contains(&true);
        self.ending.truncated |= cut;
        cut
    }
}

impl Texts for StageAnswer {
    fn each(&mut self, see: &mut dyn FnMut(&mut Text)) {
        [&mut self.stdout, &mut self.stderr, &mut self.output].into_iter().for_each(see);
    }
}

impl Texts for Ran {
    fn each(&mut self, see: &mut dyn FnMut(&mut Text)) {
        self.run.iter_mut().for_each(|run| run.each(see));
    }
}

impl Texts for Answer {
    fn each(&mut self, see: &mut dyn FnMut(&mut Text)) {
        self.compile.iter_mut().for_each(|compile| compile.each(see));
        self.ran.each(see);
    }
}

impl From<&StageOutcome> for Ending {
    fn from(stage: &StageOutcome) -> Ending {
        let (output, verdict) = (&stage.output, stage.verdict());
        let (code, signal) = match stage.ended {
            // Clients ask this code whether there is a program.
            Ended::Exited(0) if stage.stage == Stage::Compile && !stage.artifact => (Some(1), None),
            Ended::Exited(code) => (Some(code), None),
            Ended::NotStarted(_) => (Some(CODE_NOT_STARTED), None),
            Ended::Signalled(number) => (None, Some(signal_name(number))),
            Ended::WallTime | Ended::CpuTime | Ended::Memory | Ended::Killed => (None, Some("SIGKILL".to_owned())),
        };
        let status = match verdict {
            Verdict::Ok => None,
            Verdict::TimeLimit => Some(Status::TO),
            Verdict::OutputLimit => match output.total(Stream::Stderr) > output.total(Stream::Stdout) {
                true => Some(Status::EL),
                false => Some(Status::OL),
            },
            Verdict::InternalError => Some(Status::XX),
            _ if signal.is_some() => Some(Status::SG),
            _ => Some(Status::RE),
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
