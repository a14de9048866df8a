//! payrelay next to litestream: kills of both under load, a lost machine, and full load.

mod replication;

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use rusqlite::Connection;
use testkit::bench::load::{self, Outcome, payment};
use testkit::bench::{WARM_UP, folder};
use testkit::http::{Client, pay};
use testkit::process::Payrelay;
use testkit::store::wait_until_all_is_delivered;
use testkit::timed::alone;
use testkit::{StopOnDrop, let_time_pass, random};

use self::replication::{Machine, VERSION};
use crate::clients::{Clients, Receipt};
use crate::report::Report;

const LIMIT: Duration = Duration::from_mins(3);
const LOAD: Duration = Duration::from_mins(1);
const CLIENTS: usize = 8;
const FULL_LOAD: Duration = Duration::from_secs(30);

/// The replica may be this old at full load.
const LAG_MAX: Duration = Duration::from_secs(10);

/// What was seen while something else ran.
#[derive(Debug, Default)]
struct Seen {
    wal_bytes_max: u64,
    /// The longest time without a new file in the replica.
    replica_age_max: Duration,
}

/// Runs `work`, and looks at the files and at litestream meanwhile.
fn watch<T>(machine: &Machine, work: impl FnOnce() -> T) -> (T, Seen) {
    let seen = Mutex::new(Seen::default());
    let done = AtomicBool::new(false);
    let result = thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Relaxed) {
                let mut seen = seen.lock().unwrap();
                seen.wal_bytes_max = seen.wal_bytes_max.max(machine.wal_bytes());
                let age = machine.replica_age().unwrap_or_default();
                seen.replica_age_max = seen.replica_age_max.max(age);
                drop(seen);
                let_time_pass(Duration::from_millis(20));
            }
        });
        let _stop = StopOnDrop(&done);
        work()
    });
    (result, seen.into_inner().unwrap())
}

/// The payments of a database: reservation by id.
fn payments(database: &Path) -> BTreeMap<i64, i64> {
    let connection = Connection::open(database).unwrap();
    let mut statement = connection
        .prepare("SELECT id, reservation_id FROM payment")
        .unwrap();
    let rows = statement
        .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))
        .unwrap();
    rows.map(Result::unwrap).collect()
}

/// The newest payment: its id, and when it was executed, in microseconds.
fn newest_payment(database: &Path) -> (i64, i64) {
    let sql = "SELECT id, executed_at FROM payment ORDER BY id DESC LIMIT 1";
    let read = |row: &rusqlite::Row<'_>| Ok((row.get(0)?, row.get(1)?));
    let connection = Connection::open(database).unwrap();
    connection.query_row(sql, [], read).unwrap()
}

fn log_lines(log: &str, level: &str) -> usize {
    let level = format!("level={level}");
    log.lines().filter(|line| line.contains(&level)).count()
}

/// Kills payrelay and litestream in turn, at random moments, until the load is over.
fn kill_in_turn(machine: &Machine, clients: &Clients) -> Outcomes {
    let mut random = fastrand::Rng::with_seed(random::seed(|| fastrand::u64(..)));
    let mut payrelay = machine.start_payrelay(&[]);
    let mut litestream = machine.start_litestream();
    clients.set_address(Some(payrelay.addr()));
    let start = Instant::now();
    let mut kills = [0, 0];
    while start.elapsed() < LOAD {
        let_time_pass(Duration::from_millis(random.u64(2000..5000)));
        let turn = (kills[0] + kills[1]) % 2;
        if turn == 0 {
            clients.set_address(None);
            payrelay.kill9();
            payrelay = machine.start_payrelay(&[]);
            clients.set_address(Some(payrelay.addr()));
        } else {
            litestream.kill();
            litestream = machine.start_litestream();
        }
        kills[turn] += 1;
    }
    // Whatever is answered now is in the replica after the command.
    let answered_before_sync = clients.answered();
    machine.run_page_commands("litestream sync");
    let_time_pass(Duration::from_millis(random.u64(1000..2500)));
    // The machine is lost.
    litestream.kill();
    payrelay.kill9();
    let lost_at = Instant::now();
    clients.set_address(None);
    Outcomes {
        kills,
        answered_before_sync,
        lost_at,
        span: start.elapsed(),
    }
}

