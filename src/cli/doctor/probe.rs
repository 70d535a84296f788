//! What a sandbox is made to do to show its walls and limits. This executable is the program, so no image needs any
//! tool for it; the limits come as an argument.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use bytesize::ByteSize;
use nix::errno::Errno;
use nix::libc;
use nix::mount::{MsFlags, mount};
use nix::sys::statvfs::{FsFlags, statvfs};
use nix::unistd::{Uid, getgroups, getresgid, getresuid, setuid};
use serde::{Deserialize, Serialize};

use crate::host::print;
use crate::model::limits::Limits;
use crate::model::rootfs::WRITABLE_PATHS;

/// The hidden verb that becomes a probe.
pub const VERB: &str = "probe";

/// Threads that keep CPUs busy: more than a sandbox of [`super::walls`] may.
const BUSY: usize = 2;

/// How long a process stays that is to be killed.
const STAY: Duration = Duration::from_secs(60);

/// Key and loopback port of what one sandbox puts up and another must not find.
const KEY: u16 = 7717;

/// Addresses that no sandbox may reach: a neighbour's host, a cloud's metadata, the world.
const ADDRESSES: [&str; 5] =
    ["10.0.2.2:80", "169.254.169.254:80", "1.1.1.1:53", "[fd00:ec2::254]:80", "[2606:4700:4700::1111]:53"];

/// What tells of the host or of other programs: podman masks them, or they are init's.
const HIDDEN: [&str; 14] = [
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/sched_debug",
    "/proc/acpi",
    "/proc/scsi",
    "/sys/firmware",
    "/proc/1/environ",
    "/proc/1/maps",
    "/proc/1/mem",
    "/proc/1/fd",
    "/proc/1/root/work",
    "/job",
];

/// Switches of the kernel's.
const SWITCHES: [&str; 3] = ["/proc/sysrq-trigger", "/proc/sys/kernel/core_pattern", "/proc/sys/vm/drop_caches"];

/// Devices that a program may have.
const DEVICES: [&str; 8] = ["null", "zero", "full", "random", "urandom", "tty", "ptmx", "console"];

/// Calls that must not be there, with arguments for which none of them does anything.
const CALLS: [(&str, libc::c_long, [usize; 3]); 13] = [
    ("unshare", libc::SYS_unshare, [libc::CLONE_NEWUSER as usize, 0, 0]),
    ("setns", libc::SYS_setns, [usize::MAX, 0, 0]),
    ("add_key", libc::SYS_add_key, [0; 3]),
    ("keyctl", libc::SYS_keyctl, [0; 3]),
    ("io_uring_setup", libc::SYS_io_uring_setup, [1, 0, 0]),
    ("bpf", libc::SYS_bpf, [0; 3]),
    ("perf_event_open", libc::SYS_perf_event_open, [0; 3]),
    ("userfaultfd", libc::SYS_userfaultfd, [0; 3]),
    ("ptrace of init", libc::SYS_ptrace, [libc::PTRACE_ATTACH as usize, 1, 0]),
    ("init_module", libc::SYS_init_module, [0; 3]),
    ("kexec_load", libc::SYS_kexec_load, [0; 3]),
    ("reboot", libc::SYS_reboot, [0; 3]),
    ("socket of AF_VSOCK", libc::SYS_socket, [libc::AF_VSOCK as usize, libc::SOCK_STREAM as usize, 0]),
];

/// What a program tries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Probe {
    /// Every wall that can be tried from inside; prints a [`Tried`] a line. Its word: the limits, as JSON.
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
    /// Looks for what was put up under this mark; prints a [`Tried`] of [`Wall::Neighbour`].
    Look,
}

impl Probe {
    /// Its word on the command line.
    pub fn word(self) -> String {
        use clap::ValueEnum;
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }
}

/// What stands around a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)]
pub enum Wall {
    Memory,
    Processes,
    Cpu,
    Time,
    CpuTime,
    Output,
    Disk,
    Inodes,
    OpenFiles,
    Network,
    Uid,
    Capabilities,
    NoNewPrivileges,
    Seccomp,
    Landlock,
    ReadOnlyRoot,
    MaskedPaths,
    Devices,
    Descriptors,
    Neighbour,
    Leftovers,
}

