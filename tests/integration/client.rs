//! A small HTTP/1.1 client. Each request has its own connection, which a test can close or keep open at will, so that
//! each request looks like a client of its own to the server.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::Value;

/// Timeout of an answer. Longer than anything that a test waits for: when it expires, something hangs.
const ANSWER_TIME: Duration = Duration::from_secs(120);

/// The answer of `POST /coderunner`. Missing or additional fields are an error.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Answer {
    pub status: u8,
    pub compile_output: String,
    pub run_output: String,
}

impl Answer {
    /// The answer to a program that compiled without messages.
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
    /// The value of a header; the case of its name does not matter.
    pub fn header(&self, name: &str) -> Option<&str> {
        let is = |(key, _): &&(String, String)| key.eq_ignore_ascii_case(name);
        self.headers.iter().find(is).map(|(_, value)| value.as_str())
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("no JSON ({error}): {self:?}"))
    }

    /// The outcome of a run; panics if the status is not 200.
    pub fn answer(&self) -> Answer {
        assert_eq!(self.status, 200, "{}", String::from_utf8_lossy(&self.body));
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("no answer ({error}): {self:?}"))
    }

    /// The text of an error; panics unless the body is exactly `{"message": "…"}`.
    pub fn message(&self) -> String {
        let body = self.json();
        let fields = body.as_object().unwrap_or_else(|| panic!("no object: {body}"));
        assert_eq!(fields.len(), 1, "more than a message: {body}");
        body["message"].as_str().unwrap_or_else(|| panic!("no message: {body}")).to_owned()
    }
}

/// A request under way. Dropping it closes the connection, as a client does that disconnects.
pub struct Pending {
    stream: TcpStream,
    deadline: Instant,
    /// The answer to HEAD has no body, although it has a `Content-Length`.
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
    /// Connects and sends these bytes unchanged.
    pub fn send(address: SocketAddr, bytes: &[u8]) -> Pending {
        let stream = TcpStream::connect(address).unwrap_or_else(|error| panic!("cannot connect to {address}: {error}"));
        stream.set_write_timeout(Some(ANSWER_TIME)).unwrap();
        let mut pending =
            Pending { stream, deadline: Instant::now() + ANSWER_TIME, bodiless: bytes.starts_with(b"HEAD ") };
        // A server that answers early may close the connection before it has read everything. Only its answer counts.
        let _ = pending.stream.write_all(bytes);
        pending
    }

    /// Sends more of the request.
    pub fn send_more(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes);
    }

    /// Closes the sending direction; the answer can still be read.
    pub fn end_of_request(&self) {
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    /// Waits for the whole answer.
    pub fn reply(self) -> Reply {
        self.try_reply().unwrap_or_else(|error| panic!("no answer: {error}"))
    }

    /// Waits for the whole answer; fails if the connection ends without one.
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

    /// Reads until the server closes the connection.
    pub fn read_to_end(mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        while self.read(&mut bytes).unwrap_or_else(|error| panic!("the answer does not end: {error}")) > 0 {}
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

/// Decodes the body of an answer with `Transfer-Encoding: chunked`.
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

/// Parses a reply once all of it has arrived. Such answers have a `Content-Length`.
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
