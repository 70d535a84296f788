//! Features for operators: metrics, request ids, readiness probes, API keys, rate limits and the fair queue.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::client::{Answer, Pending, Reply};
use crate::harness::{self, Options, Server, eventually, marked_seconds, wait_running};

const JSON: (&str, &str) = ("Content-Type", "application/json");

fn serve(config: &str) -> Server {
    Server::start(Options { languages: &["bash"], config, ..Options::default() })
}

/// Sends code with additional headers.
fn begin(server: &Server, code: &str, headers: &[(&str, &str)]) -> Pending {
    let headers = [&[JSON], headers].concat();
    server.begin_request("POST", "/coderunner", &headers, json!({ "code": code }).to_string().as_bytes())
}

fn run(server: &Server, code: &str, headers: &[(&str, &str)]) -> Reply {
    begin(server, code, headers).reply()
}

/// The samples of `/metrics`: name with labels, and value.
fn metrics(server: &Server) -> BTreeMap<String, f64> {
    let reply = server.get("/metrics");
    assert_eq!(reply.status, 200);
    assert!(reply.header("content-type").unwrap().starts_with("text/plain; version=0.0.4"));
    let text = String::from_utf8(reply.body).unwrap();
    let samples = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    samples
        .map(|line| {
            let (name, value) = line.rsplit_once(' ').unwrap();
            (name.to_owned(), value.parse().unwrap())
        })
        .collect()
}

/// The sum of all samples with this name and all of these labels.
fn sum(metrics: &BTreeMap<String, f64>, name: &str, labels: &[(&str, &str)]) -> f64 {
    let is = |sample: &str| {
        let (base, rest) = sample.split_once('{').unwrap_or((sample, ""));
        base == name && labels.iter().all(|(label, value)| rest.contains(&format!("{label}=\"{value}\"")))
    };
    metrics.iter().filter(|(sample, _)| is(sample)).map(|(_, value)| value).sum()
}

#[test]
fn metrics_count_events_and_labels_never_come_from_clients() {
    let server = serve("[limits]\nrun_time = \"3s\"\n[ready]\nprobe = true");
    assert_eq!(server.run("echo one").run_output, "one\n");
    assert_eq!(server.run("echo one").run_output, "one\n");
    server.run("exit 3");
    server.run("sleep 30");
    server.request("GET", "/%22%7Dunheard-of", &[], b"");
    server.request("POST", "/coderunner", &[JSON], b"{");
    let now = metrics(&server);
    let count = |name: &str, labels: &[(&str, &str)]| sum(&now, name, labels);
    let requests = |route: &str, code: &str| count("coderunner_requests_total", &[("route", route), ("code", code)]);
    assert_eq!(requests("/coderunner", "200"), 4.0, "{now:#?}");
    assert_eq!(requests("/coderunner", "400"), 1.0);
    assert_eq!(requests("other", "404"), 1.0);
    assert_eq!(count("coderunner_request_seconds_count", &[("route", "/coderunner")]), 5.0);
    let runs = |verdict: &str| count("coderunner_runs_total", &[("language", "bash"), ("verdict", verdict)]);
    assert_eq!((runs("ok"), runs("runtime_error"), runs("time_limit")), (1.0, 1.0, 1.0));
    assert_eq!(count("coderunner_stage_seconds_count", &[("language", "bash"), ("stage", "run")]), 3.0);
    assert!(count("coderunner_stage_seconds_sum", &[("stage", "run")]) >= 3.0, "one run slept until its limit");
    assert_eq!(count("coderunner_queue_wait_seconds_count", &[("language", "bash")]), 3.0);
    assert_eq!((count("coderunner_cache_hits_total", &[]), count("coderunner_cache_misses_total", &[])), (1.0, 3.0));
    assert!(count("coderunner_cache_bytes", &[]) > 0.0);
    assert!(count("coderunner_sandbox_start_seconds_count", &[("language", "bash")]) >= 3.0);
    assert!(count("coderunner_build_info", &[("version", env!("CARGO_PKG_VERSION"))]) == 1.0);
    assert!(now.keys().all(|sample| !sample.contains("unheard-of")), "{now:#?}");

    eventually("all clean-ups are counted, no sandbox is busy, and new ones are ready", || {
        let now = metrics(&server);
        let busy = sum(&now, "coderunner_sandboxes_busy", &[("language", "bash")]);
        let ready = sum(&now, "coderunner_sandboxes_ready", &[("language", "bash")]);
        let removed = sum(&now, "coderunner_sandboxes_removed_total", &[]);
        let swept = sum(&now, "coderunner_sweeps_total", &[("result", "ok")]);
        let built = sum(&now, "coderunner_image_created_timestamp_seconds", &[("language", "bash")]);
        (busy == 0.0 && ready == 2.0 && removed >= 3.0 && swept >= 1.0 && built > 1e9).then_some(())
    });
    server.stop();
}

