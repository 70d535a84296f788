//! The result of a job: how each stage ended, what it used, and the verdict.

use serde::{Deserialize, Serialize};

use crate::model::job::Stage;
use crate::model::output::Output;

/// How the main process of a stage ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ended {
    /// By itself, with this exit code.
    Exited(i32),
    /// By a signal that neither init nor the server sent.
    Signalled(i32),
    /// Killed at its wall time limit.
    WallTime,
    /// Killed at its CPU time limit.
    CpuTime,
    /// Killed because its processes used more memory than the request allowed the stage.
    Memory,
    /// Killed on request of the server: output limit reached, or run cancelled.
    Killed,
    /// The command could not be started, for this reason.
    NotStarted(String),
}

/// The resources that a stage used, and how often the kernel enforced a limit.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// From start to end, in microseconds.
    pub wall_us: u64,
    /// User and system time of all processes, in microseconds.
    pub cpu_us: u64,
    /// Peak memory in bytes.
    pub memory: u64,
    /// Number of processes that the kernel killed at the memory limit.
    pub oom_kills: u64,
    /// Number of forks that the kernel refused at the process limit.
    pub forks_refused: u64,
}

/// The result of a stage or a job in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Exit code 0.
    Ok,
    /// The compiler refused the source.
    CompileError,
    /// Exit code other than 0.
    RuntimeError,
    /// Ended by a signal.
    Signalled,
    /// Wall or CPU time ran out.
    TimeLimit,
    /// Killed at the memory limit.
    MemoryLimit,
    /// The kernel refused forks at the process limit, and the program failed.
    ProcessLimit,
    /// Printed more than a stage is allowed to.
    OutputLimit,
    /// The client no longer waits for the result.
    Cancelled,
    /// The server failed.
    InternalError,
}

impl Verdict {
    /// Whether the outcome may be cached: the same job would get this verdict again.
    pub fn is_repeatable(self) -> bool {
        matches!(self, Verdict::Ok | Verdict::CompileError | Verdict::RuntimeError | Verdict::Signalled)
    }
}

/// One stage: how it ended, what it printed and used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StageOutcome {
    /// Which stage.
    pub stage: Stage,
    /// How its main process ended.
    pub ended: Ended,
    /// Whether the stage created its artifact; true if it has none to create.
    pub artifact: bool,
    /// What it used.
    pub usage: Usage,
    /// What it printed.
    pub output: Output,
}

impl StageOutcome {
    /// The verdict of this stage. A limit is recognised by kernel counters and by our own kills, never by the exit
    /// code.
    pub fn verdict(&self) -> Verdict {
        let failed = self.ended != Ended::Exited(0);
        match self.ended {
            // Also if the program ended before it was killed.
            _ if self.output.overflowed => Verdict::OutputLimit,
            Ended::Killed => Verdict::Cancelled,
            Ended::Memory => Verdict::MemoryLimit,
            _ if self.usage.oom_kills > 0 => Verdict::MemoryLimit,
            _ if failed && self.usage.forks_refused > 0 => Verdict::ProcessLimit,
            Ended::WallTime | Ended::CpuTime => Verdict::TimeLimit,
            _ if self.stage == Stage::Compile && (failed || !self.artifact) => Verdict::CompileError,
            Ended::Exited(0) => Verdict::Ok,
            Ended::Exited(_) | Ended::NotStarted(_) => Verdict::RuntimeError,
            Ended::Signalled(_) => Verdict::Signalled,
        }
    }

    /// The output of the stage, followed by its [`notes`](Self::notes), if any.
    pub fn explained(&self) -> String {
        self.output.text() + &self.notes_after().unwrap_or_default()
    }

    /// The notes in the form to append to the output: starting on a new line.
    pub fn notes_after(&self) -> Option<String> {
        let notes = self.notes()?;
        Some(if self.output.ends_line() { notes } else { format!("\n{notes}") })
    }

    /// Why the stage failed or was cut short, in one line without a line feed.
    pub fn why(&self) -> Option<String> {
        match (self.verdict(), &self.ended) {
            (Verdict::MemoryLimit, _) => Some("killed: out of memory".to_owned()),
            (Verdict::ProcessLimit, _) => Some("failed: no more processes or threads allowed".to_owned()),
            (Verdict::OutputLimit, Ended::Killed) => Some("killed: too much output".to_owned()),
            (Verdict::OutputLimit, _) => Some("too much output".to_owned()),
            (_, Ended::WallTime) => Some(format!("killed: out of time after {}", format_us(self.usage.wall_us))),
            (_, Ended::CpuTime) => Some(format!("killed: out of CPU time after {}", format_us(self.usage.cpu_us))),
            (_, Ended::Killed) => Some("killed".to_owned()),
            (_, Ended::Signalled(number)) => Some(match nix::sys::signal::Signal::try_from(*number) {
                Ok(signal) => format!("ended by signal {number} ({signal})"),
                Err(_) => format!("ended by signal {number}"),
            }),
            (_, Ended::NotStarted(reason)) => Some(reason.clone()),
            (_, Ended::Exited(0)) if !self.artifact && self.output.kept() == 0 => {
                Some("the compiler made no program".to_owned())
            }
            (_, Ended::Exited(_) | Ended::Memory) => None,
        }
    }

