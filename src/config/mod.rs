//! Settings: built-in defaults, then a file, then `CODERUNNER_*`, then flags; checked as a whole.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytesize::ByteSize;
use figment::Figment;
use figment::error::Kind;
use figment::providers::{Env, Format, Serialized, Toml};
use figment::value::{Dict, Value};
use serde::{Deserialize, Serialize};
use warp::http::Uri;

use crate::http::auth::AccessSettings;
use crate::http::origin::is_host;
use crate::images::UpdateSettings;
use crate::model::language::{self, Language, LanguageError, LanguageSettings};
use crate::model::limits::Limits;
use crate::model::size::{exact, size_text};
use crate::run::cache::CacheSettings;
use crate::run::readiness::ReadySettings;
use crate::sandbox::engine::EngineKind;
use crate::scheduler::QueueSettings;

/// Read where `--config` names no other file; need not exist.
pub const DEFAULT_FILE: &str = "/etc/coderunner/coderunner.toml";

const DEFAULTS: &str = include_str!("defaults.toml");
const PREFIX: &str = "CODERUNNER_";

/// Variables with our prefix that are no settings: the file's path and how the log is.
const NOT_SETTINGS: [&str; 3] = ["config", "log", "log_format"];

/// How those begin that only tests read.
const OF_TESTS: &str = "test_";

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

/// What flags may override.
#[derive(Debug, Default, Serialize)]
pub struct Overrides {
    /// `--listen`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listen: Option<SocketAddr>,
    /// `--language`, the default one first
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub languages: Vec<String>,
    /// `--engine`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub engine: Option<EngineKind>,
    /// The instance of a verb that is not the server.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instance: Option<String>,
    /// Containers at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub containers: Option<usize>,
}

/// Everything that can be set. `defaults.toml` says what each key means.
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

/// `[batch]`
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BatchSettings {
    /// The most that what compiling made may be to go to the containers of other inputs.
    #[serde(serialize_with = "exact")]
    pub build: ByteSize,
}

/// `[shutdown]`
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShutdownSettings {
    /// How long running requests may take to end.
    #[serde(with = "humantime_serde")]
    pub drain: Duration,
}

impl Settings {
    /// Reads all layers. Without `file`, [`DEFAULT_FILE`] is read if it exists.
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

    pub(crate) fn from_layers(name: &str, text: &str, overrides: &Overrides) -> Result<Settings, ConfigError> {
        let built_in = Figment::from(Toml::string(DEFAULTS)).merge(Toml::string(language::CATALOGUE));
        let keys = setting_keys(&built_in)?;
        let figment =
            built_in.merge(Toml::string(text)).merge(environment(keys)).merge(Serialized::defaults(overrides));
        let settings: Settings = figment.extract().map_err(|error| malformed(error, name))?;
        settings.check()?;
        Ok(settings)
    }

    /// The languages that are served, the default one first.
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

    /// A language of the catalogue by its name or an alias.
    pub fn language(&self, name: &str) -> Result<Language, ConfigError> {
        self.language_with(name, |_| ())
    }

    /// Like [`Settings::language`], with other limits.
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

    /// The language whose sources end like this file.
    pub fn language_of(&self, file: &Path) -> Option<String> {
        let ending = file.extension()?;
        let is = |name: &&str| self.language(name).is_ok_and(|l| Path::new(&l.source).extension() == Some(ending));
        self.catalogue().find(is).map(str::to_owned)
    }

    /// The catalogue's names, enabled or not.
    pub fn catalogue(&self) -> impl Iterator<Item = &str> {
        self.language.keys().map(String::as_str)
    }

