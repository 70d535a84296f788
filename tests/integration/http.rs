//! HTTP: error answers, framing, size limits, host names and CORS.

use serde_json::{Value, json};

use crate::client::{Answer, Pending, Reply, head};
use crate::harness::{Endpoint, Options, Server};
use crate::shared::Shared;

const JSON: (&str, &str) = ("Content-Type", "application/json");

/// Options of a server whose configuration no other test has.
fn options(config: &str) -> Options<'_> {
    Options { languages: &["bash"], containers: 1, config, ..Options::default() }
}

fn shared(config: &str) -> Shared {
    Shared::start(&["bash"], config)
}

/// Checks that a request was refused with this status, and a message that contains these words.
#[track_caller]
fn assert_refused(reply: &Reply, status: u16, words: &[&str]) {
    let message = reply.message();
    assert_eq!(reply.status, status, "{message}");
    assert_eq!(reply.header("content-type"), Some("application/json"));
    for word in words {
        assert!(message.contains(word), "{word:?} is not in {message:?}");
    }
}

#[test]
fn answer_is_json_with_three_fields() {
    let server = shared("");
    let reply = server.begin("echo hello").reply();
    assert_eq!(reply.status, 200);
    assert_eq!(reply.header("content-type"), Some("application/json"));
    assert_eq!(reply.json(), json!({"status": 1, "compileOutput": "", "runOutput": "hello\n"}));
}

#[test]
fn malformed_bodies_return_400() {
    let server = shared("");
    let bodies: [&[u8]; 10] = [
        b"",
        b"{",
        b"null",
        b"[]",
        b"\"echo\"",
        b"{}",
        b"{\"source\": \"echo\"}",
        b"{\"code\": 1}",
        b"{\"code\": \"\xff\"}",
        b"{\"code\": \"a\", \"code\": \"b\"}",
    ];
    for body in bodies {
        let reply = server.request("POST", "/coderunner", &[JSON], body);
        assert_refused(&reply, 400, &["{\"code\": \"…\"}"]);
    }
}

#[test]
fn unknown_request_fields_are_ignored() {
    let server = shared("");
    let body =
        json!({"code": "echo \"$1\"; cat", "language": "python", "version": "3", "stdin": "typed", "args": ["x"]});
    assert_eq!(server.begin_json(&body).reply().answer(), Answer::ran("\n"));
}

#[test]
fn unknown_paths_return_404() {
    let server = shared("");
    for path in ["/no-such-page", "/coderunner/more", "/Coderunner", "/api/v9/execute", "/../etc/passwd", "/%00"] {
        assert_refused(&server.get(path), 404, &["POST /coderunner"]);
        assert_refused(&server.request("POST", path, &[JSON], b"{\"code\": \"\"}"), 404, &[]);
    }
}

#[test]
fn wrong_methods_return_405_with_allow() {
    let server = shared("");
    for method in ["GET", "PUT", "DELETE", "PATCH", "HEAD"] {
        let reply = server.request(method, "/coderunner", &[], b"");
        assert_eq!((reply.status, reply.header("allow")), (405, Some("POST, OPTIONS")), "{method}");
    }
    assert_refused(&server.get("/coderunner"), 405, &["POST"]);
    for path in ["/healthz", "/readyz"] {
        let reply = server.request("POST", path, &[JSON], b"{}");
        assert_refused(&reply, 405, &["GET"]);
        assert_eq!(reply.header("allow"), Some("GET, HEAD"));
    }
}

#[test]
fn wrong_content_types_return_415() {
    let server = shared("");
    let body = b"{\"code\": \"echo hello\"}";
    for kind in ["text/plain", "application/x-www-form-urlencoded", "application/jsonx", ""] {
        let reply = server.request("POST", "/coderunner", &[("Content-Type", kind)], body);
        assert_refused(&reply, 415, &["application/json"]);
    }
    assert_refused(&server.request("POST", "/coderunner", &[], body), 415, &["application/json"]);
    for kind in ["application/json; charset=utf-8", "Application/JSON"] {
        let reply = server.request("POST", "/coderunner", &[("Content-Type", kind)], body);
        assert_eq!(reply.answer(), Answer::ran("hello\n"));
    }
}