    /// How much output was left out, and why the stage failed or was cut short: a line each.
    pub fn notes(&self) -> Option<String> {
        let cut = self
            .output
            .truncated()
            .then(|| format!("output cut: {} of {} bytes shown", self.output.kept(), self.output.total_both()));
        let lines: String = cut.into_iter().chain(self.why()).map(|line| format!("coderunner: {line}\n")).collect();
        (!lines.is_empty()).then_some(lines)
    }
}

/// Formats microseconds in a readable unit, with at least two digits.
fn format_us(us: u64) -> String {
    match us as f64 {
        us if us >= 1e6 => format!("{:.1} s", us / 1e6),
        us if us >= 1e4 => format!("{:.0} ms", us / 1e3),
        us => format!("{:.1} ms", us / 1e3),
    }
}

/// The result of a job: the results of its stages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// The compile stage, if the language has one.
    pub compile: Option<StageOutcome>,
    /// The run stage, unless compiling failed.
    pub run: Option<StageOutcome>,
}

impl Outcome {
    /// The verdict of the last stage that ran.
    pub fn verdict(&self) -> Verdict {
        match (&self.compile, &self.run) {
            (_, Some(run)) => run.verdict(),
            (Some(compile), None) => compile.verdict(),
            (None, None) => Verdict::InternalError,
        }
    }

    /// Whether compilation succeeded, so that the program was run.
    pub fn compiled(&self) -> bool {
        self.run.is_some()
    }

    /// The result of a stage, if it ran.
    pub fn stage(&self, stage: Stage) -> Option<&StageOutcome> {
        match stage {
            Stage::Compile => self.compile.as_ref(),
            Stage::Run => self.run.as_ref(),
        }
    }

    /// Bytes of memory that this value takes, heap allocations included.
    pub fn size(&self) -> usize {
        let reason = |ended: &Ended| match ended {
            Ended::NotStarted(reason) => reason.capacity(),
            _ => 0,
        };
        let stages = self.compile.iter().chain(&self.run);
        size_of::<Outcome>() + stages.map(|stage| stage.output.size() + reason(&stage.ended)).sum::<usize>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::output::Stream;

    fn stage(stage: Stage, ended: Ended) -> StageOutcome {
        StageOutcome { stage, ended, artifact: true, usage: Usage::default(), output: Output::default() }
    }

    #[test]
    fn verdicts_distinguish_limits_from_failures() {
        let run = |ended| stage(Stage::Run, ended);
        assert_eq!(run(Ended::Exited(0)).verdict(), Verdict::Ok);
        assert_eq!(run(Ended::Exited(137)).verdict(), Verdict::RuntimeError);
        assert_eq!(run(Ended::Signalled(9)).verdict(), Verdict::Signalled);
        assert_eq!(run(Ended::WallTime).verdict(), Verdict::TimeLimit);
        assert_eq!(run(Ended::CpuTime).verdict(), Verdict::TimeLimit);
        assert_eq!(run(Ended::Killed).verdict(), Verdict::Cancelled);
        let mut killed = run(Ended::Signalled(9));
        killed.usage.oom_kills = 1;
        assert_eq!(killed.verdict(), Verdict::MemoryLimit);
        let mut refused = run(Ended::Exited(1));
        refused.usage.forks_refused = 3;
        assert_eq!(refused.verdict(), Verdict::ProcessLimit);
        refused.ended = Ended::Exited(0);
        assert_eq!(refused.verdict(), Verdict::Ok);
        let mut flood = run(Ended::Killed);
        flood.output.overflowed = true;
        assert_eq!(flood.verdict(), Verdict::OutputLimit);
        flood.ended = Ended::Exited(0);
        assert_eq!(flood.verdict(), Verdict::OutputLimit, "also when the program ends before it is killed");
    }

    #[test]
    fn compiling_succeeds_with_exit_code_0_and_an_artifact() {
        assert_eq!(stage(Stage::Compile, Ended::Exited(0)).verdict(), Verdict::Ok);
        assert_eq!(stage(Stage::Compile, Ended::Exited(1)).verdict(), Verdict::CompileError);
        let mut linked_nothing = stage(Stage::Compile, Ended::Exited(0));
        linked_nothing.artifact = false;
        assert_eq!(linked_nothing.verdict(), Verdict::CompileError);
    }

    #[test]
    fn last_line_says_why_a_run_was_cut_short() {
        let mut outcome = stage(Stage::Run, Ended::WallTime);
        outcome.output.push(Stream::Stdout, b"so far", 100);
        outcome.usage.wall_us = 5_000_000;
        assert_eq!(outcome.explained(), "so far\ncoderunner: killed: out of time after 5.0 s\n");
        let mut long = stage(Stage::Run, Ended::Exited(0));
        long.output.push(Stream::Stdout, b"0123456789", 4);
        assert_eq!(long.explained(), "0123\ncoderunner: output cut: 4 of 10 bytes shown\n");
        assert_eq!(stage(Stage::Run, Ended::Exited(7)).explained(), "");
    }

    #[test]
    fn time_limits_are_reported_with_at_least_two_digits() {
        for (us, text) in [(1_500, "1.5 ms"), (22_400, "22 ms"), (999_000, "999 ms"), (5_040_000, "5.0 s")] {
            let mut outcome = stage(Stage::Run, Ended::WallTime);
            outcome.usage.wall_us = us;
            assert_eq!(outcome.why(), Some(format!("killed: out of time after {text}")));
        }
    }
}
