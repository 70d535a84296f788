//! Piston's API, version 2: what its clients send and read, and what we add beside its fields.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::alphabet::STANDARD as ALPHABET;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use serde::{Deserialize, Serialize};
use serde_json::json;
use warp::filters::BoxedFilter;
use warp::reply::Response;
use warp::{Filter, Reply};

use super::error::ApiError;
use super::{ApiSettings, Wishes, is_json, json_body, live, wishes};
use crate::job::{Ended, Job, Limits, SourceFile, Stage, StageMemory, StageOutcome, Stream, Streams, Verdict};
use crate::language::{Language, is_file_name};
use crate::runner::{self, Runner};

/// A request that is one, for those who sent another.
const EXAMPLE: &str = "{\"language\": \"…\", \"version\": \"*\", \"files\": [{\"content\": \"…\"}]}";

/// Files of a request. Their names travel in one message to init, and their directories count as files.
const MAX_FILES: usize = 100;

/// Parts of a file's name.
const MAX_DEPTH: usize = 16;

/// Bytes of all arguments as JSON: they travel in one message to init.
const MAX_ARGS: usize = 96 * 1024;

/// Exit code of what could not be started, as shells have it.
const CODE_NOT_STARTED: i32 = 127;

/// Base64 as clients write it, padded or not.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &ALPHABET,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// What is asked. Other fields are ignored; null is the same as leaving a field out.
#[derive(Debug, Deserialize)]
pub struct Request {
    /// Name or alias of a language.
    pub language: String,
    /// The versions that will do, as a range; any where it is left out.
    pub version: Option<String>,
    /// The first one is the program, whatever its name.
    pub files: Vec<File>,
    /// What the program reads.
    pub stdin: Option<String>,
    /// What is appended to the command that runs the program.
    pub args: Option<Vec<String>>,
    /// Wall time of compiling in milliseconds.
    pub compile_timeout: Option<f64>,
    /// Wall time of running in milliseconds.
    pub run_timeout: Option<f64>,
    /// CPU time of compiling in milliseconds, all processes together.
    pub compile_cpu_time: Option<f64>,
    /// CPU time of running in milliseconds, all processes together.
    pub run_cpu_time: Option<f64>,
    /// Memory of compiling in bytes; -1 for what the language has.
    pub compile_memory_limit: Option<f64>,
    /// Memory of running in bytes; -1 for what the language has.
    pub run_memory_limit: Option<f64>,
}

/// A file of a request.
#[derive(Debug, Deserialize)]
pub struct File {
    /// A relative path without `.` or `..`; made up where there is none.
    pub name: Option<String>,
    /// The contents.
    pub content: String,
    /// How they are written.
    pub encoding: Option<Encoding>,
}

/// How a file's contents are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Encoding {
    /// As they are.
    Utf8,
    /// In base64, with or without padding.
    Base64,
    /// In hexadecimal.
    Hex,
}

