//! What slow, silent and numerous clients cost the others, in time and in memory.

use std::collections::VecDeque;
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use testkit::child::KillOnDrop;
use testkit::http::{Client, connect_from, pay, payment, request};
use testkit::process::{Options, Payrelay};
use testkit::timed::alone;
use testkit::{StopOnDrop, wait_until};

const LIMIT: Duration = Duration::from_secs(20);

/// As many send half a head, and as many half a body.
const SLOW: usize = 200;

/// As many ask and never read. Fewer: until their buffers are full, each costs the database eight
/// pages of 500 payments.
const UNREAD: usize = 30;

/// While all of them are there, others are answered within this, also by an unoptimized build on a
/// busy machine.
const PROMPT: Duration = Duration::from_secs(10);

/// A peak of resident memory (`VmHWM` of `proc_pid_status(5)`) above this is a leak, not a client's
/// share.
const RESIDENT_KIB_MAX: u64 = 128 * 1024;

#[test]
fn slow_clients_delay_no_other_client() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let connections = (2 * SLOW + UNREAD + 1).to_string();
    let env = [
        ("PAYRELAY_HTTP_HEADER_TIMEOUT", "6s"),
        ("PAYRELAY_HTTP_BODY_TIMEOUT", "6s"),
        ("PAYRELAY_HTTP_WRITE_TIMEOUT", "6s"),
        ("PAYRELAY_HTTP_CONNECTIONS_MAX", &connections),
        ("PAYRELAY_HTTP_CLIENT_CONNECTIONS_MAX", &connections),
    ];
    let payrelay = Payrelay::start(Options::new(dir.path(), &env));
    let mut good = Client::connect(payrelay.addr());
    pay(&mut good, 1, 1..=500);
    assert_eq!(good.get("/payments/1").status, 200);
    let over = AtomicBool::new(false);
    let (served, slowest) = thread::scope(|scope| {
        let before = payrelay.descriptors();
        let good = scope.spawn(|| serve_all_along(&mut good, &over));
        // Also when something here fails: the scope waits for the thread.
        let over = StopOnDrop(&over);
        give_up_slow_clients(&payrelay, before);
        drop(over);
        good.join().unwrap()
    });
    let resident = payrelay.resident_peak_kib();
    println!(
        "served {served} meanwhile, the slowest in {slowest:.1?}, at most {resident} KiB resident"
    );
    assert!(
        served > 100 && slowest < PROMPT,
        "{served} served, the slowest in {slowest:?}"
    );
    assert!(resident < RESIDENT_KIB_MAX, "{resident} KiB");
}

/// Connects all slow clients, waits until payrelay has closed their connections, and takes all
/// slots with new clients.
fn give_up_slow_clients(payrelay: &Payrelay, descriptors_before: usize) {
    let address = payrelay.addr();
    let opened = Instant::now();
    let mut slow = half_heads(address);
    slow.extend(half_bodies(address));
    let unread = never_reading(address);
    println!(
        "{} slow clients after {:.1?}",
        slow.len() + unread.len(),
        opened.elapsed()
    );
    for stream in &mut slow {
        // Whatever it says, it closes.
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let ended = stream.read_to_end(&mut Vec::new());
        let reset = |error: &io::Error| error.kind() == io::ErrorKind::ConnectionReset;
        assert!(ended.as_ref().map_or_else(reset, |_| true), "{ended:?}");
    }
    // Those that never read stay open on their side: only the server's time-out ends them.
    wait_until("the last of them to be given up", 3 * LIMIT, || {
        payrelay.descriptors() <= descriptors_before
    });
    // Each asks when it is connected. The last may need seconds for that, and a client that is
    // silent for this long is given up.
    let ask = |_| {
        let mut client = Client::connect(address);
        client
            .send_raw(request("GET /health/live", "", "").as_bytes())
            .unwrap();
        client
    };
    let mut fresh: Vec<_> = (0..2 * SLOW + UNREAD).map(ask).collect();
    assert!(
        fresh
            .iter_mut()
            .all(|client| client.read_response().status == 200),
        "all slots are free again"
    );
    drop(unread);
}

