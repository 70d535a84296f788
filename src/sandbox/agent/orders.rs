//! Messages between the server and the agent.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::sandbox::direct::oci_config::SandboxConfig;

/// An order from the server to the agent.
#[derive(Debug, Serialize, Deserialize)]
pub(in crate::sandbox) struct Order {
    /// Identifies the order in its [`Done`].
    pub id: u64,
    /// The action to carry out.
    pub action: Action,
}

/// The actions that the agent can carry out.
#[derive(Debug, Serialize, Deserialize)]
pub(in crate::sandbox) enum Action {
    /// Check whether the kernel lets the agent create sandboxes.
    Preflight,
    /// Set up the mounts that the sandboxes of a template share.
    Prepare { template: String, config: Box<SandboxConfig> },
    /// Spawn a sandbox. Passed with the order are init's end of its channel and, if the sandbox has one, its cgroup.
    Spawn { template: String, job_dir: PathBuf, slot: u32 },
    /// Kill the sandbox that the order with this id has spawned, and wait for its end.
    Kill(u64),
    /// Release a template.
    Forget(String),
}

/// The agent's reply to an order, sent when the action is done; for [`Action::Spawn`], when the sandbox has ended.
#[derive(Debug, Serialize, Deserialize)]
pub(in crate::sandbox) struct Done {
    /// Id of the order.
    pub id: u64,
    /// The error says why the action failed.
    pub result: Result<(), String>,
}
