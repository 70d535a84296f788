//! What breaks around a server: podman missing, failing, slow or hanging, containers killed from outside, directories
//! that cannot be used. Requests are refused with a reason, and all is well again when the fault is gone.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::panic::AssertUnwindSafe;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::client::{Answer, Pending, Reply};
use crate::harness::{
    Files, Options, Server, drive, eventually, marked_seconds, output, refused, wait_gone, wait_running,
};
use crate::leftovers::{self, podman};
use crate::stand_in::StandIn;

/// The engine whose containers podman starts and lists one by one.
const ENGINE: (&str, &str) = ("CODERUNNER_ENGINE", "podman");

fn options(config: &str) -> Options<'_> {
    Options { languages: &["bash"], config, env: &[ENGINE], ..Options::default() }
}

/// Code that no other request has: its answer is in no memo.
fn echo(word: &str) -> String {
    format!("echo {word} # {}", marked_seconds(0))
}

#[track_caller]
fn assert_runs(server: &Server, word: &str) {
    assert_eq!(server.run(&echo(word)), Answer::ran(&format!("{word}\n")));
}

/// Whether a request is refused for now, with a message that has these words.
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
    let fails = StandIn::new("echo 'Error: out of luck' >&2; exit 125");
    let server = Server::launch(options(&fails.config()));
    server.wait_log(&["ERROR", "out of luck", "125"]);
    wait_refused(&server, "podman fails");
    server.stop();
}

#[test]
fn repaired_podman_is_used_without_a_restart() {
    let fails = StandIn::new("[ -e works ] || exit 125");
    let server = Server::launch(Options { path: Some(fails.dir()), ..options("") });
    wait_refused(&server, "podman fails");
    fails.put("works");
    server.wait_ready();
    assert_runs(&server, "found");
    server.stop();
}

#[test]
fn server_recovers_from_a_temporary_podman_failure() {
    let fails = StandIn::new("[ ! -e broken ] || { echo 'Error: out of luck' >&2; exit 125; }");
    let server = Server::start(options(&fails.config()));
    assert_runs(&server, "before");
    fails.put("broken");
    eventually("a refusal, once the ready containers are used up", || {
        let reply = server.begin(&echo("during")).reply();
        // Whoever waits for the first attempts is told the same as those after.
        if reply.status == 200 { None } else { is_refused(&reply, "cannot be made").then_some(()) }
    });
    server.wait_log(&["ERROR", "out of luck"]);
    wait_refused(&server, "cannot be made");
    fails.take("broken");
    eventually("the server is ready again", || (server.get("/readyz").status == 200).then_some(()));
    assert_runs(&server, "after");
    server.stop();
}

#[test]
fn failed_image_lookup_keeps_the_image_in_use() {
    let fails = StandIn::new("[ ! -e broken ] || { echo 'Error: out of luck' >&2; exit 125; }");
    let server = Server::start(options(&fails.config()));
    fails.put("broken");
    server.signal(Signal::SIGHUP);
    server.wait_log(&["ERROR", "cannot look for an image", "out of luck"]);
    assert_runs(&server, "in the container that was ready");
    fails.take("broken");
    server.stop();
}

#[test]
fn server_migrates_podman_once_after_its_processes_were_killed() {
    // What podman 4.3 says then, to every verb but this one.
    let lost = StandIn::new(
        "case \"$1 $2\" in
        'system migrate') echo x >>migrated; rm -f lost; exit 125 ;;
        esac
        [ ! -e lost ] || { echo 'Error: invalid internal status, try \"podman system migrate\"' >&2; exit 1; }",
    );
    lost.put("lost");
    let server = Server::launch(options(&lost.config()));
    server.wait_ready();
    assert_runs(&server, "after");
    let migrated = fs::read_to_string(lost.dir().join("migrated")).unwrap();
    assert_eq!(migrated.lines().count(), 1, "containers that run again are not stopped once more");
    server.stop();
}

