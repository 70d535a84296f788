//! The HTTP side: what is refused and how, framing, and other origins.

use serde_json::json;

use crate::client::{Answer, Pending, Reply, head};
use crate::harness::{Options, Server};

const JSON: (&str, &str) = ("Content-Type", "application/json");

fn serve(config: &str) -> Server {
    Server::start(Options { languages: &["bash"], containers: 1, config, ..Options::default() })
}

/// A refusal: this status, and a message with these words.
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
fn an_answer_has_three_fields_and_says_that_it_is_json() {
    let server = serve("");
    let reply = server.begin("echo hello").reply();
    assert_eq!(reply.status, 200);
    assert_eq!(reply.header("content-type"), Some("application/json"));
    assert_eq!(reply.json(), json!({"status": 1, "compileOutput": "", "runOutput": "hello\n"}));
    server.stop();
}

#[test]
fn a_body_that_is_no_request_is_refused() {
    let server = serve("");
    let bodies: [&[u8]; 11] = [
        b"",
        b"{",
        b"null",
        b"[]",
        b"\"echo\"",
        b"{}",
        b"{\"source\": \"echo\"}",
        b"{\"code\": 1}",
        b"{\"code\": \"\xff\"}",
        b"{\"code\": \"\\ud800\"}",
        b"{\"code\": \"a\", \"code\": \"b\"}",
    ];
    for body in bodies {
        let reply = server.request("POST", "/coderunner", &[JSON], body);
        assert_refused(&reply, 400, &["{\"code\": \"…\"}"]);
    }
    server.stop();
}

#[test]
fn fields_of_other_apis_are_ignored() {
    let server = serve("");
    let body =
        json!({"code": "echo \"$1\"; cat", "language": "python", "version": "3", "stdin": "typed", "args": ["x"]});
    assert_eq!(server.begin_json(&body).reply().answer(), Answer::ran("\n"));
    server.stop();
}

#[test]
fn what_is_not_there_is_not_found() {
    let server = serve("");
    for path in ["/no-such-page", "/coderunner/more", "/Coderunner", "/api/v9/execute", "/../etc/passwd", "/%00"] {
        assert_refused(&server.get(path), 404, &["POST /coderunner"]);
        assert_refused(&server.request("POST", path, &[JSON], b"{\"code\": \"\"}"), 404, &[]);
    }
    server.stop();
}

#[test]
fn a_wrong_method_is_told_the_right_ones() {
    let server = serve("");
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
    server.stop();
}

#[test]
fn a_body_of_another_type_is_refused() {
    let server = serve("");
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
    server.stop();
}

#[test]
fn too_large_a_source_or_body_is_refused() {
    let server = serve("source_limit = \"1KiB\"\nbody_limit = \"8KiB\"");
    let fits = format!("echo fits #{}", "x".repeat(1024 - 11));
    assert_eq!(fits.len(), 1024);
    assert_eq!(server.run(&fits), Answer::ran("fits\n"));
    assert_refused(&server.begin(&format!("{fits}x")).reply(), 413, &["code", "1024"]);
    assert_refused(&server.begin(&"x".repeat(9000)).reply(), 413, &["body", "8192"]);
    // Refused for what it says, before it is sent.
    let head = head("POST", "/coderunner", &[JSON], 1 << 40);
    let refused = Pending::send(server.address, &[head.as_bytes(), &[b' '; 9000]].concat());
    assert_refused(&refused.reply(), 413, &["body"]);
    server.stop();
}

#[test]
fn chunked_bodies_are_taken_and_bounded_too() {
    let server = serve("body_limit = \"64KiB\"");
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
fn requests_that_break_off_or_are_no_http_harm_nobody() {
    let server = serve("");
    let head = head("POST", "/coderunner", &[JSON], 100);
    let broken = Pending::send(server.address, format!("{head}{{\"code\": \"echo").as_bytes());
    broken.end_of_request();
    // Refused or just closed: there may be nobody left to tell.
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
    server.stop();
}

#[test]
fn a_connection_serves_one_request_after_another() {
    let server = serve("");
    let request = |code: &str, connection: &str| {
        let body = json!({ "code": code }).to_string();
        let head = format!(
            "POST /coderunner HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\
             Connection: {connection}\r\n\r\n",
            body.len()
        );
        head + &body
    };
    // Both at once: the answers come in order.
    let both = request("echo first", "keep-alive") + &request("echo second", "close");
    let text = Pending::send(server.address, both.as_bytes()).all();
    let text = String::from_utf8(text).unwrap();
    assert_eq!(text.matches("HTTP/1.1 200 OK").count(), 2, "{text}");
    let (first, second) = (text.find("\"first\\n\""), text.find("\"second\\n\""));
    assert!(first.is_some() && first < second, "{text}");
    server.stop();
}

#[test]
fn pages_of_any_origin_may_call_by_default() {
    let server = serve("");
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
    // A page can read why it was refused.
    let reply = server.request("POST", "/coderunner", &[JSON, origin], b"{");
    assert_refused(&reply, 400, &[]);
    assert_allowed(&reply, "https://example.org");
    server.stop();
}

#[test]
fn pages_of_configured_origins_only_may_call() {
    let server = serve("cors_origins = [\"https://one.example\", \"http://two.example:8000\"]");
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
    // Who is no browser sends no origin.
    assert_eq!(server.run("echo no browser"), Answer::ran("no browser\n"));
    server.stop();
}

#[test]
fn no_page_may_call_where_no_origin_is_configured() {
    let server = serve("cors_origins = []");
    let headers = [("Origin", "https://example.org"), ("Access-Control-Request-Method", "POST")];
    let reply = server.request("OPTIONS", "/coderunner", &headers, b"");
    assert_eq!(reply.header("access-control-allow-origin"), None);
    assert_refused(&reply, 403, &["origin"]);
    // Whether or not a browser asked for leave first.
    let reply = server.request("POST", "/coderunner", &[JSON, headers[0]], b"{\"code\": \"echo hello\"}");
    assert_refused(&reply, 403, &["origin"]);
    // The server's own page, by plain HTTP: its origin is the Host of the request.
    let reply =
        server.request("POST", "/coderunner", &[JSON, ("Origin", "http://test")], b"{\"code\": \"echo hello\"}");
    assert_eq!(reply.status, 200, "{reply:?}");
    assert_eq!(server.run("echo no browser"), Answer::ran("no browser\n"));
    server.stop();
}

#[test]
fn health_and_readiness_are_told() {
    let server = serve("");
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
