//! A machine without memory or disk space: how soon payrelay answers again, or says no.

use std::fs;
use std::io::Write as _;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::thread;
use std::time::{Duration, Instant};

use rusqlite::Connection;
use serde_json::json;

use testkit::child::KillOnDrop;
use testkit::hostile::Machine;
use testkit::hostile::load::{
    Acknowledged, Connecting, LIMIT, NO_RESERVE, acknowledged, number, request, verify,
};
use testkit::process::{Options, Payrelay};
use testkit::timed::alone;
use testkit::{wait_for, wait_until};

const SIGABRT: i32 = 6;

/// Bodies that are never finished, each as large as may be, on this number of connections at once.
fn flood(address: SocketAddr, connections: usize) -> Vec<TcpStream> {
    let head = "POST /payments HTTP/1.1\r\nHost: x\r\nContent-Type: \
        application/json\r\nContent-Length: 262144\r\n\r\n";
    let bytes = [head.as_bytes(), &b" ".repeat(262_000)].concat();
    let open = |_| -> Option<TcpStream> {
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2)).ok()?;
        stream
            .set_write_timeout(Some(Duration::from_secs(2)))
            .ok()?;
        stream.write_all(&bytes).ok()?;
        Some(stream)
    };
    (0..connections).filter_map(open).collect()
}

/// How a payrelay with little memory has gone through it.
enum Fate {
    RefusedToStart,
    Ended,
    Survived,
}

/// A payrelay that may have this number of KiB of memory.
struct Confined {
    process: KillOnDrop,
    log: PathBuf,
}

impl Confined {
    fn start(dir: &Path, kib: u32) -> Self {
        let name = format!("log-{kib}");
        let script = format!("ulimit -v {kib}; exec \"$0\" 2>{name}");
        let mut command = KillOnDrop::command("sh");
        command
            .args(["-c", &script])
            .arg(testkit::paths::binary())
            .current_dir(dir)
            .env("PAYRELAY_HTTP_LISTEN", "127.0.0.1:0");
        Self {
            process: KillOnDrop::spawn(command),
            log: dir.join(name),
        }
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Its address, or how it refused to start.
    fn wait_for_start(&mut self) -> Result<SocketAddr, ExitStatus> {
        wait_for("a payrelay that serves, or refuses", LIMIT, || {
            let log = self.log();
            let listening = log.split_once("listening on http://");
            let address = listening.and_then(|(_, rest)| rest.lines().next()?.parse().ok());
            address.map(Ok).or_else(|| self.process.try_exit().map(Err))
        })
    }

    /// What the start has left is not enough for a single payment: it says so and lives, or has
    /// ended.
    fn assert_lives_or_ended(&mut self, address: SocketAddr, refused: bool) -> Fate {
        let lives = || {
            Connecting::new(address)
                .get("/health/live")
                .is_ok_and(|(status, _)| status == 200)
        };
        let exit = wait_for("an answer, or the end", LIMIT, || {
            self.process
                .try_exit()
                .map(Some)
                .or_else(|| (refused && lives()).then_some(None))
        });
        assert!(
            exit.is_none_or(|status| status.signal() == Some(SIGABRT)),
            "{exit:?}: {}",
            self.log()
        );
        exit.map_or(Fate::Survived, |_| Fate::Ended)
    }

    /// After a flood of bodies it accepts a payment within 5 s, or it has ended.
    fn assert_pays_again_or_ended(
        &mut self,
        address: SocketAddr,
        first: i64,
        payments: &mut Vec<Acknowledged>,
    ) -> Fate {
        let mut next = (first..).step_by(20);
        let exit = wait_for("an answer, or the end", Duration::from_secs(5), || {
            if let Some(status) = self.process.try_exit() {
                return Some(Some(status));
            }
            let mut client = Connecting::new(address);
            let (status, body) = client.post(&request(next.next()?, 1)).ok()?;
            if status != 201 {
                return None;
            }
            payments.extend(acknowledged(&body, 0));
            Some(None)
        });
        let Some(status) = exit else {
            return Fate::Survived;
        };
        assert!(
            status.signal() == Some(SIGABRT) || status.code() == Some(70),
            "{status:?}: {}",
            self.log()
        );
        Fate::Ended
    }
}

/// A payrelay with this number of KiB of memory, under four floods at once. Every acknowledged
/// payment is added to `payments`.
fn run_out_of_memory(dir: &Path, kib: u32, payments: &mut Vec<Acknowledged>) -> Fate {
    let mut confined = Confined::start(dir, kib);
    let address = match confined.wait_for_start() {
        Ok(address) => address,
        // How much the allocator reserves for each thread is a matter of timing.
        Err(status) => {
            assert!(
                [Some(75), Some(78)].contains(&status.code()) || status.signal() == Some(SIGABRT),
                "{status:?}: {}",
                confined.log()
            );
            return Fate::RefusedToStart;
        }
    };
    let first = 1000 * i64::from(kib);
    let paid = Connecting::new(address).post(&request(first, 5));
    if let Ok((201, paid)) = &paid {
        payments.extend(acknowledged(paid, 0));
    } else {
        let refused = paid.as_ref().is_ok_and(|(status, _)| *status == 503);
        let log = confined.log();
        assert!(refused || paid.is_err(), "{paid:?}\n{log}");
        return confined.assert_lives_or_ended(address, refused);
    }
    let floods: Vec<_> = (0..4)
        .map(|_| thread::spawn(move || flood(address, 100)))
        .collect();
    let floods: Vec<_> = floods
        .into_iter()
        .map(|flood| flood.join().unwrap())
        .collect();
    drop(floods);
    confined.assert_pays_again_or_ended(address, first + 100, payments)
}

/// Either it survives, and answers within 5 s. Or it has ended in a way that every supervisor sees
/// as a failure, and the next start finds every acknowledged payment.
#[test]
fn a_payrelay_out_of_memory_answers_again_within_5_s_or_has_ended() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let mut payments = Vec::new();
    // In KiB; some 75,000 are needed for a start.
    let fates =
        [90_000, 130_000, 200_000].map(|kib| run_out_of_memory(dir.path(), kib, &mut payments));
    let count = |wanted: fn(&Fate) -> bool| fates.iter().filter(|fate| wanted(fate)).count();
    let survived = count(|fate| matches!(fate, Fate::Survived));
    let ended = count(|fate| matches!(fate, Fate::Ended));
    let refused = count(|fate| matches!(fate, Fate::RefusedToStart));
    println!("survived {survived}, ended {ended}, refused at the start {refused}");
    assert!(survived + ended > 0, "it started with none of these");
    let mut payrelay = Payrelay::start(Options::new(dir.path(), &[]));
    assert_eq!(payrelay.terminate().code(), Some(0), "{}", payrelay.log());
    verify(
        &Connection::open(dir.path().join("payrelay.db")).unwrap(),
        &payments,
    );
}

