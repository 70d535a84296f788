//! What is asked for and what came of it: pure data, no I/O.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

/// Bytes that a file takes of its tmpfs at a time.
const PAGE: usize = 4096;

/// One file of a job, placed in the working directory before the first stage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceFile {
    /// Relative path without `..`, checked where the job is built.
    pub name: String,
    /// Contents, byte for byte.
    pub content: Bytes,
}

/// One program to compile and run.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    /// Name in the catalogue.
    pub language: String,
    /// Sources of the client and files that the language adds.
    pub files: Arc<[SourceFile]>,
    /// Standard input of the run stage.
    pub stdin: Bytes,
    /// Arguments appended to the language's run command.
    pub args: Arc<[String]>,
    /// Whether both output streams share one pipe, which keeps their order exact.
    pub streams: Streams,
    /// Limits in force, the language's unless the client asked for lower ones.
    pub limits: Limits,
    /// Lower memory limits of the stages, where the client asked for them.
    pub memory: StageMemory,
}

/// Memory that a stage may use, below that of its container: watched by init, which looks every few
/// milliseconds, while the container's own limit is kept by the kernel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StageMemory {
    /// Bytes for the compile stage.
    pub compile: Option<u64>,
    /// Bytes for the run stage.
    pub run: Option<u64>,
}

impl StageMemory {
    /// That of a stage.
    pub fn of(&self, stage: Stage) -> Option<u64> {
        match stage {
            Stage::Compile => self.compile,
            Stage::Run => self.run,
        }
    }
}

/// How the two output streams of a program are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Streams {
    /// One pipe for both: order exact, everything counts as stdout.
    Merged,
    /// A pipe each: streams told apart, their order that of arrival.
    Separate,
}

/// Key of the memo: a hash of everything that can change an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct JobKey([u8; 32]);

impl Job {
    /// The memo key of this job on an image; `image` is its content id, not its name.
    pub fn key(&self, image: &str) -> JobKey {
        // Hashed as a whole: piece by piece takes longer than all else that finds an answer in the memo.
        let mut text = Vec::with_capacity(512);
        // Each field behind its length: no two jobs make the same text.
        let mut add = |bytes: &[u8]| {
            text.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
            text.extend_from_slice(bytes);
        };
        add(self.language.as_bytes());
        add(image.as_bytes());
        add(&(self.files.len() as u64).to_le_bytes());
        for file in self.files.iter() {
            add(file.name.as_bytes());
            add(&file.content);
        }
        add(&self.stdin);
        add(&(self.args.len() as u64).to_le_bytes());
        for arg in self.args.iter() {
            add(arg.as_bytes());
        }
        add(&[matches!(self.streams, Streams::Merged).into()]);
        add(self.limits.numbers().map(u128::to_le_bytes).as_flattened());
        for limit in [self.memory.compile, self.memory.run] {
            add(limit.map(u64::to_le_bytes).as_ref().map_or(&[], |bytes| bytes));
        }
        JobKey(*blake3::hash(&text).as_bytes())
    }

    /// Whether its files can be placed within its limits; if not, why.
    pub fn has_room(&self) -> Result<(), String> {
        let names = || self.files.iter().map(|file| file.name.as_str());
        let parents: BTreeSet<&str> =
            names().flat_map(|name| name.match_indices('/').map(|(at, _)| &name[..at])).collect();
        // The working directory is one too.
        let inodes = (self.files.len() + parents.len() + 1) as u64;
        let bytes: usize = self.files.iter().map(|file| file.content.len().next_multiple_of(PAGE)).sum();
        if inodes > self.limits.inodes {
            let most = self.limits.inodes;
            return Err(format!("the files are {inodes} with their directories, and at most {most} are allowed"));
        }
        if bytes as u64 > self.limits.directory_size() {
            let most = self.limits.directory_size();
            return Err(format!("the files take {bytes} bytes of a disk of {most}"));
        }
        Ok(())
    }
}

