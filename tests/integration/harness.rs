//! A server under test: started with its own configuration, called over HTTP, stopped, and then checked for anything
//! that it left behind.
//!
//! Every server has a unique instance name, so tests can run in parallel. Every wait has a timeout, generous enough for
//! a busy machine; no test measures these timeouts.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::ops::{Deref, Range};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::client::{self, Answer, Pending, Reply};
use crate::{leftovers, shared};

/// Timeout for things that normally happen at once.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// The first and the longest pause between two checks of a condition that is waited for. The pause grows with the time
/// that has passed, because many checks call podman or read all of `/proc`, and that many tests wait at the same time.
const POLL: Range<Duration> = Duration::from_millis(20)..Duration::from_millis(250);

/// An upper bound of the number of tests that run at the same time.
const SLOTS: u32 = 32;

/// The ranges of uids of the servers that tests share; tests use those below for their own servers.
pub const SHARED_RANGES: Range<u32> = SLOTS * 7..250;

/// The languages with local images, which `make run` uses, too.
const LOCAL: &str = include_str!("../../packaging/dev/local.toml");

/// How a server is started.
#[derive(Debug, Clone, Default)]
pub struct Options<'a> {
    /// The languages to serve, the default one first; `["c"]` if empty.
    pub languages: &'a [&'a str],
    /// Number of containers; 2 if zero.
    pub containers: usize,
    /// Further configuration in TOML, merged over that of the local images table by table.
    pub config: &'a str,
    /// Further environment variables.
    pub env: &'a [(&'a str, &'a str)],
    /// A directory put first on PATH, for a fake podman.
    pub path: Option<&'a Path>,
    /// The limit of open descriptors; that of this process if `None`.
    pub descriptors: Option<u64>,
    /// The instance name; a unique one if `None`.
    pub instance: Option<&'a str>,
}

/// A server as its clients see it.
#[derive(Debug, Clone, Copy)]
pub struct Endpoint {
    /// The address that it listens on.
    pub address: SocketAddr,
}

/// A running server of one test, which stops it with [`Server::stop`]; dropping it kills it, which happens only in failed
/// tests. As an [`Endpoint`] it takes requests. Tests that do nothing else use a [`crate::shared::Shared`] server.
pub struct Server {
    /// Its instance name.
    pub instance: String,
    endpoint: Endpoint,
    child: Child,
    log: Log,
    files: Files,
    stopped: bool,
}

/// How a process ended: its exit status and its stderr.
#[derive(Debug)]
pub struct Exit {
    pub status: ExitStatus,
    pub stderr: String,
}

/// The configuration file and the state directory of an instance.
pub struct Files {
    dir: TempDir,
    /// The instance name in the configuration file.
    pub instance: String,
}

impl Files {
    /// Writes the configuration that these options ask for.
    pub fn new(options: &Options) -> Files {
        let instance = options.instance.map_or_else(unique_name, str::to_owned);
        let dir = TempDir::with_prefix("coderunner-test-").unwrap();
        let mut config: toml::Table = LOCAL.parse().unwrap();
        let languages = if options.languages.is_empty() { &["c"] } else { options.languages };
        let containers = if options.containers == 0 { 2 } else { options.containers };
        config.insert("listen".into(), "127.0.0.1:0".into());
        if let Some(engine) = engine() {
            config.insert("engine".into(), engine.into());
        }
        config.insert("instance".into(), instance.clone().into());
        config.insert("languages".into(), languages.to_vec().into());
        // Long enough for a busy machine; tests of the limit set their own.
        merge(&mut config, toml::toml! { limits = { run_time = "30s" } });
        // Many tests look at the ready sandboxes, which requests to /readyz would use up by probing.
        merge(&mut config, toml::toml! { ready = { probe = false } });
        config.insert("containers".into(), i64::try_from(containers).unwrap().into());
        merge(&mut config, options.config.parse().unwrap());
        fs::write(dir.path().join("coderunner.toml"), config.to_string()).unwrap();
        Files { dir, instance }
    }

