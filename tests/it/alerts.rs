//! The alerts of packaging/prometheus: each is fired by a fault of a running payrelay, and by
//! nothing else. And the names in them and in the dashboard are those of a scrape.

mod dashboard;
mod kafka;
mod machine;
mod reference;
mod rules;
mod slack;

use std::path::Path;
use std::time::Duration;

use payrelay::domain::timestamp::Timestamp;
use rusqlite::Connection;
use testkit::http::{self, Client};
use testkit::process::Payrelay;
use testkit::scrape::{History, Scrape};

const SAMPLED: &str = "payrelay_sample_timestamp_seconds";

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// For how long payrelay was well before a fault.
const HEALTHY: Duration = Duration::from_mins(90);

/// For how long the series of a fault continue at least.
const FAULT: Duration = Duration::from_hours(2);

/// Stores a payment of this reservation.
fn pay(payrelay: &Payrelay, reservation: i64) {
    http::pay(&mut Client::connect(payrelay.addr()), 1, [reservation]);
}

/// Whether nothing waits. A scrape of a moment in which something did would continue as a fault.
fn is_idle(scrape: &Scrape) -> bool {
    let waiting = [
        "payrelay_outbox_pending_events",
        "payrelay_unconsumed_events",
        "payrelay_delivery_pending_payments{channel=\"default\"}",
    ];
    waiting.iter().all(|name| scrape.value(name) < 0.5)
}

/// Whether nothing waits, and each component works.
fn is_well(scrape: &Scrape) -> bool {
    is_idle(scrape) && scrape.smallest("payrelay_component_up") > 0.5
}

/// A payrelay that is well now: no alert fires.
fn healthy(payrelay: &Payrelay) -> History {
    let now = Timestamp::now().as_seconds();
    let first = Scrape::until(payrelay.addr(), "a payrelay that is well", |scrape| {
        scrape.value(SAMPLED) > now && scrape.value("payrelay_ready") > 0.5 && is_well(scrape)
    });
    let since = first.value(SAMPLED);
    let last = Scrape::until(payrelay.addr(), "a later sample", |scrape| {
        scrape.value(SAMPLED) > since && is_well(scrape)
    });
    History::new()
        .then(HEALTHY, first, last)
        .fires(Duration::from_mins(89), &[])
}

/// Has promtool evaluate packaging/prometheus/alerts.yml.
#[track_caller]
fn check(history: &History) {
    let file = Path::new(ROOT).join(rules::FILE);
    history.check(file.to_str().unwrap(), &rules::severities());
}

/// Changes times in the database for the sake of an alert, as docs/reference/alerts.md has to say.
fn shift_times(_alert: &str, database: &Path, sql: &str) {
    let connection = Connection::open(database).unwrap();
    connection.busy_timeout(Duration::from_secs(10)).unwrap();
    assert!(connection.execute(sql, []).unwrap() > 0, "{sql}");
}