/// Limits of a container and of the two stages in it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Memory of the container with its files; swap is the same, so none.
    #[serde(serialize_with = "crate::model::size::exact")]
    pub memory: bytesize::ByteSize,
    /// Processes and threads at once.
    pub processes: u32,
    /// CPUs that may be kept busy.
    pub cpus: f64,
    /// Open files of a process.
    pub open_files: u64,
    /// Size of each writable directory; see [`Limits::directory_size`].
    #[serde(serialize_with = "crate::model::size::exact")]
    pub disk: bytesize::ByteSize,
    /// Files in each writable directory.
    pub inodes: u64,
    /// Bytes kept of each output stream.
    #[serde(serialize_with = "crate::model::size::exact")]
    pub output: bytesize::ByteSize,
    /// Bytes that a stage may print before it is killed.
    #[serde(serialize_with = "crate::model::size::exact")]
    pub output_total: bytesize::ByteSize,
    /// Wall time of the compile stage.
    #[serde(with = "humantime_serde")]
    pub compile_time: Duration,
    /// CPU time of the compile stage, all its processes together.
    #[serde(with = "humantime_serde")]
    pub compile_cpu_time: Duration,
    /// Wall time of the run stage.
    #[serde(with = "humantime_serde")]
    pub run_time: Duration,
    /// CPU time of the run stage, all its processes together.
    #[serde(with = "humantime_serde")]
    pub run_cpu_time: Duration,
}

/// The two steps of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// Source to artifact.
    Compile,
    /// The program itself.
    Run,
}

impl Limits {
    /// Bytes of each writable directory. There are three, and the memory that they are charged to has to
    /// suffice when all are full: at most a quarter of it.
    pub fn directory_size(&self) -> u64 {
        self.disk.as_u64().min(self.memory.as_u64() / 4)
    }

    /// All of them, in their order.
    fn numbers(&self) -> [u128; 12] {
        // Named one by one, so that none that is added is forgotten.
        let Limits {
            memory,
            processes,
            cpus,
            open_files,
            disk,
            inodes,
            output,
            output_total,
            compile_time,
            compile_cpu_time,
            run_time,
            run_cpu_time,
        } = self;
        [
            memory.as_u64().into(),
            (*processes).into(),
            cpus.to_bits().into(),
            (*open_files).into(),
            disk.as_u64().into(),
            (*inodes).into(),
            output.as_u64().into(),
            output_total.as_u64().into(),
            compile_time.as_nanos(),
            compile_cpu_time.as_nanos(),
            run_time.as_nanos(),
            run_cpu_time.as_nanos(),
        ]
    }

    /// Wall time of a stage.
    pub fn time(&self, stage: Stage) -> Duration {
        match stage {
            Stage::Compile => self.compile_time,
            Stage::Run => self.run_time,
        }
    }

    /// CPU time of a stage.
    pub fn cpu_time(&self, stage: Stage) -> Duration {
        match stage {
            Stage::Compile => self.compile_cpu_time,
            Stage::Run => self.run_cpu_time,
        }
    }
}

/// How the main process of a stage ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ended {
    /// By itself, with this exit code.
    Exited(i32),
    /// By a signal that was not ours.
    Signalled(i32),
    /// Killed at its wall time limit.
    WallTime,
    /// Killed at its CPU time limit.
    CpuTime,
    /// Killed because its processes used more memory than the request allowed.
    Memory,
    /// Killed because the server said so (output limit, cancelled).
    Killed,
    /// It could not be started; the reason.
    NotStarted(String),
}

/// What a stage used, and what the kernel refused it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// From start to end, in microseconds.
    pub wall_us: u64,
    /// User and system time of all processes, in microseconds.
    pub cpu_us: u64,
    /// Peak memory in bytes.
    pub memory: u64,
    /// Processes that the kernel killed at the memory limit.
    pub oom_kills: u64,
    /// Forks that the kernel refused at the process limit.
    pub forks_refused: u64,
}

/// What became of a stage or a job.
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
    /// The kernel killed at the memory limit.
    MemoryLimit,
    /// The kernel refused forks at the process limit, and the program failed.
    ProcessLimit,
    /// Printed more than a stage may.
    OutputLimit,
    /// Nobody waits for the answer any more.
    Cancelled,
    /// Our fault.
    InternalError,
}

