//! Runs with live output: the WebSocket of Piston's API, and server-sent events.

use std::net::TcpStream;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};
use tungstenite::{Message, WebSocket};

use crate::client::{Pending, unchunked};
use crate::faults::{KillMethod, init_processes};
use crate::harness::{self, Endpoint, Options, PATIENCE, Server, eventually};
use crate::shared::Shared;

fn serve(config: &str) -> Server {
    Server::start(Options { languages: &["bash"], config, ..Options::default() })
}

fn shared(config: &str) -> Shared {
    Shared::start(&["bash"], config)
}

struct Socket(WebSocket<TcpStream>);

impl Socket {
    fn open(server: &Endpoint) -> Socket {
        let stream = TcpStream::connect(server.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        let (socket, _) = tungstenite::client(format!("ws://{}/api/v2/connect", server.address), stream).unwrap();
        Socket(socket)
    }

    /// Opens a socket and sends the `init` message.
    fn begin(server: &Endpoint, code: &str) -> Socket {
        let mut socket = Socket::open(server);
        socket.send(json!({"type": "init", "language": "bash", "version": "*", "files": [{"content": code}]}));
        let runtime = socket.receive().unwrap();
        assert_eq!(runtime, json!({"type": "runtime", "language": "bash", "version": "5.0.0"}));
        socket
    }

    fn send(&mut self, message: Value) {
        self.0.send(Message::text(message.to_string())).unwrap();
    }

    /// Receives the next message, or the code with which the server closes.
    fn receive(&mut self) -> Result<Value, u16> {
        loop {
            match self.0.read().unwrap() {
                Message::Text(text) => return Ok(serde_json::from_str(text.as_str()).unwrap()),
                Message::Close(frame) => return Err(frame.unwrap().code.into()),
                _ => {}
            }
        }
    }

    /// Receives all messages until the server closes, and the code with which it does.
    fn receive_all(&mut self) -> (Vec<Value>, u16) {
        let mut received = Vec::new();
        loop {
            match self.receive() {
                Ok(message) => received.push(message),
                Err(code) => return (received, code),
            }
        }
    }
}

#[test]
fn websocket_from_a_disallowed_origin_returns_403() {
    for (config, foreign) in [("cors_origins = []", 403), ("cors_origins = [\"https://one.example\"]", 403), ("", 101)]
    {
        let server = shared(config);
        let status = |origin: &str| {
            let request = format!(
                "GET /api/v2/connect HTTP/1.1\r\nHost: {}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
                 Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nOrigin: {origin}\r\n\r\n",
                server.address
            );
            Pending::send(server.address, request.as_bytes()).reply().status
        };
        assert_eq!(status("https://other.example"), foreign, "{config}");
        assert_eq!(status(&format!("http://{}", server.address)), 101, "{config}");
    }
}

/// The output on one stream.
fn output(received: &[Value], stream: &str) -> String {
    let is = |message: &&Value| message["type"] == "data" && message["stream"] == stream;
    received.iter().filter(is).map(|message| message["data"].as_str().unwrap()).collect()
}

#[test]
fn websocket_exchanges_input_and_output_with_a_program() {
    let server = shared("");
    let mut socket = Socket::begin(&server, "echo ready; read name; echo hello $name; echo wrong >&2; cat; exit 3");
    let (mut received, mut typed) = (Vec::new(), false);
    let code = loop {
        match socket.receive() {
            Ok(message) => received.push(message),
            Err(code) => break code,
        }
        // Input is sent only after the first output has arrived, so output must come while the program runs.
        if !typed && output(&received, "stdout") == "ready\n" {
            typed = true;
            socket.send(json!({"type": "unknown message type"}));
            socket.send(json!({"type": "data", "stream": "stdin", "data": "world\n"}));
            socket.send(json!({"type": "data", "stream": "stdin", "data": "rest é\n"}));
            socket.send(json!({"type": "eof"}));
        }
    };
    assert_eq!(code, 4999);
    assert!(received.contains(&json!({"type": "stage", "stage": "run"})), "{received:?}");
    assert_eq!(output(&received, "stdout"), "ready\nhello world\nrest é\n");
    assert_eq!(output(&received, "stderr"), "wrong\n");
    let exit = received.last().unwrap();
    assert_eq!((&exit["type"], &exit["stage"], &exit["code"]), (&json!("exit"), &json!("run"), &json!(3)), "{exit}");
    assert_eq!((&exit["signal"], &exit["verdict"]), (&json!(null), &json!("runtime_error")));
}

#[test]
fn websocket_forwards_signals_to_the_program() {
    let server = shared("");
    let mut socket = Socket::begin(&server, "trap 'echo caught; exit 5' USR1; echo ready; while :; do sleep 0.1; done");
    while socket.receive().unwrap()["data"] != "ready\n" {}
    socket.send(json!({"type": "signal", "signal": "SIGUSR1"}));
    let (received, code) = socket.receive_all();
    assert_eq!((output(&received, "stdout").as_str(), code), ("caught\n", 4999));
    assert_eq!(received.last().unwrap()["code"], 5);

    let mut socket = Socket::begin(&server, "echo ready; exec sleep 100");
    while socket.receive().unwrap()["data"] != "ready\n" {}
    socket.send(json!({"type": "signal", "signal": "SIGKILL"}));
    let (received, code) = socket.receive_all();
    assert_eq!((&received.last().unwrap()["signal"], code), (&json!("SIGKILL"), 4999));
}

#[test]
fn flood_of_signals_does_not_fail_the_run() {
    let server = serve("containers = 1");
    let mut socket = Socket::begin(&server, "echo ready; read line; echo $line");
    while socket.receive().unwrap()["data"] != "ready\n" {}
    // A stopped init reads no messages, like one that gets no CPU time.
    let inits = init_processes(&server);
    let signal = |signal| inits.iter().for_each(|init| kill(*init, signal).unwrap());
    signal(Signal::SIGSTOP);
    for _ in 0..20_000 {
        socket.send(json!({"type": "signal", "signal": "SIGCONT"}));
    }
    socket.send(json!({"type": "data", "stream": "stdin", "data": "heard\n"}));
    let next = socket.receive();
    signal(Signal::SIGCONT);
    assert_eq!(next.unwrap()["data"], "heard\n");
    assert_eq!(socket.receive_all().1, 4999);
    server.stop();
}

#[test]
fn websocket_protocol_errors_close_with_piston_codes() {
    let server = shared("");
    let closed = |messages: &[Value]| {
        let mut socket = Socket::open(&server);
        messages.iter().for_each(|message| socket.send(message.clone()));
        let (received, code) = socket.receive_all();
        (received.last().map(|message| message["type"].clone()), code)
    };
    let init = json!({"type": "init", "language": "bash", "version": "*", "files": [{"content": "cat"}]});
    let data = |stream: &str| json!({"type": "data", "stream": stream, "data": "x"});
    assert_eq!(closed(&[init.clone(), init.clone()]).1, 4000);
    assert_eq!(closed(&[]), (None, 4001));
    assert_eq!(closed(&[json!("no message")]), (Some(json!("error")), 4002));
    let unknown = json!({"type": "init", "language": "cobol", "version": "*", "files": [{"content": ""}]});
    assert_eq!(closed(&[unknown]), (Some(json!("error")), 4002));
    assert_eq!(closed(&[data("stdin")]).1, 4003);
    assert_eq!(closed(&[json!({"type": "signal", "signal": "SIGINT"})]).1, 4003);
    assert_eq!(closed(&[init.clone(), data("stdout")]).1, 4004);
    assert_eq!(closed(&[init, json!({"type": "signal", "signal": "SIGNOTHING"})]).1, 4005);
    let reply = server.get("/api/v2/connect");
    assert_eq!(reply.status, 400);
    assert!(reply.message().contains("WebSocket"));
}

#[test]
fn websocket_output_has_the_usual_limits() {
    let server = shared("limits = { output = \"1KiB\", output_total = \"64KiB\" }");
    let mut socket = Socket::begin(&server, "while :; do echo 0123456789; done");
    let (received, code) = socket.receive_all();
    assert_eq!((output(&received, "stdout").len(), code), (1024, 4999));
    let exit = received.last().unwrap();
    assert_eq!((&exit["status"], &exit["verdict"]), (&json!("OL"), &json!("output_limit")), "{exit}");
}

#[test]
fn websocket_disconnect_frees_the_container() {
    let server = serve("containers = 1\nlimits = { run_time = \"60s\" }");
    let mark = harness::marked_seconds(50);
    let socket = Socket::begin(&server, &format!("sleep {mark}"));
    harness::wait_running(&mark);
    drop(socket);
    harness::wait_gone(&mark);
    assert_eq!(server.run("echo next").run_output, "next\n");
    // A shutdown ends an interactive run, too.
    let mut socket = Socket::begin(&server, "sleep 50");
    while socket.receive().unwrap()["type"] != "stage" {}
    server.stop();
}

#[test]
fn open_websockets_count_as_connections() {
    // Half of the descriptors are for connections.
    let options = Options { languages: &["bash"], containers: 1, descriptors: Some(300), ..Options::default() };
    let server = Server::start(options);
    let (sockets, late) = eventually("150 sockets are open at once", || {
        let began = Instant::now();
        let sockets: Vec<Socket> = (0..150).map(|_| Socket::open(&server)).collect();
        let late = server.begin_request("GET", "/healthz", &[], b"");
        std::thread::sleep(Duration::from_millis(500));
        let was_answered = late.has_begun();
        // The server closes idle sockets after a while; try again if that may have happened.
        if began.elapsed() > Duration::from_secs(5) {
            return None;
        }
        assert!(!was_answered, "a request was served beside 150 sockets");
        Some((sockets, late))
    });
    drop(sockets);
    assert_eq!(late.reply().status, 200);
    server.stop();
}

#[test]
fn one_byte_writes_are_merged_into_fewer_events() {
    let server = shared("limits = { run_time = \"60s\", run_cpu_time = \"60s\" }");
    let trickle = "n=0; while [ $n -lt 60000 ]; do printf o; printf e >&2; n=$((n + 1)); done";
    let body = json!({"language": "bash", "version": "*", "files": [{"content": trickle}]}).to_string();
    let headers = [("Content-Type", "application/json"), ("Accept", "text/event-stream")];
    let began = Instant::now();
    let answer = server.begin_request("POST", "/api/v2/execute", &headers, body.as_bytes()).read_to_end();
    let text = String::from_utf8(unchunked(&answer)).unwrap();
    let events = text.matches("event:data").count();
    // The first thousand events of each stream are sent at once, then at most one per millisecond.
    assert!(events as u128 <= 2 * (1001 + began.elapsed().as_millis()), "{events}");
    assert_eq!(text.matches("\"stdout\":\"").count(), 1);
    assert!(text.contains(&"o".repeat(60_000)) && text.contains(&"e".repeat(60_000)), "all output is kept");
}

#[test]
fn execute_sends_server_sent_events_on_request() {
    let server = serve("containers = 1");
    let watch = |path: &str, body: &Value| {
        let headers = [("Content-Type", "application/json"), ("Accept", "text/event-stream")];
        let pending = server.begin_request("POST", path, &headers, body.to_string().as_bytes());
        String::from_utf8(pending.read_to_end()).unwrap()
    };
    let body = json!({"language": "bash", "version": "*", "files": [{"content": "echo out; echo err >&2; exit 2"}]});
    let first = watch("/api/v2/execute", &body);
    assert!(first.contains("content-type: text/event-stream"), "{first}");
    for part in
        ["event:stage", "\"out\\n\"", "\"err\\n\"", "event:exit", "event:result", "\"verdict\":\"runtime_error\""]
    {
        assert!(first.contains(part), "{part} is not in {first}");
    }
    assert!(first.contains("\"cached\":false"), "{first}");
    let again = watch("/api/v2/execute", &body);
    assert!(again.contains("\"cached\":true") && again.contains("event:exit"), "{again}");
    let plain = watch("/coderunner", &json!({"code": "echo hello"}));
    assert!(plain.contains("{\"compileOutput\":\"\",\"runOutput\":\"hello\\n\",\"status\":1}"), "{plain}");

    // A second request waits for the only container and receives a `queued` event.
    let mark = harness::marked_seconds(20);
    let busy = server.begin(&format!("sleep {mark}"));
    harness::wait_running(&mark);
    let headers = [("Content-Type", "application/json"), ("Accept", "text/event-stream")];
    let body = json!({"code": "echo waited"}).to_string();
    let waiting = server.begin_request("POST", "/coderunner", &headers, body.as_bytes());
    eventually("the first event", || waiting.has_begun().then_some(()));
    std::thread::sleep(Duration::from_millis(500));
    drop(busy);
    let text = String::from_utf8(waiting.read_to_end()).unwrap();
    assert!(text.contains("event:queued") && text.contains("\"position\":0"), "{text}");
    assert!(text.contains("waited\\n"), "{text}");
    server.stop();
}

#[test]
fn failures_of_streamed_runs_are_logged_once_with_the_request_id() {
    let server = Server::start(Options {
        languages: &["bash"],
        containers: 1,
        config: "[limits]\nrun_time = \"60s\"",
        env: &[("CODERUNNER_LOG_FORMAT", "json")],
        ..Options::default()
    });
    let post = |path: &str, accept: &str, body: Value| {
        let headers = [("Content-Type", "application/json"), ("Accept", accept)];
        let pending = server.begin_request("POST", path, &headers, body.to_string().as_bytes());
        Box::new(move || String::from_utf8(pending.read_to_end()).unwrap())
    };
    let fails = |mark: &str, answer: Box<dyn FnOnce() -> String>| {
        harness::wait_running(mark);
        KillMethod::Inside.kill(&server);
        let answer = answer();
        let id = answer.split("under request id ").nth(1).unwrap_or_else(|| panic!("no error: {answer}"));
        let id: String = id.chars().take_while(char::is_ascii_alphanumeric).collect();
        let id = format!("\"id\":\"{id}\"");
        server.wait_log(&["a request failed", &id]);
        let log = server.log();
        let errors: Vec<&str> = log.lines().filter(|line| line.contains("ERROR") && line.contains(&id)).collect();
        assert_eq!(errors.len(), 1, "once: {errors:#?}");
    };
    let mark = harness::marked_seconds(50);
    fails(&mark, post("/coderunner", "text/event-stream", json!({"code": format!("sleep {mark}")})));

    let mark = harness::marked_seconds(50);
    let files = json!([{"content": "sleep $1"}]);
    let body =
        json!({"language": "bash", "version": "*", "files": files, "inputs": [{"args": ["0"]}, {"args": [mark]}]});
    fails(&mark, post("/api/v2/batch", "application/x-ndjson", body));

    let mark = harness::marked_seconds(50);
    let mut socket = Socket::begin(&server, &format!("sleep {mark}"));
    fails(&mark, Box::new(move || json!(socket.receive_all().0).to_string()));
    server.stop();
}
