//! A minimal HTTP client. Its own cost is part of what is measured.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail};

/// Timeout of a read or a write.
const TIMEOUT: Duration = Duration::from_secs(60);

/// A persistent connection for many requests, one at a time.
pub struct Connection {
    stream: TcpStream,
    received: Vec<u8>,
}

/// An answer of the server.
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The body.
    pub body: Vec<u8>,
}

impl Connection {
    /// Connects to a server.
    pub fn open(address: SocketAddr) -> Result<Connection> {
        let stream = TcpStream::connect(address).with_context(|| format!("cannot connect to {address}"))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        let received = Vec::new();
        Ok(Connection { stream, received })
    }

    /// Posts code and returns the answer, whatever its status.
    pub fn post(&mut self, code: &str) -> Result<Answer> {
        let body = serde_json::json!({ "code": code }).to_string();
        let request = format!(
            "POST /coderunner HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        );
        self.stream.write_all(request.as_bytes())?;
        self.answer()
    }

    fn answer(&mut self) -> Result<Answer> {
        self.received.clear();
        let (head, status, length) = loop {
            self.receive()?;
            let mut headers = [httparse::EMPTY_HEADER; 32];
            let mut response = httparse::Response::new(&mut headers);
            let httparse::Status::Complete(head) = response.parse(&self.received)? else {
                continue;
            };
            let is_length = |header: &&httparse::Header| header.name.eq_ignore_ascii_case("content-length");
            let header = response.headers.iter().find(is_length).context("an answer without a length")?;
            let length: usize = std::str::from_utf8(header.value)?.parse()?;
            break (head, response.code.unwrap_or_default(), length);
        };
        while self.received.len() < head + length {
            self.receive()?;
        }
        let body = self.received[head..].to_vec();
        Ok(Answer { status, body })
    }

    fn receive(&mut self) -> Result<()> {
        let mut part = [0; 4096];
        match self.stream.read(&mut part).context("the server does not answer")? {
            0 => bail!("the server closed the connection"),
            count => self.received.extend_from_slice(&part[..count]),
        }
        Ok(())
    }
}
