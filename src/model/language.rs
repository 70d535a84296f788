//! Languages, which are data: an image, files, and the commands of two stages.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use figment::value::Dict;
use semver::Version;
use serde::{Deserialize, Serialize};

use crate::model::job::{Job, SourceFile, Stage, Streams};
use crate::model::limits::{Limits, StageMemory};
use crate::model::outcome::{Outcome, StageOutcome, Verdict};

/// The catalogue that is built in.
pub const CATALOGUE: &str = include_str!("languages.toml");

/// An entry of the catalogue as it is written. Its limits are only those that differ from the general ones.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LanguageSettings {
    image: String,
    #[serde(default = "some_version")]
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

/// The version of an entry that names none.
fn some_version() -> Version {
    Version::new(1, 0, 0)
}

impl LanguageSettings {
    /// Whether requests may use this name for it.
    pub fn has_alias(&self, name: &str) -> bool {
        self.aliases.iter().any(|alias| alias == name)
    }
}

/// What is wrong with an entry: its key, the value and what is allowed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("language.{language}.{key} = {value:?}: {allowed}")]
pub struct LanguageError {
    language: String,
    key: &'static str,
    value: String,
    allowed: &'static str,
}

/// A language that can be served.
#[derive(Debug, Clone, PartialEq)]
pub struct Language {
    /// Its key in the catalogue: lower-case letters, digits, `-`, `+` and `_`.
    pub name: String,
    /// The version that clients are told; they may ask for a range of versions.
    pub version: Version,
    /// Other names that requests may use.
    pub aliases: Vec<String>,
    /// The name of the image. Sandboxes are made from the id that it stood for when it was checked.
    pub image: String,
    /// Name of the file that a request's code becomes.
    pub source: String,
    /// Files beside it that a request cannot replace.
    pub files: BTreeMap<String, String>,
    compile: Vec<String>,
    artifact: Option<String>,
    run: Vec<String>,
    env: BTreeMap<String, String>,
    /// Limits of its sandboxes.
    pub limits: Limits,
    /// How its images are checked.
    pub health: Health,
}

impl Language {
    /// Checks an entry. `limits` are the general ones with the entry's own over them.
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

    /// The job of a request that is nothing but code: the language's own files are beside it.
    pub fn job(&self, code: Bytes, streams: Streams) -> Job {
        self.job_of(vec![SourceFile { name: self.source.clone(), content: code }], streams)
    }

    /// The job of a request's files, whose names were checked; the language's own are beside them.
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

    /// Names that a request's files cannot have: the language's own files, and what compiling makes.
    pub fn reserved(&self) -> impl Iterator<Item = &str> {
        self.files.keys().chain(&self.artifact).map(String::as_str)
    }

    /// The command of a stage; none where the language has no such stage.
    pub fn command(&self, stage: Stage) -> Option<&[String]> {
        match stage {
            Stage::Compile => (!self.compile.is_empty()).then_some(&self.compile),
            Stage::Run => Some(&self.run),
        }
    }

    /// The file that a stage must leave behind.
    pub fn artifact(&self, stage: Stage) -> Option<&str> {
        match stage {
            Stage::Compile => self.artifact.as_deref(),
            Stage::Run => None,
        }
    }

    /// The environment variables of its programs, with the memory limit inserted.
    pub fn environment(&self) -> Vec<(String, String)> {
        let memory = self.limits.memory.as_u64();
        let fill = |value: &String| {
            value.replace("{memory}", &memory.to_string()).replace("{memory/2}", &(memory / 2).to_string())
        };
        self.env.iter().map(|(name, value)| (name.clone(), fill(value))).collect()
    }
}

/// The language of this name or alias.
pub fn named<'a>(languages: &'a [Arc<Language>], name: &str) -> Option<&'a Arc<Language>> {
    languages.iter().find(|language| language.name == name || language.aliases.iter().any(|alias| alias == name))
}

/// How many characters of the output of a health program are reported when it is not what was expected.
const TOLD: usize = 300;

/// A program that shows whether an image works.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Health {
    /// Its source.
    pub code: String,
    /// What it must print.
    pub output: String,
}

impl Health {
    /// Says what is wrong with an outcome of this program, if anything is.
    pub fn failure(&self, outcome: &Outcome) -> Option<String> {
        let printed = outcome.run.as_ref().map(|run| run.output.text()).unwrap_or_default();
        if outcome.verdict() == Verdict::Ok && printed == self.output {
            return None;
        }
        let stages = [&outcome.compile, &outcome.run];
        let explained: String = stages.into_iter().flatten().map(StageOutcome::explained).collect();
        let explained: String = explained.chars().take(TOLD).collect();
        Some(format!("it ended with {:?} and printed {explained:?} instead of {:?}", outcome.verdict(), self.output))
    }
}

/// Whether this can be the name of a language, of an instance or of the owner of a key. Languages and instances become part
/// of container names and labels.
pub fn is_name(name: &str) -> bool {
    name.len() <= 32
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "-+_".contains(c))
}

/// Whether this is an image reference, which podman cannot take for an option.
fn is_image(image: &str) -> bool {
    (1..=255).contains(&image.len())
        && image.starts_with(|c: char| c.is_ascii_alphanumeric())
        && image.chars().all(|c| c.is_ascii_alphanumeric() || "./:@_-".contains(c))
}

/// Whether this is a path that stays below the directory it is joined to.
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
