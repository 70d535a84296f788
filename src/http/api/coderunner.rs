//! `POST /coderunner`: code in, three fields out.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use warp::filters::BoxedFilter;
use warp::reply::Response;

use crate::http::Api;
use crate::http::error::ApiError;
use crate::http::json::is_json;
use crate::http::openapi::Refused;
use crate::http::request::{Call, post};
use crate::http::text::{Text, Texts};
use crate::model::job::{Job, Stage, Streams};
use crate::model::language::Language;
use crate::model::outcome::Outcome;

/// A request that is one, for those who sent another.
const EXAMPLE: &str = "{\"code\": \"…\"}";

/// What is asked. Fields of other APIs are ignored.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = Code, example = json!({"code": "echo hello"}))]
pub struct Request {
    /// The program, in the default language.
    code: String,
}

/// What is answered.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = CodeAnswer)]
struct Answer {
    /// 1 if it compiled, 0 if not.
    #[schema(maximum = 1)]
    status: u8,
    /// What the compiler printed, both streams in order.
    #[schema(value_type = String)]
    compile_output: Text,
    /// What the program printed, both streams in order. A last line that begins with `coderunner:` says why it was cut short.
    #[schema(value_type = String)]
    run_output: Text,
}

impl From<&Arc<Outcome>> for Answer {
    fn from(outcome: &Arc<Outcome>) -> Answer {
        Answer {
            status: outcome.compiled().into(),
            compile_output: Text::explained(outcome, Stage::Compile),
            run_output: Text::explained(outcome, Stage::Run),
        }
    }
}

impl Texts for Answer {
    fn each(&mut self, see: &mut dyn FnMut(&mut Text)) {
        see(&mut self.compile_output);
        see(&mut self.run_output);
    }
}

impl Request {
    /// The job that it stands for.
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
/// Whatever the program does, the answer is 200. With `Accept: text/event-stream` events tell what happens: `queued`,
/// `stage`, `data`, `exit`, and at last `result` with the plain answer, or `error`.
#[utoipa::path(
    post, path = "/coderunner", operation_id = "code", request_body = Request,
    responses((status = 200, description = "What became of it",
        content((Answer = "application/json"), (String = "text/event-stream"))), Refused)
)]
async fn run(request: Request, call: Call) -> Result<Response, ApiError> {
    let language = call.api.runner.language(None).map_err(|error| call.context.refusal(error))?;
    let job = request.into_job(language, call.api.source_limit)?;
    call.respond(job, |answer| Answer::from(&answer.outcome)).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::outcome::{Ended, StageOutcome, Usage};
    use crate::model::output::{Output, Stream};

    #[test]
    fn an_answer_is_the_text_and_why_it_was_cut_short() {
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
            let told = run.explained();
            assert_eq!(
                told,
                run.output.text()
                    + if run.output.text().is_empty() || run.output.text().ends_with('\n') { "" } else { "\n" }
                    + &run.notes().unwrap()
            );
            let outcome = Arc::new(Outcome { compile: None, run: Some(run) });
            let json = serde_json::json!({"status": 1, "compileOutput": "", "runOutput": told});
            assert_eq!(serde_json::to_value(Answer::from(&outcome)).unwrap(), json);
        }
    }
}
