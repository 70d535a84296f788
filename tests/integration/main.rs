//! Drives the real executable over HTTP, with real rootless containers. `make test` prepares all that it needs:
//! the local images, an ordinary account, and the executable.
#![allow(clippy::unwrap_used, clippy::expect_used)]

/// Makes two tests of each function: one for either way to make sandboxes. The walls and limits are the same.
macro_rules! on_each_engine {
    ($($test:ident)*) => {
        mod podman {
            $(#[test] fn $test() { super::$test("podman"); })*
        }
        mod direct {
            $(#[test] fn $test() { super::$test("direct"); })*
        }
    };
}

mod answers;
mod batch;
mod cli;
mod client;
mod connect;
mod doctor;
mod faults;
mod floods;
mod harness;
mod http;
mod images;
mod leftovers;
mod limits;
mod log;
mod openapi;
mod operators;
mod piston;
mod programs;
mod queue;
mod readme;
mod registry;
mod reload;
#[path = "../security/mod.rs"]
mod security;
mod settings;
mod shutdown;
mod soak;
mod stand_in;
mod walls;