struct Outcomes {
    /// Of payrelay, of litestream.
    kills: [usize; 2],
    answered_before_sync: usize,
    lost_at: Instant,
    span: Duration,
}

/// Starts payrelay on the adopted copy. It gives no id again, delivers everything, and the audit is
/// clean. litestream continues with the same replica.
fn continue_on(machine: &Machine, receipts: &[Receipt]) {
    let mut given: BTreeSet<i64> = receipts.iter().map(|receipt| receipt.id).collect();
    let payrelay = machine.start_payrelay(&[]);
    let log = payrelay.log();
    assert!(log.contains("New ids begin at"), "{log}");
    let mut client = Client::connect(payrelay.addr());
    for round in 0..100 {
        // Reservations that the clients did not have.
        let ids = pay(
            &mut client,
            1,
            1_000_000_000 + round..=1_000_000_000 + round,
        );
        for id in ids {
            assert!(given.insert(id), "{id} was given twice");
        }
    }
    wait_until_all_is_delivered(&machine.database(), LIMIT);
    let audit = machine.run_page_commands("payrelay audit");
    println!("{audit}");
    let mut litestream = machine.start_litestream();
    machine.run_page_commands("litestream sync");
    let expected = payments(&machine.database());
    litestream.kill();
    drop(payrelay);
    let third = machine.replacement("third");
    third.run_page_commands("litestream restore");
    assert_eq!(payments(&third.database()), expected);
}

#[test]
fn a_lost_machine_loses_only_what_was_answered_after_the_last_sync() {
    let _alone = alone();
    let folder = folder();
    let machine = Machine::new(&folder.path().join("first"), &folder.path().join("replica"));
    let clients = Clients::start(CLIENTS);
    let (outcomes, seen) = watch(&machine, || kill_in_turn(&machine, &clients));
    let (receipts, longest) = clients.stop();

    let second = machine.replacement("second");
    second.run_page_commands("litestream restore");
    let mode = second.database().metadata().unwrap().permissions().mode();
    assert_eq!(
        mode & 0o777,
        0o600,
        "the copy is as private as the database"
    );
    assert!(
        !second.has_folder_of_litestream(),
        "payrelay warns of a copy that was not adopted by this"
    );
    let copy = payments(&second.database());
    check_copy(&copy, &receipts, outcomes.answered_before_sync);
    continue_on(&second, &receipts);

    let what_ran = format!(
        "payrelay next to litestream {VERSION}, {CLIENTS} clients, kill -9 of both in turn, then \
            the loss of the machine under load. Restored, adopted, audit clean."
    );
    let mut report = Report::new("litestream", &what_ran);
    let count = f64::from(u32::try_from(receipts.len()).unwrap());
    let rate = count / outcomes.span.as_secs_f64();
    let [of_payrelay, of_litestream] = outcomes.kills;
    report.add("load", format!("{:.0?}", outcomes.span));
    report.add("kills of payrelay", of_payrelay);
    report.add("kills of litestream", of_litestream);
    report.add("payments a second, kills included", format!("{rate:.0}"));
    report.add("longest request without a kill", format!("{longest:.0?}"));
    let lost = receipts
        .iter()
        .filter(|receipt| !copy.contains_key(&receipt.id));
    let oldest = lost
        .clone()
        .map(|receipt| outcomes.lost_at.saturating_duration_since(receipt.answered));
    report.add("payments lost with the machine", lost.count());
    report.add(
        "age of the oldest lost payment",
        format!("{:.1?}", oldest.max().unwrap_or_default()),
    );
    add_seen(&mut report, &machine, &seen);
    report.finish();
}

