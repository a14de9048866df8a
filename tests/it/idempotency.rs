//! The Idempotency-Key against the real binary: the same answer again, also after a kill; never two
//! payments.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Duration;

use rusqlite::{Connection, OpenFlags};
use serde_json::{Value, json};
use tempfile::TempDir;

use testkit::http::{Client, Response};
use testkit::process::{Options, Payrelay};
use testkit::wait_until;

const LIMIT: Duration = Duration::from_secs(20);

struct Fixture {
    dir: TempDir,
    payrelay: Payrelay,
}

fn start(env: &[(&str, &str)]) -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let payrelay = Payrelay::start(Options::new(dir.path(), env));
    Fixture { dir, payrelay }
}

impl Fixture {
    fn post(&self, headers: &[&str], body: &str) -> Response {
        post(self.payrelay.addr(), headers, body)
    }

    fn number(&self, sql: &str) -> i64 {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY;
        let connection =
            Connection::open_with_flags(self.dir.path().join("payrelay.db"), flags).unwrap();
        connection.busy_timeout(LIMIT).unwrap();
        connection.query_row(sql, [], |row| row.get(0)).unwrap()
    }
}

fn post(address: SocketAddr, headers: &[&str], body: &str) -> Response {
    let mut client = Client::connect(address);
    let headers: String = headers
        .iter()
        .flat_map(|header| [*header, "\r\n"])
        .collect();
    let head = format!(
        "POST /payments HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n{headers}"
    );
    let request = format!("{head}Content-Length: {}\r\n\r\n{body}", body.len());
    client.send_raw(request.as_bytes()).unwrap();
    client.read_response()
}

fn body(user_id: i64, reservations: impl IntoIterator<Item = i64>) -> String {
    let reservations: Vec<_> = reservations
        .into_iter()
        .map(|id| json!({ "reservation_id": id, "seat_price": 5 }))
        .collect();
    json!({ "user_id": user_id, "reservations": reservations }).to_string()
}

#[track_caller]
fn assert_refused(response: &Response, slug: &str) {
    let problem = response.json();
    assert_eq!(
        (response.status, &problem["field"]),
        (422, &json!("Idempotency-Key")),
        "{problem}"
    );
    assert_eq!(problem["type"], format!("urn:payrelay:problem:{slug}"));
}

#[test]
fn a_repeated_request_gets_the_same_bytes_even_after_sigkill() {
    let mut fixture = start(&[]);
    fixture.post(&[], &body(1, [10, 20, 30]));
    // A thousand, some of them FAILED.
    let requests = [
        ("one", body(2, [1])),
        ("many", body(3, 1..=1000)),
        ("failed", body(4, [10, 1])),
    ];
    let replayed = Cell::new(None);
    let ask = |fixture: &Fixture, (key, body): &(&str, String)| {
        let response = fixture.post(&[&format!("Idempotency-Key: {key}")], body);
        assert_eq!(
            (response.status, response.header("content-type")),
            (201, Some("application/json"))
        );
        assert_eq!(response.header("idempotency-replayed"), replayed.get());
        response.body
    };
    let first: Vec<_> = requests
        .iter()
        .map(|request| ask(&fixture, request))
        .collect();
    let failed: Value = serde_json::from_slice(&first[2]).unwrap();
    assert!(
        failed["payments"]
            .as_array()
            .unwrap()
            .iter()
            .all(|payment| payment["status"] == "FAILED"),
        "{failed}"
    );
    let many: Value = serde_json::from_slice(&first[1]).unwrap();
    let statuses: BTreeSet<_> = many["payments"]
        .as_array()
        .unwrap()
        .iter()
        .map(|p| p["status"].to_string())
        .collect();
    assert_eq!(
        (many["payments"].as_array().unwrap().len(), statuses.len()),
        (1000, 2)
    );
    replayed.set(Some("true"));
    for request in &requests {
        ask(&fixture, request);
    }
    fixture.payrelay.kill9();
    let fixture = Fixture {
        payrelay: Payrelay::start(Options::new(fixture.dir.path(), &[])),
        dir: fixture.dir,
    };
    let again: Vec<_> = requests
        .iter()
        .map(|request| ask(&fixture, request))
        .collect();
    assert!(first == again, "an answer has changed");
    assert_eq!(
        fixture.number("SELECT count(*) FROM payment"),
        3 + 1 + 1000 + 2
    );
    assert_eq!(
        fixture.number("SELECT count(*) FROM outbox"),
        3 + 1 + 1000 + 2
    );
}

#[test]
fn a_quoted_key_equals_the_unquoted_key() {
    let fixture = start(&[]);
    let first = fixture.post(&["Idempotency-Key: \"8e03978e-40d5\""], &body(1, [1]));
    let second = fixture.post(&["idempotency-key: 8e03978e-40d5"], &body(1, [1]));
    assert_eq!((first.status, first.body), (201, second.body));
}

