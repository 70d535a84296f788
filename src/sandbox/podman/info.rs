//! Facts about podman and the host.

use std::path::PathBuf;

use crate::host::process::ProcessError;
use crate::sandbox::podman::Podman;

/// The fields of `podman info` that coderunner uses.
#[derive(Debug, Clone, Default)]
pub struct Info {
    /// podman's version.
    pub version: String,
    /// Name and version of the OCI runtime.
    pub runtime: String,
    /// The storage driver.
    pub driver: String,
    /// Whether the overlay file system is the kernel's own; `None` if podman does not say.
    pub native_overlay: Option<bool>,
    /// The directory in which each volume has one.
    pub volumes: PathBuf,
    /// `v1` or `v2`.
    pub cgroup_version: String,
    /// The cgroup controllers that this user's containers get.
    pub controllers: Vec<String>,
}

impl Info {
    /// Parses the output of `podman info --format json`. Missing fields are empty.
    pub fn parse(json: &[u8]) -> Info {
        let value: serde_json::Value = serde_json::from_slice(json).unwrap_or_default();
        let text = |pointer: &str| value.pointer(pointer).and_then(|v| v.as_str()).unwrap_or_default().to_owned();
        Info {
            version: text("/version/Version"),
            runtime: text("/host/ociRuntime/version").lines().next().unwrap_or_default().to_owned(),
            driver: text("/store/graphDriverName"),
            native_overlay: match text("/store/graphStatus/Native Overlay Diff").as_str() {
                "true" => Some(true),
                "false" => Some(false),
                _ => None,
            },
            volumes: text("/store/volumePath").into(),
            cgroup_version: text("/host/cgroupVersion"),
            controllers: value
                .pointer("/host/cgroupControllers")
                .and_then(|v| v.as_array())
                .map(|list| list.iter().filter_map(|v| v.as_str()).map(str::to_owned).collect())
                .unwrap_or_default(),
        }
    }

    /// The limits that podman cannot set on this host.
    pub fn missing_controllers(&self) -> Vec<&'static str> {
        let has = |name: &str| self.cgroup_version == "v2" && self.controllers.iter().any(|c| c == name);
        [("memory", "memory"), ("pids", "processes"), ("cpu", "CPU")]
            .into_iter()
            .filter(|(controller, _)| !has(controller))
            .map(|(_, what)| what)
            .collect()
    }
}

impl Podman {
    /// The output of `podman info`, which is run once.
    pub async fn info(&self) -> Result<&Info, ProcessError> {
        let query = || async { self.verb(["info", "--format", "json"]).await.map(|json| Info::parse(&json)) };
        self.info.get_or_try_init(query).await
    }

    /// Number of uids that this user's containers have, including the user's own.
    pub async fn mapped_ids(&self) -> Result<u64, ProcessError> {
        let map = self.text(&["unshare", "cat", "/proc/self/uid_map"]).await?;
        Ok(map.lines().filter_map(|line| line.split_whitespace().nth(2)?.parse::<u64>().ok()).sum())
    }
}