#[test]
fn oversized_sources_and_bodies_return_413() {
    let server = Server::start(options("source_limit = \"1KiB\"\nbody_limit = \"8KiB\""));
    let fits = format!("echo fits #{}", "x".repeat(1024 - 11));
    assert_eq!(fits.len(), 1024);
    assert_eq!(server.run(&fits), Answer::ran("fits\n"));
    assert_refused(&server.begin(&format!("{fits}x")).reply(), 413, &["code", "1024"]);
    assert_refused(&server.begin(&"x".repeat(9000)).reply(), 413, &["body", "8192"]);
    // A too large `Content-Length` is refused before the body is sent.
    let head = head("POST", "/coderunner", &[JSON], 1 << 40);
    let refused = Pending::send(server.address, &[head.as_bytes(), &[b' '; 9000]].concat());
    assert_refused(&refused.reply(), 413, &["body"]);
    server.stop();
}

#[test]
fn chunked_bodies_are_accepted_and_bounded() {
    let server = Server::start(options("body_limit = \"64KiB\""));
    let head = head("POST", "/coderunner", &[JSON, ("Transfer-Encoding", "chunked")], 0);
    let mut request = Pending::send(server.address, format!("{head}9\r\n{{\"code\": \r\n").as_bytes());
    request.send_more(b"d\r\n\"echo hello\"}\r\n0\r\n\r\n");
    assert_eq!(request.reply().answer(), Answer::ran("hello\n"));

    let mut request = Pending::send(server.address, head.as_bytes());
    for _ in 0..40 {
        request.send_more(format!("800\r\n{}\r\n", " ".repeat(0x800)).as_bytes());
    }
    assert_refused(&request.reply(), 413, &["body"]);
    server.stop();
}

#[test]
fn truncated_or_invalid_requests_do_not_harm_the_server() {
    let server = shared("");
    let head = head("POST", "/coderunner", &[JSON], 100);
    let broken = Pending::send(server.address, format!("{head}{{\"code\": \"echo").as_bytes());
    broken.end_of_request();
    // The connection may also be closed without an answer.
    if let Ok(reply) = broken.try_reply() {
        assert_eq!(reply.status, 400);
    }
    drop(Pending::send(server.address, head.as_bytes()));
    for garbage in ["\0\0\0\0\r\n\r\n", "GET / HTTP/9.9\r\n\r\n", "\x16\x03\x01 TLS hello\r\n\r\n"] {
        let request = Pending::send(server.address, garbage.as_bytes());
        request.end_of_request();
        if let Ok(reply) = request.try_reply() {
            assert!((400..600).contains(&reply.status), "{reply:?}");
        }
    }
    let long = Pending::send(server.address, format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(100_000)).as_bytes());
    if let Ok(reply) = long.try_reply() {
        assert!((400..500).contains(&reply.status), "{reply:?}");
    }
    assert_eq!(server.run("echo alive"), Answer::ran("alive\n"));
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    let server = shared("");
    let request = |code: &str, connection: &str| {
        let body = json!({ "code": code }).to_string();
        let head = format!(
            "POST /coderunner HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\
             Connection: {connection}\r\n\r\n",
            body.len()
        );
        head + &body
    };
    // Both requests are sent at once; the answers come in order.
    let both = request("echo first", "keep-alive") + &request("echo second", "close");
    let text = Pending::send(server.address, both.as_bytes()).read_to_end();
    let text = String::from_utf8(text).unwrap();
    assert_eq!(text.matches("HTTP/1.1 200 OK").count(), 2, "{text}");
    let (first, second) = (text.find("\"first\\n\""), text.find("\"second\\n\""));
    assert!(first.is_some() && first < second, "{text}");
}

#[test]
fn all_origins_may_call_by_default() {
    let server = shared("");
    let preflight = [
        ("Origin", "https://example.org"),
        ("Access-Control-Request-Method", "POST"),
        ("Access-Control-Request-Headers", "content-type"),
    ];
    let reply = server.request("OPTIONS", "/coderunner", &preflight, b"");
    assert_eq!(reply.status, 200);
    assert_allowed(&reply, "https://example.org");
    let methods = reply.header("access-control-allow-methods").unwrap();
    assert!(methods.contains("POST"), "{methods}");
    let headers = reply.header("access-control-allow-headers").unwrap();
    assert!(headers.to_ascii_lowercase().contains("content-type"), "{headers}");
    assert!(reply.header("access-control-max-age").unwrap().parse::<u32>().unwrap() > 0);

    let origin = ("Origin", "https://example.org");
    let reply = server.request("POST", "/coderunner", &[JSON, origin], b"{\"code\": \"echo hello\"}");
    assert_eq!(reply.answer(), Answer::ran("hello\n"));
    assert_allowed(&reply, "https://example.org");
    // Error answers have CORS headers, so that a page can read the reason.
    let reply = server.request("POST", "/coderunner", &[JSON, origin], b"{");
    assert_refused(&reply, 400, &[]);
    assert_allowed(&reply, "https://example.org");
}