impl Verdict {
    /// Whether the same job would be judged the same again: what the memo may keep.
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
    /// Whether the language's artifact was there at the end; true where it has none.
    pub artifact: bool,
    /// What it used.
    pub usage: Usage,
    /// What it printed.
    pub output: Output,
}

impl StageOutcome {
    /// The truth about this stage: limits from counters and our own kills, never from exit codes.
    pub fn verdict(&self) -> Verdict {
        let failed = self.ended != Ended::Exited(0);
        match self.ended {
            // Also of one that ended before it could be killed.
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

    /// What it printed, with a last line where it was cut short or something was left out.
    pub fn explained(&self) -> String {
        self.output.text() + &self.notes_after().unwrap_or_default()
    }

    /// What follows the text of what was printed, in lines of its own.
    pub fn notes_after(&self) -> Option<String> {
        let notes = self.notes()?;
        Some(if self.output.ends_line() { notes } else { format!("\n{notes}") })
    }

    /// Why it was cut short, in one line without its end.
    pub fn why(&self) -> Option<String> {
        match (self.verdict(), &self.ended) {
            (Verdict::MemoryLimit, _) => Some("killed: out of memory".to_owned()),
            (Verdict::ProcessLimit, _) => Some("failed: no more processes or threads allowed".to_owned()),
            (Verdict::OutputLimit, Ended::Killed) => Some("killed: too much output".to_owned()),
            (Verdict::OutputLimit, _) => Some("too much output".to_owned()),
            (_, Ended::WallTime) => Some(format!("killed: out of time after {}", lasted(self.usage.wall_us))),
            (_, Ended::CpuTime) => Some(format!("killed: out of CPU time after {}", lasted(self.usage.cpu_us))),
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

    /// Why it was cut short and what was left out, in lines of their own.
    pub fn notes(&self) -> Option<String> {
        let cut = self
            .output
            .truncated()
            .then(|| format!("output cut: {} of {} bytes shown", self.output.kept(), self.output.total_both()));
        let lines: String = cut.into_iter().chain(self.why()).map(|line| format!("coderunner: {line}\n")).collect();
        (!lines.is_empty()).then_some(lines)
    }
}

/// A time in microseconds in a unit that leaves it two digits at least.
fn lasted(us: u64) -> String {
    match us as f64 {
        us if us >= 1e6 => format!("{:.1} s", us / 1e6),
        us if us >= 1e4 => format!("{:.0} ms", us / 1e3),
        us => format!("{:.1} ms", us / 1e3),
    }
}

/// What became of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// The compile stage, where the language has one.
    pub compile: Option<StageOutcome>,
    /// The run stage, unless compiling failed.
    pub run: Option<StageOutcome>,
}

impl Outcome {
    /// The verdict of the last stage that there was.
    pub fn verdict(&self) -> Verdict {
        match (&self.compile, &self.run) {
            (_, Some(run)) => run.verdict(),
            (Some(compile), None) => compile.verdict(),
            (None, None) => Verdict::InternalError,
        }
    }

    /// Whether the program got as far as being run.
    pub fn compiled(&self) -> bool {
        self.run.is_some()
    }

    /// The stage of this kind, if there was one.
    pub fn stage(&self, stage: Stage) -> Option<&StageOutcome> {
        match stage {
            Stage::Compile => self.compile.as_ref(),
            Stage::Run => self.run.as_ref(),
        }
    }

    /// Bytes of memory that it takes, what its parts have allocated included.
    pub fn size(&self) -> usize {
        let reason = |ended: &Ended| match ended {
            Ended::NotStarted(reason) => reason.capacity(),
            _ => 0,
        };
        let stages = self.compile.iter().chain(&self.run);
        size_of::<Outcome>() + stages.map(|stage| stage.output.size() + reason(&stage.ended)).sum::<usize>()
    }
}

/// One of the two output streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// Bytes of one stream in a row, packed: a program can make there be as many as bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run(u32);

impl Run {
    /// The bit that says which stream; the others are the length.
    const STDERR: u32 = 1 << 31;

    /// Of as many of these bytes as fit in one, 2 GiB.
    fn new(stream: Stream, length: usize) -> Run {
        let length = u32::try_from(length).unwrap_or(u32::MAX).min(Run::STDERR - 1);
        Run(if stream == Stream::Stderr { length | Run::STDERR } else { length })
    }

    fn stream(self) -> Stream {
        if self.0 & Run::STDERR != 0 { Stream::Stderr } else { Stream::Stdout }
    }

    fn length(self) -> usize {
        (self.0 & !Run::STDERR) as usize
    }
}

/// How far a reader of an [`Output`] has come.
#[derive(Debug, Clone, Copy, Default)]
pub struct Place {
    run: usize,
    within: usize,
    byte: usize,
}

/// What a stage printed: the first bytes of each stream in order of arrival, and how much there was.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Output {
    bytes: Vec<u8>,
    /// Whose the bytes are, from the first on, and how many in a row: a program that changes from one stream to the
    /// other with each byte makes many of these.
    runs: Vec<Run>,
    kept: [usize; 2],
    total: [u64; 2],
    /// Whether the stage printed more than it may at all.
    pub overflowed: bool,
}

impl Output {
    /// Takes what a stream brought, keeps what fits under `cap` bytes of that stream, returns that part.
    pub fn push<'a>(&mut self, stream: Stream, bytes: &'a [u8], cap: usize) -> &'a [u8] {
        let at = stream as usize;
        self.total[at] += bytes.len() as u64;
        let fits = &bytes[..bytes.len().min(cap.saturating_sub(self.kept[at]))];
        self.kept[at] += fits.len();
        self.bytes.extend_from_slice(fits);
        let mut new = fits.len();
        if let Some(last) = self.runs.last_mut().filter(|last| last.stream() == stream) {
            let length = last.length() + new;
            *last = Run::new(stream, length);
            new = length - last.length();
        }
        while new > 0 {
            let run = Run::new(stream, new);
            new -= run.length();
            self.runs.push(run);
        }
        fits
    }

