//! Tests whether one sandbox can see another: one leaves marks wherever it can, the other looks for them.

use std::fs;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::Path;

use nix::libc;

use crate::cli::doctor::probe::syscalls::call;
use crate::cli::doctor::wall::{Wall, WallResult};
use crate::model::rootfs::WRITABLE_PATHS;

/// The System V IPC key and the loopback port of the marks.
const KEY: u16 = 7717;

/// The marks that exist only as long as they are held.
pub(super) type HeldMarks = (UnixListener, Option<TcpListener>);

/// Leaves marks wherever another sandbox might find them.
pub(super) fn show(mark: &str) -> io::Result<HeldMarks> {
    for place in WRITABLE_PATHS {
        fs::write(Path::new(place).join(mark), mark)?;
    }
    let created = libc::IPC_CREAT as usize | 0o666;
    call(libc::SYS_shmget, [KEY.into(), 4096, created])?;
    call(libc::SYS_msgget, [KEY.into(), created, 0])?;
    let local = UnixListener::bind_addr(&SocketAddr::from_abstract_name(mark)?)?;
    // Binding fails if the loopback interface is down, and then nothing can be reached on it.
    Ok((local, TcpListener::bind(("127.0.0.1", KEY)).ok()))
}

/// Looks for the marks of [`show`], and for processes other than init and this one.
pub(super) fn look(mark: &str) -> io::Result<WallResult> {
    let mut holes: Vec<String> = Vec::new();
    let mut hole_if = |found: bool, what: &str| found.then(|| holes.push(what.to_owned()));
    for place in WRITABLE_PATHS {
        hole_if(Path::new(place).join(mark).exists(), &format!("a file in {place}"));
    }
    hole_if(call(libc::SYS_shmget, [KEY.into(), 0, 0]).is_ok(), "shared memory");
    hole_if(call(libc::SYS_msgget, [KEY.into(), 0, 0]).is_ok(), "a message queue");
    hole_if(UnixStream::connect_addr(&SocketAddr::from_abstract_name(mark)?).is_ok(), "an abstract socket");
    hole_if(TcpStream::connect(("127.0.0.1", KEY)).is_ok(), "a port on loopback");
    let is_process = |name: &str| name.parse::<u32>().is_ok();
    let processes = fs::read_dir("/proc")?.flatten().filter(|e| is_process(&e.file_name().to_string_lossy())).count();
    hole_if(processes != 2, &format!("{processes} processes"));
    Ok(WallResult::from_holes(Wall::Neighbour, "nothing of it can be seen", &holes))
}
