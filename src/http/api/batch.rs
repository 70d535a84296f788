//! `POST /api/v2/batch`: compiles a program once and runs it on many inputs.

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
use crate::http::api::piston::{self, RunResult, StageResult, check_args};
use crate::http::body::{self, Writer};
use crate::http::budget::Lease;
use crate::http::error::ApiError;
use crate::http::json::is_json;
use crate::http::openapi::ErrorResponses;
use crate::http::request::{Call, NDJSON, post};
use crate::http::text::{Fields, Text, Texts};
use crate::model::job::{Job, Stage};
use crate::model::language::Language;
use crate::model::outcome::{StageOutcome, Verdict};
use crate::model::output;
use crate::run::{self, RunError};

/// A valid request, shown in error messages.
const EXAMPLE: &str = "{\"language\": \"…\", \"files\": [{\"content\": \"…\"}], \"inputs\": [{\"stdin\": \"…\", \"expected_output\": \"…\"}]}";

/// Most inputs of a request.
const MAX_INPUTS: usize = 100;

/// Bytes kept of one stream for all inputs together, in equal shares. A single input keeps no more than in a plain run.
const MAX_KEPT: u64 = 4 << 20;

/// Bytes of JSON for the outputs of all results, in equal shares. The kept bytes of both streams appear twice in a
/// result, which makes 16 MiB; the other 8 MiB are for escapes. Output that needs more escapes is cut further.
const MAX_JSON: usize = 24 << 20;

/// The request: the fields of an execute request, and the inputs.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = Batch, example = json!({
    "language": "bash", "files": [{"content": "read n; echo $((n * n))"}],
    "inputs": [{"stdin": "3", "expected_output": "9"}, {"args": ["x"]}]
}))]
pub struct BatchRequest {
    /// The program. Its `stdin` and `args` apply to inputs without their own.
    #[serde(flatten)]
    program: piston::ExecuteRequest,
    /// The inputs, 1 to 100.
    #[schema(min_items = 1, max_items = 100)]
    inputs: Vec<Input>,
}

/// One input for the program.
#[derive(Debug, Deserialize, ToSchema)]
pub struct Input {
    /// Standard input.
    stdin: Option<String>,
    /// Arguments appended to the run command.
    args: Option<Vec<String>>,
    /// The expected stdout. White space at the ends of lines and at the end is ignored.
    expected_output: Option<String>,
}

/// The part of the response that is the same for all inputs.
#[derive(Debug, Serialize, ToSchema)]
pub struct BatchProgram {
    /// The language's name.
    language: String,
    /// The language's version.
    version: String,
    /// The compile stage, if the language has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    compile: Option<StageResult>,
}

/// The response.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = BatchAnswer)]
pub struct BatchResponse {
    /// The program.
    #[serde(flatten)]
    program: BatchProgram,
    /// Whether all inputs have passed.
    passed: bool,
    /// The result of each input, in their order.
    results: Vec<InputResult>,
}

/// The result of an input.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Tried)]
pub struct InputResult {
    /// Index of the input, from 0.
    index: usize,
    /// Whether the verdict is `ok` and stdout is as expected.
    passed: bool,
    /// The result of the run, or an error.
    #[serde(flatten)]
    result: InputOutcome,
}

/// The result of the run, or an error.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Tally)]
#[serde(untagged)]
pub enum InputOutcome {
    /// The program was run.
    Ran(Box<RunResult>),
    /// The server could not run the program.
    Failed {
        /// The reason.
        error: String,
    },
}

impl Texts for BatchProgram {
    fn each_text(&mut self, visit: &mut dyn FnMut(&mut Text)) {
        self.compile.iter_mut().for_each(|compile| compile.each_text(visit));
    }
}

impl Texts for InputResult {
    fn each_text(&mut self, visit: &mut dyn FnMut(&mut Text)) {
        if let InputOutcome::Ran(ran) = &mut self.result {
            ran.each_text(visit);
        }
    }
}

