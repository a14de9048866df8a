//! Clients that pay while everything around them fails: each repeats a request under its key until
//! it is answered.

use std::collections::BTreeSet;
use std::io::{self, BufReader, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{CLIENTS, LIMIT, USERS};
use testkit::http::{read_body, read_head};
use testkit::let_time_pass;

/// What all clients share.
#[derive(Default)]
pub struct Workload {
    /// Where payrelay listens at the moment; the port changes with each start.
    pub address: Mutex<Option<SocketAddr>>,
    finished: AtomicBool,
    requests: AtomicUsize,
}

/// A request that was answered 201, with the answer.
#[derive(Debug, Clone)]
pub struct Receipt {
    pub user: u64,
    pub reservations: BTreeSet<u64>,
    pub payments: Vec<i64>,
}

/// Clients that work until they are joined.
pub struct Clients {
    workload: Arc<Workload>,
    threads: Vec<JoinHandle<Vec<Receipt>>>,
}

impl Clients {
    /// Starts them. `phase` is part of their keys.
    pub fn start(workload: &Arc<Workload>, random: &mut fastrand::Rng, phase: usize) -> Self {
        workload.finished.store(false, Ordering::Relaxed);
        let start = |number| {
            let client = Client {
                name: format!("{phase}-{number}"),
                random: random.fork(),
                workload: Arc::clone(workload),
                connection: None,
            };
            thread::spawn(|| client.work())
        };
        Self {
            workload: Arc::clone(workload),
            threads: (0..CLIENTS).map(start).collect(),
        }
    }

    /// Ends them once their last requests are answered.
    pub fn join(self) -> Vec<Receipt> {
        self.workload.finished.store(true, Ordering::Relaxed);
        self.threads
            .into_iter()
            .flat_map(|thread| thread.join().unwrap())
            .collect()
    }
}

struct Client {
    name: String,
    random: fastrand::Rng,
    workload: Arc<Workload>,
    connection: Option<BufReader<TcpStream>>,
}

impl Client {
    fn work(mut self) -> Vec<Receipt> {
        let mut receipts = Vec::new();
        while !self.workload.finished.load(Ordering::Relaxed) {
            receipts.push(self.pay());
        }
        receipts
    }

    fn pay(&mut self) -> Receipt {
        let user = self.random.u64(0..USERS);
        let count = self.random.u64(1..=3);
        // Some are paid already.
        let reservations: BTreeSet<u64> = (0..count).map(|_| self.random.u64(0..200_000)).collect();
        let list: Vec<Value> = reservations
            .iter()
            .map(|id| json!({"reservation_id": id, "seat_price": 100}))
            .collect();
        let body = json!({"user_id": user, "reservations": list}).to_string();
        let turn = self.workload.requests.fetch_add(1, Ordering::Relaxed);
        let request = format!(
            "POST /payments HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n\
             Idempotency-Key: \"client-{}-{turn}\"\r\nContent-Length: {}\r\n\r\n{body}",
            self.name,
            body.len()
        );
        let answer = self.until_answered(&request);
        if self.random.u8(0..20) == 0 {
            let again = self.until_answered(&request);
            assert_eq!(
                again, answer,
                "the same answer to the same key, byte for byte"
            );
        }
        let answer: Value = serde_json::from_slice(&answer).unwrap();
        let payments = answer["payments"].as_array().unwrap().iter();
        let payments = payments
            .map(|payment| payment["id"].as_i64().unwrap())
            .collect();
        Receipt {
            user,
            reservations,
            payments,
        }
    }

    fn until_answered(&mut self, request: &str) -> Vec<u8> {
        let began = Instant::now();
        loop {
            match self.ask(request) {
                Ok((201, body)) => return body,
                // Too much work, or stopping: the client comes again.
                Ok((503, _)) | Err(_) => self.connection = None,
                Ok((status, body)) => panic!("{status}: {}", String::from_utf8_lossy(&body)),
            }
            assert!(began.elapsed() < LIMIT, "no answer within {LIMIT:?}");
            let_time_pass(Duration::from_millis(2));
        }
    }

    fn ask(&mut self, request: &str) -> io::Result<(u16, Vec<u8>)> {
        if self.connection.is_none() {
            let address = self
                .workload
                .address
                .lock()
                .unwrap()
                .ok_or(io::ErrorKind::NotConnected)?;
            let stream = TcpStream::connect(address)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(Duration::from_secs(20)))?;
            self.connection = Some(BufReader::new(stream));
        }
        let connection = self
            .connection
            .as_mut()
            .ok_or(io::ErrorKind::NotConnected)?;
        connection.get_mut().write_all(request.as_bytes())?;
        let (line, headers) = read_head(connection)?.ok_or(io::ErrorKind::UnexpectedEof)?;
        let status = line
            .split(' ')
            .nth(1)
            .and_then(|status| status.parse().ok());
        Ok((
            status.ok_or(io::ErrorKind::InvalidData)?,
            read_body(connection, &headers)?,
        ))
    }
}