#[test]
fn client_disconnects_and_full_queue_are_counted() {
    let server = Server::start(Options {
        languages: &["bash"],
        containers: 1,
        config: "[limits]\nrun_time = \"60s\"\n[queue]\nlength = 1",
        ..Options::default()
    });
    let mark = marked_seconds(50);
    let running = server.begin(&format!("sleep {mark}"));
    wait_running(&mark);
    let waiting = server.begin("echo waiting");
    eventually("one request waits", || (sum(&metrics(&server), "coderunner_queue_length", &[]) == 1.0).then_some(()));
    assert_eq!(sum(&metrics(&server), "coderunner_sandboxes_busy", &[]), 1.0);
    assert_eq!(server.begin("echo refused").reply().status, 503);
    drop(running);
    assert_eq!(waiting.reply().answer(), Answer::ran("waiting\n"));
    let now = metrics(&server);
    assert_eq!(sum(&now, "coderunner_errors_total", &[("kind", "queue_full")]), 1.0);
    assert_eq!(sum(&now, "coderunner_requests_total", &[("code", "499")]), 1.0);
    assert_eq!(sum(&now, "coderunner_requests_total", &[("code", "503"), ("route", "/coderunner")]), 1.0);
    server.stop();
}

/// Parses the lines of a JSON log.
fn lines(server: &Server) -> Vec<Value> {
    server.log().lines().map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("no JSON: {line}"))).collect()
}

#[test]
fn request_id_appears_in_answer_and_log() {
    let server = Server::start(Options {
        languages: &["bash"],
        env: &[("CODERUNNER_LOG_FORMAT", "json"), ("CODERUNNER_LOG", "debug")],
        ..Options::default()
    });

    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    let parent = format!("00-{trace}-00f067aa0ba902b7-01");
    let secret = "echo the-code-is-nobodys-business";
    let reply = run(&server, secret, &[("X-Request-Id", "mine-1.2_3"), ("traceparent", &parent)]);
    assert_eq!((reply.status, reply.header("x-request-id")), (200, Some("mine-1.2_3")));
    let made: BTreeSet<String> = ["bad id", "", "{\"a\":1}", &"x".repeat(65)]
        .iter()
        .map(|id| run(&server, "echo 2", &[("X-Request-Id", id), ("traceparent", "00-0-0-0")]))
        .map(|reply| reply.header("x-request-id").unwrap().to_owned())
        .collect();
    assert_eq!(made.len(), 4, "a new id for each request: {made:?}");
    assert!(made.iter().all(|id| id.len() == 16 && id.bytes().all(|c| c.is_ascii_hexdigit())), "{made:?}");
    assert!(server.get("/nowhere").header("x-request-id").is_some(), "error answers have an id, too");

    let answered = |id: &str| {
        eventually("a line for the request", || {
            let is = |line: &Value| line["span"]["id"] == id && line["message"] == "answered";
            let mut found: Vec<Value> = lines(&server).into_iter().filter(is).collect();
            assert!(found.len() <= 1, "one line per request: {found:?}");
            found.pop()
        })
    };
    let line = answered("mine-1.2_3");
    assert_eq!((&line["route"], &line["code"], &line["level"]), (&json!("/coderunner"), &json!(200), &json!("DEBUG")));
    assert_eq!((&line["span"]["trace"], &line["client"]), (&json!(trace), &json!("127.0.0.1")));
    assert_eq!(answered(made.first().unwrap())["span"].get("trace"), None, "an invalid trace context is ignored");
    assert!(!server.log().contains("nobodys-business"), "submitted code is never logged, not even at debug level");
    server.stop();
}

