//! coderunner compiles and runs code of strangers, each run in a fresh rootless container.

// Built for libFuzzer it is what that drives.
#![cfg_attr(fuzzing, no_main)]

#[cfg(fuzzing)]
use coderunner::fuzz as _;

#[cfg(not(fuzzing))]
fn main() -> std::process::ExitCode {
    coderunner::cli::main()
}
