//! The command line: the start of this process, and a file for each verb.

mod account;
mod args;
mod doctor;
mod key;
mod run;
mod serve;
mod session;
mod sweep;
mod update;

use std::ffi::OsString;
use std::io::IsTerminal;
use std::process::ExitCode;

use anyhow::{Context, anyhow};
use clap::{CommandFactory, Parser};
use tracing_subscriber::EnvFilter;

use crate::config::{Overrides, Settings};
use crate::host::print::PrintError;
use crate::host::{log, print};
use crate::sandbox;
use args::{Cli, Common, Verb};
use doctor::probe;

/// Parses the command line and runs its verb.
pub fn main() -> ExitCode {
    let Cli { verb, log_format } = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return print_usage(&error),
    };
    match verb {
        // Before anything starts threads.
        Verb::Init => return sandbox::init::main(),
        Verb::Agent => return sandbox::agent::main(),
        Verb::Probe { probe, ref word } => return probe::main(probe, word),
        _ => {}
    }
    // Dropped at the end of this function, which flushes the log.
    let _flush = match log::start_writer() {
        Ok(flush) => flush,
        Err(error) => {
            print::stderr_line(&format!("coderunner: cannot start: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let level = match verb {
        Verb::Serve { .. } => "info",
        _ => "warn",
    };
    let filter = std::env::var("CODERUNNER_LOG").unwrap_or_else(|_| level.into());
    let filter = match EnvFilter::try_new(&filter) {
        Ok(filter) => filter,
        Err(_) => {
            log::print(&format!(
                "coderunner: CODERUNNER_LOG = {filter:?}: allowed are error, warn, info, debug, trace and off"
            ));
            return ExitCode::FAILURE;
        }
    };
    log::start(filter, log_format, std::io::stderr().is_terminal());
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            log::print(&format!("coderunner: cannot start: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(self::verb(verb));
    // Does not wait for a pending read of stdin, which cannot be cancelled.
    runtime.shutdown_background();
    result.unwrap_or_else(|error| {
        if error.downcast_ref().is_some_and(PrintError::is_broken_pipe) {
            return ExitCode::from(print::CODE_BROKEN_PIPE);
        }
        log::print(&format!("coderunner: {}", error_text(&error)));
        ExitCode::FAILURE
    })
}

/// Prints the help or version that was requested, or the error in the command line.
fn print_usage(error: &clap::Error) -> ExitCode {
    let code = ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(1));
    match error.print().map_err(PrintError::on_stdout) {
        // A wrong command line gives the same exit code whether or not its message could be printed.
        _ if error.use_stderr() => code,
        Ok(()) => code,
        Err(error) if error.is_broken_pipe() => ExitCode::from(print::CODE_BROKEN_PIPE),
        Err(error) => {
            print::stderr_line(&format!("coderunner: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// The message of an error, followed by those of its causes that it does not contain already.
fn error_text(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |text, cause| match text.contains(&cause) {
        _ if text.is_empty() => cause,
        true => text,
        false => format!("{text}: {cause}"),
    })
}

/// Runs a verb.
async fn verb(verb: Verb) -> anyhow::Result<ExitCode> {
    let code = |ok: bool| if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    let load = |common: &Common| {
        Settings::load(
            common.config.as_deref(),
            &Overrides { languages: common.languages.clone(), ..Overrides::default() },
        )
    };
    match verb {
        Verb::Serve { common, listen, engine } => {
            let overrides = Overrides { listen, engine, languages: common.languages, ..Overrides::default() };
            serve::serve(common.config, overrides).await.map(|()| ExitCode::SUCCESS)
        }
        Verb::Run { config, language, files, stdin, time, memory, json, program } => {
            let mut words = program.into_iter();
            let file = words.next().unwrap_or_default().into();
            let text = |arg: OsString| arg.into_string().map_err(|arg| anyhow!("the argument {arg:?} is not UTF-8"));
            let args = words.map(text).collect::<anyhow::Result<_>>()?;
            let args = run::RunArgs { file, files, language, args, stdin, time, memory, json, config };
            run::run(args).await.map(ExitCode::from)
        }
        Verb::Doctor { common, engine, json } => {
            let overrides = Overrides { engine, languages: common.languages, ..Overrides::default() };
            let settings = Settings::load(common.config.as_deref(), &overrides)?;
            doctor::run(&settings, json).await.map(code)
        }
        Verb::Update(common) => update::update(&load(&common)?).await.map(code),
        Verb::Config(common) => {
            print::stdout(toml::to_string(&load(&common)?)?)?;
            Ok(ExitCode::SUCCESS)
        }
        Verb::Key { owner } => {
            key::key(&owner)?;
            Ok(ExitCode::SUCCESS)
        }
        Verb::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "coderunner", &mut script);
            print::stdout(script)?;
            Ok(ExitCode::SUCCESS)
        }
        Verb::Man { directory } => {
            clap_mangen::generate_to(Cli::command(), &directory)
                .with_context(|| format!("cannot write manual pages to {}", directory.display()))?;
            Ok(ExitCode::SUCCESS)
        }
        Verb::Sweep(common) => sweep::sweep(load(&common)?).await.map(|()| ExitCode::SUCCESS),
        Verb::Init | Verb::Agent | Verb::Probe { .. } => Ok(ExitCode::FAILURE),
    }
}
