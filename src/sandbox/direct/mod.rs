//! The direct engine: podman creates a template, and the agent spawns sandboxes from it.
//!
//! For each language and image podman creates one labelled container, the *template*, with the same isolation as in the
//! podman engine, and initialises it without starting it. Its OCI configuration is the source of every security
//! setting. It is read once, into a [`SandboxConfig`](oci_config::SandboxConfig), from which the
//! [agent](crate::sandbox::agent) creates each sandbox with its own job directory, tmpfs, cgroup and processes.
//! Removing the template unmounts the image.
//!
//! How a sandbox is made, and starts a program:
//! 1. The pool's manager (`scheduler::manager`) has a free slot, and calls [`Engine::start`](crate::sandbox::Engine).
//! 2. [`DirectEngine`] makes the template of the image, if there is none yet, and has the agent set up its shared mounts.
//! 3. It makes the job directory, the cgroup and the channel, and orders the agent to spawn.
//! 4. The agent copies itself into new namespaces (`agent::spawn`, `agent::template`), drops its privileges, and is init
//!    (`init::run`), which reports that it is ready. The pool hands the sandbox to a request, or keeps it.
//! 5. [`Sandbox::run`](crate::sandbox::Sandbox) writes the files and sends a stage; init starts the program
//!    (`init::stage`, `init::spawn`, `init::confine`) and reports its end.
//! 6. The supervisor (`sandbox::supervisor`) has the agent kill what is left, and gives the slot back to the pool.

mod agent_client; // sends orders to the agent
mod engine;
pub mod oci_config;
mod template; // a container that is never started
mod template_cache;

pub use engine::DirectEngine;
