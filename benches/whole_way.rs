//! The whole way at once: HTTP in, Kafka, the consumer, the delivery table, Slack. Against the
//! intake alone, and against Kafka's own producer benchmark on the same broker in the same run.
#![expect(clippy::unwrap_used, reason = "a benchmark fails by panicking")]
#![expect(clippy::cast_precision_loss, reason = "figures are small")]

use std::path::Path;
use std::time::{Duration, Instant};

use rusqlite::{Connection, OpenFlags};
use testkit::bench::load::{self, Outcome, Since, payment};
use testkit::bench::{Figure, Goal, Plan, Table, WARM_UP, delivery, folder};
use testkit::kafka::{Broker, producer_performance};
use testkit::process::{Options, Payrelay};
use testkit::slack::FakeSlack;
use testkit::{topic, wait_until};

const CONNECTIONS: usize = 64;

/// The bytes of a record of ours: key, value and headers.
const RECORD_BYTES: usize = 250;

/// The real binary on a database of its own, with its Slack.
struct System {
    payrelay: Payrelay,
    _slack: FakeSlack,
    dir: tempfile::TempDir,
}

impl System {
    /// With Kafka, consumer and a fast Slack; or without a Kafka that it can reach.
    fn start(bootstrap: &str, topic: &str) -> Self {
        Self::start_in(folder(), bootstrap, topic)
    }

    fn start_in(dir: tempfile::TempDir, bootstrap: &str, topic: &str) -> Self {
        let slack = FakeSlack::start();
        let url = slack.url();
        let env = [
            ("PAYRELAY_PUBLISHER_KIND", "kafka"),
            ("PAYRELAY_KAFKA_DELIVERY", delivery()),
            ("PAYRELAY_KAFKA_BOOTSTRAP_SERVERS", bootstrap),
            ("PAYRELAY_KAFKA_TOPIC", topic),
            ("PAYRELAY_KAFKA_GROUP", topic),
            ("PAYRELAY_SLACK_WEBHOOK_URL", &url),
            ("PAYRELAY_SLACK_MESSAGES_PER_SECOND", "100000"),
            ("PAYRELAY_SLACK_SUMMARY_OVER", "0"),
        ];
        let payrelay = Payrelay::start(Options::new(dir.path(), &env));
        Self {
            payrelay,
            _slack: slack,
            dir,
        }
    }

    /// The first payment is delivered: every thread has its connection.
    fn warm_up(&self) {
        load::open(
            self.payrelay.addr(),
            1,
            10.0,
            Duration::from_secs(1),
            |out, number| {
                payment(out, 0, number, 1);
            },
        );
        self.wait_until_all_is_delivered();
    }

    fn wait_until_all_is_delivered(&self) {
        wait_until("every delivery", Duration::from_mins(5), || {
            undelivered(self.dir.path()) == 0
        });
    }

    fn closed(&self, plan: Plan, base: u64) -> Outcome {
        let spans = (WARM_UP, plan.span);
        load::closed(
            self.payrelay.addr(),
            CONNECTIONS,
            spans,
            201,
            move |out, number| {
                payment(out, number % 1000, base + number, 1);
            },
        )
    }

    fn paced(&self, plan: Plan, base: u64, rate: f64) -> Outcome {
        let load = (plan.span, Since::Due);
        load::paced(self.payrelay.addr(), 128, rate, load, move |out, number| {
            payment(out, number % 1000, base + number, 1);
        })
    }
}

/// Events without a finished delivery. There is one partition, so both come in order.
fn undelivered(dir: &Path) -> i64 {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY;
    let connection = Connection::open_with_flags(dir.join("payrelay.db"), flags).unwrap();
    let sql = "SELECT (SELECT ifnull(max(id), 0) FROM outbox) - (SELECT ifnull(max(outbox_id), 0) \
        FROM delivery) + (SELECT count(*) FROM delivery WHERE status IN ('PENDING', 'SENDING'))";
    connection.query_row(sql, [], |row| row.get(0)).unwrap()
}

