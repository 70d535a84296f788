//! The log: who does not read it, or cannot keep it, does not harm the server.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::client::Answer;
use crate::harness::{Options, Server, eventually};

/// Lines that were dropped so far.
fn dropped(server: &Server) -> u64 {
    let text = String::from_utf8(server.get("/metrics").body).unwrap();
    let value = text.lines().find_map(|line| line.strip_prefix("coderunner_log_dropped_lines_total "));
    value.expect("the metric").parse().unwrap()
}

/// A server whose log goes there serves, reloads, counts what is lost, and ends well.
fn serves(stderr: Stdio) {
    let options = Options { languages: &["bash"], env: &[("CODERUNNER_LOG", "debug")], ..Options::default() };
    let server = Server::launch_to(stderr, &options);
    server.wait_ready();
    assert_eq!(server.run("echo hello"), Answer::ran("hello\n"));
    server.signal(nix::sys::signal::Signal::SIGHUP);
    eventually("lines are counted", || (dropped(&server) > 5).then_some(()));
    assert_eq!(server.run("echo again"), Answer::ran("again\n"));
    server.stop();
}

#[test]
fn closed_log_pipe_does_not_harm_the_server() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    serves(writer.into());
}

#[test]
fn log_on_a_full_disk_does_not_harm_the_server() {
    serves(File::options().write(true).open("/dev/full").unwrap().into());
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
                        // As long as they may be: a line for each.
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

    // The reader goes on reading until it is told what it has missed.
    let (told, missed) = std::sync::mpsc::channel();
    let reading = std::thread::spawn(move || {
        let mut reader = BufReader::new(reader);
        let mut line = String::new();
        while reader.read_line(&mut line).unwrap() > 0 {
            let said: serde_json::Value = serde_json::from_str(&line).expect("whole lines");
            if let Some(lines) = said["lines"].as_u64() {
                assert_eq!(said["level"], "WARN");
                told.send(lines).unwrap();
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
