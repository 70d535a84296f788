//! A server under test: started with a configuration of its own, asked over HTTP, stopped, and then checked for
//! anything that it left behind.
//!
//! Every server has an instance name of its own, so tests run side by side. Every wait has a deadline, generous
//! enough for a busy machine; none is what a test measures.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
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
use crate::leftovers;

/// How long anything may take that should take a moment.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// Pause between two looks at something that is waited for.
const POLL: Duration = Duration::from_millis(20);

/// More tests than run at the same time.
const SLOTS: u32 = 32;

/// The languages of the local images, as `make run` has them too.
const LOCAL: &str = include_str!("../../packaging/dev/local.toml");

/// What a server is started with.
#[derive(Debug, Clone, Default)]
pub struct Options<'a> {
    /// The languages to serve, the default one first; empty is `["c"]`.
    pub languages: &'a [&'a str],
    /// Containers at once; 0 is 2.
    pub containers: usize,
    /// Further configuration in TOML. It is merged over that of the local images, table by table.
    pub config: &'a str,
    /// Further environment.
    pub env: &'a [(&'a str, &'a str)],
    /// A directory put before PATH, for stand-ins of podman.
    pub path: Option<&'a Path>,
    /// How many descriptors it may have; as many as this process if `None`.
    pub descriptors: Option<u64>,
    /// The instance's name; one that nobody else has if `None`.
    pub instance: Option<&'a str>,
}

/// A running server. Stop it with [`Server::stop`]; merely dropping it kills it, and is for tests that failed.
pub struct Server {
    /// Its name among those of this user.
    pub instance: String,
    /// Where it listens.
    pub address: SocketAddr,
    child: Child,
    log: Log,
    started: Instant,
    files: Files,
    stopped: bool,
}

/// The end of a process: its status and all that it said on stderr.
#[derive(Debug)]
pub struct Exit {
    pub status: ExitStatus,
    pub stderr: String,
}

/// The configuration file and the state directory of an instance.
pub struct Files {
    dir: TempDir,
    /// The name that the file gives.
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
        // A busy machine is slow: tests of the limit set their own.
        merge(&mut config, toml::toml! { limits = { run_time = "30s" } });
        // Sandboxes that wait are what many tests look at: being asked is not to use them up.
        merge(&mut config, toml::toml! { ready = { probe = false } });
        config.insert("containers".into(), i64::try_from(containers).unwrap().into());
        merge(&mut config, options.config.parse().unwrap());
        fs::write(dir.path().join("coderunner.toml"), config.to_string()).unwrap();
        Files { dir, instance }
    }

    /// The configuration file; tests of SIGHUP change it.
    pub fn config(&self) -> PathBuf {
        self.dir.path().join("coderunner.toml")
    }

    /// A directory for whatever else a test needs.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The executable with this verb, in an environment that holds nothing of the outer one's settings.
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
                // A test run that is killed takes its servers along. It is the thread that counts as the parent,
                // so a server lives no longer than the test that started it.
                Ok(nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?)
            });
        }
        command
    }
}

impl Server {
    /// Starts a server and waits until it is ready.
    pub fn start(options: Options) -> Server {
        let server = Server::launch(options);
        server.wait_ready();
        server
    }

    /// Starts a server and waits until it listens; its first sandbox may not be there yet, or never come.
    pub fn launch(options: Options) -> Server {
        Server::launch_with(Files::new(&options), &options)
    }

    /// Like [`Server::launch`], with files that were there before: another start of the same instance.
    pub fn launch_with(files: Files, options: &Options) -> Server {
        let mut child = files.command("serve", options).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let log = Log::of(&mut child);
        let mut server = Server {
            instance: files.instance.clone(),
            address: SocketAddr::from(([0; 4], 0)),
            child,
            log,
            started: Instant::now(),
            files,
            stopped: false,
        };
        server.address = eventually("a line that tells the address", || {
            let ended = server.child.try_wait().unwrap();
            assert!(ended.is_none(), "the server ended at its start: {ended:?}");
            let log = server.log();
            let line = log.lines().find(|line| line.contains("listening"))?;
            // Either format of the log.
            let address = line.split_once("address=").or_else(|| line.split_once("\"address\":\""))?.1;
            Some(address.split(|c: char| c.is_whitespace() || c == '"').next()?.parse().unwrap())
        });
        server
    }

    /// Starts a server with this for its stderr, at an address that was free, and waits until it answers.
    pub fn launch_to(stderr: Stdio, options: &Options) -> Server {
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let files = Files::new(options);
        let mut command = files.command("serve", options);
        command.env("CODERUNNER_LISTEN", address.to_string()).stdout(Stdio::null()).stderr(stderr);
        let child = command.spawn().unwrap();
        // It holds our side of a pipe.
        drop(command);
        let (instance, started) = (files.instance.clone(), Instant::now());
        let mut server = Server { instance, address, child, log: Log::none(), started, files, stopped: false };
        eventually("it answers", || {
            let ended = server.child.try_wait().unwrap();
            assert!(ended.is_none(), "the server ended at its start: {ended:?}");
            TcpStream::connect(address).ok()
        });
        server
    }

