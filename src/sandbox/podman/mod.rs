//! podman: its commands, and the engine that makes each sandbox by `podman run`.

pub(super) mod args; // of the commands that make containers
mod cli; // runs commands
mod containers; // verbs for containers
mod dev; // a sandbox's /dev
mod engine;
mod images; // verbs for images
mod info; // what podman tells of itself

pub use cli::Podman;
pub use engine::PodmanEngine;
pub use info::Info;
