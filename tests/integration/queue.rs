//! Concurrent requests: the limit on containers, the queue, shared and cached answers, and clients that disconnect.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::client::{Answer, Pending};
use crate::harness::{Options, Server, eventually, marked_seconds, wait_gone, wait_running};
use crate::leftovers;

/// A program that prints something different in each run.
const UUID: &str = "cat /proc/sys/kernel/random/uuid";

fn serve(containers: usize, config: &str) -> Server {
    Server::start(Options { languages: &["bash"], containers, config, ..Options::default() })
}

fn answers(pending: Vec<Pending>) -> Vec<Answer> {
    pending.into_iter().map(|pending| pending.reply().answer()).collect()
}

#[test]
fn forty_requests_on_ten_containers_all_succeed() {
    let server = serve(10, "[limits]\nrun_time = \"60s\"\n[queue]\nwait = \"120s\"");
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let most = scope.spawn(|| {
            let mut most = 0;
            while !done.load(Ordering::Relaxed) {
                most = most.max(leftovers::sandboxes(&server.instance));
                std::thread::sleep(Duration::from_millis(100));
            }
            most
        });
        let pending = (0..40).map(|n| server.begin(&format!("sleep 0.2; echo {n}"))).collect();
        let answers = answers(pending);
        done.store(true, Ordering::Relaxed);
        for (n, answer) in answers.iter().enumerate() {
            assert_eq!(*answer, Answer::ran(&format!("{n}\n")));
        }
        let most = most.join().unwrap();
        assert!((1..=10).contains(&most), "{most} sandboxes at once");
    });
    server.stop();
}

#[test]
fn identical_requests_share_one_run() {
    let server = serve(4, "[queue]\nlength = 4");
    let code = format!("sleep 1; {UUID}");
    let answers = answers((0..40).map(|_| server.begin(&code)).collect());
    assert_eq!(answers[0].run_output.len(), 37, "{:?}", answers[0]);
    assert!(answers.iter().all(|answer| *answer == answers[0]), "{answers:?}");
    server.stop();
}

#[test]
fn repeated_code_is_answered_from_the_cache() {
    let server = serve(2, "");
    let first = server.run(UUID);
    assert_eq!(first.run_output.len(), 37, "{first:?}");
    assert_eq!(server.run(UUID), first);
    assert_ne!(server.run(&format!("{UUID} ")), first);
    // Failed runs are cached, too: the same output shows that they did not run again.
    for end in ["exit 3", "kill -SEGV $$"] {
        let code = format!("{UUID}; {end}");
        assert_eq!(server.run(&code), server.run(&code));
    }
    server.stop();
}

#[test]
fn outcomes_cut_by_a_limit_are_not_cached() {
    let server = serve(2, "[limits]\nrun_time = \"3s\"\noutput_total = \"1MiB\"");
    for end in ["sleep 60", "yes"] {
        let code = format!("{UUID}; {end}");
        let uuid = |answer: Answer| answer.run_output.lines().next().unwrap().to_owned();
        assert_ne!(uuid(server.run(&code)), uuid(server.run(&code)), "{end}");
    }
    server.stop();
}

#[test]
fn cached_answers_expire_and_an_empty_cache_keeps_none() {
    let server = serve(2, "[cache]\nttl = \"2s\"");
    let first = server.run(UUID);
    eventually("another answer", || (server.run(UUID) != first).then_some(()));
    server.stop();
    let server = serve(2, "[cache]\nsize = \"0B\"");
    assert_ne!(server.run(UUID), server.run(UUID));
    server.stop();
}

#[test]
fn full_queue_returns_503_with_retry_after() {
    let server = serve(1, "[limits]\nrun_time = \"60s\"\n[queue]\nlength = 2\nwait = \"120s\"");
    let mark = marked_seconds(50);
    // Bash does not report that its `sleep` was killed.
    let running = server.begin(&format!("{{ sleep {mark}; }} 2>/dev/null; echo ran"));
    wait_running(&mark);
    let queued: Vec<Pending> = (0..5).map(|n| server.begin(&format!("echo {n}"))).collect();
    eventually("three requests are refused", || {
        (queued.iter().filter(|pending| pending.has_begun()).count() == 3).then_some(())
    });
    leftovers::kill_marked(&mark);
    let replies: Vec<_> = queued.into_iter().map(Pending::reply).collect();
    let refused: Vec<_> = replies.iter().filter(|reply| reply.status == 503).collect();
    assert_eq!(refused.len(), 3, "two may wait: {replies:?}");
    for reply in refused {
        assert!(reply.message().contains("queue is full"), "{}", reply.message());
        assert!(reply.header("retry-after").unwrap().parse::<u32>().unwrap() > 0);
    }
    for (n, reply) in replies.iter().enumerate().filter(|(_, reply)| reply.status == 200) {
        assert_eq!(reply.answer(), Answer::ran(&format!("{n}\n")));
    }
    assert_eq!(running.reply().answer(), Answer::ran("ran\n"));
    // The refused requests have not freed places that they never held.
    assert_eq!(server.run("echo after"), Answer::ran("after\n"));
    server.stop();
}