impl Wall {
    /// Those that [`Probe::Walls`] tries.
    pub const INSIDE: [Wall; 13] = [
        Wall::Disk,
        Wall::Inodes,
        Wall::OpenFiles,
        Wall::Network,
        Wall::Uid,
        Wall::Capabilities,
        Wall::NoNewPrivileges,
        Wall::Seccomp,
        Wall::Landlock,
        Wall::ReadOnlyRoot,
        Wall::MaskedPaths,
        Wall::Devices,
        Wall::Descriptors,
    ];

    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Wall::Memory => "memory",
            Wall::Processes => "processes",
            Wall::Cpu => "cpu",
            Wall::Time => "wall time",
            Wall::CpuTime => "cpu time",
            Wall::Output => "output",
            Wall::Disk => "disk",
            Wall::Inodes => "inodes",
            Wall::OpenFiles => "open files",
            Wall::Network => "network",
            Wall::Uid => "uid",
            Wall::Capabilities => "capabilities",
            Wall::NoNewPrivileges => "no-new-privileges",
            Wall::Seccomp => "seccomp",
            Wall::Landlock => "Landlock",
            Wall::ReadOnlyRoot => "read-only root",
            Wall::MaskedPaths => "masked paths",
            Wall::Devices => "devices",
            Wall::Descriptors => "descriptors",
            Wall::Neighbour => "neighbour",
            Wall::Leftovers => "leftovers",
        }
    }
}

/// What came of trying a wall.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tried {
    /// Which.
    pub wall: Wall,
    /// Whether it holds.
    pub holds: bool,
    /// What should have come.
    pub expected: String,
    /// What came.
    pub seen: String,
}

impl Tried {
    /// What came of it, in words.
    pub fn new(wall: Wall, holds: bool, expected: impl Into<String>, seen: impl Into<String>) -> Tried {
        Tried { wall, holds, expected: expected.into(), seen: seen.into() }
    }

    /// A wall without the holes that were looked for.
    fn without(wall: Wall, expected: &str, holes: &[String]) -> Tried {
        let seen = if holes.is_empty() { expected.to_owned() } else { holes.join(", ") };
        Tried::new(wall, holes.is_empty(), expected, seen)
    }
}

/// The life of a probe.
pub fn main(probe: Probe, word: &str) -> ExitCode {
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
            // Used after all were made, so that they are.
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
            // In a group of its own, and with our output.
            Command::new("/proc/self/exe").args([VERB, &Probe::Sleep.word(), word]).process_group(0).spawn()?;
        }
        Probe::Look => tell(&look(word)?)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn tell(tried: &Tried) -> io::Result<()> {
    writeln!(io::stdout(), "{}", serde_json::to_string(tried)?)
}

fn walls(limits: &Limits) -> io::Result<Vec<Tried>> {
    Ok(vec![
        disk(limits.directory_size()),
        inodes(limits.inodes),
        open_files(limits.open_files),
        network()?,
        uid()?,
        capabilities()?,
        no_new_privileges()?,
        seccomp()?,
        landlock(),
        read_only_root()?,
        masked_paths(),
        devices()?,
        descriptors()?,
    ])
}

/// Calls the kernel by number.
fn call(number: libc::c_long, [first, second, third]: [usize; 3]) -> Result<libc::c_long, Errno> {
    // SAFETY: no pointer among the arguments of [`CALLS`] and of the calls for System V memory is other than null,
    // so nothing of ours is read or written.
    Errno::result(unsafe { libc::syscall(number, first, second, third, 0_usize, 0_usize) })
}

/// Whether the kernel refused, by whichever wall; with any other error it had begun.
fn is_refusal(error: Errno) -> bool {
    matches!(error, Errno::EPERM | Errno::EACCES | Errno::ENOSYS | Errno::EAFNOSUPPORT)
}

fn disk(size: u64) -> Tried {
    let chunk = vec![0; usize::try_from(size / 8).unwrap_or(usize::MAX).max(1)];
    let fill = |place: &str| {
        let file = |number: u32| Path::new(place).join(format!("fill-{number}"));
        let mut written = 0;
        let mut files = 0;
        // Many files, for a single one has a limit of its own.
        while written <= 2 * size
            && let Ok(mut part) = File::create(file(files))
        {
            let whole = part.write_all(&chunk).is_ok();
            written += part.metadata().map_or(0, |meta| meta.len());
            files += 1;
            if !whole {
                break;
            }
        }
        (0..files).for_each(|number| drop(fs::remove_file(file(number))));
        written
    };
    let filled = WRITABLE_PATHS.map(|place| (place, fill(place)));
    let seen: Vec<String> = filled.iter().map(|(place, bytes)| format!("{} in {place}", ByteSize(*bytes))).collect();
    let holds = filled.iter().all(|(_, bytes)| (size / 2..=size).contains(bytes));
    Tried::new(Wall::Disk, holds, format!("{} in each directory", ByteSize(size)), seen.join(", "))
}