    fn check(&self) -> Result<(), ConfigError> {
        fn within<T: PartialOrd>(
            key: &str,
            value: T,
            least: T,
            most: T,
            shown: impl Fn(&T) -> String,
        ) -> Result<(), ConfigError> {
            if least <= value && value <= most {
                return Ok(());
            }
            Err(ConfigError::OutOfRange {
                key: key.into(),
                value: shown(&value),
                allowed: format!("from {} to {}", shown(&least), shown(&most)),
            })
        }
        let number = |n: &usize| n.to_string();
        let time = |t: &Duration| humantime::format_duration(*t).to_string();
        let seconds = Duration::from_secs;
        // 150: podman has a keyring made per container, and kernel.keys.maxkeys allows a user 200.
        within("containers", self.containers, 1, 150, number)?;
        within("queue.length", self.queue.length, 0, 1_000_000, number)?;
        within("queue.wait", self.queue.wait, Duration::from_millis(1), seconds(3600), time)?;
        within("cache.ttl", self.cache.ttl, Duration::from_millis(1), seconds(30 * 86400), time)?;
        within("cache.size", self.cache.size, ByteSize(0), ByteSize::tib(1), size_text)?;
        within("batch.build", self.batch.build, ByteSize(0), ByteSize::gib(4), size_text)?;
        within("update.interval", self.update.interval, seconds(1), seconds(366 * 86400), time)?;
        within("update.pull_timeout", self.update.pull_timeout, seconds(1), seconds(86400), time)?;
        within("ready.interval", self.ready.interval, seconds(1), seconds(86400), time)?;
        within("access.burst", self.access.burst.get(), 1, 1_000_000, u32::to_string)?;
        if let Some(name) = self.access.keys.keys().find(|name| !language::is_name(name)) {
            return Err(ConfigError::OutOfRange {
                key: "access.keys".into(),
                value: format!("{name:?}"),
                allowed: "owners of 1 to 32 of a-z, 0-9, -, + and _, a letter first".into(),
            });
        }
        within("shutdown.drain", self.shutdown.drain, seconds(0), seconds(3600), time)?;
        within("body_limit", self.body_limit, ByteSize::kib(1), ByteSize::mib(256), size_text)?;
        let named = |s: &ByteSize| size_text(s) + if *s == self.body_limit { ", body_limit" } else { "" };
        within("source_limit", self.source_limit, ByteSize(1), self.body_limit, named)?;
        within("answer_memory", self.answer_memory, ByteSize::mib(4), ByteSize::tib(1), size_text)?;
        if !language::is_name(&self.instance) {
            return Err(ConfigError::OutOfRange {
                key: "instance".into(),
                value: format!("{:?}", self.instance),
                allowed: "1 to 32 of a-z, 0-9, -, + and _, a letter first".into(),
            });
        }
        if !self.podman.is_absolute() && self.podman.components().count() != 1 {
            return Err(ConfigError::OutOfRange {
                key: "podman".into(),
                value: format!("{:?}", self.podman),
                allowed: "an absolute path, or a name to be found on PATH".into(),
            });
        }
        for host in &self.allowed_hosts {
            if host != "*" && !is_host(host) {
                return Err(ConfigError::OutOfRange {
                    key: "allowed_hosts".into(),
                    value: format!("{host:?}"),
                    allowed: "\"*\", or names and addresses without a port like \"run.example.org\"".into(),
                });
            }
        }
        for origin in &self.cors_origins {
            if origin != "*" && !is_origin(origin) {
                return Err(ConfigError::OutOfRange {
                    key: "cors_origins".into(),
                    value: format!("{origin:?}"),
                    allowed: "\"*\", or origins like \"https://example.org\"".into(),
                });
            }
        }
        if self.languages.is_empty() {
            return Err(ConfigError::OutOfRange {
                key: "languages".into(),
                value: "[]".into(),
                allowed: "at least one language".into(),
            });
        }
        self.check_limits("limits", &self.limits)?;
        // Each entry, enabled or not: a mistake shows when it is made.
        self.catalogue().try_for_each(|name| self.language(name).map(drop))?;
        self.enabled().map(drop)
    }

    fn check_limits(&self, section: &str, limits: &Limits) -> Result<(), ConfigError> {
        let most = &self.ceilings;
        let bytes = |s: ByteSize| s.as_u64() as f64;
        let seconds = |d: Duration| d.as_secs_f64();
        // Least values: below them not even a hello program runs.
        let rows = [
            ("memory", bytes(limits.memory), bytes(ByteSize::mib(16)), bytes(most.memory), "bytes"),
            ("processes", f64::from(limits.processes), 1.0, f64::from(most.processes), ""),
            ("cpus", limits.cpus, 0.01, most.cpus, ""),
            ("open_files", limits.open_files as f64, 8.0, most.open_files as f64, ""),
            ("disk", bytes(limits.disk), bytes(ByteSize::kib(64)), bytes(most.disk), "bytes"),
            ("inodes", limits.inodes as f64, 16.0, most.inodes as f64, ""),
            ("output", bytes(limits.output), 1.0, bytes(most.output), "bytes"),
            ("output_total", bytes(limits.output_total), 1.0, bytes(most.output_total), "bytes"),
            ("compile_time", seconds(limits.compile_time), 0.001, seconds(most.compile_time), "seconds"),
            ("compile_cpu_time", seconds(limits.compile_cpu_time), 0.001, seconds(most.compile_cpu_time), "seconds"),
            ("run_time", seconds(limits.run_time), 0.001, seconds(most.run_time), "seconds"),
            ("run_cpu_time", seconds(limits.run_cpu_time), 0.001, seconds(most.run_cpu_time), "seconds"),
        ];
        for (key, value, least, most, unit) in rows {
            if !(least..=most).contains(&value) {
                return Err(ConfigError::OutOfRange {
                    key: format!("{section}.{key}"),
                    value: value.to_string(),
                    allowed: format!("from {least} to {most} {unit} ([ceilings] holds the most)").replace("  ", " "),
                });
            }
        }
        Ok(())
    }
}

