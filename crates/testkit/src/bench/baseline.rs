//! What payrelay is compared with: the ways in which it could have been built, on the same tables
//! and statements.

use std::io::{BufReader, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::unbounded;
use payrelay::domain::payment::{NewPayment, Reservation};
use payrelay::domain::timestamp::Timestamp;
use payrelay::store::{Store, payment};
use rusqlite::{Connection, Transaction, TransactionBehavior};

use crate::http::{read_body, read_head};

/// Opens the database that payrelay has made, once for each connection of a client, as most
/// services would. It has SQLite's own cache, checkpoints and busy handler.
fn connect(database: &Path) -> Connection {
    let connection = Connection::open(database).expect("the database opens");
    connection
        .busy_timeout(Duration::from_secs(30))
        .expect("SQLite takes a time-out");
    connection
        .pragma_update(None, "synchronous", "FULL")
        .expect("SQLite takes the pragma");
    connection
        .pragma_update(None, "foreign_keys", true)
        .expect("SQLite takes the pragma");
    connection
}

/// (a) A thread and a database connection for each client, one transaction for each request. Serves
/// until the process ends.
pub fn transaction_per_request(database: &Path) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    let address = listener
        .local_addr()
        .expect("a bound listener has an address");
    let database = database.to_owned();
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let mut connection = connect(&database);
            thread::spawn(move || serve(&stream, &mut connection));
        }
    });
    address
}

fn serve(mut stream: &TcpStream, connection: &mut Connection) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream);
    while let Some((_, headers)) = read_head(&mut reader)? {
        let body = read_body(&mut reader, &headers)?;
        let new = NewPayment::parse(&body).expect("the load is right");
        let stored = Transaction::new(connection, TransactionBehavior::Immediate).and_then(|tx| {
            let payments = payment::execute_payments(&tx, &new, "KRW", None, Timestamp::now())?;
            tx.commit()?;
            Ok(payments)
        });
        let (status, body) = match stored {
            Ok(payments) => ("201 Created", serde_json::to_string(&payments)?),
            Err(error) => ("503 Service Unavailable", error.to_string()),
        };
        let length = body.len();
        stream.write_all(
            format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\n\r\n{body}").as_bytes(),
        )?;
    }
    Ok(())
}

/// (c) The writer without HTTP: `in_flight` jobs at any time, each of `count` payments. Payments a
/// second.
pub fn bare_writer(store: &Store, in_flight: usize, span: Duration, count: u64) -> f64 {
    let (answer, answered) = unbounded();
    let next = Arc::new(AtomicU64::new(1 << 40));
    let submit = || {
        let first = next.fetch_add(count, Ordering::Relaxed);
        let reservation = |id: u64| Reservation {
            reservation_id: id as i64,
            seat_price: 150_000,
        };
        let new = NewPayment {
            user_id: (first % 1000) as i64,
            reservations: (first..first + count).map(reservation).collect(),
        };
        let answer = answer.clone();
        let work = move |tx: &Transaction<'_>| {
            payment::execute_payments(tx, &new, "KRW", None, Timestamp::now())
        };
        store
            .submit(count as usize, work, move |result| {
                answer
                    .send(result.expect("the writer works").len())
                    .expect("we wait");
            })
            .expect("the queue has capacity");
    };
    let started = Instant::now();
    (0..in_flight).for_each(|_| submit());
    let mut done = 0;
    while started.elapsed() < span {
        done += answered.recv().expect("the writer answers");
        submit();
    }
    let rate = done as f64 / started.elapsed().as_secs_f64();
    for _ in 0..in_flight {
        let _ = answered.recv();
    }
    rate
}

/// The least that a durable commit can cost: one page appended and fsynced by SQLite. Milliseconds
/// each.
pub fn bare_commits(database: &Path, count: usize) -> Vec<f64> {
    let connection = connect(database);
    connection
        .pragma_update(None, "journal_mode", "WAL")
        .expect("SQLite takes the pragma");
    connection
        .execute_batch("CREATE TABLE IF NOT EXISTS t (x)")
        .expect("a new file takes a table");
    let mut insert = connection
        .prepare("INSERT INTO t VALUES (1)")
        .expect("the statement is right");
    let times = (0..count).map(|_| {
        let started = Instant::now();
        insert.execute([]).expect("the insert works");
        started.elapsed().as_secs_f64() * 1000.0
    });
    times.collect()
}