    /// Waits until `/readyz` answers 200.
    pub fn wait_ready(&self) {
        eventually("the server is ready (its images are made by `make test`)", || {
            (self.get("/readyz").status == 200).then_some(())
        });
    }

    /// Waits until every language is ready; there have to be as many containers.
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

    /// Sends code and does not wait for the answer.
    pub fn begin(&self, code: &str) -> Pending {
        self.begin_json(&json!({ "code": code }))
    }

    /// Sends any JSON to `/coderunner`.
    pub fn begin_json(&self, body: &Value) -> Pending {
        let headers = [("Content-Type", "application/json")];
        self.begin_request("POST", "/coderunner", &headers, body.to_string().as_bytes())
    }

    /// Sends any request.
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

    /// Whether the kernel keeps this limit (`memory`, `processes`, `cpu`) of sandboxes here. Rootless containers
    /// have none of them where cgroups are v1, and the server says so.
    pub fn enforces(&self, limit: &str) -> bool {
        let body = self.get("/readyz").json();
        let missing = body["limitsNotEnforced"].as_array().expect("limitsNotEnforced");
        missing.iter().all(|name| name != limit)
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).unwrap();
    }

    /// What it has logged so far.
    pub fn log(&self) -> String {
        self.log.text()
    }

    /// Waits until the log has a line with all of these words.
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

    /// Names of the containers that podman lists for it, running or not.
    pub fn containers(&self) -> Vec<String> {
        leftovers::containers(&self.instance)
    }

    /// Waits until it has ended; does not ask it to.
    pub fn wait_exit(&mut self) -> ExitStatus {
        wait_exit(&mut self.child)
    }

    /// Ends it as systemd does, and checks that it ends well and leaves nothing behind.
    pub fn stop(self) {
        self.signal(Signal::SIGTERM);
        self.ends_well();
    }

    /// Waits for the end of a server that was asked to end; checks that it is a good one and leaves nothing behind.
    pub fn ends_well(mut self) {
        let status = self.wait_exit();
        assert_eq!(status.code(), Some(0), "the end of the server: {status}");
        leftovers::assert_none(&self.instance, self.started);
        self.stopped = true;
    }

    /// Kills it as nothing can be caught, and leaves its files for the next start. What it ran is not waited for.
    pub fn crash(mut self) -> Files {
        self.child.kill().unwrap();
        self.wait_exit();
        self.stopped = true;
        let nothing = Files { dir: TempDir::new().unwrap(), instance: String::new() };
        std::mem::replace(&mut self.files, nothing)
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
        // Shown by the test's harness where the test failed.
        eprintln!("log of {}:\n{}", self.instance, self.log());
    }
}

/// Starts a server that is to refuse, and waits for its end.
pub fn refused(options: Options) -> Exit {
    let files = Files::new(&options);
    refused_with(&files, &options)
}

/// Like [`refused`], with files that are there already.
pub fn refused_with(files: &Files, options: &Options) -> Exit {
    let mut child = files.command("serve", options).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let log = Log::of(&mut child);
    let status = wait_exit(&mut child);
    let stderr = eventually("the end of stderr", || log.ended().then(|| log.text()));
    Exit { status, stderr }
}

/// Runs a command to its end with a deadline; what it reads on stdin is up to the command.
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
    // A program that does not read it is no error.
    let _ = child.stdin.take().unwrap().write_all(stdin);
    let status = eventually_within(patience, "the end of a process", || child.try_wait().unwrap());
    Output { status, stdout: stdout.join().unwrap(), stderr: stderr.join().unwrap() }
}

/// Runs a client of the server to its good end, and returns all that it said.
#[track_caller]
pub fn drive(program: &str, args: &[&str]) -> String {
    drive_within(PATIENCE, program, args)
}

/// Like [`drive`], for what takes longer.
#[track_caller]
pub fn drive_within(patience: Duration, program: &str, args: &[&str]) -> String {
    let output = finish_within(patience, with_pipes(Command::new(program).args(args)), b"");
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program}: {}: {said}", output.status);
    said
}

/// Where `packaging/dev/clients` has put those of others.
pub fn clients() -> String {
    std::env::var("CODERUNNER_TEST_CLIENTS").expect("CODERUNNER_TEST_CLIENTS: run tests by `make test`")
}

/// The engine that this profile of the tests is for; the server's own choice where it is for none.
pub fn engine() -> Option<&'static str> {
    let profile = std::env::var("NEXTEST_PROFILE").unwrap_or_default();
    (profile == "podman").then_some("podman")
}

