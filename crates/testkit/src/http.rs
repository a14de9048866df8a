//! HTTP/1.1 by hand, for requests that a well-behaved client would never send.
//!
//! [`Client`] speaks to the product; [`read_head`] and [`read_body`] also serve the fake for
//! Slack.

use serde_json::{Value, json};
use socket2::{Domain, Socket, Type};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// An answer that takes longer is a failure of the product, not slowness.
const READ_TIMEOUT: Duration = Duration::from_secs(10);

/// Names in lower case and values, in the order of arrival.
pub type Headers = Vec<(String, String)>;

/// One keep-alive connection.
pub struct Client {
    address: SocketAddr,
    reader: BufReader<TcpStream>,
}

#[derive(Debug, Clone)]
pub struct Response {
    pub status: u16,
    pub headers: Headers,
    pub body: Vec<u8>,
}

impl Response {
    /// The body as JSON; panics with the whole response when it is something else.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| {
            panic!(
                "not JSON ({error}): {self:?}, {}",
                String::from_utf8_lossy(&self.body)
            )
        })
    }

    /// The first header of that lower-case name.
    pub fn header(&self, name: &str) -> Option<&str> {
        header(&self.headers, name)
    }
}

impl Client {
    #[track_caller]
    pub fn connect(address: SocketAddr) -> Client {
        let stream = TcpStream::connect(address)
            .unwrap_or_else(|error| panic!("connect to {address}: {error}"));
        stream
            .set_read_timeout(Some(READ_TIMEOUT))
            .expect("the time-out is not zero");
        stream
            .set_nodelay(true)
            .expect("a fresh socket takes options");
        Client {
            address,
            reader: BufReader::new(stream),
        }
    }

    /// Sends the bytes as they are. An error is for the test to judge: a server may close on bad
    /// input.
    pub fn send_raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.reader.get_mut().write_all(bytes)
    }

    /// The next final response; interim ones (1xx) are skipped.
    #[track_caller]
    pub fn read_response(&mut self) -> Response {
        loop {
            let mut response = self.read_interim();
            if response.status >= 200 {
                if !matches!(response.status, 204 | 304) {
                    response.body = self.read_response_body(&response);
                }
                return response;
            }
        }
    }

    /// The next status line and headers, without a body: for a 1xx, and for the answer to a HEAD.
    #[track_caller]
    pub fn read_interim(&mut self) -> Response {
        let head =
            read_head(&mut self.reader).unwrap_or_else(|error| panic!("read a response: {error}"));
        let (line, headers) = head.expect("a response, but the server closed the connection");
        let status = line
            .split(' ')
            .nth(1)
            .and_then(|status| status.parse().ok());
        let status = status.unwrap_or_else(|| panic!("not a status line: {line:?}"));
        Response {
            status,
            headers,
            body: Vec::new(),
        }
    }

    #[track_caller]
    fn read_response_body(&mut self, response: &Response) -> Vec<u8> {
        let framed = response
            .header("content-length")
            .or(response.header("transfer-encoding"));
        let body = if framed.is_some() {
            read_body(&mut self.reader, &response.headers)
        } else {
            let mut body = Vec::new();
            self.reader.read_to_end(&mut body).map(|_| body)
        };
        body.unwrap_or_else(|error| panic!("read the body of {response:?}: {error}"))
    }

    /// Whether the server has closed the connection: waits for that, or for a byte, or for the
    /// time-out.
    pub fn closed_by_server(&mut self) -> bool {
        loop {
            match self.reader.fill_buf() {
                Ok(bytes) => return bytes.is_empty(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return error.kind() == io::ErrorKind::ConnectionReset,
            }
        }
    }

    #[track_caller]
    pub fn get(&mut self, path: &str) -> Response {
        self.send(&format!(
            "GET {path} HTTP/1.1\r\nHost: {}\r\n\r\n",
            self.address
        ))
    }

    #[track_caller]
    pub fn post_json(&mut self, path: &str, body: &Value) -> Response {
        let body = if body.is_null() {
            String::new()
        } else {
            body.to_string()
        };
        self.send(&format!(
            "POST {path} HTTP/1.1\r\nHost: {}\r\nContent-Type: \
                application/json\r\nContent-Length: {}\r\n\r\n{body}",
            self.address,
            body.len(),
        ))
    }

    #[track_caller]
    fn send(&mut self, request: &str) -> Response {
        if let Err(error) = self.send_raw(request.as_bytes()) {
            panic!("send to {}: {error}", self.address);
        }
        self.read_response()
    }
}