impl Texts for BatchResponse {
    fn each_text(&mut self, visit: &mut dyn FnMut(&mut Text)) {
        self.program.each_text(visit);
        self.results.iter_mut().for_each(|result| result.each_text(visit));
    }
}

/// The jobs of one program, and the expected output of each.
pub struct Batch {
    language: Arc<Language>,
    /// One for each input.
    pub jobs: Vec<Job>,
    expected: Vec<Option<String>>,
}

impl BatchRequest {
    /// Converts the request to jobs.
    pub fn into_batch(self, languages: &[Arc<Language>], source_limit: usize) -> Result<Batch, ApiError> {
        if self.inputs.is_empty() || self.inputs.len() > MAX_INPUTS {
            let message = format!("inputs must be 1 to {MAX_INPUTS}; there are {}", self.inputs.len());
            return Err(ApiError::BadRequest(message));
        }
        let (language, mut job) = self.program.into_job(languages, source_limit)?;
        job.limits.output = job.limits.output.min(ByteSize(MAX_KEPT / self.inputs.len() as u64));
        let (mut jobs, mut expected) = (Vec::new(), Vec::new());
        for input in self.inputs {
            let mut job = job.clone();
            if let Some(stdin) = input.stdin {
                job.stdin = stdin.into();
            }
            if let Some(args) = input.args {
                job.args = check_args(args)?.into();
            }
            jobs.push(job);
            expected.push(input.expected_output);
        }
        Ok(Batch { language, jobs, expected })
    }
}

impl InputResult {
    /// The result of an input; its output takes at most `max_json` bytes of JSON.
    fn new(
        index: usize,
        result: Result<run::Answer, ApiError>,
        expected: Option<&str>,
        max_json: usize,
    ) -> InputResult {
        let answer = match result {
            Ok(answer) => answer,
            Err(error) => {
                let result = InputOutcome::Failed { error: error.message() };
                return InputResult { index, passed: false, result };
            }
        };
        let passed = answer.outcome.verdict() == Verdict::Ok
            && expected
                .is_none_or(|expected| answer.outcome.run.as_ref().is_some_and(|run| output_matches(run, expected)));
        let mut ran = RunResult::from(&answer);
        ran.cut(max_json);
        InputResult { index, passed, result: InputOutcome::Ran(Box::new(ran)) }
    }
}

/// Whether stdout is as expected, ignoring white space at the ends of lines and at the end.
fn output_matches(run: &StageOutcome, expected: &str) -> bool {
    !run.output.truncated_of(output::Stream::Stdout)
        && equal_lines(&run.output.text_of(output::Stream::Stdout), expected)
}

fn equal_lines(one: &str, other: &str) -> bool {
    one.trim_end().lines().map(str::trim_end).eq(other.trim_end().lines().map(str::trim_end))
}

/// Answers `/api/v2/batch`.
pub fn filter(api: &Arc<Api>) -> BoxedFilter<(Response,)> {
    post(is_json, EXAMPLE, run, api)
}

