//! Clients that pay while the machine fails, and what has to be in the database afterwards.

use std::io::{self, BufReader, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rusqlite::Connection;
use serde_json::{Value, json};

use super::Machine;
use crate::http::{read_body, read_head};
use crate::lock;

/// Noisy machines included.
pub const LIMIT: Duration = Duration::from_secs(30);

/// Payments are accepted until the disk itself refuses.
pub const NO_RESERVE: (&str, &str) = ("PAYRELAY_DATABASE_MIN_FREE_BYTES", "0");

/// An acknowledged payment, and when.
#[derive(Debug, Clone, PartialEq)]
pub struct Acknowledged {
    pub id: i64,
    pub reservation_id: i64,
    pub status: String,
    /// How much the machine had recorded when the client had read the answer.
    pub journal: u64,
}

/// Answers by their status, and those that never came.
#[derive(Debug, Default)]
pub struct Answers {
    pub acknowledged: Vec<Acknowledged>,
    /// With the first reservation that was asked for.
    pub refused: Vec<(u16, i64, Value)>,
    pub lost: usize,
}

/// Unpaid reservations.
static NEXT_RESERVATION: AtomicI64 = AtomicI64::new(1);

impl Answers {
    pub fn count(&self) -> usize {
        self.acknowledged.len() + self.refused.len()
    }
}

/// Lets this number of connections pay, each as soon as it is answered, until `enough` says so or
/// the process is gone.
pub fn load(
    machine: &Machine,
    address: SocketAddr,
    connections: usize,
    enough: impl Fn(&Answers) -> bool + Sync,
) -> Answers {
    let answers = Mutex::new(Answers::default());
    let client = || {
        let mut connection = Connecting::new(address);
        loop {
            let first = NEXT_RESERVATION.fetch_add(20, Ordering::Relaxed);
            let body = request(
                first,
                usize::try_from(first / 20 % 12 + 1).expect("a small number"),
            );
            let answer = connection.post(&body);
            let mut answers = lock(&answers);
            match answer {
                Ok((201, body)) => answers
                    .acknowledged
                    .extend(acknowledged(&body, machine.recorded_length())),
                Ok((status, body)) => answers.refused.push((status, first, body)),
                Err(_) => {
                    answers.lost += 1;
                    return;
                }
            }
            if enough(&answers) {
                return;
            }
        }
    };
    thread::scope(|scope| (0..connections).for_each(|_| drop(scope.spawn(client))));
    answers.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// A request for several reservations from `first`; now and then one that is paid already.
pub fn request(first: i64, count: usize) -> Value {
    let again = (first % 7 == 0).then_some(first - 20);
    let ids = again.into_iter().chain(first..).take(count);
    let reservations: Vec<_> = ids
        .map(|id| json!({"reservation_id": id, "seat_price": 5}))
        .collect();
    json!({"user_id": first % 50, "reservations": reservations})
}

pub fn acknowledged(body: &Value, journal: u64) -> impl Iterator<Item = Acknowledged> {
    body["payments"]
        .as_array()
        .expect("a list of payments")
        .iter()
        .map(move |payment| Acknowledged {
            id: payment["id"].as_i64().expect("an id"),
            reservation_id: payment["reservation_id"].as_i64().expect("an id"),
            status: payment["status"].as_str().expect("a status").to_owned(),
            journal,
        })
}

/// A connection that may end at any moment.
pub struct Connecting {
    address: SocketAddr,
    reader: Option<BufReader<TcpStream>>,
}

impl Connecting {
    pub fn new(address: SocketAddr) -> Self {
        Self {
            address,
            reader: None,
        }
    }

    pub fn post(&mut self, body: &Value) -> io::Result<(u16, Value)> {
        let body = body.to_string();
        let head =
            "POST /payments HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n";
        self.send(&format!(
            "{head}Content-Length: {}\r\n\r\n{body}",
            body.len()
        ))
    }

    /// Slack is well again: what waits for it is not to wait for up to a minute longer.
    pub fn resume_slack(&mut self) {
        let resume = "POST /admin/channels/default/resume HTTP/1.1\r\nHost: \
            127.0.0.1\r\nContent-Length: 0\r\n\r\n";
        let answer = self.send(resume).expect("it answers");
        assert_eq!(answer.0, 202, "{answer:?}");
    }

    pub fn get(&mut self, path: &str) -> io::Result<(u16, Value)> {
        self.send(&format!("GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"))
    }

    pub fn send(&mut self, request: &str) -> io::Result<(u16, Value)> {
        let answer = self.try_send(request);
        if answer.is_err() {
            self.reader = None;
        }
        answer
    }

    fn try_send(&mut self, request: &str) -> io::Result<(u16, Value)> {
        let reader = match &mut self.reader {
            Some(reader) => reader,
            none => {
                let stream = TcpStream::connect_timeout(&self.address, LIMIT)?;
                stream.set_read_timeout(Some(LIMIT))?;
                stream.set_nodelay(true)?;
                none.insert(BufReader::new(stream))
            }
        };
        reader.get_mut().write_all(request.as_bytes())?;
        let (line, headers) = read_head(reader)?.ok_or(io::ErrorKind::UnexpectedEof)?;
        let status = line
            .split(' ')
            .nth(1)
            .and_then(|status| status.parse().ok());
        let body = read_body(reader, &headers)?;
        Ok((
            status.ok_or(io::ErrorKind::InvalidData)?,
            serde_json::from_slice(&body)?,
        ))
    }
}

pub fn number(connection: &Connection, sql: &str) -> i64 {
    connection
        .query_row(sql, [], |row| row.get(0))
        .unwrap_or_else(|error| panic!("{sql}: {error}"))
}

/// The file is whole, its tables agree, and everything that was acknowledged is in it.
pub fn verify(connection: &Connection, acknowledged: &[Acknowledged]) {
    let check: String = connection
        .query_row("PRAGMA integrity_check", [], |row| row.get(0))
        .expect("the database can be read");
    assert_eq!(check, "ok");
    let payments = number(connection, "SELECT count(*) FROM payment");
    assert_eq!(
        number(connection, "SELECT coalesce(max(id), 0) FROM payment"),
        payments,
        "ids have no gaps"
    );
    let sequence = "SELECT coalesce((SELECT seq FROM sqlite_sequence WHERE name = 'payment'), 0)";
    assert_eq!(
        number(connection, sequence),
        payments,
        "the next id is a new one"
    );
    let joined = "SELECT count(*) FROM payment p JOIN user_history h ON h.user_id = p.user_id \
                  AND h.last_payment_id >= p.id \
                  JOIN outbox o ON o.payment_id = p.id AND o.id = p.id AND o.user_id = p.user_id";
    assert_eq!(
        number(connection, joined),
        payments,
        "each payment has its history and its event"
    );
    assert_eq!(number(connection, "SELECT count(*) FROM outbox"), payments);
    let mut stored = connection
        .prepare("SELECT reservation_id, status FROM payment ORDER BY id")
        .expect("the database can be read");
    let stored = stored
        .query_map([], |row| {
            Ok((row.get::<_, i64>(0)?, row.get::<_, String>(1)?))
        })
        .expect("the database can be read");
    let stored: Vec<_> = stored
        .map(|row| row.expect("the row can be read"))
        .collect();
    for Acknowledged {
        id,
        reservation_id,
        status,
        ..
    } in acknowledged
    {
        let found = stored.get(usize::try_from(*id - 1).expect("a small number"));
        assert_eq!(
            found,
            Some(&(*reservation_id, status.clone())),
            "payment {id} was acknowledged"
        );
    }
}

pub fn for_at_least(span: Duration) -> impl Fn(&Answers) -> bool + Sync {
    let started = Instant::now();
    move |_| started.elapsed() > span
}