#[test]
fn readiness_probe_runs_at_most_once_per_interval() {
    let config = r#"
        [ready]
        probe = true
        interval = "1h"
    "#;
    let server = Server::start(Options { languages: &["bash", "python"], containers: 3, config, ..Options::default() });
    let probes = |language: &str, result: &str| {
        sum(&metrics(&server), "coderunner_probes_total", &[("language", language), ("result", result)])
    };
    eventually("python was probed, too", || {
        server.get("/readyz");
        (probes("python", "ok") == 1.0).then_some(())
    });
    let asked: Vec<Pending> = (0..20).map(|_| server.begin_request("GET", "/readyz", &[], b"")).collect();
    assert!(asked.into_iter().all(|pending| pending.reply().status == 200));
    assert_eq!((probes("bash", "ok"), probes("python", "ok")), (1.0, 1.0), "at most one probe per interval");
    server.stop();
}

#[test]
fn aborted_readiness_requests_waste_no_sandbox() {
    let config = r#"
        [ready]
        probe = true
        interval = "1h"
        [language.bash]
        health = { code = "sleep 1; echo hello", output = "hello\n" }
    "#;
    // `launch`, because `start` requests /readyz; this test does so only once there is a sandbox.
    let server = Server::launch(Options { languages: &["bash"], config, ..Options::default() });
    let is = |name: &str, labels: &[(&str, &str)]| sum(&metrics(&server), name, labels);
    eventually("a sandbox is ready", || (is("coderunner_sandboxes_ready", &[]) > 0.0).then_some(()));
    for _ in 0..5 {
        let asked = server.begin_request("GET", "/readyz", &[], b"");
        std::thread::sleep(Duration::from_millis(100));
        drop(asked);
    }
    eventually("the probe succeeded", || (is("coderunner_probes_total", &[("result", "ok")]) == 1.0).then_some(()));
    assert_eq!(server.get("/readyz").status, 200);
    assert_eq!(is("coderunner_probes_total", &[]), 1.0, "the result of the aborted requests is reused");
    server.stop();
}

#[test]
fn client_run_counts_as_readiness_probe() {
    // `launch`, because `start` requests /readyz; this test does so only after the first run.
    let server = Server::launch(Options {
        languages: &["bash"],
        config: "[ready]\nprobe = true\ninterval = \"1h\"",
        ..Options::default()
    });
    let answer = eventually("the first sandbox runs a program", || {
        let reply = server.begin("echo proof").reply();
        (reply.status == 200).then(|| reply.answer())
    });
    assert_eq!(answer, Answer::ran("proof\n"));
    server.wait_ready();
    assert_eq!(sum(&metrics(&server), "coderunner_probes_total", &[]), 0.0);
    server.stop();
}

