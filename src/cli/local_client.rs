//! A client of the local socket of a running payrelay: one request a connection.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use super::api::ApiResponse;

/// A payrelay that needs longer does not answer.
const TIMEOUT: Duration = Duration::from_secs(10);

/// A client of a running payrelay.
#[derive(Debug)]
pub(super) struct LocalClient {
    socket: PathBuf,
}

impl LocalClient {
    /// A client of this socket, if a process listens there.
    pub(super) fn connect(socket: &Path) -> io::Result<Self> {
        UnixStream::connect(socket)?;
        Ok(Self {
            socket: socket.to_owned(),
        })
    }

    pub(super) fn request(
        &self,
        method: &str,
        path: &str,
        body: Option<&Value>,
    ) -> io::Result<ApiResponse> {
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        let body = body.map(Value::to_string).unwrap_or_default();
        exchange_json(&mut stream, method, path, &body)
    }
}

/// Sends a request, and reads the response to the end of the connection.
pub(super) fn exchange_json(
    stream: &mut (impl Read + Write),
    method: &str,
    path: &str,
    body: &str,
) -> io::Result<ApiResponse> {
    // To a request of HTTP/1.0 the response has no chunks, and ends with the connection.
    let length = body.len();
    write!(
        stream,
        "{method} {path} HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\n\
            Content-Length: {length}\r\n\r\n{body}"
    )?;
    let mut response = Vec::new();
    stream.read_to_end(&mut response)?;
    parse_local_response(&response)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "this is no response"))
}

fn parse_local_response(response: &[u8]) -> Option<ApiResponse> {
    let text = std::str::from_utf8(response).ok()?;
    let (head, body) = text.split_once("\r\n\r\n")?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    Some(ApiResponse {
        status,
        body: serde_json::from_str(body).ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_local_response_has_a_status_and_a_body() {
        let response = parse_local_response(b"HTTP/1.0 404 Not Found\r\na: b\r\n\r\n{}").unwrap();
        assert_eq!(
            (response.status, response.body),
            (404, serde_json::json!({}))
        );
        assert!(parse_local_response(b"HTTP/1.0 200 OK\r\n\r\n{").is_none());
        assert!(parse_local_response(b"").is_none());
    }
}
