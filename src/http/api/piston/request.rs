//! Requests of Piston's API, and their conversion to jobs.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::alphabet::STANDARD as ALPHABET;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use serde::Deserialize;
use utoipa::ToSchema;

use crate::http::api::piston::version::is_within;
use crate::http::error::ApiError;
use crate::model::job::{Job, SourceFile, Streams};
use crate::model::language::{Language, is_file_name, named};
use crate::model::limits::{Limits, StageMemory};

/// Most files of a request: all names have to fit into one message to init, and directories count as inodes too.
const MAX_FILES: usize = 100;

/// Most parts of a file's path.
const MAX_DEPTH: usize = 16;

/// Most bytes of all arguments as JSON: they have to fit into one message to init.
const MAX_ARGS: usize = 96 * 1024;

/// Base64, padded or not.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &ALPHABET,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// The request. Unknown fields are ignored; null is the same as leaving a field out.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = Program, example = json!({"language": "bash", "version": "*", "files": [{"content": "echo hello"}]}))]
pub struct ExecuteRequest {
    /// Name or alias of a language.
    pub language: String,
    /// The accepted versions, as an npm range; any version if left out.
    pub version: Option<String>,
    /// The source files. The first one is the program, whatever its name.
    #[schema(min_items = 1, max_items = 100)]
    pub files: Vec<File>,
    /// Standard input of the program.
    pub stdin: Option<String>,
    /// Arguments appended to the run command.
    pub args: Option<Vec<String>>,
    /// Wall time limit of compiling in milliseconds.
    #[schema(minimum = 1)]
    pub compile_timeout: Option<f64>,
    /// Wall time limit of running in milliseconds.
    #[schema(minimum = 1)]
    pub run_timeout: Option<f64>,
    /// CPU time limit of compiling in milliseconds, all processes together.
    #[schema(minimum = 1)]
    pub compile_cpu_time: Option<f64>,
    /// CPU time limit of running in milliseconds, all processes together.
    #[schema(minimum = 1)]
    pub run_cpu_time: Option<f64>,
    /// Memory limit of compiling in bytes; -1 for the language's limit.
    #[schema(minimum = -1)]
    pub compile_memory_limit: Option<f64>,
    /// Memory limit of running in bytes; -1 for the language's limit.
    #[schema(minimum = -1)]
    pub run_memory_limit: Option<f64>,
}

/// A file of a request.
#[derive(Debug, Deserialize, ToSchema)]
pub struct File {
    /// A relative path without `.` or `..`; the server chooses one if left out.
    pub name: Option<String>,
    /// The contents.
    pub content: String,
    /// The encoding of `content`; `utf8` if left out.
    pub encoding: Option<Encoding>,
}

/// The encoding of a file's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Encoding {
    /// Plain text.
    Utf8,
    /// Base64, with or without padding.
    Base64,
    /// Hexadecimal.
    Hex,
}

impl ExecuteRequest {
    /// Converts the request to a job. Returns its language as well.
    pub fn into_job(self, languages: &[Arc<Language>], source_limit: usize) -> Result<(Arc<Language>, Job), ApiError> {
        let range = self.version.as_deref().unwrap_or("*");
        let language = named(languages, &self.language).filter(|language| is_within(&language.version, range));
        let Some(language) = language.map(Arc::clone) else {
            return Err(bad(format!("{}-{range} runtime is unknown; GET /api/v2/runtimes lists them", self.language)));
        };
        let mut job = language.job_of(decode_files(&language, self.files, source_limit)?, Streams::Separate);
        let max = &language.limits;
        job.limits = Limits {
            compile_time: time("compile_timeout", self.compile_timeout, max.compile_time)?,
            run_time: time("run_timeout", self.run_timeout, max.run_time)?,
            compile_cpu_time: time("compile_cpu_time", self.compile_cpu_time, max.compile_cpu_time)?,
            run_cpu_time: time("run_cpu_time", self.run_cpu_time, max.run_cpu_time)?,
            ..job.limits
        };
        job.memory = StageMemory {
            compile: memory("compile_memory_limit", self.compile_memory_limit, max.memory.as_u64())?,
            run: memory("run_memory_limit", self.run_memory_limit, max.memory.as_u64())?,
        };
        job.args = check_args(self.args.unwrap_or_default())?.into();
        job.stdin = self.stdin.unwrap_or_default().into();
        job.has_room().map_err(bad)?;
        Ok((language, job))
    }
}

/// Checks the arguments for a program: no NUL, at most `MAX_ARGS` bytes.
pub fn check_args(args: Vec<String>) -> Result<Vec<String>, ApiError> {
    if args.iter().any(|arg| arg.contains('\0')) {
        return Err(bad("args must not contain NUL"));
    }
    match serde_json::to_vec(&args) {
        Ok(json) if json.len() <= MAX_ARGS => Ok(args),
        json => {
            let size = json.ok().map(|json| json.len());
            Err(ApiError::TooLarge { what: "the args together are", size, limit: MAX_ARGS })
        }
    }
}

fn bad(message: impl Into<String>) -> ApiError {
    ApiError::BadRequest(message.into())
}

/// Decodes the files of a request and names them as `job_files` does.
fn decode_files(language: &Language, files: Vec<File>, source_limit: usize) -> Result<Vec<SourceFile>, ApiError> {
    let decoded = files.into_iter().enumerate().map(|(at, file)| {
        let content = match file.encoding.unwrap_or(Encoding::Utf8) {
            Encoding::Utf8 => Some(file.content.into_bytes()),
            Encoding::Base64 => BASE64.decode(file.content).ok(),
            Encoding::Hex => hex::decode(file.content).ok(),
        };
        let content = content.ok_or_else(|| bad(format!("files[{at}].content is not of its encoding")))?;
        Ok((file.name, content))
    });
    job_files(language, decoded.collect::<Result<_, ApiError>>()?, source_limit)
}

