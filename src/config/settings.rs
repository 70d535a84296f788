//! The types of all settings, and access to the languages that they define.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytesize::ByteSize;
use figment::Figment;
use figment::providers::Serialized;
use serde::{Deserialize, Serialize};

use crate::config::error::{ConfigError, malformed};
use crate::http::auth::AccessSettings;
use crate::images::UpdateSettings;
use crate::model::language::{Language, LanguageSettings};
use crate::model::limits::Limits;
use crate::model::size::exact;
use crate::run::cache::CacheSettings;
use crate::run::readiness::ReadySettings;
use crate::sandbox::engine::EngineKind;
use crate::scheduler::QueueSettings;

/// All settings. `defaults.toml` documents each key.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct Settings {
    #[serde(deserialize_with = "address")]
    pub listen: SocketAddr,
    pub instance: String,
    pub engine: EngineKind,
    pub languages: Vec<String>,
    pub containers: usize,
    pub require_limits: bool,
    pub allowed_hosts: Vec<String>,
    pub cors_origins: Vec<String>,
    #[serde(serialize_with = "exact")]
    pub body_limit: ByteSize,
    #[serde(serialize_with = "exact")]
    pub source_limit: ByteSize,
    #[serde(serialize_with = "exact")]
    pub answer_memory: ByteSize,
    pub playground: bool,
    pub podman: PathBuf,
    pub queue: QueueSettings,
    pub access: AccessSettings,
    pub ready: ReadySettings,
    pub cache: CacheSettings,
    pub batch: BatchSettings,
    pub update: UpdateSettings,
    pub shutdown: ShutdownSettings,
    pub limits: Limits,
    pub ceilings: Limits,
    language: BTreeMap<String, LanguageSettings>,
}

impl Settings {
    /// The enabled languages, the default one first.
    pub fn enabled(&self) -> Result<Vec<Arc<Language>>, ConfigError> {
        let mut enabled: Vec<Arc<Language>> = Vec::new();
        for name in &self.languages {
            let language = self.language(name)?;
            if enabled.iter().all(|other| other.name != language.name) {
                enabled.push(Arc::new(language));
            }
        }
        Ok(enabled)
    }

    /// The language of the catalogue with this name or alias.
    pub fn language(&self, name: &str) -> Result<Language, ConfigError> {
        self.language_with(name, |_| ())
    }

    /// Like [`Settings::language`], but applies `change` to its limits before they are checked.
    pub fn language_with(&self, name: &str, change: impl FnOnce(&mut Limits)) -> Result<Language, ConfigError> {
        let by_alias = || self.language.iter().find(|(_, entry)| entry.has_alias(name)).map(|(name, _)| name);
        let Some(name) = self.language.get_key_value(name).map(|(name, _)| name).or_else(by_alias) else {
            return Err(ConfigError::OutOfRange {
                key: "languages".into(),
                value: format!("{name:?}"),
                allowed: format!("one of {}", self.language.keys().cloned().collect::<Vec<_>>().join(", ")),
            });
        };
        let entry = self.language[name].clone();
        let section = format!("language.{name}.limits");
        let mut limits: Limits = Figment::from(Serialized::defaults(&self.limits))
            .merge(Serialized::defaults(&entry.limits))
            .extract()
            .map_err(|error| malformed(error, &section))?;
        change(&mut limits);
        self.check_limits(&section, &limits)?;
        Ok(Language::new(name, entry, limits)?)
    }

    /// The language whose source file has the same extension as this file.
    pub fn language_of(&self, file: &Path) -> Option<String> {
        let extension = file.extension()?;
        let has_extension = |name: &&str| {
            self.language(name).is_ok_and(|language| Path::new(&language.source).extension() == Some(extension))
        };
        self.catalogue().find(has_extension).map(str::to_owned)
    }

    /// The names of all languages of the catalogue, enabled or not.
    pub fn catalogue(&self) -> impl Iterator<Item = &str> {
        self.language.keys().map(String::as_str)
    }
}

/// `[batch]`
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BatchSettings {
    /// Largest build that is copied to the containers of a batch's other inputs.
    #[serde(serialize_with = "exact")]
    pub build: ByteSize,
}

/// `[shutdown]`
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShutdownSettings {
    /// How long running requests may take to end after the first signal.
    #[serde(with = "humantime_serde")]
    pub drain: Duration,
}

/// Deserializes a socket address with an error that names the value, which serde's own error does not.
fn address<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<SocketAddr, D::Error> {
    let text = String::deserialize(deserializer)?;
    text.parse().map_err(|_| serde::de::Error::invalid_value(serde::de::Unexpected::Str(&text), &"socket address"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::load;
    use crate::model::job::Stage;

    #[test]
    fn engine_name_crun_is_an_alias_of_direct() {
        assert_eq!(load("engine = \"crun\"").unwrap().engine, EngineKind::Direct);
        assert_eq!(load("engine = \"direct\"").unwrap().engine, EngineKind::Direct);
        assert!(<EngineKind as clap::ValueEnum>::from_str("crun", false).is_ok());
    }

    #[test]
    fn defaults_match_the_documentation() {
        let settings = load("").unwrap();
        assert_eq!(settings.listen.to_string(), "127.0.0.1:8080");
        assert_eq!(settings.containers, 10);
        assert_eq!(settings.cache.ttl, Duration::from_secs(600));
        assert_eq!(settings.update.interval, Duration::from_secs(7 * 86400));
        let pivot = settings.enabled().unwrap().remove(0);
        assert_eq!(pivot.name, "pivot");
        assert_eq!(pivot.image, "registry.cn-hangzhou.aliyuncs.com/pivot_studio/pivot_lang:latest");
        assert_eq!(pivot.limits.memory, ByteSize::mib(512));
    }

    #[test]
    fn pivot_entry_matches_its_compiler() {
        let pivot = load("").unwrap().language("pivot").unwrap();
        assert_eq!(pivot.source, "main.pi");
        assert_eq!(pivot.files["Kagari.toml"], "entry = \"main.pi\"\nproject = \"main\"\n");
        assert_eq!(pivot.command(Stage::Compile).unwrap().join(" "), "plc main.pi -o out");
        assert_eq!(pivot.artifact(Stage::Compile), Some("out"));
        assert_eq!(pivot.command(Stage::Run).unwrap(), ["./out"]);
        assert_eq!(pivot.environment(), [("PL_IMMIX_HEAP_SIZE".into(), (256u64 << 20).to_string())]);
    }

    #[test]
    fn every_catalogue_entry_is_valid() {
        let settings = load("").unwrap();
        assert!(settings.catalogue().count() >= 8);
        for name in settings.catalogue() {
            settings.language(name).unwrap();
        }
        assert_eq!(settings.language("js").unwrap().name, "javascript");
    }

    #[test]
    fn sizes_are_written_back_exactly() {
        let text = "[limits]\nmemory = \"1300MiB\"\noutput = 1100\n[ceilings]\nmemory = \"1300MiB\"\n[cache]\nsize = 0";
        let settings = load(text).unwrap();
        let limits = settings.language("c").unwrap().limits;
        assert_eq!((limits.memory, limits.output), (ByteSize::mib(1300), ByteSize(1100)));
        let written = toml::to_string(&settings).unwrap();
        assert!(written.contains("memory = \"1300MiB\"") && written.contains("output = \"1100B\""), "{written}");
        assert!(written.contains("size = \"0B\""), "{written}");
    }
}