/// Each of these payments is refused with 507 within 5 s.
fn assert_refused_soon(client: &mut Connecting, reservations: std::ops::Range<i64>) {
    for reservation in reservations {
        let asked = Instant::now();
        let (status, problem) = client.post(&request(reservation, 1)).unwrap();
        assert_eq!(
            (status, &problem["type"]),
            (507, &json!("urn:payrelay:problem:insufficient-storage")),
            "{problem}"
        );
        assert!(asked.elapsed() < Duration::from_secs(5));
    }
}

fn assert_unready_because_of_a_full_disk(client: &mut Connecting) {
    let (status, ready) = client.get("/health/ready").unwrap();
    assert_eq!(
        (status, &ready["status"]),
        (503, &json!("unavailable")),
        "{ready}"
    );
    let error = ready["components"]["database"]["error"].as_str().unwrap();
    assert!(error.contains("full"), "{ready}");
}

#[test]
fn a_full_disk_is_507_within_5_s_and_payments_continue_once_there_is_space() {
    let _alone = alone();
    let machine = Machine::new();
    let mut payrelay = Payrelay::start(machine.options(&[NO_RESERVE]));
    let mut client = Connecting::new(payrelay.addr());
    let body = request(1, 1).to_string();
    let head = "POST /payments HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: \
        application/json\r\nIdempotency-Key: once\r\n";
    let keyed = format!("{head}Content-Length: {}\r\n\r\n{body}", body.len());
    assert_eq!(client.send(&keyed).unwrap().0, 201);
    machine.set("full", "0");
    assert_refused_soon(&mut client, 101..301);
    assert_unready_because_of_a_full_disk(&mut client);
    assert_eq!(
        client.get("/payments/1").unwrap().0,
        200,
        "what is there can be read"
    );
    // Nor is it ready because of a transaction that has nothing to write. Each look tries one that
    // writes, and a request in the same commit is refused with it.
    let mut repeated = 0;
    wait_until("the earlier response to be repeated", LIMIT, || {
        repeated += usize::from(client.send(&keyed).unwrap().0 == 201);
        assert_eq!(
            client.get("/health/ready").unwrap().0,
            503,
            "{}",
            payrelay.log()
        );
        repeated >= 20
    });
    machine.clear("full");
    assert_eq!(client.post(&request(1001, 1)).unwrap().0, 201);
    wait_until("the health page to say so", LIMIT, || {
        client.get("/health/ready").unwrap().0 == 200
    });
    assert_eq!(payrelay.terminate().code(), Some(0), "{}", payrelay.log());
    // Complete only now.
    let log = payrelay.log();
    assert_eq!(
        (
            payrelay.count_in_log("writer: database error"),
            payrelay.count_in_log("writer: the database works again")
        ),
        (1, 1),
        "{log}"
    );
    assert!(log.lines().count() < 30, "{log}");
    let connection = Connection::open(machine.database()).unwrap();
    verify(&connection, &[]);
    assert_eq!(number(&connection, "SELECT count(*) FROM payment"), 2);
}
