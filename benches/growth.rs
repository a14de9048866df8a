//! What a table that has grown costs: intake, drain and start with millions of finished rows, and
//! payments during a purge. The baseline is an empty database in the same run.
#![expect(clippy::unwrap_used, reason = "a benchmark fails by panicking")]
#![expect(clippy::cast_precision_loss, reason = "figures are small")]

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use payrelay::domain::timestamp::Timestamp;
use payrelay::relay::Step;
use payrelay::relay::in_process::InProcess;
use payrelay::store::publication::{self, Destination, Receipt};
use payrelay::store::{Transaction, delivery, outbox};
use rusqlite::Connection;
use testkit::bench::grown::grown;
use testkit::bench::load::{self, payment};
use testkit::bench::{Figure, Goal, Plan, Table, WARM_UP, folder, start_without_kafka as start};
use testkit::store::Database;
use testkit::wait_until;

/// A folder with a copy of a database, or with none.
fn copy(of: Option<&Path>) -> tempfile::TempDir {
    let dir = folder();
    if let Some(path) = of {
        let copy = dir.path().join("payrelay.db");
        fs::copy(path, &copy).unwrap();
        // Written back now, not while something is timed.
        fs::File::open(copy).unwrap().sync_all().unwrap();
    }
    dir
}

/// With this number of users, in random order.
fn intake(dir: &Path, plan: Plan, users: u64) -> f64 {
    let payrelay = start(dir, &[]);
    let base = users << 20;
    let outcome = load::closed(
        payrelay.addr(),
        64,
        (WARM_UP, plan.span),
        201,
        move |out, number| {
            payment(
                out,
                number.wrapping_mul(0x9e37_79b9) % users,
                base + number,
                1,
            );
        },
    );
    outcome.rate()
}

/// Milliseconds from the start of the process to its first answer.
fn start_up(dir: &Path) -> f64 {
    let started = Instant::now();
    let payrelay = start(dir, &[]);
    let ready = testkit::http::Client::connect(payrelay.addr()).get("/health/ready");
    assert_eq!(ready.status, 200);
    started.elapsed().as_secs_f64() * 1000.0
}

fn drain(dir: tempfile::TempDir, count: i64) -> f64 {
    let database = Database::open_in(dir);
    for first in (0..count).step_by(1000) {
        let first = first + (1 << 41);
        database.pay(first % 997, first..first + 1000);
    }
    let (mut relay, _waker) = testkit::bench::relay(&database, InProcess);
    let started = Instant::now();
    let last = std::iter::repeat_with(|| relay.step()).find(|step| *step != Step::Progress);
    let elapsed = started.elapsed();
    assert_eq!(last, Some(Step::Idle));
    assert_eq!(
        database.number("SELECT count(*) FROM outbox WHERE status = 'INIT'"),
        0
    );
    count as f64 / elapsed.as_secs_f64()
}

/// Bytes of file for each payment when a hundred thousand at a time are published, delivered and
/// purged, again and again. Also returns those of the payments and their history alone.
fn bytes_a_payment(rounds: i64) -> (f64, f64) {
    let count = 100_000;
    let database = Database::open_in(folder());
    let pages = || {
        database.number("SELECT page_count * page_size FROM pragma_page_count, pragma_page_size")
    };
    let round = |round: i64| {
        for first in (round * count..(round + 1) * count).step_by(1000) {
            database.pay(first % 997, first..first + 1000);
            let publish = move |tx: &Transaction<'_>| {
                let receipts: Vec<_> = (first + 1..=first + 1000)
                    .map(|id| Receipt {
                        outbox_id: id,
                        place: Destination::Delivery,
                    })
                    .collect();
                publication::record_publications(tx, &receipts, Timestamp::now())?;
                let ids: Vec<_> = (first + 1..=first + 1000).collect();
                delivery::mark_deliveries_delivered(
                    tx,
                    &ids,
                    delivery::Carrier::Single,
                    Timestamp::now(),
                )
            };
            database.store().write(publish).unwrap();
        }
        let later = Timestamp::now().plus(Duration::from_secs(1));
        while database
            .store()
            .write(move |tx| outbox::purge_outbox(tx, later, 1000))
            .unwrap()
            > 0
        {}
    };
    round(0);
    let first = pages();
    (1..rounds).for_each(round);
    let all = (pages() - first) as f64 / (count * (rounds - 1)) as f64;
    let kept = "SELECT sum(pgsize) FROM dbstat WHERE name IN ('payment', 'payment_paid')";
    (all, database.number(kept) as f64 / (count * rounds) as f64)
}