#[test]
fn podman_commands_are_retried_on_transient_image_errors() {
    // Each verb once, with what podman 4.3 says while another process makes or deletes an image.
    let stumbles = StandIn::new(
        "case $1 in image | images | tag | untag | rmi | create | init | container | ps | rm) ;; *) exit 0 ;; esac
        asked=asked-$(echo \"$*\" | cksum | tr -d ' ')
        [ ! -e \"$asked\" ] || exit 0
        : >\"$asked\"
        echo 'Error: locating item named \"manifest\" for image with ID \"0f\": file does not exist' >&2; exit 125",
    );
    let server = Server::start(options(&stumbles.config()));
    assert_runs(&server, "after");
    let log = server.log();
    assert!(!log.contains("image with ID"), "{log}");
    server.stop();
    let asked = fs::read_dir(stumbles.dir()).unwrap().count() - 1;
    assert!(asked > 3, "each is asked again: {asked}");
}

#[test]
fn processes_orphaned_by_a_failed_podman_run_are_killed() {
    // As where its image is deleted meanwhile: no record, but a monitor that waits for a process in namespaces of its own.
    let forgets = StandIn::new(
        "[ \"$1\" = run ] && [ -e forgetful ] || exit 0
        for arg do case $arg in --name=*) name=${arg#*=} ;; esac done
        setsid bash -c 'exec -a conmon unshare --user --pid --fork sh -c \"sleep 10000\" -n $0' \"$name\" &
        while ! pgrep -f \"sleep 10000 -n $name\" >>monitors; do sleep 0.1; done
        exit 126",
    );
    let server = Server::start(Options { containers: 1, path: Some(forgets.dir()), ..options("") });
    forgets.put("forgetful");
    assert_runs(&server, "the last one");
    server.wait_log(&["no sandbox; trying again", "126"]);
    forgets.take("forgetful");
    eventually("the server is ready again", || (server.get("/readyz").status == 200).then_some(()));
    let left = format!("sleep 10000 -n coderunner-{}-", server.instance);
    eventually("it is ended", || leftovers::marked(&left).is_empty().then_some(()));
    assert!(fs::read_to_string(forgets.dir().join("monitors")).unwrap().lines().count() > 0);
    server.stop();
}

#[test]
fn slow_podman_delays_answers_but_fails_none() {
    let slow = StandIn::new("sleep 2");
    let server = Server::start(options(&slow.config()));
    let pending: Vec<_> = (0..4).map(|number| server.begin(&format!("echo {number}"))).collect();
    for (number, pending) in pending.into_iter().enumerate() {
        assert_eq!(pending.reply().answer(), Answer::ran(&format!("{number}\n")));
    }
    server.stop();
}

#[test]
fn hanging_podman_delays_neither_refusals_nor_shutdown() {
    let mark = marked_seconds(10_000);
    let hangs = StandIn::new(&format!("exec sleep {mark}"));
    let server = Server::launch(options(&hangs.config()));
    wait_running(&mark);
    assert!(is_refused(&server.begin("echo").reply(), "not been looked for"));
    assert_eq!(server.get("/readyz").status, 503);
    server.stop();
    wait_gone(&mark);
}

#[test]
fn requests_time_out_while_podman_hangs() {
    let hangs = StandIn::new("while [ -e hang ]; do sleep 0.05; done");
    let config = hangs.config() + "[queue]\nwait = \"1s\"";
    let server = Server::start(options(&config));
    hangs.put("hang");
    eventually("a refusal, once the ready containers are used up", || {
        let reply = server.begin(&echo("during")).reply();
        if reply.status == 200 { None } else { is_refused(&reply, "no container became free within 1s").then_some(()) }
    });
    hangs.take("hang");
    eventually("answers again", || {
        let reply = server.begin(&echo("after")).reply();
        (reply.status == 200).then(|| assert_eq!(reply.answer(), Answer::ran("after\n")))
    });
    server.stop();
}

#[test]
fn server_shuts_down_although_podman_hangs() {
    let mark = marked_seconds(10_000);
    let hangs = StandIn::new(&format!("[ ! -e hang ] || exec sleep {mark}"));
    let server = Server::start(options(&hangs.config()));
    hangs.put("hang");
    assert_runs(&server, "ready before");
    wait_running(&mark);
    server.stop();
    wait_gone(&mark);
}

#[test]
fn shutdown_ends_although_podman_cannot_remove_templates() {
    let mark = marked_seconds(10_000);
    let hangs = StandIn::new(&format!("[ ! -e hang ] || exec sleep {mark}"));
    let config = hangs.config();
    let env = [("CODERUNNER_ENGINE", "direct")];
    let languages = ["bash", "python", "c"];
    // Most have no sandbox then, and nothing but the end removes theirs.
    let options = Options { languages: &languages, containers: 1, env: &env, ..options(&config) };
    let mut server = Server::start(options.clone());
    for language in languages {
        server.wait_log(&["image in use", &format!("coderunner-{language}:")]);
    }
    hangs.put("hang");
    server.signal(Signal::SIGTERM);
    let asked = Instant::now();
    assert_eq!(server.wait_exit().code(), Some(0));
    assert!(asked.elapsed() < Duration::from_secs(60), "systemd does not wait longer: {:?}", asked.elapsed());
    wait_gone(&mark);
    hangs.take("hang");
    let server = Server::launch_with(server.crash(), &options);
    server.wait_ready();
    server.stop();
}

#[test]
fn temporary_agent_failure_does_not_switch_the_engine() {
    let fails = StandIn::new("[ \"$1\" != unshare ] || [ ! -e broken ] || { echo 'Error: out of ids' >&2; exit 125; }");
    fails.put("broken");
    let config = fails.config();
    let env = [("CODERUNNER_ENGINE", "auto")];
    let server = Server::launch(Options { env: &env, ..options(&config) });
    server.wait_log(&["ERROR", "it has ended", "out of ids"]);
    fails.take("broken");
    server.wait_ready();
    assert_runs(&server, "after");
    let log = server.log();
    assert!(!log.contains("engine: podman"), "{log}");
    server.stop();
}

/// What can be killed from outside: a container, or what holds it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Killing {
    /// Every process inside.
    Inside,
    ByPodman,
    RemovedByPodman,
    Conmon,
    PodmanItself,
    /// Ours inside podman's namespace.
    Agent,
}

impl Killing {
    fn of(engine: &str) -> &'static [Killing] {
        match engine {
            "podman" => {
                &[Killing::Inside, Killing::ByPodman, Killing::RemovedByPodman, Killing::Conmon, Killing::PodmanItself]
            }
            _ => &[Killing::Inside, Killing::Agent],
        }
    }

    /// Whether the container is dead as soon as this is done, and not a moment later.
    fn is_sudden(self) -> bool {
        matches!(self, Killing::Inside | Killing::ByPodman | Killing::RemovedByPodman)
    }

    /// Does it to the only container of a server.
    pub fn kill(self, server: &Server) {
        let victims = match self {
            Killing::Inside => inside(server),
            Killing::ByPodman => {
                let victims = inside(server);
                podman(&["kill", "--", &the_container(server)]);
                return victims.into_iter().for_each(wait_dead);
            }
            Killing::RemovedByPodman => {
                return drop(podman(&["rm", "--force", "--time", "0", "--", &the_container(server)]));
            }
            Killing::Conmon => of_the_container(server, "conmon"),
            Killing::PodmanItself => of_the_container(server, "podman"),
            Killing::Agent => leftovers::agents(server.pid()),
        };
        assert!(!victims.is_empty(), "{self:?}: nothing to kill");
        for victim in &victims {
            // One may have gone with the one before.
            let _ = kill(*victim, Signal::SIGKILL);
        }
        victims.into_iter().for_each(wait_dead);
    }
}

