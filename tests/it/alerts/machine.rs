//! Faults of the machine, of its operator, and of payrelay itself.

use std::fs;
use std::net::SocketAddr;
use std::time::Duration;

use rusqlite::Connection;
use testkit::hostile::Machine;
use testkit::http::{self, Client};
use testkit::process::{Options, Payrelay, run_command};
use testkit::scrape::{History, Scrape};
use testkit::wait_until;

use super::{FAULT, SAMPLED, check, healthy, is_idle, pay, shift_times};

const LIMIT: Duration = Duration::from_mins(1);

/// Two scrapes of a state, the second with a later sample.
fn scrapes(address: SocketAddr, what: &str, is_so: impl Fn(&Scrape) -> bool) -> [Scrape; 2] {
    let first = Scrape::until(address, what, &is_so);
    let sampled = |scrape: &Scrape| scrape.value(SAMPLED);
    let before = sampled(&first);
    let last = Scrape::until(address, what, |scrape| {
        sampled(scrape) > before && is_so(scrape)
    });
    [first, last]
}

fn then(history: &History, [first, last]: [Scrape; 2]) -> History {
    history.clone().then(FAULT, first, last)
}

#[test]
fn a_full_disk_a_refused_reload_and_a_kill_are_alerts() {
    let machine = Machine::new();
    machine.set("full", "100000000000");
    let config = machine.folder().join("config.toml");
    fs::write(&config, "[database]\n").unwrap();
    let mut payrelay = Payrelay::start(machine.options(&[]));
    pay(&payrelay, 1);
    let well = healthy(&payrelay);
    let free = |scrape: &Scrape| scrape.value("payrelay_disk_free_bytes");

    machine.set("full", "100000000");
    let low = scrapes(payrelay.addr(), "a disk that is low", |scrape| {
        free(scrape) < 2e8
    });
    let low = then(&well, low)
        .fires(Duration::from_mins(9), &[])
        .fires(Duration::from_mins(11), &["PayrelayDiskLow"]);
    check(&low);

    machine.set("full", "10000000");
    let full = scrapes(payrelay.addr(), "a payrelay that refuses", |scrape| {
        free(scrape) < 2e7 && scrape.value("payrelay_ready") < 0.5
    });
    let full = then(&well, full)
        .fires(Duration::from_secs(15), &[])
        .fires(Duration::from_secs(45), &["PayrelayRefusesPayments"])
        .fires(
            Duration::from_mins(11),
            &["PayrelayDiskLow", "PayrelayRefusesPayments"],
        );
    check(&full);

    machine.set("full", "100000000000");
    let well = healthy(&payrelay);
    let reloaded = |scrape: &Scrape| scrape.value("payrelay_config_reload_success") > 0.5;
    fs::write(&config, "[database]\nno_such_key = 1\n").unwrap();
    payrelay.signal("HUP");
    let refused = scrapes(payrelay.addr(), "a refused reload", |scrape| {
        !reloaded(scrape)
    });
    fs::write(&config, "[database]\n").unwrap();
    payrelay.signal("HUP");
    let accepted = scrapes(payrelay.addr(), "a reload", reloaded);
    let reload = then(&well, refused).fires(Duration::from_secs(15), &["PayrelayReloadFailed"]);
    let reload = then(&reload, accepted).fires(Duration::from_secs(15), &[]);
    check(&reload);

    payrelay.kill9();
    let gone = Scrape::of(payrelay.addr());
    assert!(!gone.is_up());
    let down = then(&well, [gone.clone(), gone])
        .fires(Duration::from_secs(45), &[])
        .fires(Duration::from_secs(75), &["PayrelayDown"]);
    check(&down);
}

/// No payment is accepted, and both the health and the metrics say so.
fn check_not_ready(payrelay: &Payrelay, scrape: &Scrape) {
    assert!(scrape.value("payrelay_ready") < 0.5);
    let health = Client::connect(payrelay.addr()).get("/health/ready");
    assert_eq!(health.status, 503);
    let database = &health.json()["components"]["database"];
    let error = database["error"].as_str().unwrap();
    assert!(error.starts_with("the disk does not respond"), "{database}");
}

