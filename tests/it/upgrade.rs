//! The database of each released version is served, restored and audited by this one.

use std::fs;
use std::path::{Path, PathBuf};

use testkit::http::{Client, request};
use testkit::paths;
use testkit::process::{Options, Payrelay, run_command};

/// Written by payrelay 0.2.0, as tests/data/README.md says.
fn released_database() -> PathBuf {
    paths::repository().join("tests/data/payrelay-0.2.0.db")
}

/// The request that stored its first payments, and the response of payrelay 0.2.0.
const KEY: &str = "Idempotency-Key: \"order-17\"\r\n";
const BODY: &str = concat!(
    r#"{"user_id": 42, "reservations": [{"reservation_id": 1001, "seat_price": 150000}, "#,
    r#"{"reservation_id": 1002, "seat_price": 9223372036854775807}]}"#
);
const RESPONSE: &str = include_str!("../data/payrelay-0.2.0.response.json");

fn run_command_in(dir: &Path, arguments: &[&str]) -> String {
    let (code, output, error) = run_command(dir, &[], arguments);
    assert_eq!(code, Some(0), "{arguments:?}: {output}{error}");
    output
}

/// What payrelay 0.2.0 has stored is still there, and new payments follow.
fn check_released_payments(payrelay: &Payrelay) {
    let mut client = Client::connect(payrelay.addr());
    let repeated = request("POST /payments", KEY, BODY);
    client.send_raw(repeated.as_bytes()).unwrap();
    let response = client.read_response();
    assert_eq!(response.header("idempotency-replayed"), Some("true"));
    assert_eq!(String::from_utf8_lossy(&response.body), RESPONSE);
    let history = client.get("/users/42/payment-history").json();
    assert_eq!(history["payments"].as_array().unwrap().len(), 3);
    let letters = client.get("/admin/dead-letters?all=true").json();
    let reason = &letters["dead_letters"][0]["reason"];
    assert_eq!(reason, "skipped by local user root: a broken text");
    let ids = testkit::http::pay(&mut client, 7, [2001]);
    assert!(ids[0] > 5, "{ids:?}");
}

#[test]
fn a_database_of_0_2_0_is_served_and_its_audit_is_clean() {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(released_database(), dir.path().join("payrelay.db")).unwrap();
    let mut payrelay = Payrelay::start(Options::new(dir.path(), &[]));
    check_released_payments(&payrelay);
    assert!(payrelay.terminate().success());
    run_command_in(dir.path(), &["audit", "--file-only"]);
}

#[test]
fn a_backup_of_0_2_0_is_restored() {
    let dir = tempfile::tempdir().unwrap();
    let copy = released_database();
    let copy = copy.to_str().unwrap();
    run_command_in(dir.path(), &["restore", copy, "--yes"]);
    let payrelay = Payrelay::start(Options::new(dir.path(), &[]));
    check_released_payments(&payrelay);
}
