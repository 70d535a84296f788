//! The command line: a verb each, and the processes that are no verbs of anybody's.

pub mod doctor;
pub mod run;
pub mod serve;

use std::ffi::OsString;
use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, anyhow};
use bytesize::ByteSize;
use clap::{Args, CommandFactory, Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::config::{Overrides, Settings};
use crate::host::print::Unprinted;
use crate::host::{log, print};
use crate::http::auth;
use crate::model::language;
use crate::sandbox::{self, engine::EngineKind};
use doctor::probe::{self, Probe};

/// Compile and run untrusted code, each run in a fresh rootless container
#[derive(Debug, Parser)]
#[command(version, about, propagate_version = true)]
struct Cli {
    /// Log format
    #[arg(long, global = true, value_name = "FORMAT", env = "CODERUNNER_LOG_FORMAT", default_value = "text")]
    log_format: log::Format,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Serve HTTP until SIGTERM or Ctrl-C
    Serve {
        #[command(flatten)]
        common: Common,
        /// Address and port to listen on [default: 127.0.0.1:8080]
        #[arg(long, value_name = "ADDRESS")]
        listen: Option<SocketAddr>,
        /// Engine that makes the sandboxes [default: the configured one]
        #[arg(long)]
        engine: Option<EngineKind>,
    },
    /// Run one program; pass its input, output and exit code through
    Run {
        /// Configuration file [default: /etc/coderunner/coderunner.toml]
        #[arg(long, value_name = "FILE", env = "CODERUNNER_CONFIG")]
        config: Option<PathBuf>,
        /// Language [default: by the ending of the file name]
        #[arg(short, long)]
        language: Option<String>,
        /// Further file beside the program; may be repeated
        #[arg(short, long = "file", value_name = "FILE")]
        files: Vec<PathBuf>,
        /// Standard input of the program, instead of this command's own
        #[arg(long, value_name = "TEXT")]
        stdin: Option<String>,
        /// Time limit, such as 2s or 500ms [default: that of the language]
        #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
        time: Option<Duration>,
        /// Memory limit, such as 64MiB [default: that of the language]
        #[arg(long, value_name = "SIZE")]
        memory: Option<ByteSize>,
        /// Print the result as JSON, in the form of /api/v2/execute, instead of the program's output
        #[arg(long)]
        json: bool,
        /// Source file, and the arguments of the program; everything after the file goes to the program
        #[arg(required = true, trailing_var_arg = true, value_names = ["FILE", "ARGS"])]
        program: Vec<OsString>,
    },
    /// Check every limit and every isolation wall on this host; exit with code 1 if one fails
    Doctor {
        #[command(flatten)]
        common: Common,
        /// Engine that must pass; both are checked [default: the configured one]
        #[arg(long)]
        engine: Option<EngineKind>,
        /// Print JSON instead of a table
        #[arg(long)]
        json: bool,
    },
    /// Update the images now, through the running server if there is one
    Update(Common),
    /// Print the effective settings
    Config(Common),
    /// Create an API key for a client, and print the line for the configuration
    Key {
        /// Owner of the key, as shown in the log
        #[arg(default_value = "client")]
        owner: String,
    },
    /// Generate shell completions
    Completions {
        /// Shell
        shell: clap_complete::Shell,
    },
    /// Write the manual pages; used by `make install`
    #[command(hide = true)]
    Man {
        /// Target directory
        directory: PathBuf,
    },
    /// Remove the containers that a killed server left behind; used by the systemd unit
    #[command(hide = true)]
    Sweep(Common),
    /// PID 1 of a sandbox.
    #[command(hide = true)]
    Init,
    /// The agent: makes sandboxes inside podman's namespaces
    #[command(hide = true)]
    Agent,
    /// Checks that `doctor` runs inside sandboxes
    #[command(hide = true)]
    Probe { probe: Probe, word: String },
}

#[derive(Debug, Args)]
struct Common {
    /// Configuration file [default: /etc/coderunner/coderunner.toml]
    #[arg(long, value_name = "FILE", env = "CODERUNNER_CONFIG")]
    config: Option<PathBuf>,
    /// Language to serve; may be repeated, the first one is the default
    #[arg(long = "language", value_name = "NAME")]
    languages: Vec<String>,
}

/// What this process was started for.
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
    // Until the very end.
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
        // Of a wrong command line nobody has to hear to know its code.
        _ if asked.use_stderr() => code,
        Ok(()) => code,
        Err(error) if error.is_unread() => ExitCode::from(print::CODE_UNREAD),
        Err(error) => {
            print::complain(&format!("coderunner: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// An error and its causes, but those that it tells itself.
pub fn told(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |told, cause| match told.contains(&cause) {
        _ if told.is_empty() => cause,
        true => told,
        false => format!("{told}: {cause}"),
    })
}

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
        Verb::Update(common) => serve::update(&load(&common)?).await.map(code),
        Verb::Config(common) => {
            print::stdout(toml::to_string(&load(&common)?)?)?;
            Ok(ExitCode::SUCCESS)
        }
        Verb::Key { owner } => {
            if !language::is_name(&owner) {
                anyhow::bail!("{owner:?} is no owner: 1 to 32 of a-z, 0-9, -, + and _, a letter first");
            }
            let (key, hash) = auth::key::new_key().context("cannot read /dev/urandom")?;
            print::stdout(format!("{key}\n"))?;
            log::say(&format!(
                "The key is above; it is shown this once. For the configuration:\n[access.keys]\n{owner} = \"{hash}\""
            ));
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
        Verb::Sweep(common) => serve::sweep(load(&common)?).await.map(|()| ExitCode::SUCCESS),
        Verb::Init | Verb::Agent | Verb::Probe { .. } => Ok(ExitCode::FAILURE),
    }
}