#[test]
fn a_disk_that_syncs_slowly_or_hangs_is_an_alert() {
    let machine = Machine::new();
    let payrelay = Payrelay::start(machine.options(&[("PAYRELAY_DATABASE_QUEUE_MAX", "10")]));
    pay(&payrelay, 1);
    let well = healthy(&payrelay);

    machine.set("slow", "300 -wal");
    let first = Scrape::of(payrelay.addr());
    for reservation in 2..6 {
        pay(&payrelay, reservation);
    }
    machine.clear("slow");
    let last = Scrape::until(payrelay.addr(), "nothing that waits", is_idle);
    let slow = then(&well, [first, last])
        .fires(Duration::from_mins(9), &[])
        .fires(Duration::from_mins(16), &["PayrelayCommitSlow"]);
    check(&slow);

    let well = healthy(&payrelay);
    machine.set("hang", "-wal");
    let mut clients = Vec::new();
    let queued = "payrelay_writer_queue_payments";
    wait_until("a queue that is nearly full", LIMIT, || {
        let scrape = Scrape::of(payrelay.addr());
        let is_full =
            scrape.value(queued) > 0.8 * scrape.value("payrelay_writer_queue_max_payments");
        if !is_full {
            let mut client = Client::connect(payrelay.addr());
            let reservation = 100 + i64::try_from(clients.len()).unwrap();
            let body = http::payment(reservation, 100);
            let request = http::request("POST /payments", "", &body);
            client.send_raw(request.as_bytes()).unwrap();
            clients.push(client);
        }
        is_full
    });
    let writer = "payrelay_thread_heartbeat_timestamp_seconds{thread=\"writer\"}";
    let last = Scrape::until(payrelay.addr(), "a writer without heartbeat", |scrape| {
        scrape.age(writer) > 40.0
    });
    check_not_ready(&payrelay, &last);
    machine.clear("hang");
    // The scheduler waits for the writer.
    let stuck = [
        "PayrelayThreadStuck{thread=\"scheduler\"}",
        "PayrelayThreadStuck{thread=\"writer\"}",
    ];
    let hang = then(&well, [last.clone(), last])
        .fires(Duration::from_secs(15), &[])
        .fires(Duration::from_secs(45), &["PayrelayRefusesPayments"])
        .fires(
            Duration::from_mins(2),
            &["PayrelayQueueFull", "PayrelayRefusesPayments"],
        )
        .fires(
            Duration::from_mins(4),
            &[
                "PayrelayQueueFull",
                "PayrelayRefusesPayments",
                stuck[0],
                stuck[1],
            ],
        );
    check(&hang);
    // It was the disk only.
    check(&healthy(&payrelay));
}

#[test]
fn a_missing_backup_and_a_growing_wal_are_alerts() {
    let folder = tempfile::tempdir().unwrap();
    let database = folder.path().join("payrelay.db");
    let payrelay = Payrelay::start(Options::new(folder.path(), &[]));
    pay(&payrelay, 1);
    let well = healthy(&payrelay);

    // Shortly before 26 hours, and more.
    let backup = "payrelay_operation_timestamp_seconds{operation=\"backup\",outcome=\"ok\"}";
    let old = |hours: f64| move |scrape: &Scrape| scrape.age(backup) > 3600.0 * hours;
    let sql = "UPDATE node SET created_at = created_at - 24 * 3600 * 1000000";
    shift_times("PayrelayBackupOld", &database, sql);
    let missing = scrapes(payrelay.addr(), "a database without backup", old(24.0));
    let missing = then(&well, missing).fires(Duration::from_mins(119), &[]);
    check(&missing);
    let sql = "UPDATE node SET created_at = created_at - 3 * 3600 * 1000000";
    shift_times("PayrelayBackupOld", &database, sql);
    let missing = scrapes(payrelay.addr(), "a database without backup", old(26.0));
    let (code, _, error) = run_command(folder.path(), &[], &["backup", "copy.db"]);
    assert_eq!(code, Some(0), "{error}");
    let made = scrapes(payrelay.addr(), "a backup", |scrape| {
        scrape.age(backup) < 60.0
    });
    let missing = then(&well, missing)
        .fires(Duration::from_mins(59), &[])
        .fires(
            Duration::from_mins(61),
            &["PayrelayBackupOld{operation=\"backup\"}"],
        );
    let missing = then(&missing, made).fires(Duration::from_secs(15), &[]);
    check(&missing);

    let well = healthy(&payrelay);
    let mut reader = Connection::open(&database).unwrap();
    let snapshot = reader.transaction().unwrap();
    let count = "SELECT count(*) FROM payment";
    let _: i64 = snapshot.query_row(count, [], |row| row.get(0)).unwrap();
    let size = "payrelay_wal_size_bytes";
    let mut client = Client::connect(payrelay.addr());
    let mut next = 1000;
    let mut grow_to = |mebibytes: f64| {
        wait_until("a WAL that grows", LIMIT, || {
            http::pay(&mut client, next, next..next + 1000);
            next += 1000;
            Scrape::of(payrelay.addr()).value(size) > mebibytes * 1024.0 * 1024.0
        });
        Scrape::until(payrelay.addr(), "nothing that waits", is_idle)
    };
    // Without the reader it would begin again at 16 MiB.
    let first = grow_to(18.0);
    let mut last = grow_to(22.0);
    last.simulate("PayrelayWalGrows", size, 600.0 * 1024.0 * 1024.0);
    drop(snapshot);
    let grown = then(&well, [first, last])
        .fires(Duration::from_mins(9), &[])
        .fires(Duration::from_mins(11), &["PayrelayWalGrows"]);
    check(&grown);
}
