//! Thousands of clients, and clients that send malformed or incomplete requests: each is refused, answered or
//! disconnected in time, other clients are served meanwhile, and all resources are released.

use std::fs;
use std::net::{IpAddr, SocketAddr, UdpSocket};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::json;

use crate::client::{Answer, Pending, head};
use crate::harness::{Options, Server, eventually, marked_seconds};
use crate::shared::Shared;

const JSON: (&str, &str) = ("Content-Type", "application/json");

/// The most connections that the server accepts at once.
const CROWD: usize = 10_000;

fn options(config: &str) -> Options<'_> {
    Options { languages: &["bash"], containers: 1, config, ..Options::default() }
}

fn descriptors(server: &Server) -> usize {
    fs::read_dir(format!("/proc/{}/fd", server.pid())).unwrap().count()
}

/// Waits until the server has no more descriptors open than before.
#[track_caller]
fn wait_descriptors_released(server: &Server, before: usize) {
    eventually(&format!("{before} descriptors as before"), || (descriptors(server) <= before).then_some(()));
}

/// Raises the limit of this process, which has a descriptor for each client.
fn allow_descriptors(needed: usize) {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    assert!(most >= needed as u64, "these tests need {needed} descriptors, and the hard limit is {most}");
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
}

/// A program whose answer is not cached.
fn echo(word: &str) -> String {
    format!("echo {word} # {}", marked_seconds(0))
}

#[track_caller]
fn assert_serves(server: &Server) {
    assert_eq!(server.run(&echo("alive")), Answer::ran("alive\n"));
}

#[test]
fn ten_thousand_stalled_clients_are_closed_while_others_are_served() {
    allow_descriptors(CROWD + 1000);
    let server = Server::start(options("limits = { output = \"1MiB\" }"));
    let before = descriptors(&server);
    // Cached for the clients below. At six bytes of JSON per NUL, it exceeds the kernel's buffers of a connection.
    let large = json!({ "code": "head -c 1048576 /dev/zero" }).to_string();
    let large = head("POST", "/coderunner", &[JSON], large.len()) + &large;
    let answer = Pending::send(server.address, large.as_bytes()).reply();
    assert!(answer.body.len() > 6 << 20, "{}", answer.body.len());

    let body = head("POST", "/coderunner", &[JSON], 100) + "{\"code\": ";
    let chunk = head("POST", "/coderunner", &[JSON, ("Transfer-Encoding", "chunked")], 0) + "ffff\r\n{";
    let kept_alive = "GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let begun = ["", "P", "POST /coderunner HTTP/1.1\r\nHost: te", &body, &chunk, kept_alive];
    let never_read = 40;
    let crowd: Vec<Pending> = (0..CROWD)
        .map(|number| match number < never_read {
            true => Pending::send(server.address, large.as_bytes()),
            false => Pending::send(server.address, begun[number % begun.len()].as_bytes()),
        })
        .collect();
    // One connection more than the maximum is still served.
    assert_serves(&server);
    wait_descriptors_released(&server, before);
    drop(crowd);
    assert_serves(&server);
    server.stop();
}

#[test]
fn connections_leave_enough_descriptors_for_runs() {
    let server = Server::start(Options { descriptors: Some(300), ..options("") });
    let before = descriptors(&server);
    let mut first = Pending::send(server.address, b"");
    // Some of these connections wait until the server accepts them.
    let crowd: Vec<Pending> = (0..200).map(|_| Pending::send(server.address, b"")).collect();
    eventually("many connections are accepted", || (descriptors(&server) > before + 100).then_some(()));
    let body = json!({ "code": echo("alive") }).to_string();
    first.send_more((head("POST", "/coderunner", &[JSON], body.len()) + &body).as_bytes());
    assert_eq!(first.reply().answer(), Answer::ran("alive\n"));
    drop(crowd);
    assert_serves(&server);
    wait_descriptors_released(&server, before);
    server.stop();
}

/// An address of this machine other than loopback, if it has one.
fn own_address() -> Option<IpAddr> {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    // Connecting a UDP socket sends nothing.
    socket.connect("198.51.100.1:9").ok()?;
    Some(socket.local_addr().unwrap().ip())
}

#[test]
fn one_address_gets_at_most_half_of_the_connections() {
    let Some(own) = own_address() else {
        eprintln!("skipped: this machine has no address other than loopback");
        return;
    };
    let server = Server::start(Options { descriptors: Some(300), ..options("listen = \"0.0.0.0:0\"") });
    let before = descriptors(&server);
    let from_afar = SocketAddr::new(own, server.address.port());
    let crowd: Vec<Pending> = (0..200).map(|_| Pending::send(from_afar, b"")).collect();
    let closed = || crowd.iter().filter(|one| one.has_begun()).count();
    eventually("one address holds a quarter of the descriptors", || (closed() == 200 - 75).then_some(()));
    // Loopback has no such bound: a proxy with many clients may connect from there.
    let others: Vec<Pending> = (0..70).map(|_| Pending::send(server.address, b"")).collect();
    assert_serves(&server);
    assert_eq!(others.iter().filter(|one| one.has_begun()).count(), 0);
    drop((crowd, others));
    wait_descriptors_released(&server, before);
    let healthz = Pending::send(from_afar, head("GET", "/healthz", &[], 0).as_bytes());
    assert_eq!(healthz.reply().status, 200);
    server.stop();
}

