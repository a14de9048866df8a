//! Clients that pay until they are stopped, while payrelay is killed. Each repeats a request under
//! its key until it is answered.

use std::io::{self, BufReader, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use testkit::http::{read_body, read_head};
use testkit::let_time_pass;

/// A payment that was answered 201.
#[derive(Debug, Clone, Copy)]
pub struct Receipt {
    pub id: i64,
    pub reservation: i64,
    pub answered: Instant,
}

/// What the clients share.
#[derive(Default)]
struct Shared {
    /// Where payrelay listens at the moment.
    address: Mutex<Option<SocketAddr>>,
    finished: AtomicBool,
    reservations: AtomicI64,
    receipts: Mutex<Vec<Receipt>>,
    longest: Mutex<Duration>,
}

/// Clients in threads of their own.
pub struct Clients {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Clients {
    pub fn start(count: usize) -> Self {
        let shared = Arc::<Shared>::default();
        let start = |_| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || pay_until_finished(&shared))
        };
        let threads = (0..count).map(start).collect();
        Self { shared, threads }
    }

    /// Where payrelay listens from now on; `None` while it does not.
    pub fn set_address(&self, address: Option<SocketAddr>) {
        *self.shared.address.lock().unwrap() = address;
    }

    /// How many payments have been answered.
    pub fn answered(&self) -> usize {
        self.shared.receipts.lock().unwrap().len()
    }

    /// Stops them, also in the middle of a request. Returns the receipts in the order of their
    /// answers, and the longest request that no kill interrupted.
    pub fn stop(self) -> (Vec<Receipt>, Duration) {
        self.shared.finished.store(true, Relaxed);
        for thread in self.threads {
            thread.join().unwrap();
        }
        let receipts = self.shared.receipts.lock().unwrap().clone();
        let longest = *self.shared.longest.lock().unwrap();
        (receipts, longest)
    }
}

fn pay_until_finished(shared: &Shared) {
    let mut connection = None;
    while !shared.finished.load(Relaxed) {
        let reservation = shared.reservations.fetch_add(1, Relaxed) + 1;
        let body = json!({
            "user_id": reservation % 1000,
            "reservations": [{"reservation_id": reservation, "seat_price": 100}],
        });
        let body = body.to_string();
        let request = format!(
            "POST /payments HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n\
             Idempotency-Key: \"release-{reservation}\"\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        while !shared.finished.load(Relaxed) {
            let sent = Instant::now();
            if let Ok(body) = exchange(shared, &mut connection, &request) {
                record_receipt(shared, reservation, sent, &body);
                break;
            }
            connection = None;
            let_time_pass(Duration::from_millis(2));
        }
    }
}

fn record_receipt(shared: &Shared, reservation: i64, sent: Instant, body: &[u8]) {
    let answered = Instant::now();
    let body: Value = serde_json::from_slice(body).unwrap();
    let id = body["payments"][0]["id"].as_i64().unwrap();
    let receipt = Receipt {
        id,
        reservation,
        answered,
    };
    shared.receipts.lock().unwrap().push(receipt);
    let mut longest = shared.longest.lock().unwrap();
    *longest = longest.max(answered - sent);
}

fn exchange(
    shared: &Shared,
    connection: &mut Option<BufReader<TcpStream>>,
    request: &str,
) -> io::Result<Vec<u8>> {
    if connection.is_none() {
        let address = *shared.address.lock().unwrap();
        let stream = TcpStream::connect(address.ok_or(io::ErrorKind::NotConnected)?)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        *connection = Some(BufReader::new(stream));
    }
    let connection = connection.as_mut().ok_or(io::ErrorKind::NotConnected)?;
    connection.get_mut().write_all(request.as_bytes())?;
    let (line, headers) = read_head(connection)?.ok_or(io::ErrorKind::UnexpectedEof)?;
    let body = read_body(connection, &headers)?;
    // 503 while payrelay stops: the client repeats the request.
    match line.split(' ').nth(1) {
        Some("201") => Ok(body),
        Some("503") => Err(io::ErrorKind::ConnectionReset.into()),
        _ => panic!("{line}: {}", String::from_utf8_lossy(&body)),
    }
}