/// The first line and the headers (names in lower case) of a message; none when the peer has
/// closed.
pub fn read_head(reader: &mut impl BufRead) -> io::Result<Option<(String, Headers)>> {
    let first = match read_line(reader) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        first => first?,
    };
    let mut headers = Vec::new();
    loop {
        let line = read_line(reader)?;
        if line.is_empty() {
            return Ok(Some((first, headers)));
        }
        let (name, value) = line.split_once(':').ok_or_else(|| malformed(&line))?;
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
}

/// The body that the headers announce: chunked, or of a stated length, or none.
pub fn read_body(reader: &mut impl BufRead, headers: &[(String, String)]) -> io::Result<Vec<u8>> {
    if header(headers, "transfer-encoding")
        .is_some_and(|coding| coding.eq_ignore_ascii_case("chunked"))
    {
        return read_chunks(reader);
    }
    let length = header(headers, "content-length").unwrap_or("0");
    let mut body = vec![0; length.parse().map_err(|_| malformed(length))?];
    reader.read_exact(&mut body)?;
    Ok(body)
}

fn read_chunks(reader: &mut impl BufRead) -> io::Result<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let line = read_line(reader)?;
        let size = line.split(';').next().unwrap_or_default().trim();
        let size = usize::from_str_radix(size, 16).map_err(|_| malformed(&line))?;
        if size == 0 {
            // Trailers, up to the empty line.
            while !read_line(reader)?.is_empty() {}
            return Ok(body);
        }
        let start = body.len();
        body.resize(start + size, 0);
        reader.read_exact(&mut body[start..])?;
        read_line(reader)?;
    }
}

/// Reads what comes next. A socket with a time-out is also interrupted where a process is stopped
/// and continues, or frozen (<https://man7.org/linux/man-pages/man7/signal.7.html>): that is no
/// answer.
pub fn read_on(reader: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match reader.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            read => return read,
        }
    }
}

fn read_line(reader: &mut impl BufRead) -> io::Result<String> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    line.truncate(line.trim_end_matches(['\r', '\n']).len());
    Ok(line)
}

fn header<'a>(headers: &'a [(String, String)], name: &str) -> Option<&'a str> {
    let found = headers.iter().find(|(candidate, _)| candidate == name)?;
    Some(&found.1)
}

fn malformed(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("malformed: {text:?}"))
}

/// Pays reservations. Returns the payments' ids.
#[track_caller]
pub fn pay(
    client: &mut Client,
    user: i64,
    reservations: impl IntoIterator<Item = i64>,
) -> Vec<i64> {
    let reservations: Vec<_> = reservations
        .into_iter()
        .map(|id| json!({"reservation_id": id, "seat_price": 5}))
        .collect();
    let response = client.post_json(
        "/payments",
        &json!({"user_id": user, "reservations": reservations}),
    );
    assert_eq!(response.status, 201);
    response.json()["payments"]
        .as_array()
        .expect("a list of payments")
        .iter()
        .map(|payment| payment["id"].as_i64().expect("an id"))
        .collect()
}

/// A request with its body; the headers may name a host.
pub fn request(start: &str, headers: &str, body: &str) -> String {
    let host = if headers.contains("Host: ") {
        ""
    } else {
        "Host: localhost\r\n"
    };
    let length = body.len();
    format!(
        "{start} HTTP/1.1\r\n{host}{headers}Content-Type: application/json\r\nContent-Length: \
            {length}\r\n\r\n{body}"
    )
}

/// A payment of one reservation, with as many spaces as make it this number of bytes long.
pub fn payment(reservation: i64, bytes: usize) -> String {
    let body =
        json!({"user_id": 1, "reservations": [{"reservation_id": reservation, "seat_price": 5}]})
            .to_string();
    let spaces = " ".repeat(bytes.saturating_sub(body.len()));
    body + &spaces
}

/// One request through a Unix socket; `start` is its method and path.
#[track_caller]
pub fn ask_local(socket: &Path, start: &str, headers: &str, body: &str) -> Response {
    let mut stream = UnixStream::connect(socket).expect("a socket that listens");
    stream
        .set_read_timeout(Some(READ_TIMEOUT))
        .expect("the time-out is not zero");
    stream
        .write_all(request(start, headers, body).as_bytes())
        .expect("the server reads");
    let mut reader = BufReader::new(stream);
    let (line, headers) = read_head(&mut reader).expect("a head").expect("a response");
    let status = line.split(' ').nth(1).and_then(|word| word.parse().ok());
    Response {
        status: status.expect("a status"),
        body: read_body(&mut reader, &headers).expect("a body"),
        headers,
    }
}

/// A connection from this address of the loopback network.
pub fn connect_from(source: [u8; 4], address: SocketAddr) -> TcpStream {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    let source = SocketAddr::from((source, 0));
    socket.bind(&source.into()).expect("a loopback address");
    socket.connect(&address.into()).expect("the server listens");
    socket.into()
}