/// The copy has every payment that was answered before the last sync, and no other payment under
/// its id.
fn check_copy(copy: &BTreeMap<i64, i64>, receipts: &[Receipt], answered_before_sync: usize) {
    for (index, receipt) in receipts.iter().enumerate() {
        let found = copy.get(&receipt.id);
        let may_be_lost = index >= answered_before_sync;
        assert!(
            found == Some(&receipt.reservation) || (found.is_none() && may_be_lost),
            "{index} of {answered_before_sync}: {receipt:?}, and the copy has {found:?}"
        );
    }
}

fn add_seen(report: &mut Report, machine: &Machine, seen: &Seen) {
    let log = machine.litestream_log();
    report.add(
        "WAL at most",
        format!("{} MB", seen.wal_bytes_max / 1_000_000),
    );
    report.add(
        "longest time without a new file in the replica",
        format!("{:.1?}", seen.replica_age_max),
    );
    report.add("errors that litestream logged", log_lines(&log, "ERROR"));
    report.add("warnings that litestream logged", log_lines(&log, "WARN"));
}

/// The load of the benchmark of the intake: 64 connections, as fast as they can.
fn load_fully(payrelay: &Payrelay, span: Duration, first_reservation: u64) -> Outcome {
    let request = move |out: &mut Vec<u8>, number| {
        payment(out, number % 1000, first_reservation + number, 1);
    };
    let outcome = load::closed(payrelay.addr(), 64, (WARM_UP, span), 201, request);
    assert_eq!(outcome.other, 0, "every payment is accepted");
    outcome
}

/// At full load the writer never rests. litestream still gets the locks that it needs.
#[test]
fn full_load_does_not_starve_litestream() {
    let _alone = alone();
    let folder = folder();
    let machine = Machine::new(&folder.path().join("first"), &folder.path().join("replica"));
    // Kafka is unavailable, so only the intake works.
    let payrelay = machine.start_payrelay(&[
        ("PAYRELAY_PUBLISHER_KIND", "kafka"),
        ("PAYRELAY_KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:1"),
    ]);
    let mut without = load_fully(&payrelay, FULL_LOAD / 3, 1 << 32);
    let mut litestream = machine.start_litestream();
    machine.run_page_commands("litestream sync");
    let (mut with, seen) = watch(&machine, || load_fully(&payrelay, FULL_LOAD, 2 << 32));
    litestream.kill();

    let (newest, newest_at) = newest_payment(&machine.database());
    let second = machine.replacement("second");
    second.run_page_commands("litestream restore");
    let (copied, copied_at) = newest_payment(&second.database());
    let lag = Duration::from_micros((newest_at - copied_at).unsigned_abs());

    let mut litestream = machine.start_litestream();
    let start = Instant::now();
    machine.run_page_commands("litestream sync");
    let catch_up = start.elapsed();
    litestream.kill();
    let what_ran = format!(
        "The load of the benchmark of the intake next to litestream {VERSION}: 64 connections \
            without a pause, on the same cores. Then litestream is killed, and the replica \
            restored."
    );
    let mut report = Report::new("litestream-full-load", &what_ran);
    for (name, outcome) in [("without", &mut without), ("with", &mut with)] {
        let rate = outcome.rate();
        report.add(
            &format!("payments a second {name} litestream"),
            format!("{rate:.0}"),
        );
        for percent in [99.0, 100.0] {
            let latency = outcome.percentile(percent);
            report.add(
                &format!("p{percent} {name} litestream"),
                format!("{latency:.1} ms"),
            );
        }
    }
    report.add(
        "age of the replica at the end of the load",
        format!("{lag:.1?}"),
    );
    report.add("payments that the replica lacked then", newest - copied);
    report.add(
        "time to replicate the rest without load",
        format!("{catch_up:.1?}"),
    );
    add_seen(&mut report, &machine, &seen);
    report.finish();
    assert!(lag < LAG_MAX, "the replica is {lag:?} behind");
}