#[test]
fn only_configured_origins_may_call() {
    let server = shared("cors_origins = [\"https://one.example\", \"http://two.example:8000\"]");
    let ask = |method: &str, origin: &str| {
        let headers = [JSON, ("Origin", origin), ("Access-Control-Request-Method", "POST")];
        server.request(method, "/coderunner", &headers, b"{\"code\": \"echo hello\"}")
    };
    for origin in ["https://one.example", "http://two.example:8000"] {
        assert_allowed(&ask("OPTIONS", origin), origin);
        let reply = ask("POST", origin);
        assert_eq!(reply.answer(), Answer::ran("hello\n"));
        assert_allowed(&reply, origin);
    }
    for origin in ["https://other.example", "http://one.example", "https://one.example:444", "null"] {
        for method in ["OPTIONS", "POST"] {
            let reply = ask(method, origin);
            assert_eq!(reply.header("access-control-allow-origin"), None, "{origin}");
            assert_refused(&reply, 403, &["origin"]);
        }
    }
    // Clients other than browsers send no `Origin`.
    assert_eq!(server.run("echo no browser"), Answer::ran("no browser\n"));
}

#[test]
fn empty_cors_origins_refuse_all_foreign_pages() {
    let server = shared("cors_origins = []");
    let headers = [("Origin", "https://example.org"), ("Access-Control-Request-Method", "POST")];
    let reply = server.request("OPTIONS", "/coderunner", &headers, b"");
    assert_eq!(reply.header("access-control-allow-origin"), None);
    assert_refused(&reply, 403, &["origin"]);
    // The request itself is refused, too, whether or not a browser sent a preflight.
    let reply = server.request("POST", "/coderunner", &[JSON, headers[0]], b"{\"code\": \"echo hello\"}");
    assert_refused(&reply, 403, &["origin"]);
    // The server's own page is allowed: its origin is the host of the request.
    let reply =
        server.request("POST", "/coderunner", &[JSON, ("Origin", "http://localhost")], b"{\"code\": \"echo hello\"}");
    assert_eq!(reply.status, 200, "{reply:?}");
    assert_eq!(server.run("echo no browser"), Answer::ran("no browser\n"));
}

#[test]
fn health_and_readiness_are_reported() {
    let server = Server::start(options(""));
    let reply = server.get("/healthz");
    assert_eq!((reply.status, reply.json()), (200, json!({"status": "ok"})));
    let reply = server.get("/readyz");
    assert_eq!(reply.status, 200);
    let body = reply.json();
    assert_eq!(body["ready"], true);
    assert_eq!(body["languages"], json!({"bash": {"ready": true, "problem": null}}));
    assert!(body["limitsNotEnforced"].is_array());
    let reply = server.request("HEAD", "/healthz", &[], b"");
    assert_eq!(reply.status, 200);
    server.stop();
}

#[track_caller]
fn assert_allowed(reply: &Reply, origin: &str) {
    let allowed = reply.header("access-control-allow-origin");
    assert!(allowed == Some("*") || allowed == Some(origin), "{allowed:?}");
}

/// Sends these header lines unchanged.
fn raw(server: &Endpoint, lines: &str) -> Reply {
    Pending::send(server.address, format!("{lines}\r\n\r\n").as_bytes()).reply()
}