#[test]
fn failing_language_is_not_ready_until_a_run_succeeds() {
    let config = r#"
        [ready]
        probe = true
        interval = "1h"
        [language.bash]
        health = { code = "echo a program", output = "what it does not print\n" }
    "#;
    // An earlier start has checked the image, so this one uses it although the changed health program fails.
    let options = Options { languages: &["bash"], ..Options::default() };
    let server = Server::start(options.clone());
    let files = {
        let path = server.files().config();
        let mut table: toml::Table = std::fs::read_to_string(&path).unwrap().parse().unwrap();
        let changed: toml::Table = config.parse().unwrap();
        table.insert("ready".into(), changed["ready"].clone());
        let bash = table["language"]["bash"].as_table_mut().unwrap();
        bash.insert("health".into(), changed["language"]["bash"]["health"].clone());
        std::fs::write(&path, table.to_string()).unwrap();
        server.crash()
    };
    let server = Server::launch_with(files, &options);
    let reply = eventually("the probe failed", || {
        let reply = server.get("/readyz");
        let problem = reply.json()["languages"]["bash"]["problem"].as_str().unwrap_or_default().to_owned();
        (problem == "its health program fails").then_some(reply)
    });
    assert_eq!((reply.status, &reply.json()["ready"]), (503, &json!(false)));
    server.wait_log(&["not ready", "a program", "what it does not print"]);
    assert_eq!(server.run("echo works"), Answer::ran("works\n"));
    assert_eq!(server.get("/readyz").status, 200, "a later run of a client outweighs the failed probe");
    server.stop();
}

#[test]
fn busy_languages_are_not_probed() {
    let server = Server::start(Options {
        languages: &["bash"],
        containers: 1,
        config: "[limits]\nrun_time = \"60s\"\n[ready]\nprobe = true\ninterval = \"1s\"",
        ..Options::default()
    });
    let mark = marked_seconds(4);
    let running = server.begin(&format!("sleep {mark}; echo undisturbed"));
    wait_running(&mark);
    let before = sum(&metrics(&server), "coderunner_probes_total", &[]);
    while !running.has_begun() {
        let asked = Instant::now();
        let status = server.get("/readyz").status;
        if !running.has_begun() {
            assert_eq!(status, 200);
            assert_eq!(sum(&metrics(&server), "coderunner_probes_total", &[]), before);
            assert!(asked.elapsed() < Duration::from_secs(60));
        }
    }
    assert_eq!(running.reply().answer(), Answer::ran("undisturbed\n"));
    server.stop();
}

/// Creates a key with `coderunner key`; returns it, and the configuration line with its hash.
pub fn new_key(owner: &str) -> (String, String) {
    let output = harness::output(std::process::Command::new(harness::executable()).args(["key", owner]), b"");
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let key = String::from_utf8(output.stdout).unwrap().trim().to_owned();
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(!message.contains(&key), "the key is printed only once");
    let line = message.lines().find(|line| line.starts_with(&format!("{owner} = "))).unwrap();
    (key, line.to_owned())
}

#[test]
fn with_api_keys_only_their_owners_can_run_code() {
    let (alice, line) = new_key("alice");
    let server = Server::start(Options {
        languages: &["bash"],
        config: &format!("[access.keys]\n{line}"),
        env: &[("CODERUNNER_LOG", "debug")],
        ..Options::default()
    });
    let bearer = format!("Bearer {alice}");
    for headers in [[("Authorization", bearer.as_str())], [("X-API-Key", alice.as_str())]] {
        assert_eq!(run(&server, "echo in", &headers).answer(), Answer::ran("in\n"));
    }
    let (stranger, _) = new_key("alice");
    for headers in [&[][..], &[("X-API-Key", stranger.as_str())], &[("Authorization", "Bearer ")]] {
        let reply = run(&server, "echo out", &[headers, &[("Origin", "https://example.org")]].concat());
        assert_eq!(reply.status, 401);
        assert!(reply.header("www-authenticate").unwrap().starts_with("Bearer"), "{reply:?}");
        assert!(reply.header("access-control-allow-origin").is_some(), "a page can read why: {reply:?}");
        assert!(reply.message().contains("X-API-Key"));
    }
    assert_eq!(server.get("/metrics").status, 401);
    assert_eq!(server.get("/metrics/").status, 401);
    assert_eq!(server.request("GET", "/metrics", &[("X-API-Key", &alice)], b"").status, 200);
    assert_eq!((server.get("/healthz").status, server.get("/readyz").status), (200, 200));
    server.wait_log(&["answered", "client=\"alice\""]);
    assert!(!server.log().contains(&alice) && !server.log().contains(&stranger), "keys are never logged");
    server.stop();
}

