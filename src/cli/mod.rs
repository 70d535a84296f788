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

/// Compiles and runs code of strangers, each run in a fresh rootless container.
#[derive(Debug, Parser)]
#[command(version, about, propagate_version = true)]
struct Cli {
    /// How the log is written
    #[arg(long, global = true, value_name = "FORMAT", env = "CODERUNNER_LOG_FORMAT", default_value = "text")]
    log_format: log::Format,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Serve HTTP until SIGTERM or Ctrl-C.
    Serve {
        #[command(flatten)]
        common: Common,
        /// Address and port to listen on [default: 127.0.0.1:8080]
        #[arg(long, value_name = "ADDRESS")]
        listen: Option<SocketAddr>,
        /// How sandboxes are made
        #[arg(long)]
        engine: Option<EngineKind>,
    },
    /// Run one program; its input, output and exit code pass through.
    Run {
        /// The configuration [default: /etc/coderunner/coderunner.toml]
        #[arg(long, value_name = "FILE", env = "CODERUNNER_CONFIG")]
        config: Option<PathBuf>,
        /// The language [default: that of the file's name]
        #[arg(short, long)]
        language: Option<String>,
        /// A further file, beside the program; repeat it for more
        #[arg(short, long = "file", value_name = "FILE")]
        files: Vec<PathBuf>,
        /// What the program reads, instead of our own standard input
        #[arg(long, value_name = "TEXT")]
        stdin: Option<String>,
        /// How long it may run, as in 2s or 500ms [default: that of the language]
        #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
        time: Option<Duration>,
        /// How much memory it may use, as in 64MiB [default: that of the language]
        #[arg(long, value_name = "SIZE")]
        memory: Option<ByteSize>,
        /// Print what became of it as JSON, as /api/v2/execute answers, instead of what it prints
        #[arg(long)]
        json: bool,
        /// The source, and the arguments of the program: whatever they look like, they are not ours
        #[arg(required = true, trailing_var_arg = true, value_names = ["FILE", "ARGS"])]
        program: Vec<OsString>,
    },
    /// Try every limit and wall on this host; exit code 1 if one does not hold.
    Doctor {
        #[command(flatten)]
        common: Common,
        /// The engine that has to be well; both are tried [default: the configured one]
        #[arg(long)]
        engine: Option<EngineKind>,
        /// Print JSON instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// Look for newer images now, in the running server if there is one.
    Update(Common),
    /// Print the settings in effect.
    Config(Common),
    /// Make a key for a client, and the line of the configuration that lets its owner in.
    Key {
        /// Its owner, as shown in the log
        #[arg(default_value = "client")]
        owner: String,
    },
    /// Print what makes a shell complete our words.
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write manual pages; `make install` does this.
    #[command(hide = true)]
    Man {
        /// Where to
        directory: PathBuf,
    },
    /// Remove what a killed server has left; the unit does this.
    #[command(hide = true)]
    Sweep(Common),
    /// PID 1 of a sandbox.
    #[command(hide = true)]
    Init,
    /// The server's hand in podman's namespaces.
    #[command(hide = true)]
    Agent,
    /// What doctor runs in sandboxes.
    #[command(hide = true)]
    Probe { probe: Probe, word: String },
}

#[derive(Debug, Args)]
struct Common {
    /// The configuration [default: /etc/coderunner/coderunner.toml]
    #[arg(long, value_name = "FILE", env = "CODERUNNER_CONFIG")]
    config: Option<PathBuf>,
    /// A language to serve; the first is the default one
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
            let (key, hash) = auth::new_key().context("cannot read /dev/urandom")?;
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