    /// Path of the configuration file; tests of the reload change it.
    pub fn config(&self) -> PathBuf {
        self.dir.path().join("coderunner.toml")
    }

    /// The directory of the configuration file; tests may put other files there.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A command line with this verb, without the `CODERUNNER_` variables of this process.
    pub fn command(&self, verb: &str, options: &Options) -> Command {
        not_as_root();
        let mut command = Command::new(executable());
        command.arg(verb).arg("--config").arg(self.config()).stdin(Stdio::null());
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("CODERUNNER_") {
                command.env_remove(name);
            }
        }
        command
            .env("NO_COLOR", "1")
            .env("XDG_STATE_HOME", self.dir.path().join("state"))
            .envs(options.env.iter().copied());
        if let Some(first) = options.path {
            let rest = std::env::var_os("PATH").unwrap_or_default();
            let dirs = std::iter::once(first.to_owned()).chain(std::env::split_paths(&rest));
            command.env("PATH", std::env::join_paths(dirs).unwrap());
        }
        let descriptors = options.descriptors;
        // SAFETY: prctl and setrlimit are async-signal-safe and allocate nothing.
        unsafe {
            command.pre_exec(move || {
                if let Some(most) = descriptors {
                    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
                }
                // The server dies with the test, even if the test run is killed: the kernel sends this signal when the
                // thread that started the server ends.
                Ok(nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?)
            });
        }
        command
    }
}

impl Endpoint {
    /// Waits until `/readyz` answers 200.
    pub fn wait_ready(&self) {
        eventually("the server is ready (`make test` builds its images)", || {
            (self.get("/readyz").status == 200).then_some(())
        });
    }

    /// Waits until every language is ready. The server needs at least one container for each.
    pub fn wait_each_ready(&self) {
        eventually("every language is ready", || {
            let languages = self.get("/readyz").json()["languages"].clone();
            languages.as_object()?.values().all(|language| language["ready"] == true).then_some(())
        });
    }

    /// Runs code in the default language.
    pub fn run(&self, code: &str) -> Answer {
        self.begin(code).reply().answer()
    }

    /// Sends code without waiting for the answer.
    pub fn begin(&self, code: &str) -> Pending {
        self.begin_json(&json!({ "code": code }))
    }

    /// Posts JSON to `/coderunner` without waiting for the answer.
    pub fn begin_json(&self, body: &Value) -> Pending {
        let headers = [("Content-Type", "application/json")];
        self.begin_request("POST", "/coderunner", &headers, body.to_string().as_bytes())
    }

