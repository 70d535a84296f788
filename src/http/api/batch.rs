//! `POST /api/v2/batch`: one program, compiled once, on many inputs.

use std::convert::Infallible;
use std::sync::Arc;

use bytes::Bytes;
use bytesize::ByteSize;
use futures_util::{Stream, StreamExt, stream};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use utoipa::ToSchema;
use warp::Reply;
use warp::filters::BoxedFilter;
use warp::http::HeaderValue;
use warp::http::header::CONTENT_TYPE;
use warp::reply::Response;

use crate::http::Api;
use crate::http::api::piston::{self, Ran, StageAnswer, arguments};
use crate::http::body::{self, Writer};
use crate::http::budget::Lease;
use crate::http::error::ApiError;
use crate::http::json::is_json;
use crate::http::openapi::Refused;
use crate::http::request::{Call, LINES, post};
use crate::http::text::{Fields, Text, Texts};
use crate::model::job::{Job, Stage};
use crate::model::language::Language;
use crate::model::outcome::{StageOutcome, Verdict};
use crate::model::output;
use crate::run::{self, RunError};

/// A request that is one, for those who sent another.
const EXAMPLE: &str = "{\"language\": \"…\", \"files\": [{\"content\": \"…\"}], \"inputs\": [{\"stdin\": \"…\", \"expected_output\": \"…\"}]}";

/// Inputs of a request.
const MAX_INPUTS: usize = 100;

/// Bytes kept of all that is printed on one stream, shared among the inputs; one alone is kept as much as in a plain run.
const OUTPUT: u64 = 4 << 20;

/// Bytes that the outputs of all results may take as JSON, in equal shares: what is kept of both streams stands there
/// twice, and half of that again is for escapes. Output of which more has to be escaped is cut further.
const WRITTEN: usize = 24 << 20;

/// What is asked: a program as it is sent to be executed, and what to run it on.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = Batch, example = json!({
    "language": "bash", "files": [{"content": "read n; echo $((n * n))"}],
    "inputs": [{"stdin": "3", "expected_output": "9"}, {"args": ["x"]}]
}))]
pub struct Request {
    /// The program. Its `stdin` and `args` are of those inputs that have none.
    #[serde(flatten)]
    program: piston::Request,
    /// What it is run on, 1 to 100.
    #[schema(min_items = 1, max_items = 100)]
    inputs: Vec<Input>,
}

/// What a program is run on.
#[derive(Debug, Deserialize, ToSchema)]
pub struct Input {
    /// What the program reads.
    stdin: Option<String>,
    /// What is appended to the command that runs it.
    args: Option<Vec<String>>,
    /// What it has to print on stdout; white space at the ends of lines, and at the end, does not matter.
    expected_output: Option<String>,
}

/// What is true of all inputs.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = BatchProgram)]
pub struct Program {
    /// The language's name.
    language: String,
    /// The language's version.
    version: String,
    /// Compiling, where the language has that.
    #[serde(skip_serializing_if = "Option::is_none")]
    compile: Option<StageAnswer>,
}

/// What is answered.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = BatchAnswer)]
pub struct Answer {
    /// The program.
    #[serde(flatten)]
    program: Program,
    /// Whether all inputs have passed.
    passed: bool,
    /// What became of each input, in their order.
    results: Vec<Tried>,
}

/// What became of an input.
#[derive(Debug, Serialize, ToSchema)]
pub struct Tried {
    /// Which one, from 0.
    index: usize,
    /// Whether the program ended well, and printed what was expected.
    passed: bool,
    /// What became of it.
    #[serde(flatten)]
    result: Tally,
}

/// Whether the program was run.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub enum Tally {
    /// It was.
    Ran(Box<Ran>),
    /// It was not, for a reason of the server's.
    Failed {
        /// Why.
        error: String,
    },
}

impl Texts for Program {
    fn each(&mut self, see: &mut dyn FnMut(&mut Text)) {
        self.compile.iter_mut().for_each(|compile| compile.each(see));
    }
}

