//! Millions of payments, a million waiting events, and minutes of load with a short retention: what
//! do answers, start, memory and file cost then? The baseline is an empty database, or the same
//! load without a purge.
#![expect(clippy::unwrap_used, reason = "a benchmark fails by panicking")]
#![expect(clippy::cast_precision_loss, reason = "figures are small")]

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use rusqlite::{Connection, OpenFlags};
use testkit::bench::cost::rss_mb;
use testkit::bench::grown::grown;
use testkit::bench::load::{self, Since, payment};
use testkit::bench::{
    Figure, Goal, Plan, Table, folder, percentile, print_line, start_without_kafka as start,
};
use testkit::browser::Browser;
use testkit::http::Client;
use testkit::process::Payrelay;
use testkit::slack::FakeSlack;
use testkit::wait_for;

/// Answered often by a monitor or an operator.
const PATHS: [&str; 5] = [
    "/health/ready",
    "/admin/channels",
    "/admin/topic",
    "/admin/dead-letters",
    SCRAPE,
];

/// A scrape has a limit of its own: it is a hundred times longer than the other answers.
const SCRAPE: &str = "/metrics";

/// Makes the newest events of a grown database wait to be published.
fn make_wait(database: &Path, waiting: u64) {
    let connection = Connection::open(database).unwrap();
    let sql = format!(
        "PRAGMA synchronous = OFF; BEGIN;
         CREATE TEMP TABLE first AS SELECT max(id) - {waiting} AS id FROM outbox;
         DELETE FROM delivery WHERE outbox_id > (SELECT id FROM first);
         UPDATE outbox SET status = 'INIT', published_at = NULL, \"partition\" = NULL,
            \"offset\" = NULL WHERE id > (SELECT id FROM first);
         UPDATE node SET consumed_through = (SELECT id FROM first);
         COMMIT; PRAGMA wal_checkpoint(TRUNCATE);"
    );
    connection.execute_batch(&sql).unwrap();
}

/// The medians of each path, and from the start of the process to the first answer, in
/// milliseconds; and the memory after that, in megabytes.
fn measure_answers(dir: &Path) -> ([f64; PATHS.len()], f64, f64) {
    let started = Instant::now();
    let payrelay = start(dir, &[]);
    let mut client = Client::connect(payrelay.addr());
    assert_eq!(client.get("/health/live").status, 200);
    let start_ms = started.elapsed().as_secs_f64() * 1000.0;
    let medians = PATHS.map(|path| {
        let mut times: Vec<f64> = (0..200)
            .map(|_| {
                let asked = Instant::now();
                assert_eq!(client.get(path).status, 200, "{path}");
                asked.elapsed().as_secs_f64() * 1000.0
            })
            .collect();
        percentile(&mut times, 50.0)
    });
    (medians, start_ms, rss_mb(payrelay.pid()))
}

/// From the request for the page until its numbers show, in milliseconds, as the browser measures
/// it.
fn measure_page(dir: &Path) -> f64 {
    let payrelay = start(dir, &[]);
    let browser = Browser::start();
    browser.open(&format!("http://{}/ui/", payrelay.addr()));
    wait_for("the numbers of the page", Duration::from_mins(1), || {
        let mark = "return performance.getEntriesByName('shown')[0]?.startTime";
        browser.run(mark).as_f64()
    })
}

#[derive(Default)]
struct Scale {
    /// Each with a large database, and with an empty one.
    paths: [[Figure; 2]; PATHS.len()],
    start: [Figure; 2],
    memory: [Figure; 2],
    page: [Figure; 2],
}

impl Scale {
    fn measure(&mut self, large: &Path) {
        let empty = folder();
        assert!(start(empty.path(), &[]).terminate().success());
        for (side, dir) in [large, empty.path()].into_iter().enumerate() {
            let (medians, start_ms, memory) = measure_answers(dir);
            for (figures, median) in self.paths.iter_mut().zip(medians) {
                figures[side].0.push(median);
            }
            self.start[side].0.push(start_ms);
            self.memory[side].0.push(memory);
            self.page[side].0.push(measure_page(dir));
        }
    }

    fn add_rows(self, table: &mut Table) {
        let baseline = "an empty database";
        for (path, [large, empty]) in PATHS.into_iter().zip(self.paths) {
            let goal = if path == SCRAPE {
                Goal::AtMost(2.0)
            } else {
                Goal::RatioAtMost(1.5)
            };
            table.against(path, "ms", large, (baseline, empty), goal);
        }
        for (name, unit, [large, empty], goal) in [
            (
                "start to the first answer",
                "ms",
                self.start,
                Goal::AtMost(100.0),
            ),
            (
                "the page, until its numbers show",
                "ms",
                self.page,
                Goal::AtMost(1000.0),
            ),
            (
                "memory after that",
                "MB",
                self.memory,
                Goal::RatioAtMost(1.2),
            ),
        ] {
            table.against(name, unit, large, (baseline, empty), goal);
        }
    }
}