#[test]
fn another_body_under_the_same_key_is_refused() {
    let fixture = start(&[]);
    let key = "Idempotency-Key: k";
    assert_eq!(fixture.post(&[key], &body(1, [1])).status, 201);
    assert_refused(
        &fixture.post(&[key], &body(1, [2])),
        "idempotency-key-reused",
    );
    // The bytes count, not what they mean.
    assert_refused(
        &fixture.post(&[key], &format!("{} ", body(1, [1]))),
        "idempotency-key-reused",
    );
    assert_eq!(fixture.number("SELECT count(*) FROM payment"), 1);
}

#[test]
fn an_invalid_key_is_refused_and_stores_nothing() {
    let fixture = start(&[]);
    let long = format!("Idempotency-Key: {}", "x".repeat(256));
    let bad: [&[&str]; 5] = [
        &["Idempotency-Key: "],
        &["Idempotency-Key: \"a"],
        &["Idempotency-Key: \u{e4}"],
        &["Idempotency-Key: a", "Idempotency-Key: a"],
        &[&long],
    ];
    for headers in bad {
        let refused = fixture.post(headers, &body(1, [1]));
        assert_eq!(
            (refused.status, &refused.json()["field"]),
            (400, &"Idempotency-Key".into())
        );
    }
    assert_eq!(fixture.number("SELECT count(*) FROM payment"), 0);
}

#[test]
fn a_refused_request_may_be_corrected_under_its_key() {
    let fixture = start(&[]);
    let key = "Idempotency-Key: k";
    assert_eq!(fixture.post(&[key], "{}").status, 422);
    assert_eq!(fixture.post(&[key], "{").status, 400);
    assert_eq!(fixture.post(&[key], &body(1, [1])).status, 201);
}

#[test]
fn sixteen_concurrent_requests_with_one_key_are_one_payment() {
    let fixture = start(&[]);
    for round in 0..20 {
        let barrier = Arc::new(Barrier::new(16));
        let posts = (0..16).map(|_| {
            let barrier = Arc::clone(&barrier);
            let address = fixture.payrelay.addr();
            thread::spawn(move || {
                barrier.wait();
                let response = post(
                    address,
                    &[&format!("Idempotency-Key: {round}")],
                    &body(round, [round, 999]),
                );
                (response.status, response.body)
            })
        });
        let posts: Vec<_> = posts.collect();
        let answers: BTreeSet<_> = posts.into_iter().map(|post| post.join().unwrap()).collect();
        assert_eq!(answers.len(), 1, "{answers:?}");
        assert_eq!(answers.first().unwrap().0, 201);
    }
    assert_eq!(fixture.number("SELECT count(*) FROM payment"), 40);
    assert_eq!(fixture.number("SELECT count(*) FROM idempotency_key"), 20);
}

#[test]
fn keys_are_purged_after_their_time() {
    let fixture = start(&[
        ("PAYRELAY_IDEMPOTENCY_RETENTION", "1s"),
        ("PAYRELAY_SCHEDULER_INTERVAL", "50ms"),
    ]);
    for id in 0..100 {
        assert_eq!(
            fixture
                .post(&[&format!("Idempotency-Key: {id}")], &body(1, [id]))
                .status,
            201
        );
    }
    wait_until("the keys to go", LIMIT, || {
        fixture.number("SELECT count(*) FROM idempotency_key") == 0
    });
    // Forgotten: it is a new request.
    let again = fixture.post(&["Idempotency-Key: 7"], &body(1, [7]));
    assert_eq!(again.json()["payments"][0]["status"], "FAILED");
}

#[test]
fn the_number_of_stored_keys_is_bounded() {
    let mut fixture = start(&[("PAYRELAY_IDEMPOTENCY_KEYS_MAX", "10")]);
    for id in 0..30 {
        assert_eq!(
            fixture
                .post(&[&format!("Idempotency-Key: {id}")], &body(1, [id]))
                .status,
            201
        );
        assert!(fixture.number("SELECT count(*) FROM idempotency_key") <= 10);
    }
    assert_eq!(
        fixture.number("SELECT min(CAST(\"key\" AS INTEGER)) FROM idempotency_key"),
        20,
        "the oldest go first"
    );
    // A smaller number holds for what is there already.
    fixture.payrelay.terminate();
    let env = [
        ("PAYRELAY_IDEMPOTENCY_KEYS_MAX", "3"),
        ("PAYRELAY_SCHEDULER_INTERVAL", "50ms"),
    ];
    let fixture = Fixture {
        payrelay: Payrelay::start(Options::new(fixture.dir.path(), &env)),
        dir: fixture.dir,
    };
    wait_until("the surplus to go", LIMIT, || {
        fixture.number("SELECT count(*) FROM idempotency_key") == 3
    });
}
