//! Mutated requests, heads and bodies, over real sockets to the real binary. It survives, and
//! answers or closes every connection. Nothing is answered with 201 that is not stored.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use serde_json::Value;

use testkit::http::{Client, read_on};
use testkit::mutations::{mutations, seeds};
use testkit::process::{Options, Payrelay};

/// How many mutations are sent where the environment does not say.
const CASES: usize = 600;

/// This number of connections at a time: most wait for the server's patience to end.
const CONNECTIONS: usize = 16;

/// By then each connection has an end.
const LIMIT: Duration = Duration::from_secs(30);

/// All that payrelay and hyper answer.
const KNOWN: [u16; 15] = [
    100, 200, 201, 202, 400, 403, 404, 405, 408, 413, 415, 421, 422, 431, 503,
];

/// Sends bytes and reads until the server has closed the connection.
fn converse(address: SocketAddr, name: &str, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    // Either may break: what the server has had enough of, it closes.
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        match read_on(&mut stream, &mut buffer) {
            Ok(0) => return answer,
            Ok(count) => answer.extend_from_slice(&buffer[..count]),
            // Closed with bytes unread: of the answer a part may be lost on the way.
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return Vec::new(),
            Err(error) => panic!(
                "{name}: {error}: neither answered nor closed: \"{}\"",
                bytes.escape_ascii()
            ),
        }
    }
}

/// Each answer's status, and its body.
fn answers(mut bytes: &[u8]) -> Vec<(u16, Vec<u8>)> {
    let mut found = Vec::new();
    while let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
        let head = String::from_utf8_lossy(&bytes[..end]).to_lowercase();
        let rest = &bytes[end + 4..];
        let status = head
            .strip_prefix("http/1.")
            .and_then(|rest| rest.get(2..5)?.parse().ok());
        let status = status.unwrap_or_else(|| panic!("no answer begins so: {head:?}"));
        let length = head
            .lines()
            .find_map(|line| line.strip_prefix("content-length: ")?.parse().ok())
            .unwrap_or(0);
        // The response to a HEAD has the length of a body that is not sent; those that come are
        // objects.
        let length = if rest.starts_with(b"{") {
            rest.len().min(length)
        } else {
            0
        };
        found.push((status, rest[..length].to_vec()));
        bytes = &rest[length..];
    }
    assert!(bytes.is_empty(), "half an answer: {}", bytes.escape_ascii());
    found
}

/// Parts of requests that mutations insert.
const WORDS: [&str; 15] = [
    "POST /payments HTTP/1.1\r\n",
    "GET ",
    "HEAD ",
    "OPTIONS ",
    " HTTP/1.0",
    "Host: x\r\n",
    "Content-Length: ",
    "Content-Type: application/json\r\n",
    "Transfer-Encoding: chunked\r\n",
    "Expect: 100-continue\r\n",
    "Connection: close\r\n",
    "Connection: keep-alive\r\n",
    "\r\n\r\n",
    "\"user_id\":",
    "0\r\n\r\n",
];

/// The responses to all inputs: how many of each status, and the payments that were answered.
#[derive(Default)]
struct Responses {
    statuses: BTreeMap<u16, usize>,
    payments: Vec<Value>,
}

impl Responses {
    fn add(&mut self, name: &str, input: &[u8], status: u16, body: &[u8]) {
        assert!(
            KNOWN.contains(&status),
            "{name}: {status} to \"{}\"",
            input.escape_ascii()
        );
        *self.statuses.entry(status).or_insert(0) += 1;
        if status == 201 {
            let body: Value = serde_json::from_slice(body).unwrap();
            self.payments
                .extend(body["payments"].as_array().unwrap().clone());
        }
    }

    /// More than a handful of each, or the test shows little.
    fn assert_variety(&self) {
        for status in [200, 201, 400, 404, 422] {
            assert!(
                self.statuses.get(&status).is_some_and(|count| *count >= 5),
                "{:?}",
                self.statuses
            );
        }
        assert!(self.payments.len() >= 5, "{:?}", self.statuses);
    }
}

/// Sends each input on a connection of its own, and collects the responses.
fn send_all(address: SocketAddr, inputs: &[(String, Vec<u8>)]) -> Responses {
    let next = AtomicUsize::new(0);
    let responses = Mutex::new(Responses::default());
    thread::scope(|scope| {
        for _ in 0..CONNECTIONS {
            scope.spawn(|| {
                while let Some((name, input)) = inputs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    for (status, body) in answers(&converse(address, name, input)) {
                        let mut responses =
                            responses.lock().unwrap_or_else(PoisonError::into_inner);
                        responses.add(name, input, status, &body);
                    }
                }
            });
        }
    });
    responses.into_inner().unwrap()
}

fn assert_all_are_stored(address: SocketAddr, payments: &[Value]) {
    let ids: BTreeSet<_> = payments
        .iter()
        .map(|payment| payment["id"].as_i64().unwrap())
        .collect();
    assert_eq!(ids.len(), payments.len(), "an id was given twice");
    for payment in payments {
        let found = Client::connect(address)
            .get(&format!("/payments/{}", payment["id"]))
            .json();
        for field in [
            "id",
            "user_id",
            "reservation_id",
            "amount",
            "status",
            "executed_at",
        ] {
            assert_eq!(
                found[field], payment[field],
                "{found} was answered as {payment}"
            );
        }
    }
}

#[test]
fn every_mutated_request_is_answered_or_closed_and_201_means_stored() {
    let dir = tempfile::tempdir().unwrap();
    let patience = [
        ("PAYRELAY_HTTP_HEADER_TIMEOUT", "200ms"),
        ("PAYRELAY_HTTP_BODY_TIMEOUT", "200ms"),
    ];
    let mut payrelay = Payrelay::start(Options::new(dir.path(), &patience));
    let corpus = seeds("request");
    let inputs: Vec<_> = corpus
        .iter()
        .cloned()
        .chain(mutations(&corpus, CASES, &WORDS))
        .collect();
    let responses = send_all(payrelay.addr(), &inputs);
    assert!(
        payrelay.try_exit().is_none(),
        "it has ended:\n{}",
        payrelay.log()
    );
    responses.assert_variety();
    assert_all_are_stored(payrelay.addr(), &responses.payments);
    let ready = Client::connect(payrelay.addr()).get("/health/ready");
    assert_eq!(ready.status, 200);
    let status = payrelay.terminate();
    assert_eq!(status.code(), Some(0), "{}", payrelay.log());
    assert!(!payrelay.log().contains("panic"), "{}", payrelay.log());
}
