//! The load generator: keep-alive connections from one thread. In a closed loop each sends its next
//! request when it has its answer. In an open loop requests are due at fixed times, whatever the
//! answers do.

use std::cell::{Cell, RefCell};
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::rc::Rc;
use std::thread;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::percentile;

/// The outcome of a load.
#[derive(Debug, Default)]
pub struct Outcome {
    pub elapsed: Duration,
    /// Answered with the status that was hoped for.
    pub good: u64,
    /// Answered with another.
    pub other: u64,
    latencies_ms: Vec<f64>,
    other_ms: Vec<f64>,
}

impl Outcome {
    pub fn rate(&self) -> f64 {
        self.good as f64 / self.elapsed.as_secs_f64()
    }

    /// Of the good answers, in milliseconds.
    pub fn percentile(&mut self, percent: f64) -> f64 {
        percentile(&mut self.latencies_ms, percent)
    }

    /// Of the other answers, in milliseconds.
    pub fn other_percentile(&mut self, percent: f64) -> f64 {
        percentile(&mut self.other_ms, percent)
    }

    fn note(&mut self, status: u16, hoped: u16, latency: Duration) {
        let latencies = if status == hoped {
            self.good += 1;
            &mut self.latencies_ms
        } else {
            self.other += 1;
            &mut self.other_ms
        };
        latencies.push(latency.as_secs_f64() * 1000.0);
    }
}

/// A payment of `count` new reservations, the first of which is `first`.
pub fn payment(out: &mut Vec<u8>, user: u64, first: u64, count: u64) {
    let mut body = format!("{{\"user_id\":{user},\"reservations\":[");
    for id in first..first + count {
        let comma = if id == first { "" } else { "," };
        let _ = write!(
            body,
            "{comma}{{\"reservation_id\":{id},\"seat_price\":150000}}"
        );
    }
    body += "]}";
    let head = "POST /payments HTTP/1.1\r\nHost: localhost\r\nContent-Type: \
        application/json\r\nContent-Length: ";
    out.extend_from_slice(format!("{head}{}\r\n\r\n{body}", body.len()).as_bytes());
}

/// Closed loop: as much as `connections` can, for `warm_up` unmeasured and `span` measured.
/// `request` writes the request with the given number.
pub fn closed(
    address: SocketAddr,
    connections: usize,
    (warm_up, span): (Duration, Duration),
    hoped: u16,
    request: impl Fn(&mut Vec<u8>, u64) + 'static,
) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let local = tokio::task::LocalSet::new();
    let outcome = Rc::new(RefCell::new(Outcome::default()));
    let next = Rc::new(Cell::new(0_u64));
    let request = Rc::new(request);
    local.block_on(&runtime, async {
        let start = Instant::now() + warm_up;
        let end = start + span;
        let clients: Vec<_> = (0..connections)
            .map(|_| {
                let (outcome, next, request) =
                    (Rc::clone(&outcome), Rc::clone(&next), Rc::clone(&request));
                tokio::task::spawn_local(async move {
                    let mut connection = Connection::open(address).await;
                    let mut bytes = Vec::new();
                    loop {
                        bytes.clear();
                        request(&mut bytes, next.replace(next.get() + 1));
                        let sent = Instant::now();
                        let status = connection.exchange(&bytes).await;
                        let now = Instant::now();
                        if now >= end {
                            return;
                        }
                        if now >= start {
                            outcome.borrow_mut().note(status, hoped, now - sent);
                        }
                    }
                })
            })
            .collect();
        for client in clients {
            client.await.expect("a client does not panic");
        }
    });
    let mut outcome = outcome.take();
    outcome.elapsed = span;
    outcome
}

/// Open loop: `rate` requests a second over `connections`, each latency counted from when the
/// request was due.
pub fn open(
    address: SocketAddr,
    connections: usize,
    rate: f64,
    span: Duration,
    request: impl Fn(&mut Vec<u8>, u64) + Send + Clone + 'static,
) -> Outcome {
    let start = Instant::now() + Duration::from_millis(50);
    let total = (rate * span.as_secs_f64()) as u64;
    let clients: Vec<_> = (0..connections as u64)
        .map(|client| {
            let request = request.clone();
            thread::spawn(move || {
                let mut outcome = Outcome::default();
                let mut connection = Blocking::open(address);
                let mut bytes = Vec::new();
                for number in (client..total).step_by(connections) {
                    let due = start + Duration::from_secs_f64(number as f64 / rate);
                    thread::sleep(due.saturating_duration_since(Instant::now()));
                    bytes.clear();
                    request(&mut bytes, number);
                    let status = connection.exchange(&bytes);
                    outcome.note(status, 201, due.elapsed());
                }
                outcome
            })
        })
        .collect();
    let mut all = Outcome::default();
    for client in clients {
        let outcome = client.join().expect("a client does not panic");
        all.good += outcome.good;
        all.other += outcome.other;
        all.latencies_ms.extend(outcome.latencies_ms);
    }
    all.elapsed = start.elapsed();
    all
}

