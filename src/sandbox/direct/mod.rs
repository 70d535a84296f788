//! The direct engine: podman makes a template, the agent spawns sandboxes from it.
//!
//! Per language and image podman creates one labelled container with the same isolation as in the podman engine, the
//! *template*, and initialises it without starting it. Its OCI configuration is the source of every security setting: read
//! once, as a [`SandboxConfig`](oci_config::SandboxConfig), by which the [agent](crate::sandbox::agent) makes each sandbox with
//! its own job directory, tmpfs, cgroup and processes. Removing the template unmounts the image.

mod agent_client; // orders for the agent
mod engine;
pub mod oci_config;
mod template; // a container that is never started
mod template_cache;

pub use engine::DirectEngine;
