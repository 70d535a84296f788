//! Large answers and slow clients: the memory that they use in the server is bounded, other clients are served
//! meanwhile, and a client that keeps reading is not disconnected.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::client::{head, unchunked};
use crate::harness::{Endpoint, Options, Server};
use crate::shared::Shared;

const JSON: (&str, &str) = ("Content-Type", "application/json");
const EVENTS: (&str, &str) = ("Accept", "text/event-stream");
const NO_CACHE: (&str, &str) = ("Cache-Control", "no-cache");

/// The most memory that the server may use, whatever its clients do.
const MOST_MEMORY: usize = 256 << 20;

/// Prints NUL bytes on both streams. JSON needs six characters for each of them, and the answer contains each twice.
const LARGE: &str = "head -c 262144 /dev/zero; head -c 262144 /dev/zero >&2";

fn serve(containers: usize) -> Server {
    Server::start(Options { languages: &["bash"], containers, ..Options::default() })
}

fn program(code: &str) -> Value {
    json!({"language": "bash", "version": "*", "files": [{"content": code}]})
}

fn memory(server: &Server) -> usize {
    let status = fs::read_to_string(format!("/proc/{}/status", server.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() << 10
}

/// A client that reads its answer in small pieces.
struct SlowClient {
    stream: TcpStream,
    bytes: Vec<u8>,
    ended: bool,
}

impl SlowClient {
    fn send(server: &Endpoint, path: &str, headers: &[(&str, &str)], body: &Value) -> SlowClient {
        let body = body.to_string();
        let head = head("POST", path, &[headers, &[JSON]].concat(), body.len());
        let mut stream = TcpStream::connect(server.address).unwrap();
        stream.write_all((head + &body).as_bytes()).unwrap();
        stream.set_nonblocking(true).unwrap();
        SlowClient { stream, bytes: Vec::new(), ended: false }
    }

    /// Reads at most `most` of the bytes that have arrived.
    fn read_some(&mut self, most: usize) {
        let mut chunk = vec![0; most];
        let mut taken = 0;
        while taken < most && !self.ended {
            match self.stream.read(&mut chunk[taken..]) {
                Ok(0) => self.ended = true,
                Ok(length) => taken += length,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => panic!("disconnected after {} bytes: {error}", self.bytes.len()),
            }
        }
        self.bytes.extend_from_slice(&chunk[..taken]);
    }

    fn status(&self) -> Option<u16> {
        let line = self.bytes.strip_prefix(b"HTTP/1.1 ")?;
        std::str::from_utf8(line.get(..3)?).ok()?.parse().ok()
    }
}

/// Lets the clients read a little at a time. Checks that the server's memory stays bounded, and that it answers others.
fn read_slowly(server: &Server, clients: &mut [SlowClient], time: Duration) {
    let (began, mut most, mut longest) = (Instant::now(), 0, Duration::ZERO);
    while began.elapsed() < time {
        clients.iter_mut().for_each(|client| client.read_some(512));
        let asked = Instant::now();
        assert_eq!(server.get("/healthz").status, 200);
        longest = longest.max(asked.elapsed());
        most = most.max(memory(server));
        assert!(most < MOST_MEMORY, "{} MiB", most >> 20);
        std::thread::sleep(Duration::from_millis(50));
    }
    // Generous: other tests keep the machine busy.
    assert!(longest < Duration::from_secs(60), "{longest:?}");
    println!("{} clients: {} MiB at most, /healthz after {longest:?} at most", clients.len(), most >> 20);
}

#[test]
fn slow_readers_of_large_answers_use_bounded_memory() {
    let server = serve(2);
    let body = program(LARGE);
    let whole = server.request("POST", "/api/v2/execute", &[JSON], body.to_string().as_bytes());
    assert!(whole.body.len() > 6 << 20, "{}", whole.body.len());
    let mut clients: Vec<SlowClient> =
        (0..200).map(|_| SlowClient::send(&server, "/api/v2/execute", &[], &body)).collect();
    read_slowly(&server, &mut clients, Duration::from_secs(20));
    let with = |status| clients.iter().filter(|client| client.status() == Some(status)).count();
    assert!(with(200) >= 10 && with(200) + with(503) == 200, "{} and {}", with(200), with(503));
    let refused = clients.iter().find(|client| client.status() == Some(503)).unwrap();
    let text = String::from_utf8_lossy(&refused.bytes);
    assert!(text.to_lowercase().contains("retry-after: ") && text.contains("memory"), "{text}");
    drop(clients);
    let again = server.request("POST", "/api/v2/execute", &[JSON], body.to_string().as_bytes());
    assert_eq!((again.status, again.json()["run"].clone()), (200, whole.json()["run"].clone()));
    server.stop();
}

#[test]
fn slow_event_stream_clients_use_bounded_memory() {
    let server = serve(4);
    let body = program(LARGE);
    // 50 clients watch a run of their own, the others get the events of a cached one.
    server.request("POST", "/api/v2/execute", &[JSON], body.to_string().as_bytes());
    let watch =
        |n| SlowClient::send(&server, "/api/v2/execute", if n < 50 { &[EVENTS, NO_CACHE] } else { &[EVENTS] }, &body);
    let mut clients: Vec<SlowClient> = (0..250).map(watch).collect();
    read_slowly(&server, &mut clients, Duration::from_secs(20));
    drop(clients);
    let watched =
        server.begin_request("POST", "/api/v2/execute", &[JSON, EVENTS], body.to_string().as_bytes()).read_to_end();
    assert!(String::from_utf8_lossy(&watched).contains("event:result"), "{} bytes", watched.len());
    server.stop();
}

/// Parses the server-sent events of an answer.
fn events(answer: &[u8]) -> Vec<(String, Value)> {
    let text = String::from_utf8(unchunked(answer)).unwrap();
    let event = |event: &str| {
        let (kind, data) = event.strip_prefix("event:")?.split_once("\ndata:")?;
        Some((kind.to_owned(), serde_json::from_str(data).unwrap()))
    };
    text.split("\n\n").filter_map(event).collect()
}

#[test]
fn cached_runs_send_the_same_events_as_fresh_runs() {
    let server = Shared::start(&["bash"], "");
    let body = program("printf 'a\\0b'; sleep 0.2; printf 'c\\xff' >&2; head -c 300000 /dev/zero").to_string();
    let watch =
        || events(&server.begin_request("POST", "/api/v2/execute", &[JSON, EVENTS], body.as_bytes()).read_to_end());
    let printed = |events: &[(String, Value)], stream: &str| -> String {
        let data = events.iter().filter(|(kind, told)| kind == "data" && told["stream"] == stream);
        data.map(|(_, told)| told["data"].as_str().unwrap()).collect()
    };
    let (first, second) = (watch(), watch());
    for events in [&first, &second] {
        let (kind, result) = events.last().unwrap();
        assert_eq!(kind, "result");
        assert_eq!(printed(events, "stdout"), result["run"]["stdout"]);
        assert_eq!(printed(events, "stderr"), "c\u{fffd}");
    }
    assert_eq!(
        (&first.last().unwrap().1["cached"], &second.last().unwrap().1["cached"]),
        (&json!(false), &json!(true))
    );
    assert_eq!(first.last().unwrap().1["run"], second.last().unwrap().1["run"]);
}

#[test]
fn batch_results_are_bounded_in_their_json_form() {
    let server = serve(4);
    let mut body = program(LARGE);
    body["inputs"] = (0..100).map(|n| json!({"stdin": n.to_string()})).collect();
    let reply = server.request("POST", "/api/v2/batch", &[JSON], body.to_string().as_bytes());
    assert_eq!(reply.status, 200);
    assert!(reply.body.len() < 25 << 20, "{} bytes", reply.body.len());
    let answer = reply.json();
    for result in answer["results"].as_array().unwrap() {
        assert_eq!((&result["verdict"], &result["truncated"]), (&json!("ok"), &json!(true)), "{}", result["index"]);
        let run = &result["run"];
        assert_eq!((&run["truncated"], &run["stdout_bytes"]), (&json!(true), &json!(262_144)));
        assert!(run["stdout"].as_str().unwrap().len() > 5000);
    }
    // Output without escapes is not truncated by that bound.
    let mut body = program("head -c 40000 /dev/zero | tr '\\0' x");
    body["inputs"] = (0..100).map(|n| json!({"stdin": n.to_string()})).collect();
    let answer = server.request("POST", "/api/v2/batch", &[JSON], body.to_string().as_bytes()).json();
    for result in answer["results"].as_array().unwrap() {
        assert_eq!((result["run"]["stdout"].as_str().unwrap().len(), &result["truncated"]), (40_000, &json!(false)));
    }
    assert!(memory(&server) < MOST_MEMORY, "{} MiB", memory(&server) >> 20);
    server.stop();
}

/// Reads for longer than the TCP_USER_TIMEOUT that once disconnected such clients.
#[test]
fn slow_but_steady_readers_get_the_whole_answer() {
    let server = Shared::start(&["bash"], "");
    let mut client = SlowClient::send(&server, "/api/v2/execute", &[], &program(LARGE));
    for _ in 0..6 {
        std::thread::sleep(Duration::from_secs(8));
        client.read_some(60_000);
    }
    let deadline = Instant::now() + Duration::from_secs(60);
    while !client.ended && Instant::now() < deadline {
        client.read_some(1 << 20);
        std::thread::sleep(Duration::from_millis(5));
    }
    let start = client.bytes.windows(4).position(|window| window == b"\r\n\r\n").unwrap() + 4;
    let answer: Value = serde_json::from_slice(&client.bytes[start..]).expect("the whole answer");
    assert_eq!(answer["run"]["stdout"].as_str().unwrap().len(), 262_144);
}

/// Sends a WebSocket frame of this kind and announced length as a browser would, but only `sent` bytes of its payload.
fn frame(stream: &mut TcpStream, kind: u8, length: usize, sent: usize) {
    let mut bytes = vec![kind, 0x80 | 127];
    bytes.extend_from_slice(&(length as u64).to_be_bytes());
    // A mask of zeros leaves the payload as it is.
    bytes.extend_from_slice(&[0; 4]);
    bytes.resize(bytes.len() + sent, b' ');
    // An error is ignored: the server may have closed the connection.
    let _ = stream.write_all(&bytes);
}

#[test]
fn incomplete_websocket_messages_use_bounded_memory() {
    let server = serve(1);
    let before = memory(&server);
    let limit = 512 * 1024;
    let url = format!("ws://{}/api/v2/connect", server.address);
    let open = |_| {
        let stream = TcpStream::connect(server.address).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(1))).unwrap();
        let mut stream = tungstenite::client(&url, stream).unwrap().0.into_inner();
        // The first fragment of a text message, and an incomplete last one.
        frame(&mut stream, 0x01, limit - 64, limit - 64);
        frame(&mut stream, 0x80, limit - 64, limit - 65);
        stream
    };
    let mut most = 0;
    let sockets: Vec<TcpStream> = (0..250).map(open).inspect(|_| most = most.max(memory(&server))).collect();
    assert!(most < before + (128 << 20), "{} MiB, and {} before", most >> 20, before >> 20);
    drop(sockets);
    server.stop();
}

#[test]
fn batch_arguments_are_held_in_memory_once() {
    let server = serve(1);
    let before = memory(&server);
    let body = |n| {
        let args = vec![""; 32_000];
        json!({"language": "bash", "files": [{"content": format!("sleep 3 # {n}")}], "args": args,
            "inputs": vec![json!({}); 100]})
    };
    let clients: Vec<SlowClient> = (0..8).map(|n| SlowClient::send(&server, "/api/v2/batch", &[], &body(n))).collect();
    let mut most = 0;
    for _ in 0..100 {
        most = most.max(memory(&server));
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(most < before + (128 << 20), "{} MiB, and {} before", most >> 20, before >> 20);
    drop(clients);
    server.stop();
}
