//! Whether one sandbox can see another: the one puts marks up wherever it can, the other looks for them.

use std::fs;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::Path;

use nix::libc;

use crate::cli::doctor::probe::syscalls::call;
use crate::cli::doctor::wall::{Tried, Wall};
use crate::model::rootfs::WRITABLE_PATHS;

/// The System V key and the loopback port of the marks.
const KEY: u16 = 7717;

/// The marks that are there as long as they are held.
pub(super) type Shown = (UnixListener, Option<TcpListener>);

/// Puts marks wherever another sandbox might find them.
pub(super) fn show(mark: &str) -> io::Result<Shown> {
    for place in WRITABLE_PATHS {
        fs::write(Path::new(place).join(mark), mark)?;
    }
    let created = libc::IPC_CREAT as usize | 0o666;
    call(libc::SYS_shmget, [KEY.into(), 4096, created])?;
    call(libc::SYS_msgget, [KEY.into(), created, 0])?;
    let local = UnixListener::bind_addr(&SocketAddr::from_abstract_name(mark)?)?;
    // Where the loopback interface is down, nobody can be reached on it.
    Ok((local, TcpListener::bind(("127.0.0.1", KEY)).ok()))
}

/// Looks for the marks of [`show`], and for processes other than init and this one.
pub(super) fn look(mark: &str) -> io::Result<Tried> {
    let mut holes: Vec<String> = Vec::new();
    let mut found = |is: bool, what: &str| is.then(|| holes.push(what.to_owned()));
    for place in WRITABLE_PATHS {
        found(Path::new(place).join(mark).exists(), &format!("a file in {place}"));
    }
    found(call(libc::SYS_shmget, [KEY.into(), 0, 0]).is_ok(), "shared memory");
    found(call(libc::SYS_msgget, [KEY.into(), 0, 0]).is_ok(), "a message queue");
    found(UnixStream::connect_addr(&SocketAddr::from_abstract_name(mark)?).is_ok(), "an abstract socket");
    found(TcpStream::connect(("127.0.0.1", KEY)).is_ok(), "a port on loopback");
    let is_process = |name: &str| name.parse::<u32>().is_ok();
    let processes = fs::read_dir("/proc")?.flatten().filter(|e| is_process(&e.file_name().to_string_lossy())).count();
    found(processes != 2, &format!("{processes} processes"));
    Ok(Tried::without(Wall::Neighbour, "nothing of it can be seen", &holes))
}