    /// Sends any request without waiting for the answer.
    pub fn begin_request(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Pending {
        let head = client::head(method, path, headers, body.len());
        Pending::send(self.address, &[head.as_bytes(), body].concat())
    }

    /// Sends any request and waits for its answer.
    pub fn request(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Reply {
        self.begin_request(method, path, headers, body).reply()
    }

    pub fn get(&self, path: &str) -> Reply {
        self.request("GET", path, &[], b"")
    }

    /// Whether this host enforces a limit of sandboxes (`memory`, `processes` or `cpu`). With cgroup v1, rootless
    /// containers have none of these, and the server reports it.
    pub fn enforces(&self, limit: &str) -> bool {
        let body = self.get("/readyz").json();
        let missing = body["limitsNotEnforced"].as_array().expect("limitsNotEnforced");
        missing.iter().all(|name| name != limit)
    }
}

impl Server {
    /// Starts a server and waits until it is ready.
    pub fn start(options: Options) -> Server {
        let server = Server::launch(options);
        server.wait_ready();
        server
    }

    /// Starts a server and waits until it listens. It may not have a sandbox yet, or may never get one.
    pub fn launch(options: Options) -> Server {
        Server::launch_with(Files::new(&options), &options)
    }

    /// Like [`Server::launch`], with existing files: starts the same instance again.
    pub fn launch_with(files: Files, options: &Options) -> Server {
        let mut child = files.command("serve", options).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let log = Log::of(&mut child);
        let mut server = Server {
            instance: files.instance.clone(),
            endpoint: Endpoint { address: SocketAddr::from(([0; 4], 0)) },
            child,
            log,
            files,
            stopped: false,
        };
        server.endpoint.address = eventually("a log line with the address", || {
            let ended = server.child.try_wait().unwrap();
            assert!(ended.is_none(), "the server exited during startup: {ended:?}");
            let log = server.log();
            let line = log.lines().find(|line| line.contains("listening"))?;
            // The text or the JSON format of the log.
            let address = line.split_once("address=").or_else(|| line.split_once("\"address\":\""))?.1;
            Some(address.split(|c: char| c.is_whitespace() || c == '"').next()?.parse().unwrap())
        });
        server
    }

    /// Starts a server that writes its log to `stderr`, on a free address, and waits until it accepts connections.
    pub fn launch_to(stderr: Stdio, options: &Options) -> Server {
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let files = Files::new(options);
        let mut command = files.command("serve", options);
        command.env("CODERUNNER_LISTEN", address.to_string()).stdout(Stdio::null()).stderr(stderr);
        let child = command.spawn().unwrap();
        // The command holds a copy of `stderr`, which may be a pipe.
        drop(command);
        let instance = files.instance.clone();
        let endpoint = Endpoint { address };
        let mut server = Server { instance, endpoint, child, log: Log::none(), files, stopped: false };
        eventually("the server accepts connections", || {
            let ended = server.child.try_wait().unwrap();
            assert!(ended.is_none(), "the server exited during startup: {ended:?}");
            TcpStream::connect(address).ok()
        });
        server
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).unwrap();
    }

    /// The log so far.
    pub fn log(&self) -> String {
        self.log.text()
    }

    /// Waits until the log has a line that contains all of these words.
    pub fn wait_log(&self, words: &[&str]) -> String {
        eventually(&format!("a line with {words:?} in the log"), || {
            let log = self.log();
            let mut lines = log.lines();
            lines.find(|line| words.iter().all(|word| line.contains(word))).map(str::to_owned)
        })
    }

    /// Its configuration file and directory.
    pub fn files(&self) -> &Files {
        &self.files
    }

    /// Names of its containers that podman lists, running or not.
    pub fn containers(&self) -> Vec<String> {
        leftovers::containers(&self.instance)
    }

    /// Waits until it has exited, without sending a signal.
    pub fn wait_exit(&mut self) -> ExitStatus {
        wait_exit(&mut self.child)
    }

    /// Sends SIGTERM as systemd does, and checks that the server exits with 0 and leaves nothing behind.
    pub fn stop(self) {
        self.signal(Signal::SIGTERM);
        self.wait_clean_exit();
    }

    /// Waits for the exit of a server that was sent a signal; checks that it exits with 0 and leaves nothing behind.
    pub fn wait_clean_exit(mut self) {
        let status = self.wait_exit();
        assert_eq!(status.code(), Some(0), "the server exited with {status}");
        leftovers::assert_none(&self.instance);
        self.stopped = true;
    }

    /// Kills it with SIGKILL, and returns its files for the next start. Does not wait for the end of its sandboxes.
    pub fn crash(mut self) -> Files {
        self.child.kill().unwrap();
        self.wait_exit();
        self.stopped = true;
        let nothing = Files { dir: TempDir::new().unwrap(), instance: String::new() };
        std::mem::replace(&mut self.files, nothing)
    }
}

impl Deref for Server {
    type Target = Endpoint;