impl Texts for Tried {
    fn each(&mut self, see: &mut dyn FnMut(&mut Text)) {
        if let Tally::Ran(ran) = &mut self.result {
            ran.each(see);
        }
    }
}

impl Texts for Answer {
    fn each(&mut self, see: &mut dyn FnMut(&mut Text)) {
        self.program.each(see);
        self.results.iter_mut().for_each(|tried| tried.each(see));
    }
}

/// Jobs of one program, and what each is expected to print.
pub struct Batch {
    language: Arc<Language>,
    /// One for each input.
    pub jobs: Vec<Job>,
    expected: Vec<Option<String>>,
}

impl Request {
    /// The jobs that are asked for.
    pub fn into_batch(self, languages: &[Arc<Language>], source_limit: usize) -> Result<Batch, ApiError> {
        if self.inputs.is_empty() || self.inputs.len() > MAX_INPUTS {
            let message = format!("inputs must be 1 to {MAX_INPUTS}; there are {}", self.inputs.len());
            return Err(ApiError::BadRequest(message));
        }
        let (language, mut job) = self.program.into_job(languages, source_limit)?;
        job.limits.output = job.limits.output.min(ByteSize(OUTPUT / self.inputs.len() as u64));
        let (mut jobs, mut expected) = (Vec::new(), Vec::new());
        for input in self.inputs {
            let mut job = job.clone();
            if let Some(stdin) = input.stdin {
                job.stdin = stdin.into();
            }
            if let Some(args) = input.args {
                job.args = arguments(args)?.into();
            }
            jobs.push(job);
            expected.push(input.expected_output);
        }
        Ok(Batch { language, jobs, expected })
    }
}

impl Tried {
    /// What became of an input; what was printed takes no more than `most` bytes.
    fn new(index: usize, result: Result<run::Answer, ApiError>, expected: Option<&str>, most: usize) -> Tried {
        let answer = match result {
            Ok(answer) => answer,
            Err(error) => {
                let result = Tally::Failed { error: error.message() };
                return Tried { index, passed: false, result };
            }
        };
        let passed = answer.outcome.verdict() == Verdict::Ok
            && expected.is_none_or(|expected| answer.outcome.run.as_ref().is_some_and(|run| printed(run, expected)));
        let mut ran = Ran::from(&answer);
        ran.cut(most);
        Tried { index, passed, result: Tally::Ran(Box::new(ran)) }
    }
}

/// Whether this is what a program printed, white space at the ends of lines and at the end aside.
fn printed(run: &StageOutcome, expected: &str) -> bool {
    !run.output.truncated_of(output::Stream::Stdout) && same(&run.output.text_of(output::Stream::Stdout), expected)
}

fn same(one: &str, other: &str) -> bool {
    one.trim_end().lines().map(str::trim_end).eq(other.trim_end().lines().map(str::trim_end))
}

/// Answers `/api/v2/batch`.
pub fn filter(api: &Arc<Api>) -> BoxedFilter<(Response,)> {
    post(is_json, EXAMPLE, run, api)
}

