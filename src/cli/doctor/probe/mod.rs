//! Probes: the programs with which `doctor` tests limits and walls from inside a sandbox. They are part of this
//! executable, so that they need no tools from an image. They get the limits as an argument.

mod files;
mod neighbour;
mod network;
mod privileges;
mod space;
mod syscalls;

use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};
use std::time::Duration;

use bytesize::ByteSize;
use nix::unistd::Uid;

use crate::cli::doctor::wall::WallResult;
use crate::host::print;
use crate::model::limits::Limits;
use neighbour::{look, show};

/// The hidden verb that runs a probe.
pub(super) const VERB: &str = "probe";

/// Number of busy threads: more than the CPUs of a trial's sandbox.
const SPINNING_THREADS: usize = 2;

/// How long a probe sleeps that is expected to be killed.
const SLEEP: Duration = Duration::from_secs(60);

/// The probes. Each takes one argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(in crate::cli) enum Probe {
    /// Tests every wall that can be tested from inside, and prints a `WallResult` per line. The argument is the limits
    /// as JSON.
    Walls,
    /// Uses this many bytes of memory.
    Memory,
    /// Starts this many threads; fails if one is refused.
    Threads,
    /// Keeps CPUs busy until killed.
    Spin,
    /// Sleeps for [`SLEEP`].
    Sleep,
    /// Prints until killed.
    Print,
    /// Leaves marks of this name wherever it can, prints its uid, and keeps the marks until its input ends.
    Show,
    /// Leaves the same marks, and a process that holds its output open.
    Leave,
    /// Looks for the marks of this name, and prints a `WallResult` of `Wall::Neighbour`.
    Look,
}

impl Probe {
    /// Its name on the command line.
    pub fn word(self) -> String {
        use clap::ValueEnum;
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }
}

/// The main function of a probe.
pub(in crate::cli) fn main(probe: Probe, word: &str) -> ExitCode {
    match run(probe, word) {
        Ok(code) => code,
        Err(error) => {
            print::stderr_line(&format!("coderunner probe: {error}; it is run by coderunner doctor, not by hand"));
            ExitCode::FAILURE
        }
    }
}

fn run(probe: Probe, word: &str) -> io::Result<ExitCode> {
    let number = || word.parse::<usize>().map_err(io::Error::other);
    match probe {
        Probe::Walls => {
            let limits: Limits = serde_json::from_str(word)?;
            for result in walls(&limits)? {
                print_result(&result)?;
            }
        }
        Probe::Memory => {
            const BLOCK: usize = 1 << 20;
            let blocks: Vec<Vec<u8>> = (0..number()? / BLOCK).map(|_| vec![1; BLOCK]).collect();
            // Reads the blocks after all were made, so that the compiler cannot optimize them away.
            writeln!(
                io::stdout(),
                "{}",
                ByteSize(blocks.iter().map(|block| std::hint::black_box(block).len() as u64).sum())
            )?;
        }
        Probe::Threads => {
            for made in 1..number()? {
                if std::thread::Builder::new().spawn(|| std::thread::sleep(SLEEP)).is_err() {
                    writeln!(io::stdout(), "{made}")?;
                    return Ok(ExitCode::FAILURE);
                }
            }
            writeln!(io::stdout(), "{word}")?;
        }
        Probe::Spin => {
            let spin = || loop {
                std::hint::spin_loop();
            };
            (1..SPINNING_THREADS).for_each(|_| drop(std::thread::spawn(spin)));
            spin();
        }
        Probe::Sleep => std::thread::sleep(SLEEP),
        Probe::Print => loop {
            io::stdout().write_all(&[b'x'; 4096])?;
        },
        Probe::Show => {
            let _marks = show(word)?;
            writeln!(io::stdout(), "{}", Uid::current())?;
            io::stdin().read_to_end(&mut Vec::new())?;
        }
        Probe::Leave => {
            show(word)?;
            // In a process group of its own, with the inherited output.
            Command::new("/proc/self/exe").args([VERB, &Probe::Sleep.word(), word]).process_group(0).spawn()?;
        }
        Probe::Look => print_result(&look(word)?)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints a result as a JSON line, which the trial parses.
fn print_result(result: &WallResult) -> io::Result<()> {
    writeln!(io::stdout(), "{}", serde_json::to_string(result)?)
}

/// Tests every wall that can be tested from inside.
fn walls(limits: &Limits) -> io::Result<Vec<WallResult>> {
    Ok(vec![
        space::disk(limits.directory_size()),
        space::inodes(limits.inodes),
        space::open_files(limits.open_files),
        network::network()?,
        privileges::uid()?,
        privileges::capabilities()?,
        privileges::no_new_privileges()?,
        syscalls::seccomp()?,
        files::landlock(),
        files::read_only_root()?,
        files::masked_paths(),
        files::devices()?,
        files::descriptors()?,
    ])
}
