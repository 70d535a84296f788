//! Checks of the settings as a whole: ranges, names, and dependencies between values.

use std::time::Duration;

use bytesize::ByteSize;
use warp::http::Uri;

use crate::config::error::ConfigError;
use crate::config::settings::Settings;
use crate::http::origin::is_host;
use crate::model::language;
use crate::model::limits::Limits;
use crate::model::size::size_text;

impl Settings {
    /// Checks all settings and each entry of the language catalogue.
    pub(super) fn check(&self) -> Result<(), ConfigError> {
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
        // 150: podman makes a keyring per container, and kernel.keys.maxkeys allows 200 keys per user.
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
                allowed: "an absolute path, or a name that is found on PATH".into(),
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
        // Checks entries of disabled languages too, so that mistakes are reported early.
        self.catalogue().try_for_each(|name| self.language(name).map(drop))?;
        self.enabled().map(drop)
    }

    /// Checks that limits are at least what a program needs and at most the ceilings.
    pub(super) fn check_limits(&self, section: &str, limits: &Limits) -> Result<(), ConfigError> {
        let most = &self.ceilings;
        let bytes = |s: ByteSize| s.as_u64() as f64;
        let seconds = |d: Duration| d.as_secs_f64();
        // The minimums are what a hello-world program needs.
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
                    allowed: format!("from {least} to {most} {unit} ([ceilings] sets the maximum)").replace("  ", " "),
                });
            }
        }
        Ok(())
    }
}

/// Whether a browser can send this as the value of `Origin`.
fn is_origin(text: &str) -> bool {
    let Ok(uri) = text.parse::<Uri>() else { return false };
    let (Some(scheme @ ("http" | "https")), Some(host)) = (uri.scheme_str(), uri.authority()) else { return false };
    !host.as_str().contains('@') && text == format!("{scheme}://{host}").to_ascii_lowercase()
}

#[cfg(test)]
mod tests {
    use crate::config::tests::{load, refusal};

    #[test]
    fn errors_name_invalid_values_and_what_is_allowed() {
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
    fn allowed_hosts_have_no_ports() {
        load("allowed_hosts = [\"*\", \"run.example.org\", \"192.0.2.1\", \"[::1]\"]").unwrap();
        for host in ["http://run.example.org", "run.example.org:80", ""] {
            let message = refusal(&format!("allowed_hosts = [{host:?}]"));
            assert!(message.contains("allowed_hosts") && message.contains("without a port"), "{message}");
        }
    }

    #[test]
    fn origins_are_accepted_only_as_browsers_send_them() {
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
}