/// One load of 5,000 payments a second to the log, in parts of a minute.
struct Sustained {
    payrelay: Payrelay,
    _slack: FakeSlack,
    dir: tempfile::TempDir,
    part: Duration,
    sent: u64,
}

const RATE: f64 = 5000.0;

impl Sustained {
    fn start(retention: &str, part: Duration) -> Self {
        let dir = folder();
        let slack = FakeSlack::start();
        let env = [
            ("PAYRELAY_PUBLISHER_KIND", "application"),
            ("PAYRELAY_SCHEDULER_RETENTION", retention),
            ("PAYRELAY_SLACK_WEBHOOK_URL", &slack.url()),
            ("PAYRELAY_SLACK_MESSAGES_PER_SECOND", "1000"),
        ];
        Self {
            payrelay: start(dir.path(), &env),
            _slack: slack,
            dir,
            part,
            sent: 0,
        }
    }

    /// The p99 of POST in a part, in milliseconds.
    fn run_part(&mut self) -> f64 {
        let first = self.sent;
        let load = (self.part, Since::Due);
        let mut outcome = load::paced(self.payrelay.addr(), 64, RATE, load, move |out, number| {
            payment(out, number % 1000, first + number, 1);
        });
        assert_eq!(outcome.other, 0);
        self.sent += outcome.good;
        outcome.percentile(99.0)
    }

    fn file_bytes(&self) -> u64 {
        fs::metadata(self.dir.path().join("payrelay.db"))
            .unwrap()
            .len()
    }

    fn number(&self, sql: &str) -> f64 {
        let path = self.dir.path().join("payrelay.db");
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY;
        let connection = Connection::open_with_flags(path, flags).unwrap();
        connection
            .query_row(sql, [], |row| row.get::<_, f64>(0))
            .unwrap()
    }
}

/// With a retention of one part: after three parts, outbox and deliveries have reached their size.
fn measure_purge(table: &mut Table, parts: usize, part: Duration) {
    let mut without = Sustained::start("3650d", part);
    let baseline: Vec<f64> = (0..3).map(|_| without.run_part()).collect();
    drop(without);
    let mut with = Sustained::start(&format!("{}s", part.as_secs()), part);
    let mut latencies = Vec::new();
    let mut waiting = Vec::new();
    let mut before = (0, 0);
    for number in 0..parts {
        let p99 = with.run_part();
        let rows = with.number("SELECT CAST(count(*) AS REAL) FROM outbox");
        print_line(&format!(
            "part {number}: p99 {p99:.2} ms, {rows} rows in the outbox, file {} bytes",
            with.file_bytes()
        ));
        if number < 3 {
            before = (with.sent, with.file_bytes());
        } else {
            latencies.push(p99);
            waiting.push(rows / RATE);
        }
    }
    let grown = with.file_bytes() - before.1;
    let each = grown as f64 / (with.sent - before.0) as f64;
    let kept = with.number(
        "SELECT sum(pgsize) * 1.0 / (SELECT count(*) FROM payment) FROM dbstat \
            WHERE name IN ('payment', 'payment_paid')",
    );
    let runs = latencies.len().min(baseline.len());
    let last = latencies[latencies.len() - runs..].to_vec();
    table.against(
        "5,000/s with a short retention: POST p99",
        "ms",
        Figure(last),
        (
            "without a purge",
            Figure(baseline[baseline.len() - runs..].to_vec()),
        ),
        Goal::RatioAtMost(1.5),
    );
    table.row(
        "seconds of events in the outbox",
        "s",
        Figure(waiting),
        Goal::AtMost(part.as_secs_f64() * 1.2),
    );
    table.against(
        "the file grows by, a payment",
        "bytes",
        Figure(vec![each]),
        ("the payments alone", Figure(vec![kept])),
        Goal::RatioAtMost(1.1),
    );
}

fn main() {
    let plan = Plan::from_args();
    let (rows, waiting) = if plan.quick {
        (1_000_000, 100_000)
    } else {
        (10_000_000, 1_000_000)
    };
    let large = folder();
    let database = large.path().join("payrelay.db");
    fs::copy(grown(rows), &database).unwrap();
    make_wait(&database, waiting);
    let mut scale = Scale::default();
    (0..plan.runs).for_each(|_| scale.measure(large.path()));
    let mut table = Table::new("scale");
    scale.add_rows(&mut table);
    let (parts, part) = if plan.quick { (6, 10) } else { (10, 60) };
    measure_purge(&mut table, parts, Duration::from_secs(part));
    table.finish();
}