    fn deref(&self) -> &Endpoint {
        &self.endpoint
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.stopped {
            return;
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        leftovers::remove(&self.instance);
        // The test runner shows this only if the test failed.
        eprintln!("log of {}:\n{}", self.instance, self.log());
    }
}

/// Starts a server that must refuse to start, and waits for its exit.
pub fn refused(options: Options) -> Exit {
    let files = Files::new(&options);
    refused_with(&files, &options)
}

/// Like [`refused`], with existing files.
pub fn refused_with(files: &Files, options: &Options) -> Exit {
    let mut child = files.command("serve", options).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let log = Log::of(&mut child);
    let status = wait_exit(&mut child);
    let stderr = eventually("stderr is closed", || log.ended().then(|| log.text()));
    Exit { status, stderr }
}

/// Runs a command to its end, with a timeout. The command need not read all of `stdin`.
pub fn output(command: &mut Command, stdin: &[u8]) -> Output {
    finish(with_pipes(command), stdin)
}

fn with_pipes(command: &mut Command) -> Child {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Like [`output`], for a child whose three streams are pipes.
pub fn finish(child: Child, stdin: &[u8]) -> Output {
    finish_within(PATIENCE, child, stdin)
}

fn finish_within(patience: Duration, mut child: Child, stdin: &[u8]) -> Output {
    let collect = |mut pipe: Box<dyn Read + Send>| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            let _ = pipe.read_to_end(&mut bytes);
            bytes
        })
    };
    let stdout = collect(Box::new(child.stdout.take().unwrap()));
    let stderr = collect(Box::new(child.stderr.take().unwrap()));
    // Fails if the program does not read it, which is no error.
    let _ = child.stdin.take().unwrap().write_all(stdin);
    let status = eventually_within(patience, "a process exits", || child.try_wait().unwrap());
    Output { status, stdout: stdout.join().unwrap(), stderr: stderr.join().unwrap() }
}

/// Runs a program to its end, checks that it succeeds, and returns its stdout and stderr.
#[track_caller]
pub fn run_program(program: &str, args: &[&str]) -> String {
    run_program_within(PATIENCE, program, args)
}

/// Like [`run_program`], with another timeout.
#[track_caller]
pub fn run_program_within(patience: Duration, program: &str, args: &[&str]) -> String {
    let output = finish_within(patience, with_pipes(Command::new(program).args(args)), b"");
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program}: {}: {said}", output.status);
    said
}

/// The directory where `packaging/dev/clients` installs third-party clients.
pub fn clients() -> String {
    std::env::var("CODERUNNER_TEST_CLIENTS").expect("CODERUNNER_TEST_CLIENTS: run tests by `make test`")
}

/// The engine of the nextest profile; `None` where the server chooses.
pub fn engine() -> Option<&'static str> {
    let profile = std::env::var("NEXTEST_PROFILE").unwrap_or_default();
    (profile == "podman").then_some("podman")
}

/// The server's executable. If tests run as another user than cargo, it is a copy that this user can read.
pub fn executable() -> PathBuf {
    std::env::var_os("CODERUNNER_TEST_EXE").map_or_else(|| env!("CARGO_BIN_EXE_coderunner").into(), PathBuf::from)
}

/// Waits until `probe` returns a value. `what` says in the panic message what was waited for.
pub fn eventually<T>(what: &str, probe: impl FnMut() -> Option<T>) -> T {
    eventually_within(PATIENCE, what, probe)
}

fn eventually_within<T>(patience: Duration, what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = probe() {
            return found;
        }
        assert!(began.elapsed() < patience, "timeout after {patience:?}: {what}");
        pause(began);
    }
}

/// Waits until `probe` finds nothing any more. The panic message lists what it still finds.
pub fn eventually_none(what: &str, mut probe: impl FnMut() -> Vec<String>) {
    let mut found = Vec::new();
    let began = Instant::now();
    while began.elapsed() < PATIENCE {
        found = probe();
        if found.is_empty() {
            return;
        }
        pause(began);
    }
    panic!("still there after {PATIENCE:?}: {what}: {found:#?}");
}

/// Pauses before the next check of a condition that is waited for since this time.
fn pause(began: Instant) {
    std::thread::sleep((began.elapsed() / 8).clamp(POLL.start, POLL.end));
}

/// Removes the indentation that a program has inside a test.
pub fn code(text: &str) -> String {
    let indentation = |line: &str| line.len() - line.trim_start().len();
    let lines = || text.lines().skip_while(|line| line.trim().is_empty());
    let common = lines().filter(|line| !line.trim().is_empty()).map(indentation).min().unwrap_or(0);
    lines().map(|line| format!("{}\n", line.get(common..).unwrap_or_default())).collect()
}