#[test]
fn requests_for_foreign_host_names_return_403() {
    let server = shared("cors_origins = []");
    let post = |server: &Endpoint, host: &str| {
        let body = json!({"code": "echo hello"}).to_string();
        let head = format!(
            "POST /coderunner HTTP/1.1\r\nHost: {host}\r\nOrigin: http://{host}\r\nSec-Fetch-Site: same-origin\r\n\
             Content-Type: application/json\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        Pending::send(server.address, (head + &body).as_bytes()).reply()
    };
    for host in ["evil.example", "evil.example:8080", "localhost.evil.example", "192.0.2.1"] {
        assert_refused(&post(&server, host), 403, &["allowed_hosts"]);
        assert_refused(&raw(&server, &format!("GET /metrics HTTP/1.1\r\nHost: {host}")), 403, &["allowed_hosts"]);
        let whole = format!("GET http://{host}/healthz HTTP/1.1\r\nHost: localhost");
        assert_refused(&raw(&server, &whole), 403, &["allowed_hosts"]);
    }
    for host in ["localhost", "127.0.0.1:8080", "[::1]", "LOCALHOST."] {
        assert_eq!(post(&server, host).answer(), Answer::ran("hello\n"), "{host}");
    }
    for config in ["allowed_hosts = [\"runner.example\"]", "allowed_hosts = [\"*\"]", "listen = \"0.0.0.0:0\""] {
        let server = Server::launch(options(config));
        let healthz = |host: &str| raw(&server, &format!("GET /healthz HTTP/1.1\r\nHost: {host}")).status;
        assert_eq!((healthz("runner.example:443"), healthz("localhost")), (200, 200), "{config}");
        assert_eq!(healthz("evil.example"), if config.contains("runner") { 403 } else { 200 }, "{config}");
        server.stop();
    }
}

#[test]
fn host_header_must_be_single_and_valid() {
    let server = shared("");
    let twice = raw(&server, "GET /healthz HTTP/1.1\r\nHost: localhost\r\nHost: localhost");
    assert_refused(&twice, 400, &["Host"]);
    assert_refused(&raw(&server, "GET /healthz HTTP/1.1"), 400, &["Host"]);
    assert_refused(&raw(&server, "GET /healthz HTTP/1.1\r\nHost: a@localhost"), 400, &["Host"]);
    assert_eq!(raw(&server, "GET /healthz HTTP/1.0").status, 200);
}

#[test]
fn oversized_bodies_are_refused_before_they_are_sent() {
    let server = shared("");
    let expects = ("Expect", "100-continue");
    let asked = head("POST", "/coderunner", &[JSON, expects], 10 << 20);
    // The answer is 413 instead of `100 Continue`, and the client never sends the body.
    assert_refused(&Pending::send(server.address, asked.as_bytes()).reply(), 413, &["body", "10485760", "524288"]);
    let asked = head("POST", "/coderunner", &[JSON], 10 << 20);
    assert_refused(&Pending::send(server.address, asked.as_bytes()).reply(), 413, &["body"]);
    // A client that has begun to send the body gets the answer, too.
    let sent = [asked.as_bytes(), &vec![b' '; 2 << 20]].concat();
    assert_refused(&Pending::send(server.address, &sent).reply(), 413, &["body"]);
    let body = json!({"code": "echo hello"}).to_string();
    let mut request =
        Pending::send(server.address, head("POST", "/coderunner", &[JSON, expects], body.len()).as_bytes());
    request.send_more(body.as_bytes());
    let all = String::from_utf8(request.read_to_end()).unwrap();
    assert!(all.starts_with("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n"), "{all}");
}

#[test]
fn oversized_request_heads_return_431() {
    let server = shared("");
    for size in [40_000, 400_000, 3_000_000] {
        let line = format!("GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Long: {}", "x".repeat(size));
        assert_eq!(raw(&server, &line).status, 431, "{size}");
    }
    let many: String = (0..200).map(|number| format!("\r\nX-{number}: y")).collect();
    assert_eq!(raw(&server, &format!("GET /healthz HTTP/1.1\r\nHost: localhost{many}")).status, 431);
}

#[test]
fn compressed_bodies_return_415() {
    let server = shared("");
    let body = b"{\"code\": \"echo hello\"}";
    for coding in ["gzip", "br", "identity, gzip"] {
        let reply = server.request("POST", "/coderunner", &[JSON, ("Content-Encoding", coding)], body);
        assert_refused(&reply, 415, &["Content-Encoding"]);
    }
    let reply = server.request("POST", "/coderunner", &[JSON, ("Content-Encoding", "identity")], body);
    assert_eq!(reply.answer(), Answer::ran("hello\n"));
}

#[test]
fn lone_surrogates_become_the_replacement_character() {
    let server = shared("");
    let post = |path: &str, body: &str| server.request("POST", path, &[JSON], body.as_bytes());
    let reply = post("/coderunner", r#"{"code": "printf '\ud83d%s\udE00' '\ud83d\ude00'", "other": "\ud800"}"#);
    assert_eq!(reply.answer(), Answer::ran("\u{fffd}😀\u{fffd}"));
    let body =
        r#"{"language": "bash", "files": [{"content": "cat; echo \"$1\""}], "stdin": "\udfff", "args": ["\ud83d"]}"#;
    assert_eq!(post("/api/v2/execute", body).json()["run"]["stdout"], "\u{fffd}\u{fffd}\n");
    let body = r#"{"language": "bash", "files": [{"content": "cat"}], "inputs": [{"stdin": "a\ud83d", "expected_output": "a\ud83d"}]}"#;
    assert_eq!(post("/api/v2/batch", body).json()["passed"], true);
}

#[test]
fn error_messages_state_sizes_and_times_and_are_short() {
    let server = shared("");
    let execute = |body: Value| server.request("POST", "/api/v2/execute", &[JSON], body.to_string().as_bytes());
    let large = json!({"language": "bash", "version": "*", "files": [{"content": "#".repeat(70_000)}]});
    assert_refused(&execute(large), 413, &["the files together are too large: 700", "at most 65536"]);
    assert_refused(&server.begin(&"#".repeat(70_000)).reply(), 413, &["the code is too large: 70000", "65536"]);
    let body = json!({"language": "bash", "version": "*", "files": [{"content": "sleep 9"}], "run_timeout": 1.5});
    let message = execute(body).json()["run"]["message"].as_str().unwrap().to_owned();
    assert!(message.contains(" ms") && !message.contains(" 0.0"), "{message}");
    let unknown = json!({"language": "\u{1}".repeat(60_000), "version": "*", "files": []});
    let reply = execute(unknown);
    assert_refused(&reply, 400, &["runtime is unknown"].map(|_| "\u{1}"));
    assert!(reply.body.len() < 8000, "{} bytes", reply.body.len());
}

#[test]
fn preflight_allows_requested_headers_and_answers_vary_by_origin() {
    let server = shared("");
    let preflight = [
        ("Origin", "https://example.org"),
        ("Access-Control-Request-Method", "POST"),
        ("Access-Control-Request-Headers", "x-requested-with,content-type"),
    ];
    let reply = server.request("OPTIONS", "/coderunner", &preflight, b"");
    assert_eq!(reply.status, 200, "{reply:?}");
    assert_allowed(&reply, "https://example.org");
    assert!(reply.header("access-control-allow-headers").unwrap().contains("x-requested-with"));
    // The preflight answer lists the allowed methods; the browser refuses others.
    let other = [("Origin", "https://example.org"), ("Access-Control-Request-Method", "PUT")];
    let reply = server.request("OPTIONS", "/coderunner", &other, b"");
    assert_eq!((reply.status, reply.header("access-control-allow-methods")), (200, Some("POST")));

    let server = shared("cors_origins = [\"https://one.example\"]");
    for origin in ["https://one.example", "https://other.example"] {
        let headers = [JSON, ("Origin", origin)];
        let reply = server.request("POST", "/coderunner", &headers, b"{\"code\": \"echo hello\"}");
        assert_eq!(reply.header("vary"), Some("Origin"), "{reply:?}");
    }
    assert_refused(
        &server.request("POST", "/coderunner", &[JSON, ("Origin", "https://other.example")], b"{}"),
        403,
        &["https://other.example", "cors_origins"],
    );
}

#[test]
fn client_errors_never_return_5xx() {
    let server = shared("");
    let names: Vec<Value> =
        (0..100).map(|n| json!({"name": format!("{}{n}", "\u{1}".repeat(250)), "content": ""})).collect();
    let program = json!({"language": "bash", "version": "*", "files": names, "args": ["\u{1}".repeat(16_000)]});
    let body = program.to_string();
    let post = |headers: &[(&str, &str)], body: &[u8]| server.request("POST", "/api/v2/execute", headers, body).status;
    assert!(post(&[JSON], body.as_bytes()) < 500);
    let text = "{\"language\": \"bash\", \"version\": \"*\", \"files\": [{\"content\": \"true\"}]}".as_bytes();
    for (name, value) in [
        ("Content-Type", "\u{e9}"),
        ("Accept", "\u{e9}"),
        ("Origin", "\u{e9}"),
        ("Sec-Fetch-Site", "\u{e9}"),
        ("Upgrade", "websocket"),
        ("Range", "bytes=0-"),
        ("Expect", "200-ok"),
        ("If-None-Match", "*"),
    ] {
        for method in ["GET", "POST", "OPTIONS", "HEAD", "TRACE", "CONNECT"] {
            for path in ["/", "/coderunner", "/api/v2/execute", "/api/v2/batch", "/api/v2/connect", "/readyz", "*"] {
                let status = server.request(method, path, &[(name, value)], text).status;
                assert!(status < 500, "{method} {path} {name}: {status}");
            }
        }
    }
}