/// Compile a program once, and run it on many inputs
///
/// Each input has a fresh container, a few at once. With `Accept: application/x-ndjson` the program comes in a line of
/// JSON, then each result in one as it is there.
// A client that leaves ends what still runs.
#[utoipa::path(
    post, path = "/api/v2/batch", operation_id = "batch", request_body = Request,
    responses((status = 200, description = "What became of it",
        content((Answer = "application/json"), (String = "application/x-ndjson"))), Refused)
)]
async fn run(request: Request, call: Call) -> Result<Response, ApiError> {
    let Batch { language, jobs, expected } = request.into_batch(call.api.runner.languages(), call.api.source_limit)?;
    let (memory, wishes) = (call.memory(), call.wishes);
    let frame = memory.lease(body::CHUNKS).await?;
    let most = WRITTEN / jobs.len();
    // Each outcome that waits here is within the budget, and there is one for each input.
    let (sender, mut ended) = mpsc::unbounded_channel();
    let context = call.context.clone();
    call.spawn(async move |call| {
        let tell = |index, result: Result<run::Answer, RunError>| {
            let leased = result.map_err(|error| call.context.refusal(error)).and_then(|answer| {
                let lease = memory.try_lease(answer.outcome.size())?;
                Ok((answer, lease))
            });
            let _ = sender.send((index, leased));
        };
        tokio::select! {
            () = sender.closed() => {}
            () = call.api.runner.run_batch(jobs, wishes.reuse, &call.context.client, tell) => {}
        }
    });
    // Some may be refused before the first has its outcome: a status says only that there is none at all.
    let mut heard = Vec::new();
    let (index, (first, lease)) = loop {
        match ended.recv().await {
            Some((index, Ok(leased))) => break (index, leased),
            Some((index, Err(error))) => heard.push((index, Err(error))),
            None => {
                let first = heard.into_iter().find_map(|(_, error)| error.err());
                return Err(first.unwrap_or_else(|| context.refusal(RunError::ShuttingDown)));
            }
        }
    };
    let mut compile = StageAnswer::of(&first.outcome, Stage::Compile);
    if let Some(compile) = &mut compile {
        compile.cut(most);
    }
    let program = Program { language: language.name.clone(), version: language.version.to_string(), compile };
    let tried = move |(index, result): (usize, Result<(run::Answer, Lease), ApiError>)| {
        let (result, lease) = match result {
            Ok((answer, lease)) => (Ok(answer), Some(lease)),
            Err(error) => (Err(error), None),
        };
        (Tried::new(index, result, expected.get(index).and_then(Option::as_deref), most), lease)
    };
    heard.push((index, Ok((first, lease))));
    let ended = stream::iter(heard).chain(stream::poll_fn(move |context| ended.poll_recv(context))).map(tried);
    if wishes.lines {
        return as_lines(program, frame, ended);
    }
    let (mut results, leases): (Vec<Tried>, Vec<Option<Lease>>) = ended.unzip().await;
    results.sort_by_key(|tried| tried.index);
    let passed = results.iter().all(|tried| tried.passed);
    let leases = leases.into_iter().flatten().chain([frame]).collect();
    body::leased_json(Answer { program, passed, results }, leases).await
}

/// The program in a line of JSON, then a line for each input.
fn as_lines(
    program: Program,
    frame: Lease,
    tried: impl Stream<Item = (Tried, Option<Lease>)> + Send + Sync + 'static,
) -> Result<Response, ApiError> {
    let head = stream::iter(lines(program, vec![frame])?);
    let line = |(tried, lease): (Tried, Option<Lease>)| {
        let line = lines(tried, lease.into_iter().collect());
        stream::iter(line.into_iter().flatten())
    };
    let mut response = warp::reply::stream(head.chain(tried.flat_map(line)).map(Ok::<_, Infallible>)).into_response();
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(LINES));
    response.headers_mut().insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(response)
}

/// A line of JSON in chunks.
fn lines<T: Texts>(mut value: T, leases: Vec<Lease>) -> Result<impl Iterator<Item = Bytes> + use<T>, ApiError> {
    let mut writer = Writer::new(&mut value, Fields::AsDeclared, leases)?.between(b"", b"\n");
    Ok(std::iter::from_fn(move || writer.chunk()))
}

#[cfg(test)]
mod tests {
    use super::same;

    #[test]
    fn white_space_at_ends_does_not_matter() {
        for (one, other) in [("1\n2\n", "1\n2"), ("1 \r\n2\n\n", "1\n2"), ("", "\n"), (" 1", " 1")] {
            assert!(same(one, other), "{one:?} {other:?}");
        }
        for (one, other) in [("1\n\n2", "1\n2"), ("1", " 1"), ("", "x"), ("1 2", "1  2")] {
            assert!(!same(one, other), "{one:?} {other:?}");
        }
    }
}
