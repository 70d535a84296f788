//! Settings, from the built-in defaults, a file, `CODERUNNER_*` variables and flags, and checked as a whole.

mod checks;
mod error;
mod settings;
mod sources;

pub use error::ConfigError;
pub use settings::Settings;
pub use sources::Overrides;

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::model::language::Language;

    /// A language of the built-in catalogue.
    pub(crate) fn language(name: &str) -> Language {
        load("").unwrap().language(name).unwrap()
    }

    /// The settings with this text as the configuration file.
    pub(crate) fn load(text: &str) -> Result<Settings, ConfigError> {
        Settings::from_layers("test.toml", text, &Overrides::default())
    }

    /// The message of the error for these settings.
    pub(super) fn refusal(text: &str) -> String {
        load(text).unwrap_err().to_string()
    }
}
