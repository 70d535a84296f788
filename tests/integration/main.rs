//! Tests the real executable over HTTP, with real rootless containers. `make test` prepares what the tests need:
//! the local images, an account without privileges, and the executable.
#![allow(clippy::unwrap_used, clippy::expect_used)]

/// Defines two tests for each listed function, one per engine. Both engines must enforce the same isolation and limits.
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
mod fake_podman;
mod faults;
mod floods;
mod harness;
mod http;
mod images;
mod isolation;
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
mod shared;
mod shutdown;
mod soak;