/// The p99 of POST at 600/s, in milliseconds, and how many rows a second the purge has deleted
/// meanwhile.
fn post_p99(dir: &Path, span: Duration, purge: bool) -> (f64, f64) {
    let retention = if purge { "1d" } else { "3650d" };
    let payrelay = start(
        dir,
        &[
            ("PAYRELAY_SCHEDULER_INTERVAL", "10ms"),
            ("PAYRELAY_SCHEDULER_RETENTION", retention),
        ],
    );
    let count = || {
        let connection = Connection::open(dir.join("payrelay.db")).unwrap();
        connection
            .query_row("SELECT count(*) FROM delivery", [], |row| {
                row.get::<_, i64>(0)
            })
            .unwrap()
    };
    let before = count();
    if purge {
        wait_until("the purge to have begun", Duration::from_secs(10), || {
            count() < before
        });
    }
    let before = count();
    let started = Instant::now();
    let mut outcome = load::open(payrelay.addr(), 16, 600.0, span, |out, number| {
        payment(out, number % 1000, (1 << 42) + number, 1);
    });
    assert_eq!(outcome.other, 0);
    (
        outcome.percentile(99.0),
        (before - count()) as f64 / started.elapsed().as_secs_f64(),
    )
}

/// Each figure twice: with an empty and with a grown database.
#[derive(Default)]
struct Figures {
    start: [Figure; 2],
    intake: [Figure; 2],
    users: [Figure; 2],
    drain: [Figure; 2],
    /// With the purge, and without it.
    purging: [Figure; 2],
    purged: Figure,
    /// The whole file, and payments and their history alone.
    bytes: [Figure; 2],
}

impl Figures {
    fn measure_sizes(&mut self, plan: Plan, grown: &Path, rows: u64) {
        for (side, database) in [None, Some(grown)].into_iter().enumerate() {
            let dir = copy(database);
            if side == 0 {
                assert!(start(dir.path(), &[]).terminate().success());
            }
            self.start[side].0.push(start_up(dir.path()));
            self.intake[side].0.push(intake(dir.path(), plan, 1000));
            self.drain[side].0.push(drain(copy(database), 100_000));
            let many_users = intake(copy(database).path(), plan, rows / 10);
            self.users[side].0.push(many_users);
        }
    }

    fn measure_purge(&mut self, plan: Plan, grown: &Path) {
        let span = Duration::from_secs(if plan.quick { 5 } else { 20 });
        let dir = copy(Some(grown));
        self.purging[1].0.push(post_p99(dir.path(), span, false).0);
        let (p99, rate) = post_p99(dir.path(), span, true);
        self.purging[0].0.push(p99);
        self.purged.0.push(rate);
        let (all, kept) = bytes_a_payment(6);
        self.bytes[0].0.push(all);
        self.bytes[1].0.push(kept);
    }

    fn add_sizes(&self, table: &mut Table, rows: u64) {
        let name = |what: &str| format!("{what} with {rows} finished payments");
        let intake = name("64 connections: payments");
        let users = format!("{intake}, of {} users", rows / 10);
        for (name, [empty, full]) in [
            (intake, &self.intake),
            (users, &self.users),
            (name("100,000 events drained"), &self.drain),
        ] {
            let baseline = ("empty", empty.clone());
            table.against(name, "/s", full.clone(), baseline, Goal::RatioAtLeast(0.9));
        }
        let [empty, full] = &self.start;
        table.against(
            name("start to the first answer"),
            "ms",
            full.clone(),
            ("empty", empty.clone()),
            Goal::RatioAtMost(1.1),
        );
        table.row("", "ms", full.clone(), Goal::AtMost(100.0));
    }

    fn add_purge(self, table: &mut Table) {
        let [with, without] = self.purging;
        table.against(
            "POST at 600/s while the purge works, p99",
            "ms",
            with,
            ("without it", without),
            Goal::RatioAtMost(1.5),
        );
        let [all, kept] = self.bytes;
        let name =
            "the file grows by, a payment, with 100,000 at a time published, delivered and purged";
        table.against(
            name,
            "bytes",
            all,
            ("payment and history alone", kept),
            Goal::RatioAtMost(1.1),
        );
        table.row("purged meanwhile", "rows/s", self.purged, Goal::None);
    }
}

fn main() {
    let plan = Plan::from_args();
    let rows: u64 = if plan.quick { 1_000_000 } else { 10_000_000 };
    let grown = grown(rows);
    let mut figures = Figures::default();
    for _ in 0..3 {
        figures.measure_sizes(plan, &grown, rows);
        figures.measure_purge(plan, &grown);
    }
    let mut table = Table::new("growth");
    figures.add_sizes(&mut table, rows);
    figures.add_purge(&mut table);
    table.finish();
}