/// From when a latency is counted.
#[derive(Debug, Clone, Copy)]
pub enum Since {
    /// When the request was due.
    Due,
    /// When it was sent: for a rate that the client itself cannot keep up.
    Sent,
}

/// Open loop from one thread: `rate` requests a second over many connections. Cheaper than
/// [`open`], but the timer has steps of a millisecond.
pub fn paced(
    address: SocketAddr,
    connections: u64,
    rate: f64,
    (span, since): (Duration, Since),
    request: impl Fn(&mut Vec<u8>, u64) + 'static,
) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let local = tokio::task::LocalSet::new();
    let outcome = Rc::new(RefCell::new(Outcome::default()));
    let request = Rc::new(request);
    let total = (rate * span.as_secs_f64()) as u64;
    let start = Instant::now() + Duration::from_millis(50);
    local.block_on(&runtime, async {
        let clients: Vec<_> = (0..connections)
            .map(|client| {
                let outcome = Rc::clone(&outcome);
                let request = Rc::clone(&request);
                tokio::task::spawn_local(async move {
                    let mut connection = Connection::open(address).await;
                    let mut bytes = Vec::new();
                    for number in (client..total).step_by(connections as usize) {
                        let due = start + Duration::from_secs_f64(number as f64 / rate);
                        tokio::time::sleep_until(due.into()).await;
                        bytes.clear();
                        request(&mut bytes, number);
                        let sent = Instant::now();
                        let status = connection.exchange(&bytes).await;
                        let start = match since {
                            Since::Due => due,
                            Since::Sent => sent,
                        };
                        outcome.borrow_mut().note(status, 201, start.elapsed());
                    }
                })
            })
            .collect();
        for client in clients {
            client.await.expect("a client does not panic");
        }
    });
    let mut outcome = outcome.take();
    outcome.elapsed = start.elapsed();
    outcome
}

/// The status of the whole answer at the front of the buffer, and where it ends.
fn whole_answer(bytes: &[u8]) -> Option<(u16, usize)> {
    let mut headers = [httparse::EMPTY_HEADER; 32];
    let mut response = httparse::Response::new(&mut headers);
    let head = match response.parse(bytes).expect("an answer is HTTP") {
        httparse::Status::Complete(head) => head,
        httparse::Status::Partial => return None,
    };
    let status = response.code.expect("a whole head has a status");
    let length = response.headers.iter().find_map(|header| {
        let is_length = header.name.eq_ignore_ascii_case("content-length");
        is_length.then(|| {
            std::str::from_utf8(header.value)
                .ok()?
                .parse::<usize>()
                .ok()
        })?
    });
    let end = head + length.expect("every answer has a Content-Length");
    (bytes.len() >= end).then_some((status, end))
}

struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Connection {
    async fn open(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address)
            .await
            .expect("the server accepts");
        stream.set_nodelay(true).expect("a socket takes options");
        Self {
            stream,
            buffer: Vec::with_capacity(4096),
        }
    }

    async fn exchange(&mut self, request: &[u8]) -> u16 {
        self.stream
            .write_all(request)
            .await
            .expect("the server reads");
        loop {
            if let Some((status, end)) = whole_answer(&self.buffer) {
                self.buffer.drain(..end);
                return status;
            }
            let count = self
                .stream
                .read_buf(&mut self.buffer)
                .await
                .expect("the server answers");
            assert!(count > 0, "the server closed the connection");
        }
    }
}

struct Blocking {
    stream: std::net::TcpStream,
    buffer: Vec<u8>,
}

impl Blocking {
    fn open(address: SocketAddr) -> Self {
        let stream = std::net::TcpStream::connect(address).expect("the server accepts");
        stream.set_nodelay(true).expect("a socket takes options");
        Self {
            stream,
            buffer: Vec::new(),
        }
    }

    fn exchange(&mut self, request: &[u8]) -> u16 {
        use std::io::{Read as _, Write as _};
        self.stream.write_all(request).expect("the server reads");
        let mut chunk = [0; 4096];
        loop {
            if let Some((status, end)) = whole_answer(&self.buffer) {
                self.buffer.drain(..end);
                return status;
            }
            let count = self.stream.read(&mut chunk).expect("the server answers");
            assert!(count > 0, "the server closed the connection");
            self.buffer.extend_from_slice(&chunk[..count]);
        }
    }
}