/// Pays and looks until it is over, and a hundred times at least; how often, and how long the
/// slowest response needed.
fn serve_all_along(good: &mut Client, over: &AtomicBool) -> (i64, Duration) {
    let mut served = 0;
    let mut slowest = Duration::ZERO;
    while !over.load(Relaxed) || served <= 100 {
        let asked = Instant::now();
        pay(good, 2, [1000 + served]);
        assert_eq!(good.get("/payments/1").status, 200);
        slowest = slowest.max(asked.elapsed());
        served += 1;
    }
    (served, slowest)
}

fn half_heads(address: SocketAddr) -> Vec<TcpStream> {
    let begin = |_| {
        let mut stream = TcpStream::connect(address).unwrap();
        stream
            .write_all(b"POST /payments HTTP/1.1\r\nHost: localhost\r\nContent-Ty")
            .unwrap();
        stream
    };
    (0..SLOW).map(begin).collect()
}

/// More of them than the limit of bodies allows: those beyond it are answered 429.
fn half_bodies(address: SocketAddr) -> Vec<TcpStream> {
    let text = request("POST /payments", "", &payment(1, 262_144));
    let half = &text.as_bytes()[..200_000];
    let begin = |_| {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(half).unwrap();
        stream
    };
    (0..SLOW).map(begin).collect()
}

/// Each answer is a page of 500 payments, more than any buffer on the way takes together.
fn never_reading(address: SocketAddr) -> Vec<TcpStream> {
    let requests = request("GET /users/1/payment-history?limit=500", "", "").repeat(100);
    let begin = |_| {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(requests.as_bytes()).unwrap();
        stream
    };
    (0..UNREAD).map(begin).collect()
}

#[test]
fn a_slow_reader_receives_a_large_response_completely() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let env = [("PAYRELAY_HTTP_WRITE_TIMEOUT", "5s")];
    let payrelay = Payrelay::start(Options::new(dir.path(), &env));
    let mut client = Client::connect(payrelay.addr());
    pay(&mut client, 1, 1..=500);
    // Forty answers are some megabytes; the reader takes eight seconds for them, but never five for
    // a bufferful.
    let requests = request("GET /users/1/payment-history?limit=500", "", "").repeat(40);
    client.send_raw(requests.as_bytes()).unwrap();
    let begun = Instant::now();
    for round in 1..=40_u32 {
        wait_until("the reader to continue", LIMIT, || {
            begun.elapsed() > round * Duration::from_millis(200)
        });
        let page: Value = client.read_response().json();
        assert_eq!(page["payments"].as_array().unwrap().len(), 500);
    }
}

#[test]
fn new_connections_replace_silent_ones() {
    let _alone = alone();
    let env = [
        ("PAYRELAY_HTTP_CONNECTIONS_MAX", "8"),
        ("PAYRELAY_HTTP_CLIENT_CONNECTIONS_MAX", "4"),
    ];
    let dir = tempfile::tempdir().unwrap();
    let payrelay = Payrelay::start(Options::new(dir.path(), &env));
    let address = payrelay.addr();
    let mut idle = Client::connect(address);
    assert_eq!(idle.get("/health/live").status, 200);
    // Half of them say nothing, the others stop within the head.
    let silent: Vec<_> = (0..7)
        .map(|n| connect_from([127, 0, 0, 2 + n / 4], address))
        .collect();
    for stream in silent.iter().step_by(2) {
        (&*stream).write_all(b"GET /health/li").unwrap();
    }
    // A request in progress keeps its place.
    let mut busy = Client::connect(address);
    let head = "POST /payments HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n";
    let body = payment(1, 0);
    busy.send_raw(format!("{head}Content-Length: {}\r\n\r\n", body.len()).as_bytes())
        .unwrap();
    let started = Instant::now();
    for _ in 0..4 {
        let mut client = Client::connect(address);
        assert_eq!(client.get("/health/live").status, 200);
    }
    assert!(
        started.elapsed() < Duration::from_secs(10),
        "{:?}",
        started.elapsed()
    );
    busy.send_raw(body.as_bytes()).unwrap();
    assert_eq!(busy.read_response().status, 201);
}