#[test]
fn queue_timeout_returns_503_with_retry_after() {
    let server = serve(1, "[limits]\nrun_time = \"60s\"\n[queue]\nwait = \"500ms\"");
    let mark = marked_seconds(40);
    let running = server.begin(&format!("sleep {mark}"));
    wait_running(&mark);
    let reply = server.begin("echo never").reply();
    assert_eq!(reply.status, 503);
    assert!(reply.message().contains("500ms"), "{}", reply.message());
    assert!(reply.header("retry-after").is_some());
    assert!(!running.has_begun(), "the program still sleeps");
    drop(running);
    wait_gone(&mark);
    server.stop();
}

#[test]
fn client_disconnect_kills_the_program_and_frees_the_container() {
    let server = serve(1, "[limits]\nrun_time = \"120s\"\n[queue]\nwait = \"100s\"");
    assert_disconnect_frees_container(&server, Answer::ran("next\n"));
    server.stop();
}

#[test]
fn client_disconnect_kills_the_compiler_and_frees_the_container() {
    // The compiler executes the source.
    let config = r#"
        [limits]
        compile_time = "120s"
        [queue]
        wait = "100s"
        [language.bash]
        compile = ["bash", "main.sh"]
        run = ["true"]
        health = { code = "", output = "" }
    "#;
    let server = serve(1, config);
    let compiled = Answer { status: 1, compile_output: "next\n".into(), run_output: String::new() };
    assert_disconnect_frees_container(&server, compiled);
    server.stop();
}

/// Disconnects a client whose program occupies the only container, and checks that the next request gets a container
/// long before that program would have ended.
fn assert_disconnect_frees_container(server: &Server, answer: Answer) {
    let mark = marked_seconds(100);
    let running = server.begin(&format!("sleep {mark}"));
    wait_running(&mark);
    drop(running);
    let disconnected = Instant::now();
    assert_eq!(server.run("echo next"), answer);
    assert!(disconnected.elapsed() < Duration::from_secs(60), "{:?}", disconnected.elapsed());
    wait_gone(&mark);
}

#[test]
fn client_disconnect_while_queued_frees_the_place() {
    let server = serve(1, "[limits]\nrun_time = \"120s\"\n[queue]\nlength = 1\nwait = \"100s\"");
    let mark = marked_seconds(100);
    let running = server.begin(&format!("sleep {mark}"));
    wait_running(&mark);
    // One of two requests gets the only place in the queue, the other is refused.
    let mut two = [91, 92].map(|seconds| {
        let unwanted = marked_seconds(seconds);
        (server.begin(&format!("sleep {unwanted}")), unwanted)
    });
    eventually("one request is refused", || two.iter().any(|(request, _)| request.has_begun()).then_some(()));
    two.sort_by_key(|(request, _)| request.has_begun());
    let [(queued, unwanted), (refused, _)] = two;
    assert_eq!(refused.reply().status, 503);
    drop(queued);
    let next = eventually("a place in the queue", || {
        let next = server.begin("echo next");
        let soon = Instant::now() + Duration::from_secs(3);
        while Instant::now() < soon {
            if next.has_begun() {
                assert_eq!(next.reply().status, 503);
                return None;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Some(next)
    });
    drop(running);
    assert_eq!(next.reply().answer(), Answer::ran("next\n"));
    assert_eq!(leftovers::marked(&unwanted), [""; 0]);
    server.stop();
}

#[test]
fn disconnect_of_one_client_keeps_the_run_it_shares() {
    let server = serve(1, "[limits]\nrun_time = \"60s\"");
    let mark = marked_seconds(3);
    let code = format!("{UUID}; sleep {mark}");
    let first = server.begin(&code);
    wait_running(&mark);
    let others: Vec<Pending> = (0..3).map(|_| server.begin(&code)).collect();
    drop(first);
    let answers = answers(others);
    let distinct: HashSet<&str> = answers.iter().map(|answer| answer.run_output.as_str()).collect();
    assert_eq!(distinct.len(), 1, "{answers:?}");
    assert_eq!(answers[0].run_output.len(), 37);
    server.stop();
}
