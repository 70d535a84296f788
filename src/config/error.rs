//! Why settings cannot be used, in words that name the key, the value and what is allowed.

use std::path::PathBuf;

use figment::error::Kind;

use crate::config::sources::PREFIX;
use crate::model::language::LanguageError;

/// Why the settings cannot be used. Each message names the key, the value and what is allowed.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file that was named cannot be read.
    #[error("cannot read the configuration {}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A key that does not exist, or a value of the wrong kind.
    #[error("{0}")]
    Malformed(String),
    /// A value out of its range.
    #[error("{key} = {value}: {allowed}")]
    OutOfRange {
        /// The key with its section.
        key: String,
        /// What was given.
        value: String,
        /// What is allowed.
        allowed: String,
    },
    /// An entry of the catalogue is wrong.
    #[error(transparent)]
    Language(#[from] LanguageError),
}

/// Converts figment's first error to one that names the key, where it was set, and what is allowed.
pub(super) fn malformed(error: figment::Error, file: &str) -> ConfigError {
    let Some(first) = error.into_iter().next() else {
        return ConfigError::Malformed(format!("{file}: not readable as settings"));
    };
    let from_environment = first.metadata.as_ref().is_some_and(|m| m.name.contains("environment"));
    let what = match &first.kind {
        Kind::InvalidType(found, expected) | Kind::InvalidValue(found, expected) => {
            format!("{found} is not {}", in_words(expected))
        }
        Kind::UnknownField(_, known) => format!("there is no such key; there are {}", known.join(", ")),
        Kind::UnknownVariant(found, known) => format!("{found:?} is none of {}", known.join(", ")),
        other => other.to_string(),
    };
    let key = match first.path.join(".") {
        key if from_environment => format!("{PREFIX}{}", key.replace('.', "_").to_ascii_uppercase()),
        key => key,
    };
    let place = if from_environment { "the environment" } else { file };
    let parts = [place, &key, &what];
    ConfigError::Malformed(parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(": "))
}

/// Says in words, not in types of Rust, what kind of value was expected.
fn in_words(expected: &str) -> &str {
    match expected {
        "usize" | "u64" | "u32" => "a whole number",
        "f64" => "a number",
        "a nonzero u32" => "a whole number from 1",
        "parsable string" => "a size like \"64MiB\"",
        "a duration" => "a duration like \"10s\"",
        "path string" => "a path",
        "a sequence" => "a list like [\"c\", \"python\"]",
        "a map" => "a table",
        "socket address" => "an address and port like \"127.0.0.1:8080\"",
        other => other,
    }
}
