//! SIGHUP: the server reloads its configuration without a restart.

use nix::sys::signal::Signal;

use crate::client::{self, Answer, Pending};
use crate::fake_podman::FakePodman;
use crate::harness::{Options, Server, eventually, marked_seconds, wait_running};
use crate::operators::new_key;

/// Replaces a string in the configuration file.
fn edit(server: &Server, from: &str, to: &str) {
    let path = server.files().config();
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains(from), "{text}");
    std::fs::write(path, text.replace(from, to)).unwrap();
}

#[test]
fn reload_changes_settings_without_affecting_running_programs() {
    let server = Server::start(Options {
        languages: &["bash"],
        config: "source_limit = \"1KiB\"\n[limits]\nrun_time = \"60s\"\n[language.bash.env]\nGREETING = \"old\"",
        ..Options::default()
    });
    let mark = marked_seconds(5);
    let running = server.begin(&format!("sleep {mark}; echo $GREETING"));
    wait_running(&mark);
    edit(&server, "GREETING = \"old\"", "GREETING = \"new\"");
    edit(&server, "1KiB", "2KiB");
    edit(&server, "[\"bash\"]", "[\"bash\", \"python\"]");
    server.signal(Signal::SIGHUP);
    server.wait_log(&["configuration reloaded"]);
    assert_eq!(server.run("echo $GREETING"), Answer::ran("new\n"));
    let large = format!("echo large #{}", "x".repeat(1500));
    assert_eq!(server.run(&large), Answer::ran("large\n"));
    eventually("python is ready", || {
        (server.get("/readyz").json()["languages"]["python"]["ready"] == true).then_some(())
    });
    assert_eq!(running.reply().answer(), Answer::ran("old\n"));
    server.stop();
}

#[test]
fn reload_warns_about_settings_that_need_a_restart() {
    let server =
        Server::start(Options { languages: &["bash"], config: "[shutdown]\ndrain = \"9s\"", ..Options::default() });
    edit(&server, "\"9s\"", "\"8s\"");
    server.signal(Signal::SIGHUP);
    server.wait_log(&["WARN", "shutdown.drain", "restart"]);
    server.wait_log(&["configuration reloaded"]);
    server.stop();
}

#[test]
fn reload_removes_the_template_of_a_removed_language() {
    let options = Options { languages: &["bash", "python"], config: "engine = \"direct\"", ..Options::default() };
    let server = Server::start(options);
    server.wait_each_ready();
    assert_eq!(server.containers().len(), 2, "a template for each language");
    edit(&server, "[\"bash\", \"python\"]", "[\"bash\"]");
    server.signal(Signal::SIGHUP);
    server.wait_log(&["configuration reloaded"]);
    // This happens long before the periodic sweep for containers without an owner.
    eventually("the template is removed", || (server.containers().len() == 1).then_some(()));
    assert_eq!(server.run("echo alive"), Answer::ran("alive\n"));
    server.stop();
}

#[test]
fn reload_does_not_wait_for_a_pull() {
    let fake = FakePodman::new("[ \"$1\" != pull ] || while [ -e podman ]; do sleep 0.05; done");
    let config = fake.config() + "language.c.image = \"registry.invalid/c\"";
    let server = Server::launch(Options { languages: &["c"], config: &config, ..Options::default() });
    server.wait_log(&["registry.invalid/c", "pulling"]);
    edit(&server, "[\"c\"]", "[\"bash\", \"c\"]");
    server.signal(Signal::SIGHUP);
    server.wait_ready();
    assert_eq!(server.run("echo hello"), Answer::ran("hello\n"));
    let c = &server.get("/readyz").json()["languages"]["c"];
    assert!(c["problem"].as_str().unwrap().contains("is being pulled"), "{c}");
    server.stop();
}

#[test]
fn reload_of_an_invalid_configuration_changes_nothing() {
    let server =
        Server::start(Options { languages: &["bash"], config: "source_limit = \"1KiB\"", ..Options::default() });
    edit(&server, "1KiB", "lots");
    server.signal(Signal::SIGHUP);
    let line = server.wait_log(&["configuration not changed"]);
    assert!(line.contains("source_limit"), "{line}");
    assert_eq!(server.begin(&"#".repeat(1025)).reply().status, 413);
    assert_eq!(server.run("echo alive"), Answer::ran("alive\n"));
    server.stop();
}

#[test]
fn reload_applies_to_existing_connections() {
    let ((key, line), (_, other)) = (new_key("alice"), new_key("alice"));
    let config = format!("[access.keys]\n{line}");
    let server = Server::start(Options { languages: &["bash"], config: &config, ..Options::default() });
    let last = client::head("GET", "/api/v2/runtimes", &[("X-API-Key", &key)], 0);
    let first = last.replace("Connection: close\r\n", "");
    let mut connection = Pending::send(server.address, first.as_bytes());
    eventually("the first answer", || connection.has_begun().then_some(()));
    edit(&server, &line, &other);
    server.signal(Signal::SIGHUP);
    server.wait_log(&["configuration reloaded"]);
    connection.send_more(last.as_bytes());
    let answers = String::from_utf8(connection.read_to_end()).unwrap();
    let statuses: Vec<&str> = answers.lines().filter_map(|line| line.split("HTTP/1.1 ").nth(1)).collect();
    assert_eq!(statuses, ["200 OK", "401 Unauthorized"], "{answers}");
    server.stop();
}
