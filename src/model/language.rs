//! Languages: each is an image, some files, and the commands of the two stages.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use figment::value::Dict;
use semver::Version;
use serde::{Deserialize, Serialize};

use crate::model::job::{Job, SourceFile, Stage, Streams};
use crate::model::limits::{Limits, StageMemory};
use crate::model::outcome::{Outcome, StageOutcome, Verdict};

/// The built-in catalogue of languages.
pub const CATALOGUE: &str = include_str!("languages.toml");

/// A catalogue entry as written in TOML. `limits` holds only those that differ from the general limits.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LanguageSettings {
    image: String,
    #[serde(default = "default_version")]
    version: Version,
    #[serde(default)]
    aliases: Vec<String>,
    source: String,
    #[serde(default)]
    files: BTreeMap<String, String>,
    #[serde(default)]
    compile: Vec<String>,
    artifact: Option<String>,
    run: Vec<String>,
    #[serde(default)]
    env: BTreeMap<String, String>,
    #[serde(default)]
    pub(crate) limits: Dict,
    health: Health,
}

/// Version of an entry that names none.
fn default_version() -> Version {
    Version::new(1, 0, 0)
}

impl LanguageSettings {
    /// Whether this is one of its aliases.
    pub fn has_alias(&self, name: &str) -> bool {
        self.aliases.iter().any(|alias| alias == name)
    }
}

/// An invalid entry: the key, its value and what is allowed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("language.{language}.{key} = {value:?}: {allowed}")]
pub struct LanguageError {
    language: String,
    key: &'static str,
    value: String,
    allowed: &'static str,
}

/// A checked language.
#[derive(Debug, Clone, PartialEq)]
pub struct Language {
    /// Name in the catalogue: lower-case letters, digits, `-`, `+` and `_`.
    pub name: String,
    /// Version shown to clients. A request may name a range that it has to be in.
    pub version: Version,
    /// Other names that requests may use.
    pub aliases: Vec<String>,
    /// Name of the image. Sandboxes use the image id that the name had when the image was checked.
    pub image: String,
    /// Name of the file that holds the request's program.
    pub source: String,
    /// Files that the language adds beside the source; a request cannot replace them.
    pub files: BTreeMap<String, String>,
    compile: Vec<String>,
    artifact: Option<String>,
    run: Vec<String>,
    env: BTreeMap<String, String>,
    /// Limits of its sandboxes.
    pub limits: Limits,
    /// Health program, which checks its image.
    pub health: Health,
}

impl Language {
    /// Checks an entry. `limits` are the general limits, overridden by those of the entry.
    pub fn new(name: &str, entry: LanguageSettings, limits: Limits) -> Result<Language, LanguageError> {
        let require = |ok: bool, key: &'static str, value: &str, allowed: &'static str| match ok {
            true => Ok(()),
            false => Err(LanguageError { language: name.into(), key, value: value.into(), allowed }),
        };
        let names = std::iter::once(name).chain(entry.aliases.iter().map(String::as_str));
        for name in names {
            require(is_name(name), "name", name, "1 to 32 of a-z, 0-9, -, + and _, a letter first")?;
        }
        require(is_image(&entry.image), "image", &entry.image, "an image name like docker.io/library/gcc:latest")?;
        for file in std::iter::once(&entry.source).chain(entry.files.keys()).chain(&entry.artifact) {
            require(is_file_name(file), "source, files or artifact", file, "a relative path without . or .. parts")?;
        }
        require(!entry.files.contains_key(&entry.source), "files", &entry.source, "another name than the source's")?;
        require(!entry.run.is_empty(), "run", "[]", "a command")?;
        for word in entry.run.iter().chain(&entry.compile) {
            require(!word.contains('\0'), "run or compile", word, "words without NUL")?;
        }
        for (key, value) in &entry.env {
            require(is_variable(key), "env", key, "names of letters, digits and _, no digit first")?;
            require(!value.contains('\0'), "env", value, "values without NUL")?;
        }
        Ok(Language {
            name: name.into(),
            version: entry.version,
            aliases: entry.aliases,
            image: entry.image,
            source: entry.source,
            files: entry.files,
            compile: entry.compile,
            artifact: entry.artifact,
            run: entry.run,
            env: entry.env,
            limits,
            health: entry.health,
        })
    }

