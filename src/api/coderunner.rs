//! `POST /coderunner`: code in, three fields out.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::json;
use warp::Reply;
use warp::reply::Response;

use super::error::ApiError;
use super::{ApiSettings, Wishes, live};
use crate::job::{Job, Outcome, StageOutcome, Streams};
use crate::language::Language;
use crate::runner::Runner;

/// A request that is one, for those who sent another.
pub const EXAMPLE: &str = "{\"code\": \"…\"}";

/// What is asked. Fields of other APIs are ignored.
#[derive(Debug, Deserialize)]
pub struct Request {
    code: String,
}

/// What is answered.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Answer {
    status: u8,
    compile_output: String,
    run_output: String,
}

impl From<&Outcome> for Answer {
    fn from(outcome: &Outcome) -> Answer {
        let text = |stage: &Option<StageOutcome>| stage.as_ref().map(StageOutcome::explained).unwrap_or_default();
        Answer {
            status: outcome.compiled().into(),
            compile_output: text(&outcome.compile),
            run_output: text(&outcome.run),
        }
    }
}

impl Request {
    /// The job that it stands for.
    pub fn into_job(self, language: &Language, source_limit: usize) -> Result<Job, ApiError> {
        if self.code.len() > source_limit {
            return Err(ApiError::TooLarge { what: "code", limit: source_limit });
        }
        Ok(language.job(self.code.into(), Streams::Merged))
    }
}

/// Runs the code in the default language.
pub async fn run(
    request: Result<Request, ApiError>,
    wishes: Wishes,
    runner: Arc<Runner>,
    settings: Arc<ApiSettings>,
) -> Response {
    let answer = async {
        let language = runner.language(None)?;
        let job = request?.into_job(language, settings.source_limit)?;
        if wishes.events {
            return Ok(live::events(runner, job, wishes.reuse, |answer| json!(Answer::from(&*answer.outcome))));
        }
        let answer = runner.run(job, wishes.reuse).await?;
        Ok::<_, ApiError>(warp::reply::json(&Answer::from(&*answer.outcome)).into_response())
    };
    match answer.await {
        Ok(response) => response,
        Err(error) => error.into_response(),
    }
}
