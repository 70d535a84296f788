//! Errors of settings. Each message names the key, the value and the allowed values.

use std::path::PathBuf;

use figment::error::Kind;

use crate::config::sources::PREFIX;
use crate::model::language::LanguageError;

/// Why the settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The configuration file cannot be read.
    #[error("cannot read the configuration {}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The error of the kernel.
        source: std::io::Error,
    },
    /// An unknown key, or a value of the wrong type.
    #[error("{0}")]
    Malformed(String),
    /// A value that is not allowed.
    #[error("{key} = {value}: {allowed}")]
    OutOfRange {
        /// The key with its section.
        key: String,
        /// The value.
        value: String,
        /// The allowed values.
        allowed: String,
    },
    /// An invalid entry of the language catalogue.
    #[error(transparent)]
    Language(#[from] LanguageError),
}

/// Converts figment's first error to one that names the source, the key and the allowed values.
pub(super) fn malformed(error: figment::Error, file: &str) -> ConfigError {
    let Some(first) = error.into_iter().next() else {
        return ConfigError::Malformed(format!("{file}: cannot be read as settings"));
    };
    let from_environment = first.metadata.as_ref().is_some_and(|m| m.name.contains("environment"));
    let problem = match &first.kind {
        Kind::InvalidType(found, expected) | Kind::InvalidValue(found, expected) => {
            format!("{found} is not {}", type_in_words(expected))
        }
        Kind::UnknownField(_, known) => format!("there is no such key; known keys are {}", known.join(", ")),
        Kind::UnknownVariant(found, known) => format!("{found:?} is none of {}", known.join(", ")),
        other => other.to_string(),
    };
    let key = match first.path.join(".") {
        key if from_environment => format!("{PREFIX}{}", key.replace('.', "_").to_ascii_uppercase()),
        key => key,
    };
    let source = if from_environment { "the environment" } else { file };
    let parts = [source, &key, &problem];
    ConfigError::Malformed(parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(": "))
}

/// Describes an expected type in words instead of Rust's or serde's type names.
fn type_in_words(expected: &str) -> &str {
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