    /// The next bytes in a row of one stream, or of either, from a place on, at most so many; empty at the end.
    pub fn read(&self, place: &mut Place, of: Option<Stream>, most: usize) -> (Stream, &[u8]) {
        while let Some(run) = self.runs.get(place.run) {
            let left = run.length() - place.within;
            if left == 0 {
                *place = Place { run: place.run + 1, within: 0, byte: place.byte };
                continue;
            }
            let wanted = of.is_none_or(|of| of == run.stream());
            let taken = if wanted { left.min(most) } else { left };
            let bytes = self.bytes.get(place.byte..place.byte + taken).unwrap_or_default();
            place.within += taken;
            place.byte += taken;
            if wanted {
                return (run.stream(), bytes);
            }
        }
        (Stream::Stdout, &[])
    }

    /// Whether a reader has come to the end.
    pub fn is_read(&self, place: &Place) -> bool {
        place.byte >= self.bytes.len()
    }

    /// What was kept, in order of arrival.
    pub fn chunks(&self) -> impl Iterator<Item = (Stream, &[u8])> {
        let mut place = Place::default();
        std::iter::from_fn(move || Some(self.read(&mut place, None, usize::MAX)).filter(|(_, bytes)| !bytes.is_empty()))
    }

    /// Bytes of memory that it takes.
    pub fn size(&self) -> usize {
        self.bytes.capacity() + self.runs.capacity() * size_of::<Run>()
    }

    /// Bytes kept of a stream.
    pub fn kept_of(&self, stream: Stream) -> usize {
        self.kept[stream as usize]
    }

    /// Bytes printed on a stream.
    pub fn total(&self, stream: Stream) -> u64 {
        self.total[stream as usize]
    }

    /// Bytes printed on both streams.
    pub fn total_both(&self) -> u64 {
        self.total.iter().sum()
    }

    /// Bytes kept of both streams.
    pub fn kept(&self) -> usize {
        self.kept.iter().sum()
    }

    /// Whether something was printed that was not kept.
    pub fn truncated(&self) -> bool {
        self.total_both() > self.kept() as u64
    }

    /// Whether something was printed on a stream that was not kept.
    pub fn truncated_of(&self, stream: Stream) -> bool {
        self.total(stream) > self.kept[stream as usize] as u64
    }

