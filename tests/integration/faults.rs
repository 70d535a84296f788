//! Faults in the environment: podman is missing, fails, is slow or hangs, containers are killed from outside,
//! directories cannot be used. The server refuses requests with a reason, and recovers once the fault is gone.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::panic::AssertUnwindSafe;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::client::{Answer, Pending, Reply};
use crate::fake_podman::FakePodman;
use crate::harness::{
    Files, Options, Server, eventually, marked_seconds, output, refused, run_program, wait_gone, wait_running,
};
use crate::leftovers::{self, podman};

/// Most tests use the engine that calls podman for each container.
const ENGINE: (&str, &str) = ("CODERUNNER_ENGINE", "podman");

fn options(config: &str) -> Options<'_> {
    Options { languages: &["bash"], containers: 1, config, env: &[ENGINE], ..Options::default() }
}

/// A program that no other request has, so that its answer is not cached.
fn echo(word: &str) -> String {
    format!("echo {word} # {}", marked_seconds(0))
}

#[track_caller]
fn assert_runs(server: &Server, word: &str) {
    assert_eq!(server.run(&echo(word)), Answer::ran(&format!("{word}\n")));
}

/// Checks that a request is refused with 503 and `Retry-After`; returns whether the message contains these words.
fn is_refused(reply: &Reply, words: &str) -> bool {
    assert_eq!(reply.status, 503, "{}", String::from_utf8_lossy(&reply.body));
    let after = reply.header("retry-after").expect("Retry-After");
    assert!(after.parse::<u32>().is_ok_and(|seconds| seconds > 0), "{after}");
    reply.message().contains(words)
}

fn wait_refused(server: &Server, words: &str) {
    eventually(&format!("a refusal because of {words:?}"), || {
        is_refused(&server.begin("echo").reply(), words).then_some(())
    });
    let readyz = server.get("/readyz");
    assert_eq!(readyz.status, 503);
    assert!(readyz.json()["languages"]["bash"]["problem"].is_string(), "{}", readyz.json());
    assert_eq!(server.get("/healthz").status, 200);
}

#[test]
fn missing_podman_is_logged_and_reported_to_clients() {
    let server = Server::launch(options("podman = \"/nonexistent/podman\""));
    server.wait_log(&["ERROR", "/nonexistent/podman", "is it installed"]);
    wait_refused(&server, "podman fails");
    server.stop();
}

#[test]
fn failing_podman_is_logged_and_reported_to_clients() {
    let fake = FakePodman::new("echo 'Error: out of luck' >&2; exit 125");
    let server = Server::launch(options(&fake.config()));
    server.wait_log(&["ERROR", "out of luck", "125"]);
    wait_refused(&server, "podman fails");
    server.stop();
}

#[test]
fn repaired_podman_is_used_without_a_restart() {
    let fake = FakePodman::new("[ -e works ] || exit 125");
    let server = Server::launch(Options { path: Some(fake.dir()), ..options("") });
    wait_refused(&server, "podman fails");
    fake.set_flag("works");
    server.wait_ready();
    assert_runs(&server, "found");
    server.stop();
}

#[test]
fn server_recovers_from_a_temporary_podman_failure() {
    let fake = FakePodman::new("[ ! -e broken ] || { echo 'Error: out of luck' >&2; exit 125; }");
    let server = Server::start(options(&fake.config()));
    assert_runs(&server, "before");
    fake.set_flag("broken");
    eventually("a refusal, once the ready containers are used up", || {
        let reply = server.begin(&echo("during")).reply();
        // Requests that wait for the first attempt get the same reason as later ones.
        if reply.status == 200 { None } else { is_refused(&reply, "cannot be made").then_some(()) }
    });
    server.wait_log(&["ERROR", "out of luck"]);
    wait_refused(&server, "cannot be made");
    fake.clear_flag("broken");
    eventually("the server is ready again", || (server.get("/readyz").status == 200).then_some(()));
    assert_runs(&server, "after");
    server.stop();
}

#[test]
fn failed_image_lookup_keeps_the_image_in_use() {
    let fake = FakePodman::new("[ ! -e broken ] || { echo 'Error: out of luck' >&2; exit 125; }");
    let server = Server::start(options(&fake.config()));
    fake.set_flag("broken");
    server.signal(Signal::SIGHUP);
    server.wait_log(&["ERROR", "cannot look for an image", "out of luck"]);
    assert_runs(&server, "in the ready container");
    fake.clear_flag("broken");
    server.stop();
}