/// Whether a browser can send this as an origin.
fn is_origin(text: &str) -> bool {
    let Ok(uri) = text.parse::<Uri>() else { return false };
    let (Some(scheme @ ("http" | "https")), Some(host)) = (uri.scheme_str(), uri.authority()) else { return false };
    !host.as_str().contains('@') && text == format!("{scheme}://{host}").to_ascii_lowercase()
}

/// Every key of the defaults by the name of its variable, without the prefix: cache_ttl → cache.ttl.
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

fn environment(keys: BTreeMap<String, String>) -> Env {
    let settings = Env::prefixed(PREFIX).ignore(&NOT_SETTINGS).filter(|name| !name.starts_with(OF_TESTS));
    settings.map(move |name| match keys.get(&name.as_str().to_ascii_lowercase()) {
        Some(key) => key.clone().into(),
        // Kept as it is, so that the extraction refuses it by its name.
        None => name.as_str().to_ascii_lowercase().into(),
    })
}

/// figment's first error in words that name the key, where it was set, and what is allowed.
fn malformed(error: figment::Error, file: &str) -> ConfigError {
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

/// An address; serde's own error would not tell the value.
fn address<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<SocketAddr, D::Error> {
    let text = String::deserialize(deserializer)?;
    text.parse().map_err(|_| serde::de::Error::invalid_value(serde::de::Unexpected::Str(&text), &"socket address"))
}

/// What a value should have been, for those who write no Rust.
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

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn language(name: &str) -> Language {
        load("").unwrap().language(name).unwrap()
    }

    pub(crate) fn load(text: &str) -> Result<Settings, ConfigError> {
        Settings::from_layers("test.toml", text, &Overrides::default())
    }

    fn refusal(text: &str) -> String {
        load(text).unwrap_err().to_string()
    }

    #[test]
    fn the_direct_engine_is_known_by_its_former_name() {
        assert_eq!(load("engine = \"crun\"").unwrap().engine, EngineKind::Direct);
        assert_eq!(load("engine = \"direct\"").unwrap().engine, EngineKind::Direct);
        assert!(<EngineKind as clap::ValueEnum>::from_str("crun", false).is_ok());
    }

    #[test]
    fn the_defaults_are_those_of_the_readme() {
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
    fn the_pivot_entry_is_what_its_compiler_needs() {
        let pivot = load("").unwrap().language("pivot").unwrap();
        assert_eq!(pivot.source, "main.pi");
        assert_eq!(pivot.files["Kagari.toml"], "entry = \"main.pi\"\nproject = \"main\"\n");
        assert_eq!(pivot.command(crate::model::job::Stage::Compile).unwrap().join(" "), "plc main.pi -o out");
        assert_eq!(pivot.artifact(crate::model::job::Stage::Compile), Some("out"));
        assert_eq!(pivot.command(crate::model::job::Stage::Run).unwrap(), ["./out"]);
        assert_eq!(pivot.environment(), [("PL_IMMIX_HEAP_SIZE".into(), (256u64 << 20).to_string())]);
    }

    #[test]
    fn the_whole_catalogue_is_valid() {
        let settings = load("").unwrap();
        let names: Vec<&str> = settings.catalogue().collect();
        assert_eq!(names, ["bash", "c", "cpp", "go", "javascript", "pivot", "python", "rust"]);
        for name in names {
            settings.language(name).unwrap();
        }
        assert_eq!(settings.language("js").unwrap().name, "javascript");
    }

    #[test]
    fn a_file_overrides_single_keys() {
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
    fn an_unknown_key_is_named() {
        assert!(refusal("containres = 3").contains("containres"));
        assert!(refusal("[cache]\nttll = \"1m\"").contains("ttll"));
        assert!(refusal("[language.c]\nimages = \"x\"").contains("images"));
        assert!(refusal("[language.c.limits]\nmemry = 1").contains("memry"));
        assert!(refusal("[languages.c]\nimage = \"x\"").contains("languages"));
    }

    #[test]
    fn a_bad_value_is_named_with_what_is_allowed() {
        let message = refusal("containers = 0");
        assert!(message.contains("containers") && message.contains("from 1 to"), "{message}");
        let message = refusal("containers = \"many\"");
        assert!(message.contains("containers") && message.contains("many"), "{message}");
        let message = refusal("[limits]\nrun_time = \"1h\"");
        assert!(message.contains("limits.run_time") && message.contains("300"), "{message}");
        let message = refusal("[language.python.limits]\nmemory = \"1KiB\"");
        assert!(message.contains("language.python.limits.memory"), "{message}");
        let message = refusal("[cache]\nttl = \"soon\"");
        assert!(message.contains("cache.ttl"), "{message}");
        let message = refusal("languages = [\"cobol\"]");
        assert!(message.contains("cobol") && message.contains("python"), "{message}");
        let message = refusal("instance = \"../x\"");
        assert!(message.contains("instance") && message.contains("../x"), "{message}");
        let message = refusal("[language.c]\nimage = \"--privileged\"");
        assert!(message.contains("image") && message.contains("--privileged"), "{message}");
        let message = refusal("[language.c]\nsource = \"../main.c\"");
        assert!(message.contains("../main.c"), "{message}");
        let message = refusal("this is no toml");
        assert!(message.contains("test.toml"), "{message}");
    }

    #[test]
    fn sizes_are_kept_to_the_byte() {
        let text = "[limits]\nmemory = \"1300MiB\"\noutput = 1100\n[ceilings]\nmemory = \"1300MiB\"\n[cache]\nsize = 0";
        let settings = load(text).unwrap();
        let limits = settings.language("c").unwrap().limits;
        assert_eq!((limits.memory, limits.output), (ByteSize::mib(1300), ByteSize(1100)));
        let written = toml::to_string(&settings).unwrap();
        assert!(written.contains("memory = \"1300MiB\"") && written.contains("output = \"1100B\""), "{written}");
        assert!(written.contains("size = \"0B\""), "{written}");
    }

    #[test]
    fn hosts_are_told_without_ports() {
        load("allowed_hosts = [\"*\", \"run.example.org\", \"192.0.2.1\", \"[::1]\"]").unwrap();
        for host in ["http://run.example.org", "run.example.org:80", ""] {
            let message = refusal(&format!("allowed_hosts = [{host:?}]"));
            assert!(message.contains("allowed_hosts") && message.contains("without a port"), "{message}");
        }
    }

    #[test]
    fn what_no_browser_sends_is_no_origin() {
        for origin in ["https://example.org", "http://localhost:8000", "http://[::1]:80"] {
            load(&format!("cors_origins = [{origin:?}]")).unwrap();
        }
        for origin in [
            "https://example.org/",
            "https://example.org/docs",
            "https://Example.org",
            "https://a@b",
            "http://",
            "x://y",
        ] {
            assert!(refusal(&format!("cors_origins = [{origin:?}]")).contains(origin), "{origin}");
        }
    }

    #[test]
    fn a_new_language_needs_its_keys() {
        let message = refusal("[language.cobol]\nimage = \"x\"");
        assert!(message.contains("missing field"), "{message}");
        let entry = "image = \"x\"\nsource = \"a.cob\"\nrun = [\"cobc\"]\nhealth = { code = \"\", output = \"\" }";
        load(&format!("[language.cobol]\n{entry}")).unwrap();
    }

    #[test]
    fn flags_win() {
        let flags = Overrides { languages: vec!["c".into()], ..Overrides::default() };
        let settings = Settings::from_layers("t", "languages = [\"python\"]", &flags).unwrap();
        assert_eq!(settings.languages, ["c"]);
    }

    #[test]
    fn every_setting_has_a_variable() {
        let built_in = Figment::from(Toml::string(DEFAULTS));
        let keys = setting_keys(&built_in).unwrap();
        assert_eq!(keys["cache_ttl"], "cache.ttl");
        assert_eq!(keys["limits_run_time"], "limits.run_time");
        let mut names: Vec<_> = keys.keys().collect();
        names.dedup();
        assert_eq!(names.len(), keys.values().len());
    }
}
