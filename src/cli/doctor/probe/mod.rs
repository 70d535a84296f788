//! Probes: the programs by which `doctor` tries limits and walls from inside a sandbox. They are part of this executable,
//! so that no image needs any tool for them; the limits come as an argument.

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

use crate::cli::doctor::wall::Tried;
use crate::host::print;
use crate::model::limits::Limits;
use neighbour::{look, show};

/// The hidden verb that becomes a probe.
pub(super) const VERB: &str = "probe";

/// Threads that keep CPUs busy: more than a sandbox of a trial may.
const BUSY: usize = 2;

/// How long a process sleeps that is to be killed.
const STAY: Duration = Duration::from_secs(60);

/// What a program tries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(in crate::cli) enum Probe {
    /// Every wall that can be tried from inside; prints a `Tried` a line. Its word: the limits, as JSON.
    Walls,
    /// To use this many bytes of memory.
    Memory,
    /// To have this many threads; fails where one is refused.
    Threads,
    /// To keep CPUs busy for ever.
    Spin,
    /// To stay for long.
    Sleep,
    /// To print for ever.
    Print,
    /// Puts something up wherever it can under this mark, prints its uid and stays until its input ends.
    Show,
    /// Puts the same up and leaves a process behind that holds its output.
    Leave,
    /// Looks for what was put up under this mark; prints a `Tried` of `Wall::Neighbour`.
    Look,
}

impl Probe {
    /// Its word on the command line.
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
            print::complain(&format!("coderunner probe: {error}; it is run by coderunner doctor, not by hand"));
            ExitCode::FAILURE
        }
    }
}

fn run(probe: Probe, word: &str) -> io::Result<ExitCode> {
    let number = || word.parse::<usize>().map_err(io::Error::other);
    match probe {
        Probe::Walls => {
            let limits: Limits = serde_json::from_str(word)?;
            for tried in walls(&limits)? {
                tell(&tried)?;
            }
        }
        Probe::Memory => {
            const BLOCK: usize = 1 << 20;
            let blocks: Vec<Vec<u8>> = (0..number()? / BLOCK).map(|_| vec![1; BLOCK]).collect();
            // Read after all were made, so that the compiler does not leave them out.
            writeln!(
                io::stdout(),
                "{}",
                ByteSize(blocks.iter().map(|block| std::hint::black_box(block).len() as u64).sum())
            )?;
        }
        Probe::Threads => {
            for made in 1..number()? {
                if std::thread::Builder::new().spawn(|| std::thread::sleep(STAY)).is_err() {
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
            (1..BUSY).for_each(|_| drop(std::thread::spawn(spin)));
            spin();
        }
        Probe::Sleep => std::thread::sleep(STAY),
        Probe::Print => loop {
            io::stdout().write_all(&[b'x'; 4096])?;
        },
        Probe::Show => {
            let _shown = show(word)?;
            writeln!(io::stdout(), "{}", Uid::current())?;
            io::stdin().read_to_end(&mut Vec::new())?;
        }
        Probe::Leave => {
            show(word)?;
            // In a process group of its own, and with our output.
            Command::new("/proc/self/exe").args([VERB, &Probe::Sleep.word(), word]).process_group(0).spawn()?;
        }
        Probe::Look => tell(&look(word)?)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints a result, for the trial to read.
fn tell(tried: &Tried) -> io::Result<()> {
    writeln!(io::stdout(), "{}", serde_json::to_string(tried)?)
}

/// Tries every wall that can be tried from inside.
fn walls(limits: &Limits) -> io::Result<Vec<Tried>> {
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
