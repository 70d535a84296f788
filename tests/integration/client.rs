//! A small HTTP/1.1 client. Each request has a connection of its own, which a test can close or hold at will:
//! for the server that is what a client is.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::Value;

/// How long an answer may take. Longer than whatever a test waits for: when it ends, something is stuck.
const ANSWER_TIME: Duration = Duration::from_secs(120);

/// The answer of `POST /coderunner`: exactly these fields, or it is none.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Answer {
    pub status: u8,
    pub compile_output: String,
    pub run_output: String,
}

impl Answer {
    /// The answer to a program that compiled in silence.
    pub fn ran(output: &str) -> Answer {
        Answer { status: 1, compile_output: String::new(), run_output: output.to_owned() }
    }
}

/// Any HTTP answer.
#[derive(Debug, Clone)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Reply {
    /// A header's value, whatever the case of its name.
    pub fn header(&self, name: &str) -> Option<&str> {
        let is = |(key, _): &&(String, String)| key.eq_ignore_ascii_case(name);
        self.headers.iter().find(is).map(|(_, value)| value.as_str())
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("no JSON ({error}): {self:?}"))
    }

    /// The outcome of a run; panics where there is none.
    pub fn answer(&self) -> Answer {
        assert_eq!(self.status, 200, "no outcome: {}", String::from_utf8_lossy(&self.body));
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("no answer ({error}): {self:?}"))
    }

    /// The text of an error; panics where the body is anything but `{"message": "…"}`.
    pub fn message(&self) -> String {
        let body = self.json();
        let fields = body.as_object().unwrap_or_else(|| panic!("no object: {body}"));
        assert_eq!(fields.len(), 1, "more than a message: {body}");
        body["message"].as_str().unwrap_or_else(|| panic!("no message: {body}")).to_owned()
    }
}

/// A request under way. Dropping it closes the connection: the client has left.
pub struct Pending {
    stream: TcpStream,
    deadline: Instant,
    /// To HEAD there is no body, whatever the headers tell of its length.
    bodiless: bool,
}

/// The head of a request that carries `length` bytes of body, and asks for the connection to be closed.
pub fn head(method: &str, path: &str, headers: &[(&str, &str)], length: usize) -> String {
    let mut head = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n");
    if length > 0 {
        head += &format!("Content-Length: {length}\r\n");
    }
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    head + "\r\n"
}

impl Pending {
    /// Connects and sends these bytes as they are.
    pub fn send(address: SocketAddr, bytes: &[u8]) -> Pending {
        let stream = TcpStream::connect(address).unwrap_or_else(|error| panic!("cannot connect to {address}: {error}"));
        stream.set_write_timeout(Some(ANSWER_TIME)).unwrap();
        let mut pending =
            Pending { stream, deadline: Instant::now() + ANSWER_TIME, bodiless: bytes.starts_with(b"HEAD ") };
        // A server that answers early may close before it has read all: its answer tells, not this.
        let _ = pending.stream.write_all(bytes);
        pending
    }

    /// Sends more of the request.
    pub fn send_more(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes);
    }

    /// Says that nothing more will be sent, and goes on reading.
    pub fn end_of_request(&self) {
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    /// Waits for the whole answer.
    pub fn reply(self) -> Reply {
        self.try_reply().unwrap_or_else(|error| panic!("no answer: {error}"))
    }

    /// Waits for the whole answer; an error where the connection ended without one.
    pub fn try_reply(mut self) -> std::io::Result<Reply> {
        let mut bytes = Vec::new();
        loop {
            if let Some(reply) = parse(&bytes, self.bodiless) {
                return Ok(reply);
            }
            if self.read(&mut bytes)? == 0 {
                return Err(std::io::Error::new(ErrorKind::UnexpectedEof, "closed without a whole answer"));
            }
        }
    }

    /// Everything that arrives until the server closes the connection.
    pub fn all(mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        while self.read(&mut bytes).unwrap_or_else(|error| panic!("no end of the answer: {error}")) > 0 {}
        bytes
    }

    fn read(&mut self, bytes: &mut Vec<u8>) -> std::io::Result<usize> {
        let mut chunk = [0; 64 * 1024];
        let left = self.deadline.saturating_duration_since(Instant::now());
        self.stream.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        let length = self.stream.read(&mut chunk)?;
        bytes.extend_from_slice(&chunk[..length]);
        Ok(length)
    }

    /// Whether the answer, or the end of the connection, has begun to arrive.
    pub fn has_begun(&self) -> bool {
        self.stream.set_nonblocking(true).unwrap();
        let begun = match self.stream.peek(&mut [0]) {
            Err(error) => error.kind() != ErrorKind::WouldBlock,
            Ok(_) => true,
        };
        self.stream.set_nonblocking(false).unwrap();
        begun
    }
}

/// The body of an answer that came in chunks, without their framing.
pub fn unchunked(answer: &[u8]) -> Vec<u8> {
    let end = |bytes: &[u8], of: &[u8]| bytes.windows(of.len()).position(|window| window == of).map(|at| at + of.len());
    let mut rest = &answer[end(answer, b"\r\n\r\n").expect("a head")..];
    let mut body = Vec::new();
    while let Some(start) = end(rest, b"\r\n") {
        let size = std::str::from_utf8(&rest[..start - 2]).unwrap();
        let size = usize::from_str_radix(size, 16).expect("the size of a chunk");
        body.extend_from_slice(&rest[start..start + size]);
        rest = &rest[(start + size + 2).min(rest.len())..];
    }
    body
}

/// The reply, once all of it has arrived. The server frames all its answers by their length.
fn parse(bytes: &[u8], bodiless: bool) -> Option<Reply> {
    let mut headers = [httparse::EMPTY_HEADER; 32];
    let mut response = httparse::Response::new(&mut headers);
    let httparse::Status::Complete(start) = response.parse(bytes).expect("no HTTP") else {
        return None;
    };
    let mut reply = Reply {
        status: response.code?,
        headers: response
            .headers
            .iter()
            .map(|header| (header.name.to_owned(), String::from_utf8_lossy(header.value).into_owned()))
            .collect(),
        body: Vec::new(),
    };
    let length: usize = reply.header("content-length").map_or(0, |value| value.parse().unwrap());
    let body = &bytes[start..];
    (bodiless || body.len() >= length).then(|| {
        reply.body = body.to_vec();
        reply
    })
}