#[test]
fn rate_limited_clients_get_429_with_retry_after() {
    let server = serve("[access]\nrate = \"2/h\"\nburst = 2\ntrusted_proxies = [\"127.0.0.1\"]");
    let at = |address: &str| run(&server, "echo hello", &[("X-Forwarded-For", address)]);
    assert_eq!((at("192.0.2.1").status, at("198.51.100.9, 192.0.2.1").status), (200, 200));
    let reply = at("192.0.2.1");
    assert_eq!(reply.status, 429);
    let wait: u32 = reply.header("retry-after").unwrap().parse().unwrap();
    assert!((1000..=1801).contains(&wait), "about half an hour: {wait}");
    assert!(reply.message().contains("too many requests"));
    assert_eq!(at("192.0.2.2").status, 200, "another client");
    assert_eq!((at("2001:db8::1").status, at("2001:db8::2").status, at("2001:db8::3").status), (200, 200, 429));
    assert_eq!(server.get("/healthz").status, 200);
    server.stop();

    let server = serve("[access]\nrate = \"2/h\"\nburst = 1");
    let at = |address: &str| run(&server, "echo hello", &[("X-Forwarded-For", address)]);
    assert_eq!(
        (at("192.0.2.1").status, at("192.0.2.2").status),
        (200, 429),
        "X-Forwarded-For of an untrusted peer is ignored"
    );
    server.stop();
}

#[test]
fn fair_queue_serves_clients_in_turn() {
    let server = Server::start(Options {
        languages: &["bash"],
        containers: 1,
        config: "[limits]\nrun_time = \"60s\"\n[queue]\nfair = true\nwait = \"120s\"\n[access]\ntrusted_proxies = [\"127.0.0.1\"]",
        ..Options::default()
    });
    let mark = marked_seconds(50);
    let first = server.begin(&format!("sleep {mark}"));
    wait_running(&mark);
    let queued = |wanted: f64| {
        eventually("the requests are queued", || {
            (sum(&metrics(&server), "coderunner_queue_length", &[]) == wanted).then_some(())
        });
    };
    // Each program prints the time at which it ran.
    let send = |name: &str, address: &str| {
        begin(&server, &format!("echo $EPOCHREALTIME #{name}"), &[("X-Forwarded-For", address)])
    };
    let mut many = Vec::new();
    for n in 0..4 {
        many.push(send(&n.to_string(), "192.0.2.1"));
        queued(f64::from(n) + 1.0);
    }
    let one = send("one", "192.0.2.2");
    queued(5.0);
    drop(first);
    let at = |pending: Pending| pending.reply().answer().run_output.trim().parse::<f64>().unwrap();
    let one = at(one);
    let many: Vec<f64> = many.into_iter().map(at).collect();
    assert!(many.is_sorted(), "requests of one client run in order of arrival: {many:?}");
    assert!(
        many[0] < one && one < many[1],
        "the other client's request runs second, although it arrived last: {one}, {many:?}"
    );
    server.stop();
}

#[test]
fn errors_name_invalid_access_settings() {
    for (config, words) in [
        ("[access]\nrate = \"fast\"", ["rate", "30/m"]),
        ("[access]\nburst = 0", ["burst", "from 1"]),
        ("[access]\ntrusted_proxies = [\"proxy.example\"]", ["trusted_proxies", "10.0.0.0/8"]),
        ("[access.keys]\nalice = \"a key itself\"", ["alice", "64 hex digits"]),
        (
            "[access.keys]\n\"Al Ice\" = \"0000000000000000000000000000000000000000000000000000000000000000\"",
            ["Al Ice", "a-z"],
        ),
        ("[ready]\ninterval = \"10ms\"", ["ready.interval", "from 1s"]),
    ] {
        let exit = harness::refused(Options { config, ..Options::default() });
        assert_eq!(exit.status.code(), Some(1));
        assert!(words.iter().all(|word| exit.stderr.contains(word)), "{config}: {exit}");
        assert!(!exit.stderr.contains("a key itself"), "{exit}");
    }
}
