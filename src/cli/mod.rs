//! The command line: a file for each verb, and the start of this process.

mod account;
mod args;
mod doctor;
mod key;
mod run;
mod serve;
mod sweep;
mod update;
mod workshop;

use std::ffi::OsString;
use std::io::IsTerminal;
use std::process::ExitCode;

use anyhow::{Context, anyhow};
use clap::{CommandFactory, Parser};
use tracing_subscriber::EnvFilter;

use crate::config::{Overrides, Settings};
use crate::host::print::Unprinted;
use crate::host::{log, print};
use crate::sandbox;
use args::{Cli, Common, Verb};
use doctor::probe;

/// Runs what this process was started for.
pub fn main() -> ExitCode {
    let Cli { verb, log_format } = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(asked) => return help(&asked),
    };
    match verb {
        // Before anything that makes threads.
        Verb::Init => return sandbox::init::main(),
        Verb::Agent => return sandbox::agent::main(),
        Verb::Probe { probe, ref word } => return probe::main(probe, word),
        _ => {}
    }
    // Kept until the end of this function.
    let _flush = match log::start_writing() {
        Ok(flush) => flush,
        Err(error) => {
            print::complain(&format!("coderunner: cannot start: {error}"));
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
            log::say(&format!(
                "coderunner: CODERUNNER_LOG = {filter:?}: allowed are error, warn, info, debug, trace and off"
            ));
            return ExitCode::FAILURE;
        }
    };
    log::start(filter, log_format, std::io::stderr().is_terminal());
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            log::say(&format!("coderunner: cannot start: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let ended = runtime.block_on(self::verb(verb));
    // A read of our stdin may be under way, and cannot be cancelled.
    runtime.shutdown_background();
    ended.unwrap_or_else(|error| {
        if error.downcast_ref().is_some_and(Unprinted::is_unread) {
            return ExitCode::from(print::CODE_UNREAD);
        }
        log::say(&format!("coderunner: {}", told(&error)));
        ExitCode::FAILURE
    })
}

/// Prints help, or what is wrong with the command line.
fn help(asked: &clap::Error) -> ExitCode {
    let code = ExitCode::from(u8::try_from(asked.exit_code()).unwrap_or(1));
    match asked.print().map_err(Unprinted::on_stdout) {
        // A wrong command line gives the same code whether or not its message could be printed.
        _ if asked.use_stderr() => code,
        Ok(()) => code,
        Err(error) if error.is_unread() => ExitCode::from(print::CODE_UNREAD),
        Err(error) => {
            print::complain(&format!("coderunner: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// The message of an error and its causes, but without the causes that a message contains already.
fn told(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |told, cause| match told.contains(&cause) {
        _ if told.is_empty() => cause,
        true => told,
        false => format!("{told}: {cause}"),
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
            let text = |word: OsString| word.into_string().map_err(|word| anyhow!("the argument {word:?} is no UTF-8"));
            let args = words.map(text).collect::<anyhow::Result<_>>()?;
            let once = run::Once { file, files, language, args, stdin, time, memory, json, config };
            run::run(once).await.map(ExitCode::from)
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