#[test]
fn a_refusal_does_not_wait_for_the_body() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let payrelay = Payrelay::start(Options::new(dir.path(), &[]));
    let address = payrelay.addr();
    for (line, status) in [
        ("POST /nowhere", 404),
        ("PUT /payments", 405),
        ("POST /payments?dry_run=true", 422),
    ] {
        let mut client = Client::connect(address);
        let started = Instant::now();
        let head =
            format!("{line} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n");
        client
            .send_raw(format!("{head}Content-Length: 100000\r\n\r\n").as_bytes())
            .unwrap();
        let refused = client.read_response();
        assert_eq!(
            (refused.status, refused.header("connection")),
            (status, Some("close")),
            "{line}"
        );
        // http.body_timeout is 10 s.
        assert!(
            started.elapsed() < Duration::from_secs(5),
            "{line}: {:?}",
            started.elapsed()
        );
    }
}

/// A payrelay that may have 150 descriptors open, and its log.
fn start_with_few_descriptors(dir: &Path) -> (KillOnDrop, SocketAddr) {
    let mut command = KillOnDrop::command("sh");
    command
        .args(["-c", "ulimit -n 150; exec \"$0\" 2>log"])
        .arg(testkit::paths::binary())
        .current_dir(dir)
        .env("PAYRELAY_HTTP_LISTEN", "127.0.0.1:0")
        // The flood comes from the address of those who are to be served.
        .env("PAYRELAY_HTTP_CLIENT_CONNECTIONS_MAX", "4096");
    let child = KillOnDrop::spawn(command);
    let log = || fs::read_to_string(dir.join("log")).unwrap_or_default();
    wait_until("a payrelay that serves", LIMIT, || {
        log().contains("listening on http://") && log().ends_with('\n')
    });
    let log = log();
    assert!(
        log.contains("serving at most 50 connections at a time"),
        "{log}"
    );
    let address = log.split("listening on http://").nth(1).unwrap();
    (child, address.trim().parse().unwrap())
}

#[test]
fn few_descriptors_limit_connections_and_end_no_process() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let (mut child, address) = start_with_few_descriptors(dir.path());
    let mut before = Client::connect(address);
    pay(&mut before, 1, [1]);
    let flood: Vec<_> = (0..120).map(|_| Client::connect(address)).collect();
    let mut waiting = Client::connect(address);
    pay(&mut before, 1, [2]);
    drop(flood);
    pay(&mut waiting, 1, [3]);
    drop(waiting);

    // More than the kernel keeps waiting, and new ones all the time.
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let floods: Vec<_> = (0..4)
            .map(|_| scope.spawn(|| flood_until(address, &over)))
            .collect();
        let over = StopOnDrop(&over);
        for reservation in 4..200 {
            let asked = Instant::now();
            pay(&mut before, 1, [reservation]);
            assert!(
                asked.elapsed() < AGAIN,
                "a client that was there before the flood is served during it: {:?}",
                asked.elapsed()
            );
        }
        drop(over);
        let opened: usize = floods.into_iter().map(|flood| flood.join().unwrap()).sum();
        assert!(opened > 500, "the flood was {opened} connections");
    });
    let over = Instant::now();
    pay(&mut Client::connect(address), 1, [200]);
    assert!(
        over.elapsed() < AGAIN,
        "the first new client was served {:?} after the flood",
        over.elapsed()
    );
    pay(&mut before, 1, [201]);
    let log = fs::read_to_string(dir.path().join("log")).unwrap();
    assert!(child.try_exit().is_none(), "{log}");
}

/// How soon after a flood every client is served again.
const AGAIN: Duration = Duration::from_secs(10);

/// Opens connections as fast as it can and keeps the last hundred; returns how many there were.
fn flood_until(address: SocketAddr, over: &AtomicBool) -> usize {
    let mut held = VecDeque::new();
    let mut opened = 0;
    while !over.load(Relaxed) || opened < 200 {
        // Where too many wait already, the kernel does not even answer.
        if let Ok(connection) = TcpStream::connect_timeout(&address, Duration::from_millis(20)) {
            held.push_back(connection);
            opened += 1;
        } else {
            held.pop_front();
        }
        if held.len() > 100 {
            held.pop_front();
        }
    }
    opened
}