/// Checks and completes the names of files. The first file is the program and gets the source name of the language.
pub fn job_files(
    language: &Language,
    files: Vec<(Option<String>, Vec<u8>)>,
    source_limit: usize,
) -> Result<Vec<SourceFile>, ApiError> {
    if files.is_empty() || files.len() > MAX_FILES {
        return Err(bad(format!("files must be 1 to {MAX_FILES}; there are {}", files.len())));
    }
    let mut size = 0;
    let mut placed: Vec<SourceFile> = Vec::with_capacity(files.len());
    for (at, (name, content)) in files.into_iter().enumerate() {
        let name = match name.filter(|name| !name.is_empty()) {
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
        let used_names = language.reserved().chain(placed.iter().map(|file| file.name.as_str()));
        if let Some(other) = used_names.into_iter().find(|other| overlap(&name, other)) {
            return Err(bad(format!(
                "files[{at}].name {name:?} is in the way of {other:?}, which is there already (the first file is always {:?})",
                language.source
            )));
        }
        size += content.len() + name.len();
        placed.push(SourceFile { name, content: content.into() });
    }
    match size > source_limit {
        true => Err(ApiError::TooLarge { what: "the files together are", size: Some(size), limit: source_limit }),
        false => Ok(placed),
    }
}

/// Whether two paths conflict: they are equal, or one is a directory in the path of the other.
fn overlap(one: &str, other: &str) -> bool {
    let within = |inner: &str, outer: &str| inner.strip_prefix(outer).is_some_and(|rest| rest.starts_with('/'));
    one == other || within(one, other) || within(other, one)
}

fn time(name: &str, requested: Option<f64>, max: Duration) -> Result<Duration, ApiError> {
    let Some(millis) = requested else { return Ok(max) };
    let max_millis = max.as_secs_f64() * 1e3;
    if (1.0..=max_millis).contains(&millis) {
        return Ok(Duration::from_secs_f64(millis / 1e3).min(max));
    }
    Err(bad(format!("{name} must be from 1 to the configured limit of {max_millis} milliseconds")))
}

fn memory(name: &str, requested: Option<f64>, max: u64) -> Result<Option<u64>, ApiError> {
    match requested {
        None | Some(-1.0) => Ok(None),
        // Exact: memory sizes are far below 2^53.
        Some(bytes) if (1.0..=max as f64).contains(&bytes) => Ok(Some(bytes as u64).filter(|bytes| *bytes < max)),
        Some(_) => Err(bad(format!("{name} must be from 1 to the configured limit of {max} bytes, or -1 for that"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files_named(names: &[&str]) -> Result<Vec<SourceFile>, ApiError> {
        let file = |name: &&str| File { name: Some((*name).into()), content: "x".into(), encoding: None };
        decode_files(&crate::config::tests::language("c"), names.iter().map(file).collect(), 1000)
    }

    #[test]
    fn first_file_is_the_program_whatever_its_name() {
        let names = |placed: Vec<SourceFile>| placed.into_iter().map(|file| file.name).collect::<Vec<_>>();
        assert_eq!(names(files_named(&["cool.txt", "dir/b.h"]).unwrap()), ["main.c", "dir/b.h"]);
        assert_eq!(names(files_named(&["", ""]).unwrap()), ["main.c", "file1.code"]);
    }

    #[test]
    fn escaping_or_clashing_file_names_are_rejected() {
        for name in
            ["/etc/passwd", "..", "../x", "a/../../x", ".", "a//b", "a/", "nul\0", &"x".repeat(256), &"d/".repeat(20)]
        {
            assert!(files_named(&[name]).is_err() && files_named(&["a", name]).is_err(), "{name:?}");
        }
        for names in [["a", "main.c"], ["a", "out"], ["a", "out/x"], ["a", "main.c/x"]] {
            assert!(files_named(&names).is_err(), "{names:?}");
        }
        for names in [["a", "b", "b"], ["a", "b", "b/c"], ["a", "b/c", "b"]] {
            assert!(files_named(&names).is_err(), "{names:?}");
        }
        files_named(&["a", "b", "bc", "d/b", "d/c"]).unwrap();
        assert!(files_named(&[]).is_err() && files_named(&["x"; 101]).is_err());
    }

    #[test]
    fn file_contents_are_decoded_and_bounded() {
        let language = crate::config::tests::language("c");
        let one = |content: &str, encoding| {
            decode_files(&language, vec![File { name: None, content: content.into(), encoding: Some(encoding) }], 16)
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
    fn requests_can_lower_limits_but_not_raise_or_zero_them() {
        let max = Duration::from_secs(5);
        assert_eq!(time("t", None, max).unwrap(), max);
        assert_eq!(time("t", Some(5000.0), max).unwrap(), max);
        assert_eq!(time("t", Some(1.5), max).unwrap(), Duration::from_micros(1500));
        for wrong in [0.0, -1.0, 0.5, 5000.1, 1e300] {
            assert!(time("t", Some(wrong), max).is_err() && memory("m", Some(wrong), 4000).is_err() == (wrong != -1.0));
        }
        assert_eq!(memory("m", Some(-1.0), 4000).unwrap(), None);
        assert_eq!(memory("m", Some(4000.0), 4000).unwrap(), None);
        assert_eq!(memory("m", Some(3999.0), 4000).unwrap(), Some(3999));
    }
}
