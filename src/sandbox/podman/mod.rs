//! podman: its commands, and the engine that creates each sandbox with `podman run`.

pub(super) mod args; // arguments of the commands that create containers
mod cli; // runs commands
mod containers; // verbs for containers
mod dev; // a sandbox's /dev
mod engine;
mod images; // verbs for images
mod info; // facts about podman and the host

pub use cli::Podman;
pub use engine::PodmanEngine;
pub use info::Info;