#[derive(Default)]
struct Figures {
    alone: Figure,
    alone_p99: Figure,
    whole: Figure,
    whole_p99: Figure,
    half_alone_p99: Figure,
    half_whole_p99: Figure,
    drain: Figure,
    kafka: Figure,
}

impl Figures {
    fn measure(&mut self, broker: &Broker, plan: Plan, run: usize) {
        let topic = format!("whole-{run}");
        let alone = System::start("127.0.0.1:1", &topic);
        let mut outcome = alone.closed(plan, 1 << 40);
        self.alone.0.push(outcome.rate());
        self.alone_p99.0.push(outcome.percentile(99.0));

        let whole = System::start(&broker.bootstrap(), &topic);
        whole.warm_up();
        let mut outcome = whole.closed(plan, 1 << 40);
        self.whole.0.push(outcome.rate());
        self.whole_p99.0.push(outcome.percentile(99.0));
        whole.wait_until_all_is_delivered();

        let half = outcome.rate() / 2.0;
        let mut outcome = whole.paced(plan, 1 << 41, half);
        self.half_whole_p99.0.push(outcome.percentile(99.0));
        drop(whole);
        let mut outcome = alone.paced(plan, 1 << 41, half);
        self.half_alone_p99.0.push(outcome.percentile(99.0));
    }

    /// Payments that were accepted while Kafka was unavailable, from the start of the program that
    /// reaches it to the last delivery. The time of the program's start is part of it.
    fn measure_drain(&mut self, broker: &Broker, run: usize, count: u64) {
        let topic = format!("drain-{run}");
        let System { payrelay, dir, .. } = System::start("127.0.0.1:1", &topic);
        let requests = (count / 100) as f64;
        load::paced(
            payrelay.addr(),
            8,
            requests,
            (Duration::from_secs(1), Since::Sent),
            |out, number| {
                payment(out, number % 1000, number * 100, 100);
            },
        );
        drop(payrelay);
        topic::create(&broker.bootstrap(), &topic, &[]);
        let before = undelivered(dir.path());
        let started = Instant::now();
        let system = System::start_in(dir, &broker.bootstrap(), &topic);
        system.wait_until_all_is_delivered();
        self.drain
            .0
            .push(before as f64 / started.elapsed().as_secs_f64());
        drop(system);
        let topic = format!("performance-{run}");
        topic::create(&broker.bootstrap(), &topic, &[]);
        self.kafka
            .0
            .push(producer_performance(broker, &topic, count, RECORD_BYTES));
    }

    fn add_rows(self, table: &mut Table) {
        table.against(
            "64 connections, everything on: payments",
            "/s",
            self.whole,
            ("the intake alone", self.alone),
            Goal::RatioAtLeast(0.55),
        );
        table.against(
            "64 connections, everything on: p99",
            "ms",
            self.whole_p99,
            ("the intake alone", self.alone_p99),
            Goal::RatioAtMost(3.0),
        );
        table.against(
            "half of that rate, everything on: p99",
            "ms",
            self.half_whole_p99,
            ("the intake alone at the same rate", self.half_alone_p99),
            Goal::RatioAtMost(1.5),
        );
        table.against(
            "events drained the whole way, with the start",
            "/s",
            self.drain,
            ("ProducerPerformance, acks=all", self.kafka),
            Goal::RatioAtLeast(0.3),
        );
    }
}

fn main() {
    let plan = Plan::from_args();
    let count = if plan.quick { 100_000 } else { 300_000 };
    let broker = Broker::start("4.4.0");
    let mut figures = Figures::default();
    for run in 0..plan.runs {
        figures.measure(&broker, plan, run);
        figures.measure_drain(&broker, run, count);
    }
    let mut table = Table::new("whole_way");
    figures.add_rows(&mut table);
    table.finish();
}