fn inodes(most: u64) -> Tried {
    let fill = |place: &str| {
        let file = |number: &u64| Path::new(place).join(format!("file-{number}"));
        let made = (0..=most).take_while(|number| File::create(file(number)).is_ok()).count() as u64;
        (0..made).for_each(|number| drop(fs::remove_file(file(&number))));
        made
    };
    let filled = WRITABLE_PATHS.map(|place| (place, fill(place)));
    let seen: Vec<String> = filled.iter().map(|(place, files)| format!("{files} in {place}")).collect();
    let holds = filled.iter().all(|(_, files)| (most / 2..=most).contains(files));
    Tried::new(Wall::Inodes, holds, format!("{most} files in each directory"), seen.join(", "))
}

fn open_files(most: u64) -> Tried {
    let opened: Vec<File> = (0..=most).map_while(|_| File::open("/dev/null").ok()).collect();
    // Beside the three streams.
    let open = opened.len() as u64 + 3;
    Tried::new(Wall::OpenFiles, open <= most, format!("{most} at once"), format!("{open} at once"))
}

fn network() -> io::Result<Tried> {
    let interfaces = fs::read_to_string("/proc/net/dev")?;
    let names = interfaces.lines().filter_map(|line| line.split_once(':')).map(|(name, _)| name.trim());
    let mut holes: Vec<String> = names.filter(|name| *name != "lo").map(|name| format!("interface {name}")).collect();
    for address in ADDRESSES.iter().filter_map(|text| text.parse::<SocketAddr>().ok()) {
        if TcpStream::connect_timeout(&address, Duration::from_secs(2)).is_ok() {
            holes.push(format!("reached {address}"));
        }
    }
    Ok(Tried::without(Wall::Network, "nothing but an own loopback", &holes))
}

fn uid() -> io::Result<Tried> {
    let (uids, gids) = (getresuid()?, getresgid()?);
    let ids = [uids.real, uids.effective, uids.saved].map(Uid::as_raw);
    let groups = [gids.real, gids.effective, gids.saved].map(|gid| gid.as_raw());
    let others = getgroups()?;
    let own = ids == groups && ids.iter().all(|id| *id == ids[0] && *id != 0) && others.is_empty();
    let stays = setuid(Uid::from_raw(0)).is_err();
    let mut seen = format!("uid {}, gid {}, {} other groups", ids[0], groups[0], others.len());
    if !stays {
        seen += ", became root";
    }
    Ok(Tried::new(Wall::Uid, own && stays, "an own uid and gid, no groups, no way to root", seen))
}

/// A field of what the kernel says of this process.
fn status(field: &str) -> io::Result<String> {
    let status = fs::read_to_string("/proc/self/status")?;
    let mut lines = status.lines().filter_map(|line| line.split_once(':'));
    let value = lines.find(|(name, _)| *name == field).map(|(_, value)| value.trim().to_owned());
    Ok(value.unwrap_or_else(|| "not told".into()))
}

fn capabilities() -> io::Result<Tried> {
    let mut holes = Vec::new();
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        let value = status(set)?;
        if value.chars().any(|digit| digit != '0') {
            holes.push(format!("{set} {value}"));
        }
    }
    Ok(Tried::without(Wall::Capabilities, "none", &holes))
}

fn no_new_privileges() -> io::Result<Tried> {
    let value = status("NoNewPrivs")?;
    let seen = if value == "1" { "set".into() } else { format!("NoNewPrivs {value}") };
    Ok(Tried::new(Wall::NoNewPrivileges, value == "1", "set", seen))
}

fn seccomp() -> io::Result<Tried> {
    let mode = status("Seccomp")?;
    let mut holes: Vec<String> = if mode == "2" { Vec::new() } else { vec![format!("Seccomp {mode}")] };
    for (name, number, args) in CALLS {
        match call(number, args) {
            Err(error) if is_refusal(error) => {}
            Err(error) => holes.push(format!("{name}: {error}")),
            Ok(_) => holes.push(format!("{name} worked")),
        }
    }
    // With its arguments, for it looks at them before it refuses.
    match mount(Some("none"), "/tmp", Some("tmpfs"), MsFlags::empty(), None::<&str>) {
        Err(error) if is_refusal(error) => {}
        other => holes.push(format!("mount: {other:?}")),
    }
    Ok(Tried::without(Wall::Seccomp, &format!("a filter, and {} calls refused", CALLS.len() + 1), &holes))
}

/// What no mount keeps from being written: a program's own files in /proc.
fn landlock() -> Tried {
    let own = "/proc/self/comm";
    let opened = File::options().write(true).open(own).map(|_| format!("{own} can be written"));
    Tried::without(
        Wall::Landlock,
        "nothing else can be written, whatever mounts allow",
        &opened.into_iter().collect::<Vec<_>>(),
    )
}