/// Waits until a process has let go of its files.
fn wait_dead(pid: Pid) {
    eventually("the end of what was killed", || {
        let status = fs::read_to_string(format!("/proc/{pid}/status"));
        status.map_or(true, |status| status.contains("State:\tZ")).then_some(())
    });
}

/// The init of each sandbox of a server, once there is one: it is of this user, unlike the programs.
pub fn inside(server: &Server) -> Vec<Pid> {
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

/// The only container of a server, once it runs and the one before it is gone.
fn the_container(server: &Server) -> String {
    eventually("one container runs, with the init of the only sandbox", || {
        let label = format!("label=io.coderunner.instance={}", server.instance);
        let filters = ["--filter", &label, "--filter", "status=running", "--format", "{{.Pid}} {{.Names}}"];
        let running = leftovers::list(&[&["ps"], &filters[..]].concat());
        let [line] = running.as_slice() else { return None };
        let (_, name) = line.split_once(' ')?;
        (inside(server) == [pid(line)]).then(|| name.to_owned())
    })
}

/// Waits until a sandbox has no program yet: where there is but one container, no other is left.
fn wait_unused(server: &Server) {
    eventually("a sandbox waits for a program", || {
        let metrics = String::from_utf8(server.get("/metrics").body).unwrap();
        metrics.contains("coderunner_sandboxes_ready{language=\"bash\"} 1\n").then_some(())
    });
}

/// Processes of this program that name the container.
fn of_the_container(server: &Server, program: &str) -> Vec<Pid> {
    let container = the_container(server);
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
    let server = Server::start(Options { containers: 1, env: &env, ..options(config) });
    for killing in Killing::of(engine) {
        wait_unused(&server);
        let inits = inside(&server);
        killing.kill(&server);
        if !killing.is_sudden() || engine == "direct" {
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
    let server = Server::start(Options { containers: 1, env: &env, ..options(config) });
    for killing in Killing::of(engine) {
        let mark = marked_seconds(50);
        let running = server.begin(&format!("sleep {mark}"));
        wait_running(&mark);
        killing.kill(&server);
        if !killing.is_sudden() {
            // The program may live on.
            leftovers::end_marked(&mark);
        }
        let reply = running.reply();
        if killing.is_sudden() || reply.status != 200 {
            assert_eq!(reply.status, 500, "{killing:?}: {}", String::from_utf8_lossy(&reply.body));
            let message = reply.message();
            let request = message.split_whitespace().last().unwrap();
            server.wait_log(&["ERROR", request]);
            assert!(!message.contains("sandbox"), "details are for the log: {message}");
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
        // One may have gone by itself.
        let _ = output(Command::new("podman").args(["rm", "--force", "--time", "0", "--", &name]), b"");
    }
    answers_again(&server, running);
    server.stop();
}

#[test]
fn slow_template_creation_does_not_delay_other_languages() {
    let slow = StandIn::new("case $* in create*language=python*) while [ -e slow ]; do sleep 0.05; done ;; esac");
    let env = [("CODERUNNER_ENGINE", "direct")];
    let config = slow.config() + "[queue]\nwait = \"10s\"";
    let server = Server::start(Options { languages: &["bash", "python"], env: &env, ..options(&config) });
    server.wait_each_ready();
    slow.put("slow");
    // And the templates with it.
    Killing::Agent.kill(&server);
    let running = server.begin(&echo("during"));
    answers_again(&server, running);
    slow.take("slow");
    server.wait_each_ready();
    server.stop();
}

/// All is well again after something that may have ended what runs.
fn answers_again(server: &Server, running: Pending) {
    let reply = running.reply();
    assert!([200, 500, 503].contains(&reply.status), "{reply:?}");
    eventually("answers again", || {
        let reply = server.begin(&echo("after")).reply();
        (reply.status == 200).then(|| assert_eq!(reply.answer(), Answer::ran("after\n")))
    });
    (0..4).for_each(|_| assert_runs(server, "well"));
    server.wait_ready();
}

/// How often a server is killed: `CODERUNNER_TEST_KILLS`, for a long night.
fn kills() -> u32 {
    std::env::var("CODERUNNER_TEST_KILLS").map_or(6, |text| text.parse().expect("CODERUNNER_TEST_KILLS is a number"))
}

fn repeatedly_killed_server_leaves_nothing_after_a_clean_stop(engine: &str) {
    let env = [("CODERUNNER_ENGINE", engine)];
    let options = Options { env: &env, ..options("") };
    let mut files = Files::new(&options);
    for round in 0..kills() {
        let server = Server::launch_with(files, &options);
        // From its first moments on, or from when it is ready; a bit later each time.
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
    let server = Server::start(Options { containers: 1, env: &env, ..options("") });
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

/// A storage of podman's for one test, in a namespace of its own, where it can be made read-only.
struct Storage {
    dir: TempDir,
}

impl Storage {
    /// One that holds the image of bash.
    fn new() -> Storage {
        let storage = Storage { dir: TempDir::with_prefix("coderunner-test-storage-").unwrap() };
        for dir in ["run", "containers", "containers/storage"] {
            fs::create_dir(storage.path(dir)).unwrap();
            fs::set_permissions(storage.path(dir), fs::Permissions::from_mode(0o700)).unwrap();
        }
        let image = storage.path("image.tar");
        podman(&["save", "--quiet", "--output", &image, "localhost/coderunner-bash"]);
        // Before podman mounts anything in it.
        storage.podman(&["unshare", "true"]);
        storage.mount("bind");
        storage.podman(&["load", "--quiet", "--input", &image]);
        storage
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    /// What podman finds it by.
    fn env(&self) -> [(&'static str, String); 2] {
        [("XDG_RUNTIME_DIR", self.path("run")), ("XDG_DATA_HOME", self.path(""))]
    }

    fn podman(&self, args: &[&str]) -> String {
        let env = self.env().map(|(name, value)| format!("{name}={value}"));
        drive("env", &[&[env[0].as_str(), &env[1], "podman", "--log-level=error"], args].concat())
    }

    /// Does something in its namespace, without podman: that needs to write. Whether it was done.
    fn inside(&self, command: &[&str]) -> bool {
        let holder = fs::read_to_string(self.path("run/libpod/tmp/pause.pid")).unwrap();
        let enter = ["--preserve-credentials", "--user", "--mount", "--target", holder.trim(), "--"];
        output(Command::new("nsenter").args(enter).args(command), b"").status.success()
    }

    /// Mounts its directory on itself, or changes that mount, and what podman has mounted in it for itself.
    fn mount(&self, options: &str) {
        let script = "mount -o \"$2\" \"$1\" \"$1\" && {
            ! grep -q \" $1/overlay \" /proc/self/mountinfo || mount -o \"$2\" \"$1/overlay\"
        }";
        let mount = ["sh", "-c", script, "sh", &self.path("containers/storage"), options];
        // While somebody writes it cannot become read-only.
        eventually(&format!("mounted {options}"), || self.inside(&mount).then_some(()));
    }
}

impl Drop for Storage {
    fn drop(&mut self) {
        // Its files are other users', its namespace is held by a process. Also in a test that failed, so nothing here
        // may panic.
        let storage = self.path("containers/storage");
        let _ = std::panic::catch_unwind(AssertUnwindSafe(|| {
            self.inside(&["sh", "-c", "umount --lazy \"$1\"; rm -rf \"$1\"", "sh", &storage]);
            self.podman(&["system", "migrate"]);
        }));
    }
}

/// A server that uses this storage.
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
    // It fails where a container that it is about to stop is gone by then.
    eventually("podman begins anew", || {
        let migrate = ["system", "migrate"];
        output(Command::new("podman").args(migrate).envs(storage.env()), b"").status.success().then_some(())
    });
    answers_again(&server, running);
    server.stop();
    assert_eq!(storage.podman(&["ps", "--all", "--quiet"]), "");
}

fn server_recovers_from_temporarily_read_only_storage(engine: &str) {
    let storage = Storage::new();
    let server = serve_in(&storage, engine);
    assert_runs(&server, "before");
    // In the middle of making the next one, with podman.
    storage.mount("remount,bind,ro");
    // Copies of a container that is mounted already need nothing of it.
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
    let kept = ["memory", "processes", "cpu"].map(|limit| server.enforces(limit));
    server.stop();
    let strict = options("require_limits = true");
    if kept == [true; 3] {
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
