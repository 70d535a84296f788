//! The sources of settings: the built-in defaults, a file, the environment, and flags. Each overrides the one before.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;

use figment::Figment;
use figment::providers::{Env, Format, Serialized, Toml};
use figment::value::{Dict, Value};
use serde::Serialize;

use crate::config::error::{ConfigError, malformed};
use crate::config::settings::Settings;
use crate::model::language;
use crate::sandbox::engine::EngineKind;

/// The configuration file if `--config` names no other. It need not exist.
const DEFAULT_FILE: &str = "/etc/coderunner/coderunner.toml";

const DEFAULTS: &str = include_str!("defaults.toml");

/// The prefix of environment variables.
pub(super) const PREFIX: &str = "CODERUNNER_";

/// Variables with our prefix that are not settings: the path of the file, and the level and format of the log.
const NOT_SETTINGS: [&str; 3] = ["config", "log", "log_format"];

/// Second prefix, after [`PREFIX`], of variables that only tests read.
const TEST_PREFIX: &str = "test_";

/// Settings from flags or from a verb itself, which override all other sources.
#[derive(Debug, Default, Serialize)]
pub struct Overrides {
    /// `--listen`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listen: Option<SocketAddr>,
    /// `--language`, the default language first
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub languages: Vec<String>,
    /// `--engine`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub engine: Option<EngineKind>,
    /// Instance name of a verb other than `serve`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instance: Option<String>,
    /// Containers at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub containers: Option<usize>,
}

impl Settings {
    /// Reads and checks all sources. Without `file`, reads `/etc/coderunner/coderunner.toml` if it exists.
    pub fn load(file: Option<&Path>, overrides: &Overrides) -> Result<Settings, ConfigError> {
        let path = file.unwrap_or(Path::new(DEFAULT_FILE));
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if file.is_none() && error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(source) => {
                return Err(ConfigError::Unreadable { path: path.into(), source });
            }
        };
        Settings::from_layers(&path.display().to_string(), &text, overrides)
    }

    /// Like [`Settings::load`], with `text` as the content of the configuration file. Errors call that file `name`.
    pub(crate) fn from_layers(name: &str, text: &str, overrides: &Overrides) -> Result<Settings, ConfigError> {
        let built_in = Figment::from(Toml::string(DEFAULTS)).merge(Toml::string(language::CATALOGUE));
        let keys = setting_keys(&built_in)?;
        let figment =
            built_in.merge(Toml::string(text)).merge(environment(keys)).merge(Serialized::defaults(overrides));
        let settings: Settings = figment.extract().map_err(|error| malformed(error, name))?;
        settings.check()?;
        Ok(settings)
    }
}

/// Maps the name of each variable, without the prefix, to its key: cache_ttl → cache.ttl.
fn setting_keys(built_in: &Figment) -> Result<BTreeMap<String, String>, ConfigError> {
    fn walk(prefix: &str, dict: &Dict, keys: &mut BTreeMap<String, String>) {
        for (name, value) in dict {
            let key = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
            match value {
                Value::Dict(_, inner) if key != "language" => walk(&key, inner, keys),
                _ => drop(keys.insert(key.replace('.', "_"), key)),
            }
        }
    }
    let mut keys = BTreeMap::new();
    let dict: Dict = built_in.extract().map_err(|error| malformed(error, "defaults"))?;
    walk("", &dict, &mut keys);
    Ok(keys)
}

/// The settings in environment variables.
fn environment(keys: BTreeMap<String, String>) -> Env {
    let settings = Env::prefixed(PREFIX).ignore(&NOT_SETTINGS).filter(|name| !name.starts_with(TEST_PREFIX));
    settings.map(move |name| match keys.get(&name.as_str().to_ascii_lowercase()) {
        Some(key) => key.clone().into(),
        // Kept unchanged, so that the extraction refuses it by its name.
        None => name.as_str().to_ascii_lowercase().into(),
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bytesize::ByteSize;

    use super::*;
    use crate::config::tests::{load, refusal};

    #[test]
    fn configuration_file_overrides_single_keys() {
        let settings =
            load("[cache]\nttl = \"1m\"\n[language.c]\nimage = \"localhost/c\"\nlimits = { memory = \"64MiB\" }")
                .unwrap();
        assert_eq!(settings.cache.ttl, Duration::from_secs(60));
        assert_eq!(settings.cache.size, ByteSize::mib(64));
        let c = settings.language("c").unwrap();
        assert_eq!((c.image.as_str(), c.source.as_str()), ("localhost/c", "main.c"));
        assert_eq!((c.limits.memory, c.limits.processes), (ByteSize::mib(64), 64));
    }

    #[test]
    fn errors_name_unknown_keys() {
        assert!(refusal("containres = 3").contains("containres"));
        assert!(refusal("[cache]\nttll = \"1m\"").contains("ttll"));
        assert!(refusal("[language.c]\nimages = \"x\"").contains("images"));
        assert!(refusal("[language.c.limits]\nmemry = 1").contains("memry"));
        assert!(refusal("[languages.c]\nimage = \"x\"").contains("languages"));
    }

    #[test]
    fn a_new_language_needs_all_required_keys() {
        let message = refusal("[language.cobol]\nimage = \"x\"");
        assert!(message.contains("missing field"), "{message}");
        let entry = "image = \"x\"\nsource = \"a.cob\"\nrun = [\"cobc\"]\nhealth = { code = \"\", output = \"\" }";
        load(&format!("[language.cobol]\n{entry}")).unwrap();
    }

    #[test]
    fn flags_override_the_file() {
        let flags = Overrides { languages: vec!["c".into()], ..Overrides::default() };
        let settings = Settings::from_layers("t", "languages = [\"python\"]", &flags).unwrap();
        assert_eq!(settings.languages, ["c"]);
    }

    #[test]
    fn every_setting_has_an_environment_variable() {
        let built_in = Figment::from(Toml::string(DEFAULTS));
        let keys = setting_keys(&built_in).unwrap();
        assert_eq!(keys["cache_ttl"], "cache.ttl");
        assert_eq!(keys["limits_run_time"], "limits.run_time");
        let mut names: Vec<_> = keys.keys().collect();
        names.dedup();
        assert_eq!(names.len(), keys.values().len());
    }
}