fn read_only_root() -> io::Result<Tried> {
    let mut holes = Vec::new();
    if !statvfs("/").map_err(io::Error::from)?.flags().contains(FsFlags::ST_RDONLY) {
        holes.push("/ is not read-only".to_owned());
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let mounted = mounts.lines().filter_map(|line| line.split_whitespace().nth(4));
    let below = ["/", "/etc", "/usr", "/run", "/var", "/dev", "/proc", "/sys", "/proc/sys", "/sys/fs/cgroup"];
    for place in mounted.chain(below).filter(|place| !WRITABLE_PATHS.contains(place)) {
        let place = Path::new(place);
        let Ok(meta) = place.metadata() else { continue };
        let probe: PathBuf = if meta.is_dir() { place.join("coderunner-probe") } else { place.into() };
        // Devices may be written to.
        let may_try = meta.is_dir() || meta.is_file();
        if may_try && File::options().append(true).create(meta.is_dir()).open(&probe).is_ok() {
            holes.push(format!("{} can be written", place.display()));
        }
    }
    holes.sort();
    holes.dedup();
    Ok(Tried::without(Wall::ReadOnlyRoot, "nothing but /work, /tmp and /dev/shm can be written", &holes))
}

fn masked_paths() -> Tried {
    let tells = |path: &&&str| {
        let of_file = || File::open(path).is_ok_and(|mut file| file.read(&mut [0]).is_ok_and(|length| length > 0));
        fs::read_dir(path).map_or_else(|_| of_file(), |mut entries| entries.next().is_some())
    };
    let read = HIDDEN.iter().filter(tells).map(|path| format!("{path} can be read"));
    let is_open = |path: &&&str| File::options().write(true).open(path).is_ok();
    let written = SWITCHES.iter().filter(is_open).map(|path| format!("{path} can be written"));
    let holes: Vec<String> = read.chain(written).collect();
    Tried::without(Wall::MaskedPaths, "nothing of the host's and of init's can be read", &holes)
}

fn devices() -> io::Result<Tried> {
    let mut holes = Vec::new();
    for entry in fs::read_dir("/dev")? {
        let entry = entry?;
        let (kind, name) = (entry.file_type()?, entry.file_name());
        let device = kind.is_block_device() || kind.is_char_device();
        if device && !DEVICES.iter().any(|known| name == *known) {
            holes.push(entry.path().display().to_string());
        }
    }
    Ok(Tried::without(Wall::Devices, "none of the host's", &holes))
}

fn descriptors() -> io::Result<Tried> {
    let mut holes = Vec::new();
    for entry in fs::read_dir("/proc/self/fd")? {
        let entry = entry?;
        // The list itself is open while it is read, and closed when its entries are looked at.
        let number: i32 = entry.file_name().to_string_lossy().parse().map_err(io::Error::other)?;
        let target = fs::read_link(entry.path()).unwrap_or_default();
        if number > 2 && !target.starts_with("/proc/") {
            holes.push(format!("{number}: {}", target.display()));
        }
    }
    Ok(Tried::without(Wall::Descriptors, "input, output and error", &holes))
}

/// What was put up, as long as it is held.
type Shown = (UnixListener, Option<TcpListener>);

/// Puts a mark wherever another sandbox might find it.
fn show(mark: &str) -> io::Result<Shown> {
    for place in WRITABLE_PATHS {
        fs::write(Path::new(place).join(mark), mark)?;
    }
    let created = libc::IPC_CREAT as usize | 0o666;
    call(libc::SYS_shmget, [KEY.into(), 4096, created])?;
    call(libc::SYS_msgget, [KEY.into(), created, 0])?;
    let local = UnixListener::bind_addr(&UnixAddr::from_abstract_name(mark)?)?;
    // Where loopback is down nobody is met on it.
    Ok((local, TcpListener::bind(("127.0.0.1", KEY)).ok()))
}

/// Looks for everything that [`show`] puts up, and for other processes than init and this one.
fn look(mark: &str) -> io::Result<Tried> {
    let mut holes: Vec<String> = Vec::new();
    let mut found = |is: bool, what: &str| is.then(|| holes.push(what.to_owned()));
    for place in WRITABLE_PATHS {
        found(Path::new(place).join(mark).exists(), &format!("a file in {place}"));
    }
    found(call(libc::SYS_shmget, [KEY.into(), 0, 0]).is_ok(), "shared memory");
    found(call(libc::SYS_msgget, [KEY.into(), 0, 0]).is_ok(), "a message queue");
    found(UnixStream::connect_addr(&UnixAddr::from_abstract_name(mark)?).is_ok(), "an abstract socket");
    found(TcpStream::connect(("127.0.0.1", KEY)).is_ok(), "a port on loopback");
    let is_process = |name: &str| name.parse::<u32>().is_ok();
    let processes = fs::read_dir("/proc")?.flatten().filter(|e| is_process(&e.file_name().to_string_lossy())).count();
    found(processes != 2, &format!("{processes} processes"));
    Ok(Tried::without(Wall::Neighbour, "nothing of it can be seen", &holes))
}
