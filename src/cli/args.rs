//! The arguments of the command line: its verbs and their flags.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use bytesize::ByteSize;
use clap::{Args, Parser, Subcommand};

use crate::cli::doctor::probe::Probe;
use crate::host::log;
use crate::sandbox::engine::EngineKind;

/// Compile and run untrusted code, each run in a fresh rootless container
#[derive(Debug, Parser)]
#[command(version, about, propagate_version = true)]
pub(super) struct Cli {
    /// Log format
    #[arg(long, global = true, value_name = "FORMAT", env = "CODERUNNER_LOG_FORMAT", default_value = "text")]
    pub(super) log_format: log::Format,
    #[command(subcommand)]
    pub(super) verb: Verb,
}

#[derive(Debug, Subcommand)]
pub(super) enum Verb {
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
        /// Language [default: by the file name extension]
        #[arg(short, long)]
        language: Option<String>,
        /// Additional file, placed beside the program; may be repeated
        #[arg(short, long = "file", value_name = "FILE")]
        files: Vec<PathBuf>,
        /// Standard input of the program, instead of the input of this command
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
        /// Engine that must pass; doctor checks both [default: the configured one]
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
    /// PID 1 of a sandbox
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
pub(super) struct Common {
    /// Configuration file [default: /etc/coderunner/coderunner.toml]
    #[arg(long, value_name = "FILE", env = "CODERUNNER_CONFIG")]
    pub(super) config: Option<PathBuf>,
    /// Language to serve; may be repeated, the first one is the default
    #[arg(long = "language", value_name = "NAME")]
    pub(super) languages: Vec<String>,
}
