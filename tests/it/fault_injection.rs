//! The machine fails: the power, the disk, the file, the clock, threads and memory. What is
//! promised then is in docs/explanation/failure-modes.md.

mod clock;
mod damage;
mod full;
mod memory;
mod power;
mod sync;

use std::io::{self, BufReader, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::process::ExitStatus;
use std::sync::Mutex;
use std::sync::atomic::{AtomicI64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rusqlite::Connection;
use serde_json::{Value, json};

use testkit::hostile::Machine;
use testkit::http::{read_body, read_head};
use testkit::process::Payrelay;
use testkit::wait_for;

/// Noisy machines included.
const LIMIT: Duration = Duration::from_secs(30);

/// An acknowledged payment, and when.
#[derive(Debug, Clone, PartialEq)]
struct Acknowledged {
    id: i64,
    reservation_id: i64,
    status: String,
    /// How much the machine had recorded when the client had read the answer.
    journal: u64,
}

/// Answers by their status, and those that never came.
#[derive(Debug, Default)]
struct Answers {
    acknowledged: Vec<Acknowledged>,
    /// With the first reservation that was asked for.
    refused: Vec<(u16, i64, Value)>,
    lost: usize,
}

/// Unpaid reservations.
static NEXT_RESERVATION: AtomicI64 = AtomicI64::new(1);

impl Answers {
    fn count(&self) -> usize {
        self.acknowledged.len() + self.refused.len()
    }
}

/// Lets this number of connections pay, each as soon as it is answered, until `enough` says so or
/// the process is gone.
fn load(
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
            let body = request(first, usize::try_from(first / 20 % 12 + 1).unwrap());
            let answer = connection.post(&body);
            let mut answers = answers.lock().unwrap();
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
    answers.into_inner().unwrap()
}

/// A request for several reservations from `first`; now and then one that is paid already.
fn request(first: i64, count: usize) -> Value {
    let again = (first % 7 == 0).then_some(first - 20);
    let ids = again.into_iter().chain(first..).take(count);
    let reservations: Vec<_> = ids
        .map(|id| json!({"reservation_id": id, "seat_price": 5}))
        .collect();
    json!({"user_id": first % 50, "reservations": reservations})
}

fn acknowledged(body: &Value, journal: u64) -> impl Iterator<Item = Acknowledged> {
    body["payments"]
        .as_array()
        .unwrap()
        .iter()
        .map(move |payment| Acknowledged {
            id: payment["id"].as_i64().unwrap(),
            reservation_id: payment["reservation_id"].as_i64().unwrap(),
            status: payment["status"].as_str().unwrap().to_owned(),
            journal,
        })
}

/// A connection that may end at any moment.
struct Connecting {
    address: SocketAddr,
    reader: Option<BufReader<TcpStream>>,
}

impl Connecting {
    fn new(address: SocketAddr) -> Self {
        Self {
            address,
            reader: None,
        }
    }

    fn post(&mut self, body: &Value) -> io::Result<(u16, Value)> {
        let body = body.to_string();
        let head =
            "POST /payments HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n";
        self.send(&format!(
            "{head}Content-Length: {}\r\n\r\n{body}",
            body.len()
        ))
    }

    /// Slack is well again: what waits for it is not to wait for up to a minute longer.
    fn resume_slack(&mut self) {
        let resume = "POST /admin/channels/default/resume HTTP/1.1\r\nHost: \
            127.0.0.1\r\nContent-Length: 0\r\n\r\n";
        let answer = self.send(resume).unwrap();
        assert_eq!(answer.0, 202, "{answer:?}");
    }

    fn get(&mut self, path: &str) -> io::Result<(u16, Value)> {
        self.send(&format!("GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"))
    }

    fn send(&mut self, request: &str) -> io::Result<(u16, Value)> {
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

fn number(connection: &Connection, sql: &str) -> i64 {
    connection
        .query_row(sql, [], |row| row.get(0))
        .unwrap_or_else(|error| panic!("{sql}: {error}"))
}

/// The file is whole, its tables agree, and everything that was acknowledged is in it.
fn verify(connection: &Connection, acknowledged: &[Acknowledged]) {
    let check: String = connection
        .query_row("PRAGMA integrity_check", [], |row| row.get(0))
        .unwrap();
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
    let joined = "SELECT count(*) FROM payment p JOIN payment_history h ON h.payment_id = p.id \
                  JOIN outbox o ON o.payment_id = p.id AND o.id = p.id AND o.user_id = p.user_id";
    assert_eq!(
        number(connection, joined),
        payments,
        "each payment has its history and its event"
    );
    for table in ["payment_history", "outbox"] {
        assert_eq!(
            number(connection, &format!("SELECT count(*) FROM {table}")),
            payments,
            "{table}"
        );
    }
    let mut stored = connection
        .prepare("SELECT reservation_id, status FROM payment ORDER BY id")
        .unwrap();
    let stored = stored
        .query_map([], |row| {
            Ok((row.get::<_, i64>(0)?, row.get::<_, String>(1)?))
        })
        .unwrap();
    let stored: Vec<_> = stored.map(Result::unwrap).collect();
    for Acknowledged {
        id,
        reservation_id,
        status,
        ..
    } in acknowledged
    {
        let found = stored.get(usize::try_from(*id - 1).unwrap());
        assert_eq!(
            found,
            Some(&(*reservation_id, status.clone())),
            "payment {id} was acknowledged"
        );
    }
}

/// Has the process killed in the midst of its work, with the journal and the files in exact
/// agreement.
fn kill(machine: &Machine, mut payrelay: Payrelay) {
    machine.set("die", "");
    // Where everything is delivered already, nothing but this is written any more.
    let answer = Connecting::new(payrelay.addr()).post(&request(1, 1));
    assert!(
        answer.is_err(),
        "it was to be killed before it wrote this: {answer:?}"
    );
    exit(&mut payrelay);
    machine.clear("die");
}

/// Waits for an exit that comes by itself.
fn exit(payrelay: &mut Payrelay) -> ExitStatus {
    wait_for("the end of the process", LIMIT, || payrelay.try_exit())
}

fn for_at_least(span: Duration) -> impl Fn(&Answers) -> bool + Sync {
    let started = Instant::now();
    move |_| started.elapsed() > span
}