#[test]
fn server_migrates_podman_once_after_its_processes_were_killed() {
    // Every other verb fails with what podman 4.3 says in this state.
    let fake = FakePodman::new(
        "case \"$1 $2\" in
        'system migrate') echo x >>migrated; rm -f lost; exit 125 ;;
        esac
        [ ! -e lost ] || { echo 'Error: invalid internal status, try \"podman system migrate\"' >&2; exit 1; }",
    );
    fake.set_flag("lost");
    let server = Server::launch(options(&fake.config()));
    server.wait_ready();
    assert_runs(&server, "after");
    let migrated = fs::read_to_string(fake.dir().join("migrated")).unwrap();
    assert_eq!(migrated.lines().count(), 1, "a second migration would stop the containers that run by then");
    server.stop();
}

#[test]
fn podman_commands_are_retried_on_transient_image_errors() {
    // Each command fails once with what podman 4.3 says while another process creates or deletes an image.
    let fake = FakePodman::new(
        "case $1 in image | images | tag | untag | rmi | create | init | container | ps | rm) ;; *) exit 0 ;; esac
        asked=asked-$(echo \"$*\" | cksum | tr -d ' ')
        [ ! -e \"$asked\" ] || exit 0
        : >\"$asked\"
        echo 'Error: locating item named \"manifest\" for image with ID \"0f\": file does not exist' >&2; exit 125",
    );
    let server = Server::start(options(&fake.config()));
    assert_runs(&server, "after");
    let log = server.log();
    assert!(!log.contains("image with ID"), "{log}");
    server.stop();
    let asked = fs::read_dir(fake.dir()).unwrap().count() - 1;
    assert!(asked > 3, "only {asked} commands failed at first");
}

#[test]
fn processes_orphaned_by_a_failed_podman_run_are_killed() {
    // Imitates a `podman run` whose image is deleted meanwhile: podman keeps no record, but conmon and its child remain.
    let fake = FakePodman::new(
        "[ \"$1\" = run ] && [ -e forgetful ] || exit 0
        for arg do case $arg in --name=*) name=${arg#*=} ;; esac done
        setsid bash -c 'exec -a conmon unshare --user --pid --fork sh -c \"sleep 10000\" -n $0' \"$name\" &
        while ! pgrep -f \"sleep 10000 -n $name\" >>monitors; do sleep 0.1; done
        exit 126",
    );
    let server = Server::start(Options { path: Some(fake.dir()), ..options("") });
    fake.set_flag("forgetful");
    assert_runs(&server, "the last ready container");
    server.wait_log(&["no sandbox; trying again", "126"]);
    fake.clear_flag("forgetful");
    eventually("the server is ready again", || (server.get("/readyz").status == 200).then_some(()));
    let orphan = format!("sleep 10000 -n coderunner-{}-", server.instance);
    eventually("the orphans are killed", || leftovers::marked(&orphan).is_empty().then_some(()));
    assert!(fs::read_to_string(fake.dir().join("monitors")).unwrap().lines().count() > 0);
    server.stop();
}

#[test]
fn volumes_of_a_failed_podman_run_are_removed() {
    // Imitates a `podman run` that is killed after it has made the volumes, before it has recorded the container.
    let fake = FakePodman::new(
        "[ \"$1\" = run ] && [ -e killed ] || exit 0
        for arg do
            source=${arg#--mount=type=volume,*device=}
            [ \"$source\" = \"$arg\" ] || podman volume create --opt type=tmpfs --opt device=\"${source%%,*}\" >>made
        done
        exit 137",
    );
    let server = Server::start(options(&fake.config()));
    fake.set_flag("killed");
    assert_runs(&server, "the last ready container");
    server.wait_log(&["no sandbox; trying again", "137"]);
    fake.clear_flag("killed");
    server.stop();
    let made = fs::read_to_string(fake.dir().join("made")).unwrap();
    let left = leftovers::list(&["volume", "ls", "--quiet"]);
    let left: Vec<&str> = made.lines().filter(|volume| left.iter().any(|one| one == volume)).collect();
    assert!(made.lines().count() >= 3 && left.is_empty(), "{left:?} of {made}");
}

#[test]
fn slow_podman_delays_answers_but_fails_none() {
    let fake = FakePodman::new("sleep 2");
    let server = Server::start(Options { containers: 2, ..options(&fake.config()) });
    let pending: Vec<_> = (0..4).map(|number| server.begin(&format!("echo {number}"))).collect();
    for (number, pending) in pending.into_iter().enumerate() {
        assert_eq!(pending.reply().answer(), Answer::ran(&format!("{number}\n")));
    }
    server.stop();
}

#[test]
fn hanging_podman_delays_neither_refusals_nor_shutdown() {
    let mark = marked_seconds(10_000);
    let fake = FakePodman::new(&format!("exec sleep {mark}"));
    let server = Server::launch(options(&fake.config()));
    wait_running(&mark);
    assert!(is_refused(&server.begin("echo").reply(), "not been looked for"));
    assert_eq!(server.get("/readyz").status, 503);
    server.stop();
    wait_gone(&mark);
}

#[test]
fn requests_time_out_while_podman_hangs() {
    let fake = FakePodman::new("while [ -e hang ]; do sleep 0.05; done");
    let config = fake.config() + "[queue]\nwait = \"1s\"";
    let server = Server::start(options(&config));
    fake.set_flag("hang");
    eventually("a refusal, once the ready containers are used up", || {
        let reply = server.begin(&echo("during")).reply();
        if reply.status == 200 { None } else { is_refused(&reply, "no container became free within 1s").then_some(()) }
    });
    fake.clear_flag("hang");
    eventually("answers again", || {
        let reply = server.begin(&echo("after")).reply();
        (reply.status == 200).then(|| assert_eq!(reply.answer(), Answer::ran("after\n")))
    });
    server.stop();
}

#[test]
fn server_shuts_down_although_podman_hangs() {
    let mark = marked_seconds(10_000);
    let fake = FakePodman::new(&format!("[ ! -e hang ] || exec sleep {mark}"));
    let server = Server::start(options(&fake.config()));
    fake.set_flag("hang");
    assert_runs(&server, "in the ready container before");
    wait_running(&mark);
    server.stop();
    wait_gone(&mark);
}

#[test]
fn shutdown_ends_although_podman_cannot_remove_templates() {
    let mark = marked_seconds(10_000);
    let fake = FakePodman::new(&format!("[ ! -e hang ] || exec sleep {mark}"));
    let config = fake.config();
    let env = [("CODERUNNER_ENGINE", "direct")];
    let languages = ["bash", "python", "c"];
    // With one container, most languages have a template but no sandbox; only the shutdown removes their templates.
    let options = Options { languages: &languages, env: &env, ..options(&config) };
    let mut server = Server::start(options.clone());
    for language in languages {
        server.wait_log(&["image in use", &format!("coderunner-{language}:")]);
    }
    fake.set_flag("hang");
    server.signal(Signal::SIGTERM);
    let signalled = Instant::now();
    assert_eq!(server.wait_exit().code(), Some(0));
    assert!(signalled.elapsed() < Duration::from_secs(60), "longer than TimeoutStopSec: {:?}", signalled.elapsed());
    wait_gone(&mark);
    fake.clear_flag("hang");
    let server = Server::launch_with(server.crash(), &options);
    server.wait_ready();
    server.stop();
}

#[test]
fn temporary_agent_failure_does_not_switch_the_engine() {
    let fake =
        FakePodman::new("[ \"$1\" != unshare ] || [ ! -e broken ] || { echo 'Error: out of ids' >&2; exit 125; }");
    fake.set_flag("broken");
    let config = fake.config();
    let env = [("CODERUNNER_ENGINE", "auto")];
    let server = Server::launch(Options { env: &env, ..options(&config) });
    server.wait_log(&["ERROR", "it has ended", "out of ids"]);
    fake.clear_flag("broken");
    server.wait_ready();
    assert_runs(&server, "after");
    let log = server.log();
    assert!(!log.contains("engine: podman"), "{log}");
    server.stop();
}

/// A way to kill a sandbox from outside, or the processes that hold it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum KillMethod {
    /// Kills the init of each sandbox, and with it every process inside.
    Inside,
    PodmanKill,
    PodmanRemove,
    Conmon,
    /// Kills the `podman run` process.
    PodmanProcess,
    /// Kills the server's agent in podman's namespace.
    Agent,
}

impl KillMethod {
    fn of(engine: &str) -> &'static [KillMethod] {
        match engine {
            "podman" => &[
                KillMethod::Inside,
                KillMethod::PodmanKill,
                KillMethod::PodmanRemove,
                KillMethod::Conmon,
                KillMethod::PodmanProcess,
            ],
            _ => &[KillMethod::Inside, KillMethod::Agent],
        }
    }

    /// Whether the container is dead by the time that [`KillMethod::kill`] returns.
    fn is_immediate(self) -> bool {
        matches!(self, KillMethod::Inside | KillMethod::PodmanKill | KillMethod::PodmanRemove)
    }

    /// Applies it to the only container of a server.
    pub fn kill(self, server: &Server) {
        let victims = match self {
            KillMethod::Inside => init_processes(server),
            KillMethod::PodmanKill => {
                let victims = init_processes(server);
                podman(&["kill", "--", &running_container(server)]);
                return victims.into_iter().for_each(wait_dead);
            }
            KillMethod::PodmanRemove => {
                return drop(podman(&["rm", "--force", "--time", "0", "--", &running_container(server)]));
            }
            KillMethod::Conmon => processes_of_container(server, "conmon"),
            KillMethod::PodmanProcess => processes_of_container(server, "podman"),
            KillMethod::Agent => leftovers::agents(server.pid()),
        };
        assert!(!victims.is_empty(), "{self:?}: nothing to kill");
        for victim in &victims {
            // It may have ended together with the previous one.
            let _ = kill(*victim, Signal::SIGKILL);
        }
        victims.into_iter().for_each(wait_dead);
    }
}

/// Waits until a process has ended or is a zombie, and so has closed its files.
fn wait_dead(pid: Pid) {
    eventually("the killed process ends", || {
        let status = fs::read_to_string(format!("/proc/{pid}/status"));
        status.map_or(true, |status| status.contains("State:\tZ")).then_some(())
    });
}

/// Waits for a sandbox and returns the init of each. Init runs as this user, unlike the programs.
pub fn init_processes(server: &Server) -> Vec<Pid> {
    eventually("a sandbox", || {
        let files = leftovers::mounts(&server.instance);
        let pids: Vec<Pid> = files
            .iter()
            .filter_map(|process| process.file_name()?.to_str()?.parse().ok())
            .map(Pid::from_raw)
            .filter(|pid| leftovers::is_init(*pid))
            .collect();
        (!pids.is_empty()).then_some(pids)
    })
}

/// Waits until exactly one container of the server runs, and returns its name.
fn running_container(server: &Server) -> String {
    eventually("exactly one container runs, with the init of the only sandbox", || {
        let label = format!("label=io.coderunner.instance={}", server.instance);
        let filters = ["--filter", &label, "--filter", "status=running", "--format", "{{.Pid}} {{.Names}}"];
        let running = leftovers::list(&[&["ps"], &filters[..]].concat());
        let [line] = running.as_slice() else { return None };
        let (_, name) = line.split_once(' ')?;
        (init_processes(server) == [pid(line)]).then(|| name.to_owned())
    })
}

/// Waits until an unused sandbox is ready. With one container there is no other sandbox then.
fn wait_sandbox_ready(server: &Server) {
    eventually("a sandbox is ready", || {
        let metrics = String::from_utf8(server.get("/metrics").body).unwrap();
        metrics.contains("coderunner_sandboxes_ready{language=\"bash\"} 1\n").then_some(())
    });
}

/// Processes that run this program and name the container on their command line.
fn processes_of_container(server: &Server, program: &str) -> Vec<Pid> {
    let container = running_container(server);
    let lines = leftovers::processes(&server.instance);
    let of = |line: &&String| line.split_whitespace().nth(1).is_some_and(|first| first.ends_with(program));
    lines.iter().filter(of).filter(|line| line.contains(&container)).map(|line| pid(line)).collect()
}

fn pid(text: &str) -> Pid {
    Pid::from_raw(text.split_whitespace().next().unwrap().parse().unwrap())
}

on_each_engine! {
    killing_a_ready_container_fails_no_request
    killing_a_busy_container_fails_only_its_request
    repeatedly_killed_server_leaves_nothing_after_a_clean_stop
    server_recovers_when_job_directories_can_be_made_again
    server_survives_podman_system_migrate
    server_recovers_from_temporarily_read_only_storage
}

fn killing_a_ready_container_fails_no_request(engine: &str) {
    let env = [("CODERUNNER_ENGINE", engine)];
    let config = "queue.wait = \"90s\"";
    let server = Server::start(Options { env: &env, ..options(config) });
    for method in KillMethod::of(engine) {
        wait_sandbox_ready(&server);
        let inits = init_processes(&server);
        method.kill(&server);
        if !method.is_immediate() || engine == "direct" {
            inits.into_iter().for_each(wait_dead);
        }
        assert_runs(&server, "unharmed");
        assert_runs(&server, "unharmed");
    }
    server.stop();
}

fn killing_a_busy_container_fails_only_its_request(engine: &str) {
    let env = [("CODERUNNER_ENGINE", engine)];
    let config = "queue.wait = \"90s\"\n[limits]\nrun_time = \"1m\"";
    let server = Server::start(Options { env: &env, ..options(config) });
    for method in KillMethod::of(engine) {
        let mark = marked_seconds(50);
        let running = server.begin(&format!("sleep {mark}"));
        wait_running(&mark);
        method.kill(&server);
        if !method.is_immediate() {
            // The program may still run.
            leftovers::kill_marked(&mark);
        }
        let reply = running.reply();
        if method.is_immediate() || reply.status != 200 {
            assert_eq!(reply.status, 500, "{method:?}: {}", String::from_utf8_lossy(&reply.body));
            let message = reply.message();
            let request = message.split_whitespace().last().unwrap();
            server.wait_log(&["ERROR", request]);
            assert!(!message.contains("sandbox"), "details belong in the log only: {message}");
        }
        wait_gone(&mark);
        assert_runs(&server, "after");
    }
    server.stop();
}

#[test]
fn manually_removed_templates_are_recreated() {
    let env = [("CODERUNNER_ENGINE", "direct")];
    let server = Server::start(Options { env: &env, ..options("") });
    assert_runs(&server, "before");
    let running = server.begin(&format!("sleep 1; {}", echo("during")));
    for name in server.containers() {
        // It may have been removed meanwhile.
        let _ = output(Command::new("podman").args(["rm", "--force", "--time", "0", "--", &name]), b"");
    }
    assert_recovers(&server, running);
    server.stop();
}

#[test]
fn slow_template_creation_does_not_delay_other_languages() {
    let fake = FakePodman::new("case $* in create*language=python*) while [ -e slow ]; do sleep 0.05; done ;; esac");
    let env = [("CODERUNNER_ENGINE", "direct")];
    let config = fake.config() + "[queue]\nwait = \"10s\"";
    let options = Options { languages: &["bash", "python"], containers: 2, env: &env, ..options(&config) };
    let server = Server::start(options);
    server.wait_each_ready();
    fake.set_flag("slow");
    // This removes the templates, too.
    KillMethod::Agent.kill(&server);
    let running = server.begin(&echo("during"));
    assert_recovers(&server, running);
    fake.clear_flag("slow");
    server.wait_each_ready();
    server.stop();
}

/// Checks that the server recovers from a fault that may have killed the running program.
fn assert_recovers(server: &Server, running: Pending) {
    let reply = running.reply();
    assert!([200, 500, 503].contains(&reply.status), "{reply:?}");
    eventually("answers again", || {
        let reply = server.begin(&echo("after")).reply();
        (reply.status == 200).then(|| assert_eq!(reply.answer(), Answer::ran("after\n")))
    });
    (0..4).for_each(|_| assert_runs(server, "well"));
    server.wait_ready();
}

/// How often the server is killed. `CODERUNNER_TEST_KILLS` raises it for long test runs.
fn kills() -> u32 {
    std::env::var("CODERUNNER_TEST_KILLS").map_or(6, |text| text.parse().expect("CODERUNNER_TEST_KILLS is a number"))
}

fn repeatedly_killed_server_leaves_nothing_after_a_clean_stop(engine: &str) {
    let env = [("CODERUNNER_ENGINE", engine)];
    let options = Options { containers: 2, env: &env, ..options("") };
    let mut files = Files::new(&options);
    for round in 0..kills() {
        let server = Server::launch_with(files, &options);
        // Every third server is killed while it starts, the others once they are ready; each after a different delay.
        if round % 3 != 0 {
            server.wait_ready();
        }
        let pending: Vec<_> = (0..3).map(|_| server.begin(&format!("sleep 0.1; {}", echo("killed")))).collect();
        std::thread::sleep(Duration::from_millis(u64::from(round * 37 % 400)));
        files = server.crash();
        drop(pending);
    }
    let server = Server::launch_with(files, &options);
    server.wait_ready();
    assert_runs(&server, "after");
    server.stop();
}

fn server_recovers_when_job_directories_can_be_made_again(engine: &str) {
    let env = [("CODERUNNER_ENGINE", engine)];
    let server = Server::start(Options { env: &env, ..options("") });
    let jobs = leftovers::runtime_dir(&server.instance).join("jobs");
    let set_mode = |mode| fs::set_permissions(&jobs, fs::Permissions::from_mode(mode)).unwrap();
    set_mode(0o500);
    eventually("a refusal, once the ready container is used up", || {
        let reply = server.begin(&echo("during")).reply();
        if reply.status == 200 { None } else { is_refused(&reply, "cannot be made").then_some(()) }
    });
    server.wait_log(&["ERROR", "job directory", "Permission denied"]);
    set_mode(0o700);
    eventually("the server is ready again", || (server.get("/readyz").status == 200).then_some(()));
    assert_runs(&server, "after");
    server.stop();
}

/// A podman storage for one test, in its own mount namespace, where it can be made read-only.
struct Storage {
    dir: TempDir,
}

impl Storage {
    /// Creates a storage that contains the bash image.
    fn new() -> Storage {
        let storage = Storage { dir: TempDir::with_prefix("coderunner-test-storage-").unwrap() };
        for dir in ["run", "containers", "containers/storage"] {
            fs::create_dir(storage.path(dir)).unwrap();
            fs::set_permissions(storage.path(dir), fs::Permissions::from_mode(0o700)).unwrap();
        }
        let image = storage.path("image.tar");
        podman(&["save", "--quiet", "--output", &image, "localhost/coderunner-bash"]);
        // The bind mount has to exist before podman mounts anything in the storage.
        storage.podman(&["unshare", "true"]);
        storage.mount("bind");
        storage.podman(&["load", "--quiet", "--input", &image]);
        storage
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    /// The environment that makes podman use this storage.
    fn env(&self) -> [(&'static str, String); 2] {
        [("XDG_RUNTIME_DIR", self.path("run")), ("XDG_DATA_HOME", self.path(""))]
    }

    fn podman(&self, args: &[&str]) -> String {
        let env = self.env().map(|(name, value)| format!("{name}={value}"));
        run_program("env", &[&[env[0].as_str(), &env[1], "podman", "--log-level=error"], args].concat())
    }

    /// Runs a command in the namespace of the storage, without podman, which needs to write. Returns whether it succeeds.
    fn run_in_namespace(&self, command: &[&str]) -> bool {
        let holder = fs::read_to_string(self.path("run/libpod/tmp/pause.pid")).unwrap();
        let enter = ["--preserve-credentials", "--user", "--mount", "--target", holder.trim(), "--"];
        output(Command::new("nsenter").args(enter).args(command), b"").status.success()
    }

    /// Bind-mounts the directory on itself, or remounts it and podman's own mount inside it with other options.
    fn mount(&self, options: &str) {
        let script = "mount -o \"$2\" \"$1\" \"$1\" && {
            ! grep -q \" $1/overlay \" /proc/self/mountinfo || mount -o \"$2\" \"$1/overlay\"
        }";
        let mount = ["sh", "-c", script, "sh", &self.path("containers/storage"), options];
        // A mount cannot become read-only while a file is open for writing.
        eventually(&format!("mounted {options}"), || self.run_in_namespace(&mount).then_some(()));
    }
}

impl Drop for Storage {
    fn drop(&mut self) {
        // The files belong to subordinate ids, and podman's pause process holds the namespace. This also runs after a
        // failed test, so it must not panic.
        let storage = self.path("containers/storage");
        let _ = std::panic::catch_unwind(AssertUnwindSafe(|| {
            self.run_in_namespace(&["sh", "-c", "umount --lazy \"$1\"; rm -rf \"$1\"", "sh", &storage]);
            self.podman(&["system", "migrate"]);
        }));
    }
}

/// Starts a server that uses this storage.
fn serve_in(storage: &Storage, engine: &str) -> Server {
    let own = storage.env();
    let env: Vec<(&str, &str)> =
        own.iter().map(|(name, value)| (*name, value.as_str())).chain([("CODERUNNER_ENGINE", engine)]).collect();
    Server::start(Options { env: &env, ..options("") })
}

fn server_survives_podman_system_migrate(engine: &str) {
    let storage = Storage::new();
    let server = serve_in(&storage, engine);
    assert_runs(&server, "before");
    let running = server.begin(&format!("sleep 1; {}", echo("during")));
    // `system migrate` fails if a container ends before podman has stopped it.
    eventually("podman migrates", || {
        let migrate = ["system", "migrate"];
        output(Command::new("podman").args(migrate).envs(storage.env()), b"").status.success().then_some(())
    });
    assert_recovers(&server, running);
    server.stop();
    assert_eq!(storage.podman(&["ps", "--all", "--quiet"]), "");
}

fn server_recovers_from_temporarily_read_only_storage(engine: &str) {
    let storage = Storage::new();
    let server = serve_in(&storage, engine);
    assert_runs(&server, "before");
    // The podman engine is creating the next container at this moment.
    storage.mount("remount,bind,ro");
    // The direct engine copies a container whose root is already mounted, and does not need the storage.
    if engine == "podman" {
        eventually("a refusal, once the ready containers are used up", || {
            let reply = server.begin(&echo("during")).reply();
            if reply.status == 200 { None } else { is_refused(&reply, "cannot be made").then_some(()) }
        });
        server.wait_log(&["ERROR", "read-only"]);
        wait_refused(&server, "");
    } else {
        (0..4).for_each(|_| assert_runs(&server, "during"));
    }
    storage.mount("remount,bind,rw");
    server.wait_ready();
    (0..4).for_each(|_| assert_runs(&server, "after"));
    server.stop();
    assert_eq!(storage.podman(&["ps", "--all", "--quiet"]), "");
}

#[test]
fn server_runs_without_a_state_directory() {
    let env = [ENGINE, ("XDG_STATE_HOME", "/proc/nothing")];
    let server = Server::start(Options { env: &env, ..options("") });
    server.wait_log(&["WARN", "/proc/nothing"]);
    assert_runs(&server, "served");
    server.stop();
}

#[test]
fn invalid_runtime_directory_is_refused_with_a_remedy() {
    for (dir, why) in [
        ("", "not set"),
        ("/nonexistent", "No such file"),
        ("/", "belongs to user 0"),
        ("/proc/self/status", "no directory"),
    ] {
        let env = [ENGINE, ("XDG_RUNTIME_DIR", dir)];
        let exit = refused(Options { env: &env, ..options("") });
        assert_eq!(exit.status.code(), Some(1), "{dir}: {exit}");
        for words in [why, "XDG_RUNTIME_DIR", "loginctl enable-linger"] {
            assert!(exit.stderr.contains(words), "{dir}: {exit}");
        }
    }
    let odd = TempDir::with_prefix("coderunner-test-a:b-").unwrap();
    let env = [ENGINE, ("XDG_RUNTIME_DIR", odd.path().to_str().unwrap())];
    let exit = refused(Options { env: &env, ..options("") });
    assert_eq!(exit.status.code(), Some(1), "{exit}");
    assert!(exit.stderr.contains("colon"), "{exit}");
}

#[test]
fn require_limits_refuses_a_host_that_cannot_enforce_them() {
    let server = Server::start(options(""));
    let enforced = ["memory", "processes", "cpu"].map(|limit| server.enforces(limit));
    server.stop();
    let strict = options("require_limits = true");
    if enforced == [true; 3] {
        let server = Server::start(strict);
        assert_runs(&server, "limited");
        server.stop();
        return;
    }
    let exit = refused(strict);
    assert_eq!(exit.status.code(), Some(1), "{exit}");
    for words in ["cannot limit", "require_limits", "coderunner doctor"] {
        assert!(exit.stderr.contains(words), "{exit}");
    }
}
