//! The end of a server, by shutdown or by a crash: what happens to its requests, and that nothing is left behind.

use std::process::Stdio;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::client::{Answer, Pending};
use crate::fake_podman::FakePodman;
use crate::harness::{
    Files, Options, Server, eventually, finish, marked_seconds, refused_with, wait_gone, wait_running,
};
use crate::leftovers::{self, podman};

fn options(config: &str) -> Options<'_> {
    Options { languages: &["bash"], config, ..Options::default() }
}

on_each_engine! {
    killed_server_leaves_nothing_running_and_the_next_cleans_up
    two_instances_of_a_user_do_not_affect_each_other
}

/// Sends a program that sleeps for about `seconds` and then prints `done`, and waits until it runs.
fn begin_sleep(server: &Server, seconds: u32) -> (Pending, String) {
    let mark = marked_seconds(seconds);
    let pending = server.begin(&format!("sleep {mark}; echo done"));
    wait_running(&mark);
    (pending, mark)
}

#[test]
fn shutdown_drains_running_programs_and_accepts_no_requests() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let server = Server::start(options("[shutdown]\ndrain = \"60s\""));
        let (running, _) = begin_sleep(&server, 3);
        server.signal(signal);
        eventually("connections are refused", || std::net::TcpStream::connect(server.address).is_err().then_some(()));
        assert_eq!(running.reply().answer(), Answer::ran("done\n"));
        server.wait_clean_exit();
    }
}

#[test]
fn shutdown_works_while_limits_are_still_checked() {
    let mark = marked_seconds(10_000);
    // The fake podman claims that the host can enforce limits, and its `import` hangs.
    let info = r#"{"host": {"cgroupVersion": "v2", "cgroupControllers": ["cpu", "memory", "pids"]}}"#;
    let fake = FakePodman::with_answer("info", info, &format!("[ \"$1\" != import ] || exec sleep {mark}"));
    let config = fake.config() + "require_limits = true";
    let options = options(&config);
    let files = Files::new(&options);
    let mut command = files.command("serve", &options);
    let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    wait_running(&mark);
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM).unwrap();
    let output = finish(child, b"");
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(log.contains("stopped") && !log.contains("cannot try the limits") && !log.contains("listening"), "{log}");
    wait_gone(&mark);
    leftovers::assert_none(&files.instance);
}

#[test]
fn requests_running_past_the_drain_return_503() {
    let server = Server::start(options("[shutdown]\ndrain = \"1s\"\n[limits]\nrun_time = \"120s\""));
    let (running, mark) = begin_sleep(&server, 100);
    server.signal(Signal::SIGTERM);
    let reply = running.reply();
    assert_eq!(reply.status, 503);
    assert!(reply.message().contains("shutting down"), "{}", reply.message());
    assert!(reply.header("retry-after").is_some());
    wait_gone(&mark);
    server.wait_clean_exit();
}

#[test]
fn second_signal_skips_the_drain() {
    let server = Server::start(options("[shutdown]\ndrain = \"10m\"\n[limits]\nrun_time = \"280s\""));
    let (running, mark) = begin_sleep(&server, 250);
    server.signal(Signal::SIGTERM);
    server.wait_log(&["stopping: waiting for running requests"]);
    assert!(!running.has_begun());
    server.signal(Signal::SIGTERM);
    assert_eq!(running.reply().status, 503);
    wait_gone(&mark);
    server.wait_clean_exit();
}

#[test]
fn shutdown_under_load_answers_every_request() {
    let config = "[shutdown]\ndrain = \"3s\"\n[limits]\nrun_time = \"120s\"\n[queue]\nlength = 10\nwait = \"100s\"";
    let server = Server::start(options(config));
    let (running, mark) = begin_sleep(&server, 100);
    // More requests than the queue holds; the others are refused at once.
    let many: Vec<Pending> = (0..16).map(|n| server.begin(&format!("sleep 0.5; echo {n}"))).collect();
    eventually("some requests are answered", || (many.iter().filter(|one| one.has_begun()).count() >= 5).then_some(()));
    server.signal(Signal::SIGTERM);
    assert_eq!(running.reply().status, 503);
    let mut refused = 0;
    for (n, pending) in many.into_iter().enumerate() {
        // A connection that the server had not accepted yet is closed without an answer.
        let Ok(reply) = pending.try_reply() else { continue };
        match reply.status {
            200 => assert_eq!(reply.answer(), Answer::ran(&format!("{n}\n"))),
            503 => {
                assert!(reply.header("retry-after").is_some() && !reply.message().is_empty());
                refused += 1;
            }
            other => panic!("{other}: {reply:?}"),
        }
    }
    assert!(refused > 0, "the queue was full");
    wait_gone(&mark);
    server.wait_clean_exit();
}

fn killed_server_leaves_nothing_running_and_the_next_cleans_up(engine: &str) {
    let config = format!("engine = \"{engine}\"\n[limits]\nrun_time = \"120s\"");
    let options = options(&config);
    let server = Server::start(options.clone());
    let (_running, mark) = begin_sleep(&server, 100);
    let files = server.crash();
    wait_gone(&mark);
    leftovers::assert_no_sandbox_runs(&files.instance);

    // A container that never ran stands for one that podman still lists after a crash.
    let instance = files.instance.clone();
    let left = format!("coderunner-{instance}-1-1");
    let stranger = format!("stranger-{instance}");
    for (name, label) in [(&left, instance.as_str()), (&stranger, "another")] {
        let label = format!("--label=io.coderunner.instance={label}");
        let name = format!("--name={name}");
        podman(&["create", &name, "--label=io.coderunner=1", &label, "localhost/coderunner-bash", "true"]);
    }
    std::fs::create_dir_all(leftovers::runtime_dir(&instance).join("jobs/job-left")).unwrap();
    let server = Server::launch_with(files, &options);
    server.wait_ready();
    eventually("the container is removed", || (!server.containers().contains(&left)).then_some(()));
    assert!(!leftovers::runtime_dir(&instance).join("jobs/job-left").exists());
    assert_eq!(server.run("echo again"), Answer::ran("again\n"));
    let removed = podman(&["rm", "--force", &stranger]);
    assert_ne!(removed.trim(), "", "the container of another instance is not removed");
    server.stop();
}

fn two_instances_of_a_user_do_not_affect_each_other(engine: &str) {
    let config = format!("engine = \"{engine}\"\n[limits]\nrun_time = \"60s\"");
    let one = Server::start(options(&config));
    let other = Server::start(options(&config));
    let (running, _) = begin_sleep(&one, 6);
    let mut containers = one.containers();
    other.stop();
    let crashed = Server::start(options(&config)).crash();
    assert_eq!(running.reply().answer(), Answer::ran("done\n"));
    leftovers::assert_no_sandbox_runs(&crashed.instance);
    leftovers::remove(&crashed.instance);
    // The ready containers are still there.
    let after = one.containers();
    containers.retain(|name| after.contains(name));
    assert!(!containers.is_empty(), "{after:?}");
    one.stop();
}

#[test]
fn second_server_with_the_same_instance_name_is_refused() {
    let first = Server::start(options(""));
    let options = Options { instance: Some(&first.instance), ..options("") };
    let exit = refused_with(&Files::new(&options), &options);
    assert_eq!(exit.status.code(), Some(1), "{exit}");
    let expected = format!("an instance named \"{}\" is running already (process {})", first.instance, first.pid());
    assert!(exit.stderr.contains(&expected), "{exit}");
    assert!(!exit.stderr.contains("panicked"), "{exit}");
    assert_eq!(first.run("echo unharmed"), Answer::ran("unharmed\n"));
    first.stop();
}