/// A unique duration, slightly longer than `seconds`. [`leftovers::marked`] finds a `sleep` with it among all processes
/// of the machine.
pub fn marked_seconds(seconds: u32) -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    // The 1 terminates the process id, so that no mark is a prefix of another.
    format!("{seconds}.00{:07}1{:03}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

/// Waits until a process with this mark runs.
pub fn wait_running(mark: &str) {
    eventually(&format!("a process with {mark} runs"), || (!leftovers::marked(mark).is_empty()).then_some(()));
}

/// Waits until no process with this mark runs.
pub fn wait_gone(mark: &str) {
    eventually_none("marked processes", || leftovers::marked(mark));
}

/// An instance name that is unique among all test runs of this user.
pub fn unique_name() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    // Each test is a process, and nextest gives tests that run at the same time different slots.
    let slot = std::env::var("NEXTEST_TEST_GLOBAL_SLOT").ok().and_then(|slot| slot.parse().ok()).unwrap_or(0);
    name_in((slot + SLOTS * count) % SHARED_RANGES.start)
}

/// A unique instance name that selects this range of uids. A hash of the name selects one of 250 ranges of uids for
/// programs, and the kernel counts processes per uid, so names in use at the same time must select different ranges.
pub fn name_in(wanted: u32) -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let range = |name: &str| {
        let [first, second, ..] = *blake3::hash(name.as_bytes()).as_bytes();
        u32::from(u16::from_le_bytes([first, second])) % SHARED_RANGES.end
    };
    let mut names = (0..).map(|n| format!("test-{}-{count}-{n}", std::process::id()));
    names.find(|name| range(name) == wanted).unwrap()
}

/// The server refuses to run as root, whose containers would not be rootless.
fn not_as_root() {
    assert!(
        !nix::unistd::geteuid().is_root(),
        "these tests make rootless containers and cannot run as root: `make test` runs them as an ordinary user"
    );
}

fn wait_exit(child: &mut Child) -> ExitStatus {
    eventually("a process exits", || child.try_wait().unwrap())
}

/// Merges `over` into `base` recursively; values of `over` take precedence.
fn merge(base: &mut toml::Table, over: toml::Table) {
    for (key, value) in over {
        match (base.get_mut(&key), value) {
            (Some(toml::Value::Table(inner)), toml::Value::Table(value)) => merge(inner, value),
            (_, value) => drop(base.insert(key, value)),
        }
    }
}

/// The stderr of a child. A thread collects it, so that the child never blocks on the pipe.
struct Log {
    bytes: Arc<Mutex<Vec<u8>>>,
    reader: std::thread::JoinHandle<()>,
}

impl Log {
    /// A log without a child, which stays empty.
    fn none() -> Log {
        Log { bytes: Arc::default(), reader: std::thread::spawn(|| ()) }
    }

    fn of(child: &mut Child) -> Log {
        let mut pipe = child.stderr.take().unwrap();
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let into = Arc::clone(&bytes);
        let reader = std::thread::spawn(move || {
            let mut chunk = [0; 4096];
            let echo = shared::is_keeper();
            while let Ok(length @ 1..) = pipe.read(&mut chunk) {
                if echo {
                    let _ = std::io::stderr().write_all(&chunk[..length]);
                }
                into.lock().unwrap().extend_from_slice(&chunk[..length]);
            }
        });
        Log { bytes, reader }
    }

    fn text(&self) -> String {
        let ended = self.ended();
        let bytes = self.bytes.lock().unwrap();
        // Leaves out a last line that is not complete yet.
        let end =
            if ended { bytes.len() } else { bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1) };
        String::from_utf8_lossy(&bytes[..end]).into_owned()
    }

    fn ended(&self) -> bool {
        self.reader.is_finished()
    }
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let how = self
            .status
            .code()
            .map_or_else(|| format!("signal {:?}", self.status.signal()), |code| format!("code {code}"));
        write!(f, "{how}: {}", self.stderr)
    }
}
