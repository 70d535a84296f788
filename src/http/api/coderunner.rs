//! `POST /coderunner`: takes code, responds with three fields.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use warp::filters::BoxedFilter;
use warp::reply::Response;

use crate::http::Api;
use crate::http::error::ApiError;
use crate::http::json::is_json;
use crate::http::openapi::ErrorResponses;
use crate::http::request::{Call, post};
use crate::http::text::{Text, Texts};
use crate::model::job::{Job, Stage, Streams};
use crate::model::language::Language;
use crate::model::outcome::Outcome;

/// A valid request, shown in error messages.
const EXAMPLE: &str = "{\"code\": \"…\"}";

/// The request. Unknown fields are ignored.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = Code, example = json!({"code": "echo hello"}))]
pub struct CodeRequest {
    /// The program, in the default language.
    code: String,
}

/// The response.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = CodeAnswer)]
struct CodeResponse {
    /// 1 if it compiled, 0 if not.
    #[schema(maximum = 1)]
    status: u8,
    /// What the compiler printed, both streams in order.
    #[schema(value_type = String)]
    compile_output: Text,
    /// What the program printed, both streams in order. If it was cut short, a last line that begins with `coderunner:`
    /// says why.
    #[schema(value_type = String)]
    run_output: Text,
}

impl From<&Arc<Outcome>> for CodeResponse {
    fn from(outcome: &Arc<Outcome>) -> CodeResponse {
        CodeResponse {
            status: outcome.compiled().into(),
            compile_output: Text::explained(outcome, Stage::Compile),
            run_output: Text::explained(outcome, Stage::Run),
        }
    }
}

impl Texts for CodeResponse {
    fn each_text(&mut self, visit: &mut dyn FnMut(&mut Text)) {
        visit(&mut self.compile_output);
        visit(&mut self.run_output);
    }
}

impl CodeRequest {
    /// Converts the request to a job in `language`.
    pub fn into_job(self, language: &Language, source_limit: usize) -> Result<Job, ApiError> {
        if self.code.len() > source_limit {
            return Err(ApiError::TooLarge { what: "the code is", size: Some(self.code.len()), limit: source_limit });
        }
        let job = language.job(self.code.into(), Streams::Merged);
        job.has_room().map_err(ApiError::BadRequest)?;
        Ok(job)
    }
}

/// Answers `/coderunner`.
pub fn filter(api: &Arc<Api>) -> BoxedFilter<(Response,)> {
    post(is_json, EXAMPLE, run, api)
}

/// Compile and run code in the default language
///
/// The status is 200 whatever the program does. With `Accept: text/event-stream` the response is a stream of events:
/// `queued`, `stage`, `data`, `exit`, and finally `result` with the plain response, or `error`.
#[utoipa::path(
    post, path = "/coderunner", operation_id = "code", request_body = CodeRequest,
    responses((status = 200, description = "The result of the run",
        content((CodeResponse = "application/json"), (String = "text/event-stream"))), ErrorResponses)
)]
async fn run(request: CodeRequest, call: Call) -> Result<Response, ApiError> {
    let language = call.api.runner.language(None).map_err(|error| call.context.api_error(error))?;
    let job = request.into_job(language, call.api.source_limit)?;
    call.respond(job, |answer| CodeResponse::from(&answer.outcome)).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::outcome::{Ended, StageOutcome, Usage};
    use crate::model::output::{Output, Stream};

    #[test]
    fn run_output_is_the_text_followed_by_the_reason() {
        for (bytes, cap) in
            [(&b"a"[..], 9), (b"a\n", 9), (b"", 9), (b"ab\xe2\x82\xac", 4), (b"\n\xe2\x82\xac", 2), (b"\xe2\x82", 1)]
        {
            let mut output = Output::default();
            output.push(Stream::Stdout, bytes, cap);
            let run = StageOutcome {
                stage: Stage::Run,
                ended: Ended::WallTime,
                artifact: true,
                usage: Usage::default(),
                output,
            };
            let text = run.explained();
            assert_eq!(
                text,
                run.output.text()
                    + if run.output.text().is_empty() || run.output.text().ends_with('\n') { "" } else { "\n" }
                    + &run.notes().unwrap()
            );
            let outcome = Arc::new(Outcome { compile: None, run: Some(run) });
            let json = serde_json::json!({"status": 1, "compileOutput": "", "runOutput": text});
            assert_eq!(serde_json::to_value(CodeResponse::from(&outcome)).unwrap(), json);
        }
    }
}
