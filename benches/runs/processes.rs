//! Reads processes from /proc.

use std::collections::BTreeMap;
use std::fs::{read, read_dir, read_to_string};

use anyhow::{Context, Result};

/// All processes by process id.
pub struct Processes(BTreeMap<u32, Process>);

/// A process.
pub struct Process {
    parent: u32,
    name: String,
    command_line: Vec<u8>,
    /// CPU time of the process and of the children that it reaped, in clock ticks.
    pub ticks: u64,
}

impl Process {
    fn read(id: u32) -> Option<Process> {
        let stat = read_to_string(format!("/proc/{id}/stat")).ok()?;
        // The name in parentheses may contain any character.
        let (name, fields) = stat.rsplit_once(')')?;
        let fields: Vec<&str> = fields.split_whitespace().collect();
        Some(Process {
            name: name.split_once('(')?.1.to_owned(),
            parent: fields.get(1)?.parse().ok()?,
            command_line: read(format!("/proc/{id}/cmdline")).ok()?,
            // utime, stime, cutime, cstime
            ticks: fields.get(11..15)?.iter().filter_map(|ticks| ticks.parse::<u64>().ok()).sum(),
        })
    }

    /// Whether its command line contains this.
    pub fn mentions(&self, what: &str) -> bool {
        self.command_line.windows(what.len()).any(|part| part == what.as_bytes())
    }

    /// Whether it is the init of a sandbox.
    pub fn is_init(&self) -> bool {
        self.name == "coderunner-init"
    }
}

impl Processes {
    /// Reads all processes.
    pub fn now() -> Result<Processes> {
        let ids = read_dir("/proc")?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        Ok(Processes(ids.filter_map(|id| Some((id, Process::read(id)?))).collect()))
    }

    /// The processes for which `is` holds, and their descendants.
    pub fn below(&self, is: impl Fn(u32, &Process) -> bool) -> impl Iterator<Item = (u32, &Process)> {
        let entry = |id: u32| self.0.get(&id).map(|process| (id, process));
        let belongs = move |id: u32| {
            let mut line = std::iter::successors(entry(id), |(_, process)| entry(process.parent));
            line.any(|(id, process)| is(id, process))
        };
        self.0.iter().filter(move |(id, _)| belongs(**id)).map(|(id, process)| (*id, process))
    }
}

/// Reads a field with an amount of memory from a file in /proc/ID, in bytes.
pub fn memory(id: u32, file: &str, field: &str) -> Result<u64> {
    let path = format!("/proc/{id}/{file}");
    let text = read_to_string(&path).with_context(|| path.clone())?;
    let line = text.lines().find_map(|line| line.strip_prefix(field)).unwrap_or_default();
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().with_context(|| format!("{path}: {field} {line}"))?;
    Ok(kib << 10)
}
