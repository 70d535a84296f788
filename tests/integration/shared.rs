//! Servers that several tests share, because starting and stopping a server costs far more than most requests.
//!
//! A test may share a server if it looks at nothing but answers, needs no particular number of containers, and sends no
//! program twice whose answer may not come from the cache. Tests with the same options use the same server.
//!
//! Each test is a process, so a server belongs to none of them. The first test that needs it starts a *keeper*, which is
//! this executable with the test [`keeper`], and the keeper starts the server and writes its address to a file. It stops
//! the server when `packaging/dev/cargo` unlocks the file `run`, or ends in any way, which unlocks it, too; then it
//! checks, as [`Server::stop`] always does, that nothing is left. `packaging/dev/cargo` waits for all keepers and fails
//! if one did not remove its address again.

use std::fs::{self, File};
use std::io::Write;
use std::net::SocketAddr;
use std::ops::Deref;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::harness::{Endpoint, Options, SHARED_RANGES, Server, engine, eventually, name_in};

/// The variable with the directory that `packaging/dev/cargo` makes for the keepers of one run of the tests.
const DIRECTORY: &str = "CODERUNNER_TEST_SHARED";

/// The variable with the options of a keeper's server, as JSON.
const OPTIONS: &str = "CODERUNNER_TEST_KEEPER";

/// Enough for two programs of each of several tests. A program that finds no free container waits.
const CONTAINERS: usize = 4;

/// A server that other tests use at the same time.
pub struct Shared {
    endpoint: Endpoint,
    /// The log of its keeper, shown if the test fails.
    log: PathBuf,
    /// A server of this test alone, if the tests were not started by `packaging/dev/cargo`.
    own: Option<Server>,
}

impl Shared {
    /// The server with these languages and this configuration.
    pub fn start(languages: &[&str], config: &str) -> Shared {
        // The containers may be busy with the programs of other tests.
        let config = format!("queue.wait = \"100s\"\n{config}");
        let options = json!({"engine": engine(), "languages": languages, "config": config}).to_string();
        let Some(directory) = directory() else {
            let server = start(&options, None);
            return Shared { endpoint: *server, log: PathBuf::new(), own: Some(server) };
        };
        let name = &blake3::hash(options.as_bytes()).to_hex()[..16];
        let (address, log) = (directory.join(name), directory.join(format!("{name}.log")));
        // Other tests that need the server wait here while the first of them starts it.
        let lock = File::create(directory.join(format!("{name}.lock"))).unwrap();
        lock.lock().unwrap();
        let endpoint = read(&address).unwrap_or_else(|| {
            let output = File::options().create(true).append(true).open(&log).unwrap();
            let mut keeper = Command::new(std::env::current_exe().unwrap())
                .args(["shared::keeper", "--exact", "--ignored", "--nocapture"])
                .env(OPTIONS, &options)
                .stdin(Stdio::null())
                .stdout(output.try_clone().unwrap())
                .stderr(output)
                // Nextest kills the process group of a test.
                .process_group(0)
                .spawn()
                .unwrap();
            eventually("a shared server is ready", || {
                let ended = keeper.try_wait().unwrap();
                assert!(ended.is_none(), "{ended:?}: {}", fs::read_to_string(&log).unwrap());
                read(&address)
            })
        });
        Shared { endpoint, log, own: None }
    }

    /// The server with this engine and language, and with time limits that no harmless program reaches on a busy machine.
    pub fn patient(engine: &str, language: &str) -> Shared {
        Shared::start(
            &[language],
            &format!("engine = \"{engine}\"\n[limits]\nrun_time = \"60s\"\nrun_cpu_time = \"60s\""),
        )
    }
}

impl Deref for Shared {
    type Target = Endpoint;

    fn deref(&self) -> &Endpoint {
        &self.endpoint
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let failed = std::thread::panicking();
        match self.own.take() {
            Some(own) if !failed => own.stop(),
            None if failed => {
                let log = fs::read_to_string(&self.log).unwrap_or_default();
                eprintln!("log of the shared server {}:\n{log}", self.endpoint.address);
            }
            _ => {}
        }
    }
}

fn read(address: &Path) -> Option<Endpoint> {
    let address: SocketAddr = fs::read_to_string(address).ok()?.parse().expect("an address");
    Some(Endpoint { address })
}

/// Starts a server with the options of a shared one, and this instance name or a unique one.
fn start(options: &str, instance: Option<&str>) -> Server {
    let options: Value = options.parse().unwrap();
    let languages: Vec<&str> =
        options["languages"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    let config = options["config"].as_str().unwrap();
    Server::start(Options { languages: &languages, containers: CONTAINERS, config, instance, ..Options::default() })
}

fn directory() -> Option<PathBuf> {
    std::env::var_os(DIRECTORY).map(PathBuf::from)
}

/// Leaves it to `packaging/dev/cargo` to remove these names of images, all at once at the end, as each call of podman
/// costs time. Returns whether it will.
pub fn remove_at_end(names: &[String]) -> bool {
    let Some(directory) = directory() else { return false };
    let lines: String = names.iter().map(|name| format!("{name}\n")).collect();
    let file = File::options().create(true).append(true).open(directory.join("names"));
    file.and_then(|mut file| file.write_all(lines.as_bytes())).is_ok()
}

/// Whether this process is the keeper of a shared server.
pub fn is_keeper() -> bool {
    std::env::var_os(OPTIONS).is_some()
}

#[test]
#[ignore = "started by the first test that needs a shared server"]
fn keeper() {
    let Ok(options) = std::env::var(OPTIONS) else { return };
    let directory = directory().unwrap();
    let name = blake3::hash(options.as_bytes()).to_hex()[..16].to_owned();
    let run = File::open(directory.join("run")).unwrap();
    // `packaging/dev/cargo` waits until no keeper holds it any more.
    let keepers = File::open(directory.join("keepers")).unwrap();
    keepers.lock_shared().unwrap();
    let take = |range: &u32| File::create(directory.join(format!("range-{range}"))).unwrap();
    let (range, _taken) = SHARED_RANGES
        .map(|range| (range, take(&range)))
        .find(|(_, file)| file.try_lock().is_ok())
        .expect("a range of uids for each shared server");

    let server = start(&options, Some(&name_in(range)));
    let (address, partial) = (directory.join(&name), directory.join(format!("{name}.partial")));
    fs::write(&partial, server.address.to_string()).unwrap();
    fs::rename(&partial, &address).unwrap();

    // Returns once the tests are over.
    run.lock_shared().unwrap();
    server.stop();
    // The directory is gone if `packaging/dev/cargo` was killed.
    let _ = fs::remove_file(&address);
}
