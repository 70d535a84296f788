//! Messages between the server and the agent.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::sandbox::direct::oci_config::SandboxConfig;

/// From the server.
#[derive(Debug, Serialize, Deserialize)]
pub(in crate::sandbox) struct Order {
    /// By which [`Done`] refers to it.
    pub id: u64,
    /// What to do.
    pub action: Action,
}

/// What the agent can do.
#[derive(Debug, Serialize, Deserialize)]
pub(in crate::sandbox) enum Action {
    /// Try whether sandboxes can be made at all.
    Preflight,
    /// Set up what the sandboxes of a template share.
    Prepare { template: String, config: Box<SandboxConfig> },
    /// Spawn a sandbox. Beside the order are init's end of its channel and, where it has one, its cgroup.
    Spawn { template: String, job_dir: PathBuf, slot: u32 },
    /// Kill what an order has spawned, and wait for its end.
    Kill(u64),
    /// Give a template up.
    Forget(String),
}

/// From the agent: an order has been carried out; [`Action::Spawn`] when the sandbox has ended.
#[derive(Debug, Serialize, Deserialize)]
pub(in crate::sandbox) struct Done {
    /// The order's.
    pub id: u64,
    /// The error says why it was not.
    pub result: Result<(), String>,
}
