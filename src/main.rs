//! coderunner compiles and runs untrusted code, each run in a fresh rootless container.

// In a fuzzing build libFuzzer provides `main`.
#![cfg_attr(fuzzing, no_main)]

#[cfg(fuzzing)]
use coderunner::fuzz as _;

#[cfg(not(fuzzing))]
fn main() -> std::process::ExitCode {
    coderunner::cli::main()
}