/// Compile a program once, and run it on many inputs
///
/// Each input runs in a fresh container, a few at a time. With `Accept: application/x-ndjson` the response is a line of
/// JSON for the program, then one for each result as it completes.
// If the client leaves, the runs end.
#[utoipa::path(
    post, path = "/api/v2/batch", operation_id = "batch", request_body = BatchRequest,
    responses((status = 200, description = "The results of the runs",
        content((BatchResponse = "application/json"), (String = "application/x-ndjson"))), ErrorResponses)
)]
async fn run(request: BatchRequest, call: Call) -> Result<Response, ApiError> {
    let Batch { language, jobs, expected } = request.into_batch(call.api.runner.languages(), call.api.source_limit)?;
    let (memory, preferences) = (call.memory(), call.preferences);
    let frame = memory.lease(body::CHUNKS).await?;
    let max_json = MAX_JSON / jobs.len();
    // Unbounded: there is one result per input, and the outcomes are leased from the budget.
    let (sender, mut completed) = mpsc::unbounded_channel();
    let context = call.context.clone();
    call.spawn(async move |call| {
        let on_result = |index, result: Result<run::Answer, RunError>| {
            let leased = result.map_err(|error| call.context.api_error(error)).and_then(|answer| {
                let lease = memory.try_lease(answer.outcome.size())?;
                Ok((answer, lease))
            });
            let _ = sender.send((index, leased));
        };
        tokio::select! {
            () = sender.closed() => {}
            () = call.api.runner.run_batch(jobs, preferences.reuse, &call.context.client, on_result) => {}
        }
    });
    // Some inputs may fail before the first outcome. The response is an error only if there is no outcome at all.
    let mut early = Vec::new();
    let (index, (first, lease)) = loop {
        match completed.recv().await {
            Some((index, Ok(leased))) => break (index, leased),
            Some((index, Err(error))) => early.push((index, Err(error))),
            None => {
                let first = early.into_iter().find_map(|(_, error)| error.err());
                return Err(first.unwrap_or_else(|| context.api_error(RunError::ShuttingDown)));
            }
        }
    };
    let mut compile = StageResult::of(&first.outcome, Stage::Compile);
    if let Some(compile) = &mut compile {
        compile.cut(max_json);
    }
    let program = BatchProgram { language: language.name.clone(), version: language.version.to_string(), compile };
    let input_result = move |(index, result): (usize, Result<(run::Answer, Lease), ApiError>)| {
        let (result, lease) = match result {
            Ok((answer, lease)) => (Ok(answer), Some(lease)),
            Err(error) => (Err(error), None),
        };
        (InputResult::new(index, result, expected.get(index).and_then(Option::as_deref), max_json), lease)
    };
    early.push((index, Ok((first, lease))));
    let completed =
        stream::iter(early).chain(stream::poll_fn(move |context| completed.poll_recv(context))).map(input_result);
    if preferences.lines {
        return as_lines(program, frame, completed);
    }
    let (mut results, leases): (Vec<InputResult>, Vec<Option<Lease>>) = completed.unzip().await;
    results.sort_by_key(|result| result.index);
    let passed = results.iter().all(|result| result.passed);
    let leases = leases.into_iter().flatten().chain([frame]).collect();
    body::leased_json(BatchResponse { program, passed, results }, leases).await
}

/// Responds with a line of JSON for the program, then one for each input.
fn as_lines(
    program: BatchProgram,
    frame: Lease,
    results: impl Stream<Item = (InputResult, Option<Lease>)> + Send + Sync + 'static,
) -> Result<Response, ApiError> {
    let head = stream::iter(lines(program, vec![frame])?);
    let line = |(result, lease): (InputResult, Option<Lease>)| {
        let line = lines(result, lease.into_iter().collect());
        stream::iter(line.into_iter().flatten())
    };
    let mut response = warp::reply::stream(head.chain(results.flat_map(line)).map(Ok::<_, Infallible>)).into_response();
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(NDJSON));
    response.headers_mut().insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(response)
}

/// A value as a line of JSON, in chunks.
fn lines<T: Texts>(mut value: T, leases: Vec<Lease>) -> Result<impl Iterator<Item = Bytes> + use<T>, ApiError> {
    let mut writer = Writer::new(&mut value, Fields::AsDeclared, leases)?.wrapped(b"", b"\n");
    Ok(std::iter::from_fn(move || writer.chunk()))
}

#[cfg(test)]
mod tests {
    use super::equal_lines;

    #[test]
    fn trailing_white_space_is_ignored() {
        for (one, other) in [("1\n2\n", "1\n2"), ("1 \r\n2\n\n", "1\n2"), ("", "\n"), (" 1", " 1")] {
            assert!(equal_lines(one, other), "{one:?} {other:?}");
        }
        for (one, other) in [("1\n\n2", "1\n2"), ("1", " 1"), ("", "x"), ("1 2", "1  2")] {
            assert!(!equal_lines(one, other), "{one:?} {other:?}");
        }
    }
}