/// A language that is served.
#[derive(Debug, Serialize)]
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
#[derive(Debug, Serialize)]
pub struct Answer {
    /// The language's name.
    pub language: String,
    /// The language's version.
    pub version: String,
    /// Compiling, where the language has that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compile: Option<StageAnswer>,
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
#[derive(Debug, Serialize)]
pub struct StageAnswer {
    /// What it printed there. Bytes that are no UTF-8 are U+FFFD.
    pub stdout: String,
    /// What it printed there.
    pub stderr: String,
    /// Both in order of arrival.
    pub output: String,
    /// The rest.
    #[serde(flatten)]
    pub ending: Ending,
}

/// How a stage ended and what it used.
#[derive(Debug, Serialize)]
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
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

/// Piston's paths.
pub fn routes(runner: &Arc<Runner>, settings: &Arc<ApiSettings>) -> BoxedFilter<(Response,)> {
    let (listing, running, settings) = (Arc::clone(runner), Arc::clone(runner), Arc::clone(settings));
    let runtimes = warp::path!("api" / "v2" / "runtimes")
        .and(warp::get().or(warp::head()).unify())
        .map(move || warp::reply::json(&runtimes(&listing)).into_response());
    let execute = warp::path!("api" / "v2" / "execute")
        .and(warp::post())
        .and(json_body(settings.body_limit, is_taken, EXAMPLE))
        .and(wishes())
        .then(move |request, wishes| execute(request, wishes, Arc::clone(&running), Arc::clone(&settings)));
    let other_method = warp::path!("api" / "v2" / "execute")
        .map(|| "POST, OPTIONS")
        .or(warp::path!("api" / "v2" / "runtimes").map(|| "GET, HEAD"))
        .unify()
        .map(|allow| ApiError::MethodNotAllowed(allow).into_response());
    runtimes.or(execute).unify().or(other_method).unify().boxed()
}

/// Published clients send their JSON as text, or do not say what it is.
fn is_taken(kind: Option<&str>) -> bool {
    let essence = kind.and_then(|kind| kind.split(';').next()).map(str::trim);
    is_json(kind) || essence.is_none_or(|essence| essence.eq_ignore_ascii_case("text/plain"))
}

fn runtimes(runner: &Runner) -> Vec<Runtime> {
    runner.languages().iter().map(|language| Runtime::from(&**language)).collect()
}

async fn execute(
    request: Result<Request, ApiError>,
    wishes: Wishes,
    runner: Arc<Runner>,
    settings: Arc<ApiSettings>,
) -> Response {
    let answer = async {
        let (language, job) = request?.into_job(&runner, settings.source_limit)?;
        if wishes.events {
            let result = move |answer: &runner::Answer| json!(Answer::new(&language, answer));
            return Ok(live::events(runner, job, wishes.reuse, result));
        }
        let answer = runner.run(job, wishes.reuse).await?;
        Ok::<_, ApiError>(warp::reply::json(&Answer::new(&language, &answer)).into_response())
    };
    match answer.await {
        Ok(response) => response,
        Err(error) => error.into_response(),
    }
}

impl Request {
    /// The job that is asked for, and its language.
    pub fn into_job(self, runner: &Runner, source_limit: usize) -> Result<(Arc<Language>, Job), ApiError> {
        let range = self.version.as_deref().unwrap_or("*");
        let language =
            runner.language(Some(&self.language)).ok().filter(|language| is_within(&language.version, range));
        let Some(language) = language.map(Arc::clone) else {
            return Err(bad(format!("{}-{range} runtime is unknown; GET /api/v2/runtimes lists them", self.language)));
        };
        let mut job = language.job_of(files(&language, self.files, source_limit)?, Streams::Separate);
        let most = &language.limits;
        job.limits = Limits {
            compile_time: time("compile_timeout", self.compile_timeout, most.compile_time)?,
            run_time: time("run_timeout", self.run_timeout, most.run_time)?,
            compile_cpu_time: time("compile_cpu_time", self.compile_cpu_time, most.compile_cpu_time)?,
            run_cpu_time: time("run_cpu_time", self.run_cpu_time, most.run_cpu_time)?,
            ..job.limits
        };
        job.memory = StageMemory {
            compile: memory("compile_memory_limit", self.compile_memory_limit, most.memory.as_u64())?,
            run: memory("run_memory_limit", self.run_memory_limit, most.memory.as_u64())?,
        };
        job.args = self.args.unwrap_or_default();
        if job.args.iter().any(|arg| arg.contains('\0')) {
            return Err(bad("args must not contain NUL"));
        }
        if serde_json::to_vec(&job.args).map_or(true, |json| json.len() > MAX_ARGS) {
            return Err(ApiError::TooLarge { what: "args", limit: MAX_ARGS });
        }
        job.stdin = self.stdin.unwrap_or_default().into();
        Ok((language, job))
    }
}

fn bad(message: impl Into<String>) -> ApiError {
    ApiError::BadRequest(message.into())
}

/// The files of a job: decoded, named, the program first and under the name that the language's commands have for it.
fn files(language: &Language, files: Vec<File>, source_limit: usize) -> Result<Vec<SourceFile>, ApiError> {
    if files.is_empty() || files.len() > MAX_FILES {
        return Err(bad(format!("files must be 1 to {MAX_FILES}; there are {}", files.len())));
    }
    let mut size = 0;
    let mut placed: Vec<SourceFile> = Vec::with_capacity(files.len());
    for (at, file) in files.into_iter().enumerate() {
        let content = match file.encoding.unwrap_or(Encoding::Utf8) {
            Encoding::Utf8 => Some(file.content.into_bytes()),
            Encoding::Base64 => BASE64.decode(file.content).ok(),
            Encoding::Hex => hex::decode(file.content).ok(),
        };
        let Some(content) = content else {
            return Err(bad(format!("files[{at}].content is not of its encoding")));
        };
        let name = match file.name.filter(|name| !name.is_empty()) {
            Some(name) => name,
            None if at == 0 => language.source.clone(),
            None => format!("file{at}.code"),
        };
        if !is_file_name(&name) || name.split('/').count() > MAX_DEPTH {
            return Err(bad(format!(
                "files[{at}].name must be a relative path without . or .. parts, of 255 bytes and {MAX_DEPTH} parts at most"
            )));
        }
        let name = if at == 0 { language.source.clone() } else { name };
        let taken = language.reserved().chain(placed.iter().map(|file| file.name.as_str()));
        if let Some(other) = taken.into_iter().find(|other| overlap(&name, other)) {
            return Err(bad(format!(
                "files[{at}].name {name:?} is in the way of {other:?}, which is there already (the first file is always {:?})",
                language.source
            )));
        }
        size += content.len() + name.len();
        placed.push(SourceFile { name, content: content.into() });
    }
    match size > source_limit {
        true => Err(ApiError::TooLarge { what: "files together", limit: source_limit }),
        false => Ok(placed),
    }
}

/// Whether two files cannot both be there: the same one, or one in the other's place as a directory.
fn overlap(one: &str, other: &str) -> bool {
    let within = |inner: &str, outer: &str| inner.strip_prefix(outer).is_some_and(|rest| rest.starts_with('/'));
    one == other || within(one, other) || within(other, one)
}

fn time(name: &str, asked: Option<f64>, most: Duration) -> Result<Duration, ApiError> {
    let Some(millis) = asked else { return Ok(most) };
    let most_millis = most.as_secs_f64() * 1e3;
    if (1.0..=most_millis).contains(&millis) {
        return Ok(Duration::from_secs_f64(millis / 1e3).min(most));
    }
    Err(bad(format!("{name} must be from 1 to the configured limit of {most_millis} milliseconds")))
}

fn memory(name: &str, asked: Option<f64>, most: u64) -> Result<Option<u64>, ApiError> {
    match asked {
        None | Some(-1.0) => Ok(None),
        // Sizes are far below where floats have gaps.
        Some(bytes) if (1.0..=most as f64).contains(&bytes) => Ok(Some(bytes as u64).filter(|bytes| *bytes < most)),
        Some(_) => Err(bad(format!("{name} must be from 1 to the configured limit of {most} bytes, or -1 for that"))),
    }
}

/// Whether a version is in a range as npm writes them: alternatives apart by `||`, each a list that must all hold.
fn is_within(version: &semver::Version, range: &str) -> bool {
    range.split("||").any(|set| {
        let words: Vec<&str> = set.split_whitespace().collect();
        match words[..] {
            [] => true,
            [from, "-", to] => holds(version, &format!(">={from}")) && holds(version, &format!("<={to}")),
            _ => apart(&words).iter().all(|comparator| holds(version, comparator)),
        }
    })
}

/// Comparators whose operator may stand apart from its version.
fn apart(words: &[&str]) -> Vec<String> {
    words.iter().fold(Vec::new(), |mut comparators: Vec<String>, word| {
        match comparators.last_mut().filter(|last| last.ends_with(['<', '>', '=', '^', '~'])) {
            Some(last) => last.push_str(word),
            None => comparators.push((*word).to_owned()),
        }
        comparators
    })
}

fn holds(version: &semver::Version, comparator: &str) -> bool {
    let at = comparator.find(|c: char| !"<>=^~".contains(c)).unwrap_or(comparator.len());
    let (operator, of) = comparator.split_at(at);
    let of = of.strip_prefix('v').unwrap_or(of);
    if matches!(of, "" | "*" | "x" | "X" | "latest") {
        return operator.is_empty() || operator == ">=";
    }
    // A bare version is that one, not what is compatible with it.
    let operator = if operator.is_empty() { "=" } else { operator };
    semver::VersionReq::parse(&format!("{operator}{of}")).is_ok_and(|required| required.matches(version))
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

impl Answer {
    /// An answer in Piston's form.
    pub fn new(language: &Language, answer: &runner::Answer) -> Answer {
        let outcome = &answer.outcome;
        let stages = || outcome.compile.iter().chain(&outcome.run);
        Answer {
            language: language.name.clone(),
            version: language.version.to_string(),
            compile: outcome.compile.as_ref().map(StageAnswer::from),
            run: outcome.run.as_ref().map(StageAnswer::from),
            verdict: outcome.verdict(),
            cached: answer.cached.is_some(),
            age: answer.cached.map(millis),
            queued: millis(answer.queued),
            truncated: stages().any(|stage| stage.output.truncated()),
        }
    }
}

impl From<&StageOutcome> for StageAnswer {
    fn from(stage: &StageOutcome) -> StageAnswer {
        StageAnswer {
            stdout: stage.output.text_of(Stream::Stdout),
            stderr: stage.output.text_of(Stream::Stderr),
            output: stage.output.text(),
            ending: Ending::from(stage),
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn named(names: &[&str]) -> Result<Vec<SourceFile>, ApiError> {
        let file = |name: &&str| File { name: Some((*name).into()), content: "x".into(), encoding: None };
        files(&crate::config::tests::language("c"), names.iter().map(file).collect(), 1000)
    }

    #[test]
    fn ranges_are_those_of_npm() {
        let is = |range: &str| is_within(&semver::Version::new(3, 10, 2), range);
        for range in
            ["*", "", "x", "latest", "3", "3.x", "3.10", "3.10.x", "3.10.2", "v3.10.2", "=3.10.2", "^3.2", "~3.10.1"]
        {
            assert!(is(range), "{range}");
        }
        for range in [">=3 <4", ">= 3 < 4", "2.x || 3.x", "1.0.0 - 4.0.0", ">3.9", "<=3.10.2"] {
            assert!(is(range), "{range}");
        }
        for range in [
            "3.9",
            "3.10.1",
            "^2",
            "~3.9",
            "4.x",
            ">=3.11",
            "<3",
            "1 || 2",
            "1.0.0 - 2.0.0",
            "python",
            ">",
            "<*",
            "3..1",
        ] {
            assert!(!is(range), "{range}");
        }
    }

    #[test]
    fn the_first_file_is_the_program_whatever_its_name() {
        let names = |placed: Vec<SourceFile>| placed.into_iter().map(|file| file.name).collect::<Vec<_>>();
        assert_eq!(names(named(&["cool.txt", "dir/b.h"]).unwrap()), ["main.c", "dir/b.h"]);
        assert_eq!(names(named(&["", ""]).unwrap()), ["main.c", "file1.code"]);
    }

    #[test]
    fn names_that_lead_elsewhere_or_clash_are_refused() {
        for name in
            ["/etc/passwd", "..", "../x", "a/../../x", ".", "a//b", "a/", "nul\0", &"x".repeat(256), &"d/".repeat(20)]
        {
            assert!(named(&[name]).is_err() && named(&["a", name]).is_err(), "{name:?}");
        }
        for names in [["a", "main.c"], ["a", "out"], ["a", "out/x"], ["a", "main.c/x"]] {
            assert!(named(&names).is_err(), "{names:?}");
        }
        for names in [["a", "b", "b"], ["a", "b", "b/c"], ["a", "b/c", "b"]] {
            assert!(named(&names).is_err(), "{names:?}");
        }
        named(&["a", "b", "bc", "d/b", "d/c"]).unwrap();
        assert!(named(&[]).is_err() && named(&["x"; 101]).is_err());
    }

    #[test]
    fn contents_are_decoded_and_bounded() {
        let language = crate::config::tests::language("c");
        let one = |content: &str, encoding| {
            files(&language, vec![File { name: None, content: content.into(), encoding: Some(encoding) }], 16)
                .map(|placed| placed[0].content.to_vec())
        };
        assert_eq!(one("aGk=", Encoding::Base64).unwrap(), b"hi");
        assert_eq!(one("aGk", Encoding::Base64).unwrap(), b"hi");
        assert_eq!(one("6869", Encoding::Hex).unwrap(), b"hi");
        assert!(one("686", Encoding::Hex).is_err() && one("+f", Encoding::Hex).is_err());
        assert!(one("a_b!", Encoding::Base64).is_err());
        assert!(matches!(one(&"x".repeat(11), Encoding::Utf8), Err(ApiError::TooLarge { .. })));
        assert_eq!(one(&"x".repeat(10), Encoding::Utf8).unwrap().len(), 10);
    }

    #[test]
    fn limits_are_lowered_never_raised_and_zero_is_a_number() {
        let most = Duration::from_secs(5);
        assert_eq!(time("t", None, most).unwrap(), most);
        assert_eq!(time("t", Some(5000.0), most).unwrap(), most);
        assert_eq!(time("t", Some(1.5), most).unwrap(), Duration::from_micros(1500));
        for wrong in [0.0, -1.0, 0.5, 5000.1, 1e300] {
            assert!(
                time("t", Some(wrong), most).is_err() && memory("m", Some(wrong), 4000).is_err() == (wrong != -1.0)
            );
        }
        assert_eq!(memory("m", Some(-1.0), 4000).unwrap(), None);
        assert_eq!(memory("m", Some(4000.0), 4000).unwrap(), None);
        assert_eq!(memory("m", Some(3999.0), 4000).unwrap(), Some(3999));
    }
}