    /// Whether the text of both streams is empty or ends with the end of a line.
    fn ends_line(&self) -> bool {
        let end = if self.truncated() { whole_characters(&self.bytes) } else { self.bytes.len() };
        self.bytes[..end].last().is_none_or(|byte| *byte == b'\n')
    }

    /// Both streams as text in order of arrival. Bytes that are no UTF-8 become U+FFFD.
    pub fn text(&self) -> String {
        self.decoded(|_| true, self.truncated())
    }

    /// One stream as text.
    pub fn text_of(&self, stream: Stream) -> String {
        self.decoded(|of| of == stream, self.truncated_of(stream))
    }

    fn decoded(&self, wanted: impl Fn(Stream) -> bool, truncated: bool) -> String {
        // A character may be split over two chunks: join first, then decode.
        let chunks = self.chunks().filter(|(stream, _)| wanted(*stream));
        let mut bytes: Vec<u8> = chunks.flat_map(|(_, chunk)| chunk).copied().collect();
        if truncated {
            bytes.truncate(whole_characters(&bytes));
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// Length of `bytes` without a character that was cut off at the end.
pub fn whole_characters(bytes: &[u8]) -> usize {
    let start = bytes.len().saturating_sub(3);
    let last = (start..bytes.len()).rev().find(|&at| bytes[at] & 0b1100_0000 != 0b1000_0000);
    match last.map(|at| (at, &bytes[at..])) {
        Some((at, tail)) => match std::str::from_utf8(tail) {
            Err(error) if error.error_len().is_none() => at,
            _ => bytes.len(),
        },
        None => bytes.len(),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(crate) fn job(code: &[u8]) -> Job {
        let language = crate::config::tests::language("c");
        language.job(Bytes::copy_from_slice(code), Streams::Merged)
    }

    fn stage(stage: Stage, ended: Ended) -> StageOutcome {
        StageOutcome { stage, ended, artifact: true, usage: Usage::default(), output: Output::default() }
    }

    #[test]
    fn verdicts_tell_limits_from_failures() {
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
        assert_eq!(flood.verdict(), Verdict::OutputLimit, "however quick it was to end");
    }

    #[test]
    fn compiled_means_exit_code_and_artifact() {
        assert_eq!(stage(Stage::Compile, Ended::Exited(0)).verdict(), Verdict::Ok);
        assert_eq!(stage(Stage::Compile, Ended::Exited(1)).verdict(), Verdict::CompileError);
        let mut linked_nothing = stage(Stage::Compile, Ended::Exited(0));
        linked_nothing.artifact = false;
        assert_eq!(linked_nothing.verdict(), Verdict::CompileError);
    }

    #[test]
    fn a_run_that_was_cut_short_says_why_in_its_last_line() {
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
    fn a_time_that_ran_out_is_told_with_useful_digits() {
        for (us, told) in [(1_500, "1.5 ms"), (22_400, "22 ms"), (999_000, "999 ms"), (5_040_000, "5.0 s")] {
            let mut outcome = stage(Stage::Run, Ended::WallTime);
            outcome.usage.wall_us = us;
            assert_eq!(outcome.why(), Some(format!("killed: out of time after {told}")));
        }
    }

    #[test]
    fn output_keeps_order_and_counts_all() {
        let mut output = Output::default();
        output.push(Stream::Stdout, b"a", 2);
        output.push(Stream::Stderr, b"b", 2);
        output.push(Stream::Stdout, b"cd", 2);
        assert_eq!(output.text(), "abc");
        assert_eq!((output.kept(), output.total_both(), output.truncated()), (3, 4, true));
    }

    #[test]
    fn each_change_of_stream_is_paid_for() {
        let mut output = Output::default();
        for n in 0..1000 {
            output.push([Stream::Stdout, Stream::Stderr][n % 2], b"x", 1000);
        }
        assert_eq!(output.chunks().count(), 1000);
        assert!(output.size() >= 1000 * (1 + size_of::<Run>()), "{}", output.size());
    }

    proptest! {
        #[test]
        fn truncation_never_splits_a_character(text in ".{0,40}", cap in 0usize..60, pieces in 1usize..7) {
            let mut output = Output::default();
            for piece in text.as_bytes().chunks(pieces) {
                output.push(Stream::Stdout, piece, cap);
            }
            let kept = output.text();
            prop_assert!(text.starts_with(&kept), "{kept:?} is no beginning of {text:?}");
            prop_assert!(kept.len() <= cap && kept.len() + 4 > cap.min(text.len()));
        }

        #[test]
        fn any_bytes_are_text(bytes in proptest::collection::vec(any::<u8>(), 0..200), cap in 0usize..200) {
            let mut output = Output::default();
            output.push(Stream::Stdout, &bytes, cap);
            let json = serde_json::to_string(&output.text()).unwrap();
            prop_assert!(serde_json::from_str::<String>(&json).is_ok());
        }

        #[test]
        fn the_key_differs_whenever_an_input_does(
            a in (any::<String>(), any::<Vec<u8>>(), proptest::collection::vec(any::<String>(), 0..3), "[ab]{0,3}"),
            b in (any::<String>(), any::<Vec<u8>>(), proptest::collection::vec(any::<String>(), 0..3), "[ab]{0,3}"),
        ) {
            let key = |(code, stdin, args, image): &(String, Vec<u8>, Vec<String>, String)| {
                let job = Job { stdin: stdin.clone().into(), args: args.clone().into(), ..job(code.as_bytes()) };
                job.key(image)
            };
            prop_assert_eq!(key(&a) == key(&b), a == b);
            prop_assert_eq!(key(&a), key(&a));
        }
    }

    #[test]
    fn files_have_room_as_the_kernel_counts() {
        let with = |names: &[&str], inodes, length: usize| {
            let file = |name: &&str| SourceFile { name: (*name).into(), content: vec![b'x'; length].into() };
            let mut job = Job { files: names.iter().map(file).collect(), ..job(b"") };
            job.limits.inodes = inodes;
            job.limits.disk = bytesize::ByteSize::kib(8);
            job.has_room()
        };
        assert!(with(&["a", "b"], 3, 0).is_ok() && with(&["a", "b"], 2, 0).is_err());
        assert!(with(&["a/b/c", "a/b/d"], 5, 0).is_ok() && with(&["a/b/c", "a/b/d"], 4, 0).is_err());
        assert!(with(&["a", "b"], 9, 1).is_ok() && with(&["a", "b", "c"], 9, 1).is_err());
        assert!(with(&["a"], 9, 8192).is_ok() && with(&["a"], 9, 8193).is_err());
    }

    #[test]
    fn the_key_differs_for_each_single_change() {
        let base = job(b"x");
        let mut others = vec![job(b"y")];
        others.push(Job { language: "d".into(), ..base.clone() });
        others.push(Job { stdin: "x".into(), ..base.clone() });
        others.push(Job { args: vec!["x".into()].into(), ..base.clone() });
        others.push(Job { args: vec![String::new()].into(), ..base.clone() });
        others.push(Job { streams: Streams::Separate, ..base.clone() });
        let limits = |change: &dyn Fn(&mut Limits)| {
            let mut job = base.clone();
            change(&mut job.limits);
            job
        };
        others.push(Job { memory: StageMemory { compile: Some(1), run: None }, ..base.clone() });
        others.push(Job { memory: StageMemory { compile: None, run: Some(1) }, ..base.clone() });
        others.push(limits(&|l| l.run_time += Duration::from_nanos(1)));
        others.push(limits(&|l| l.memory = bytesize::ByteSize(l.memory.as_u64() + 1)));
        others.push(limits(&|l| l.cpus += 0.001));
        others.push(limits(&|l| l.output = bytesize::ByteSize(l.output.as_u64() + 1)));
        let mut renamed = base.clone();
        Arc::make_mut(&mut renamed.files)[0].name = "other.c".into();
        others.push(renamed);
        let mut keys: Vec<JobKey> = others.iter().map(|job| job.key("image")).collect();
        keys.push(base.key("image"));
        keys.push(base.key("another image"));
        let distinct: std::collections::HashSet<&JobKey> = keys.iter().collect();
        assert_eq!(distinct.len(), keys.len());
    }
}