#[test]
fn endless_or_malformed_request_heads_are_refused() {
    let server = Server::start(options(""));
    let before = descriptors(&server);
    let line = "POST /coderunner HTTP/1.1\r\n";
    let many: String = (0..20_000).map(|number| format!("x-{number}: y\r\n")).collect();
    let long = "x".repeat(4 << 20);
    for head in [
        format!("{line}{many}\r\n"),
        format!("{line}x: {long}\r\n\r\n"),
        format!("{line}{long}: x\r\n\r\n"),
        format!("{line}cookie: {}\r\n\r\n", "a=b; ".repeat(1 << 20)),
        long.clone(),
        format!("GET /{long} HTTP/1.1\r\n\r\n"),
        format!("{line}Host: localhost\r\nno colon\r\n\r\n"),
        format!("{line}Host: localhost\r\n folded\r\n\r\n"),
        format!("{line}Host: te\0st\r\n\r\n"),
        format!("{line}na me: x\r\n\r\n"),
        format!("{line}Content-Length: -1\r\n\r\n"),
        format!("{line}Content-Length: 99999999999999999999999\r\n\r\n"),
        format!("{line}Content-Length: 1\r\nContent-Length: 2\r\n\r\n"),
        format!("{line}Transfer-Encoding: gzip\r\n\r\n"),
        "\r\n".repeat(1 << 20),
    ] {
        let request = Pending::send(server.address, head.as_bytes());
        request.end_of_request();
        // A client that is still sending may find the connection closed before it has read the answer.
        if let Ok(reply) = request.try_reply() {
            assert!((400..500).contains(&reply.status), "{}: {reply:?}", &head[..head.len().min(80)]);
        }
    }
    assert_serves(&server);
    wait_descriptors_released(&server, before);
    server.stop();
}

#[test]
fn truncated_or_badly_framed_bodies_run_nothing() {
    let server = Server::start(options(""));
    let before = descriptors(&server);
    let length = |length: usize| head("POST", "/coderunner", &[JSON], length);
    let chunked = head("POST", "/coderunner", &[JSON, ("Transfer-Encoding", "chunked")], 0);
    let code = json!({ "code": "echo it ran" }).to_string();
    let size = code.len();
    let chunk = |size: &str| format!("{chunked}{size}\r\n{code}\r\n0\r\n\r\n");
    for request in [
        length(size + 1) + &code,
        length(size - 1) + &code,
        format!("{chunked}{size:x}\r\n{code}"),
        format!("{chunked}{size:x}\r\n{code}\r\n"),
        chunk(&format!("{:x}", size + 1)),
        chunk(&format!("{:x}", size - 1)),
        chunk("zz"),
        chunk("-1"),
        chunk(""),
        chunk("0x10"),
        chunk("ffffffffffffffff"),
        chunk("fffffffffffffffffffffff"),
        chunk(&format!("{size:x};{}", "x".repeat(1 << 20))),
        format!("{chunked}{size:x}\r\n{code}\r\n0\r\n{}\r\n", "x: y\r\n".repeat(100_000)),
        // Two contradicting lengths: a proxy might believe the other one.
        head("POST", "/coderunner", &[JSON, ("Content-Length", "5"), ("Transfer-Encoding", "chunked, x")], 0) + &code,
    ] {
        let pending = Pending::send(server.address, request.as_bytes());
        pending.end_of_request();
        if let Ok(reply) = pending.try_reply() {
            assert!((400..500).contains(&reply.status), "{}: {reply:?}", &request[..request.len().min(300)]);
        }
    }
    assert_serves(&server);
    wait_descriptors_released(&server, before);
    server.stop();
}

#[test]
fn deeply_nested_or_very_wide_json_is_refused_or_ignored() {
    let server = Shared::start(&["bash"], "");
    let deep = |open: &str, close: &str, times| open.repeat(times) + &close.repeat(times);
    let post = |path: &str, body: &str| server.request("POST", path, &[JSON], body.as_bytes());
    for path in ["/coderunner", "/api/v2/execute"] {
        for body in [
            deep("[", "]", 250_000),
            deep("{\"a\":", "}", 80_000),
            format!("{{\"code\":{}}}", deep("[", "]", 200_000)),
            format!("{{\"files\":{}}}", deep("[", "]", 200_000)),
            format!("{{\"files\":[{}{{}}]}}", "{},".repeat(150_000)),
            "[".repeat(500_000),
            format!("{{\"code\":\"{}", "\\u0000".repeat(80_000)),
            format!("{{\"code\":{}}}", "9".repeat(500_000)),
        ] {
            let reply = post(path, &body);
            assert_eq!(reply.status, 400, "{path} {}: {}", &body[..30], reply.message());
            assert!(reply.message().len() < 500, "the message repeats the body: {}", reply.message());
        }
    }
    // Unknown fields are ignored, whatever they contain.
    let wide: String = (0..30_000).map(|number| format!("\"{number}\":[],")).collect();
    let reply = post("/coderunner", &format!("{{{wide}\"code\":\"echo wide\"}}"));
    assert_eq!(reply.answer(), Answer::ran("wide\n"));
}
