//! The log: a reader that stalls or is gone, or a full disk, does not harm the server.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::client::Answer;
use crate::harness::{Options, Server, eventually};

/// The number of log lines that were dropped so far.
fn dropped(server: &Server) -> u64 {
    let text = String::from_utf8(server.get("/metrics").body).unwrap();
    let value = text.lines().find_map(|line| line.strip_prefix("coderunner_log_dropped_lines_total "));
    value.expect("the metric").parse().unwrap()
}

/// Checks that a server whose log cannot be written serves, reloads, counts dropped lines, and shuts down.
fn assert_works_with_log_to(stderr: Stdio) {
    let options = Options { languages: &["bash"], env: &[("CODERUNNER_LOG", "debug")], ..Options::default() };
    let server = Server::launch_to(stderr, &options);
    server.wait_ready();
    assert_eq!(server.run("echo hello"), Answer::ran("hello\n"));
    server.signal(nix::sys::signal::Signal::SIGHUP);
    eventually("dropped lines are counted", || (dropped(&server) > 5).then_some(()));
    assert_eq!(server.run("echo again"), Answer::ran("again\n"));
    server.stop();
}

#[test]
fn closed_log_pipe_does_not_harm_the_server() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    assert_works_with_log_to(writer.into());
}

#[test]
fn log_on_a_full_disk_does_not_harm_the_server() {
    assert_works_with_log_to(File::options().write(true).open("/dev/full").unwrap().into());
}

#[test]
fn stalled_log_reader_blocks_nothing_and_drops_are_reported() {
    let (reader, writer) = std::io::pipe().unwrap();
    let options = Options {
        languages: &["bash"],
        env: &[("CODERUNNER_LOG", "debug"), ("CODERUNNER_LOG_FORMAT", "json")],
        ..Options::default()
    };
    let server = Server::launch_to(writer.into(), &options);
    server.wait_ready();
    let flood = |enough: &(dyn Fn(usize) -> bool + Sync)| {
        let (over, count) = (AtomicBool::new(false), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    while !over.load(Ordering::SeqCst) {
                        // Each request writes one line, with the longest allowed request id.
                        let headers = [("X-Request-Id", &*"x".repeat(64))];
                        let asked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                            server.request("GET", "/nowhere", &headers, b"").status
                        }));
                        let all_well = asked.as_ref().is_ok_and(|status| *status == 404);
                        if !all_well || enough(count.fetch_add(1, Ordering::SeqCst)) {
                            over.store(true, Ordering::SeqCst);
                        }
                        assert!(all_well, "{asked:?}");
                    }
                });
            }
        });
    };
    flood(&|count| count >= 3000 && count.is_multiple_of(100) && dropped(&server) > 0);
    assert_eq!(server.get("/healthz").status, 200);
    assert_eq!(server.run("echo hello"), Answer::ran("hello\n"));

    // The reader resumes until a line reports how many were dropped.
    let (sender, missed) = std::sync::mpsc::channel();
    let reading = std::thread::spawn(move || {
        let mut reader = BufReader::new(reader);
        let mut line = String::new();
        while reader.read_line(&mut line).unwrap() > 0 {
            let said: serde_json::Value = serde_json::from_str(&line).expect("lines are complete");
            if let Some(lines) = said["lines"].as_u64() {
                assert_eq!(said["level"], "WARN");
                sender.send(lines).unwrap();
                break;
            }
            line.clear();
        }
        reader
    });
    let missed = missed.recv_timeout(crate::harness::PATIENCE).unwrap();
    assert!(missed > 0 && missed <= dropped(&server));
    let _stalls = reading.join().unwrap();

    let before = dropped(&server);
    flood(&|count| count.is_multiple_of(100) && dropped(&server) > before);
    server.stop();
}
