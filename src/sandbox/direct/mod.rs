//! The direct engine: podman creates a template, and the agent spawns sandboxes from it.
//!
//! For each language and image podman creates one labelled container, the *template*, with the same isolation as in the
//! podman engine, and initialises it without starting it. Its OCI configuration is the source of every security
//! setting. It is read once, into a [`SandboxConfig`](oci_config::SandboxConfig), from which the
//! [agent](crate::sandbox::agent) creates each sandbox with its own job directory, tmpfs, cgroup and processes.
//! Removing the template unmounts the image.

mod agent_client; // sends orders to the agent
mod engine;
pub mod oci_config;
mod template; // a container that is never started
mod template_cache;

pub use engine::DirectEngine;