/// The server's executable: where tests run as another user than cargo, that is a copy he can read.
pub fn executable() -> PathBuf {
    std::env::var_os("CODERUNNER_TEST_EXE").map_or_else(|| env!("CARGO_BIN_EXE_coderunner").into(), PathBuf::from)
}

/// Waits until `probe` has something, and panics with `what` when it never has.
pub fn eventually<T>(what: &str, probe: impl FnMut() -> Option<T>) -> T {
    eventually_within(PATIENCE, what, probe)
}

fn eventually_within<T>(patience: Duration, what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(found) = probe() {
            return found;
        }
        assert!(Instant::now() < deadline, "not within {patience:?}: {what}");
        std::thread::sleep(POLL);
    }
}

/// Waits until `probe` finds nothing any more, and panics with what it still finds when it never does.
pub fn eventually_none(what: &str, mut probe: impl FnMut() -> Vec<String>) {
    let mut found = Vec::new();
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        found = probe();
        if found.is_empty() {
            return;
        }
        std::thread::sleep(POLL);
    }
    panic!("still there after {PATIENCE:?}: {what}: {found:#?}");
}

/// The text of a program, without the indentation that it has in a test.
pub fn code(text: &str) -> String {
    let indentation = |line: &str| line.len() - line.trim_start().len();
    let lines = || text.lines().skip_while(|line| line.trim().is_empty());
    let common = lines().filter(|line| !line.trim().is_empty()).map(indentation).min().unwrap_or(0);
    lines().map(|line| format!("{}\n", line.get(common..).unwrap_or_default())).collect()
}

/// A duration in seconds, a bit more than `seconds`, that no other test has: `sleep` with it is found among all
/// processes of the machine by [`leftovers::marked`].
pub fn marked_seconds(seconds: u32) -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    // The 1 ends the process id, so that no mark is the beginning of another.
    format!("{seconds}.00{:07}1{:03}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

/// Waits until a program with this mark runs.
pub fn wait_running(mark: &str) {
    eventually(&format!("a program with {mark} runs"), || (!leftovers::marked(mark).is_empty()).then_some(()));
}

/// Waits until no program with this mark runs.
pub fn wait_gone(mark: &str) {
    eventually_none("programs", || leftovers::marked(mark));
}

/// A name that no other instance of this user has, of this test run or another.
pub fn unique_name() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    // The uids of programs follow from a hash of the name, in one of 250 ranges, and the kernel counts processes per uid:
    // names that are used at the same time are of different ranges. Each test is a process, and the slots of those that
    // run at the same time differ.
    let range = |name: &str| {
        let [first, second, ..] = *blake3::hash(name.as_bytes()).as_bytes();
        u32::from(u16::from_le_bytes([first, second])) % 250
    };
    let slot = std::env::var("NEXTEST_TEST_GLOBAL_SLOT").ok().and_then(|slot| slot.parse().ok()).unwrap_or(0);
    let wanted = (slot + SLOTS * count) % 250;
    let mut names = (0..).map(|n| format!("test-{}-{count}-{n}", std::process::id()));
    names.find(|name| range(name) == wanted).unwrap()
}

/// Containers of root's are not what is to be tested, and the server refuses to make them.
fn not_as_root() {
    assert!(
        !nix::unistd::geteuid().is_root(),
        "these tests make rootless containers and cannot run as root: `make test` runs them as an ordinary user"
    );
}

fn wait_exit(child: &mut Child) -> ExitStatus {
    eventually("the end of a process", || child.try_wait().unwrap())
}

/// Puts `over` over `base`, table by table.
fn merge(base: &mut toml::Table, over: toml::Table) {
    for (key, value) in over {
        match (base.get_mut(&key), value) {
            (Some(toml::Value::Table(inner)), toml::Value::Table(value)) => merge(inner, value),
            (_, value) => drop(base.insert(key, value)),
        }
    }
}

/// The stderr of a child, collected by a thread so that the child never waits for us.
struct Log {
    bytes: Arc<Mutex<Vec<u8>>>,
    reader: std::thread::JoinHandle<()>,
}

impl Log {
    /// Nobody's.
    fn none() -> Log {
        Log { bytes: Arc::default(), reader: std::thread::spawn(|| ()) }
    }

    fn of(child: &mut Child) -> Log {
        let mut pipe = child.stderr.take().unwrap();
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let into = Arc::clone(&bytes);
        let reader = std::thread::spawn(move || {
            let mut chunk = [0; 4096];
            while let Ok(length @ 1..) = pipe.read(&mut chunk) {
                into.lock().unwrap().extend_from_slice(&chunk[..length]);
            }
        });
        Log { bytes, reader }
    }

    fn text(&self) -> String {
        let ended = self.ended();
        let bytes = self.bytes.lock().unwrap();
        // Of a line that has not been read to its end nothing.
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