    /// A job with a single source file. The language's own files are added.
    pub fn job(&self, code: Bytes, streams: Streams) -> Job {
        self.job_of(vec![SourceFile { name: self.source.clone(), content: code }], streams)
    }

    /// A job with these files, whose names the caller has checked. The language's own files are added.
    pub fn job_of(&self, files: Vec<SourceFile>, streams: Streams) -> Job {
        let own = self.files.iter().map(|(name, text)| SourceFile { name: name.clone(), content: text.clone().into() });
        Job {
            language: self.name.clone(),
            files: files.into_iter().chain(own).collect(),
            stdin: Bytes::new(),
            args: Arc::default(),
            streams,
            limits: self.limits.clone(),
            memory: StageMemory::default(),
        }
    }

    /// File names that a request cannot use: the language's own files and the compile artifact.
    pub fn reserved(&self) -> impl Iterator<Item = &str> {
        self.files.keys().chain(&self.artifact).map(String::as_str)
    }

    /// The command of a stage, or `None` if the language has no such stage.
    pub fn command(&self, stage: Stage) -> Option<&[String]> {
        match stage {
            Stage::Compile => (!self.compile.is_empty()).then_some(&self.compile),
            Stage::Run => Some(&self.run),
        }
    }

    /// The file that a stage must create.
    pub fn artifact(&self, stage: Stage) -> Option<&str> {
        match stage {
            Stage::Compile => self.artifact.as_deref(),
            Stage::Run => None,
        }
    }

    /// The environment variables of its programs. `{memory}` and `{memory/2}` become the memory limit and half of it,
    /// in bytes.
    pub fn environment(&self) -> Vec<(String, String)> {
        let memory = self.limits.memory.as_u64();
        let fill = |value: &String| {
            value.replace("{memory}", &memory.to_string()).replace("{memory/2}", &(memory / 2).to_string())
        };
        self.env.iter().map(|(name, value)| (name.clone(), fill(value))).collect()
    }
}

/// Finds a language by its name or an alias.
pub fn named<'a>(languages: &'a [Arc<Language>], name: &str) -> Option<&'a Arc<Language>> {
    languages.iter().find(|language| language.name == name || language.aliases.iter().any(|alias| alias == name))
}

/// Most characters of a failed health program's output that are reported.
const REPORTED_OUTPUT: usize = 300;

/// A health program: it shows whether an image works.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Health {
    /// Its source.
    pub code: String,
    /// The exact output that it must print.
    pub output: String,
}

impl Health {
    /// Why this outcome of the health program is a failure, or `None` if it passed.
    pub fn failure(&self, outcome: &Outcome) -> Option<String> {
        let printed = outcome.run.as_ref().map(|run| run.output.text()).unwrap_or_default();
        if outcome.verdict() == Verdict::Ok && printed == self.output {
            return None;
        }
        let stages = [&outcome.compile, &outcome.run];
        let explained: String = stages.into_iter().flatten().map(StageOutcome::explained).collect();
        let explained: String = explained.chars().take(REPORTED_OUTPUT).collect();
        Some(format!("it ended with {:?} and printed {explained:?} instead of {:?}", outcome.verdict(), self.output))
    }
}

/// Whether this can be the name of a language, an instance or a key. Names of languages and instances become part of
/// container names and labels.
pub fn is_name(name: &str) -> bool {
    name.len() <= 32
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "-+_".contains(c))
}

/// Whether this is an image reference. One that starts with `-` is refused: podman would take it for an option.
fn is_image(image: &str) -> bool {
    (1..=255).contains(&image.len())
        && image.starts_with(|c: char| c.is_ascii_alphanumeric())
        && image.chars().all(|c| c.is_ascii_alphanumeric() || "./:@_-".contains(c))
}

/// Whether this is a relative path that stays below the directory it is joined to.
pub fn is_file_name(name: &str) -> bool {
    (1..=255).contains(&name.len())
        && !name.contains('\0')
        && name.split('/').all(|part| !part.is_empty() && part != "." && part != "..")
}

/// Whether this can be the name of an environment variable.
fn is_variable(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}
