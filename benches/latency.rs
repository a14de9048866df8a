//! How long a payment takes on its way at a steady rate, open loop: to the client, to Kafka, to
//! Slack.
#![expect(clippy::unwrap_used, reason = "a benchmark fails by panicking")]
#![expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    reason = "figures are small"
)]

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::unbounded;
use payrelay::domain::event::Event;
use payrelay::domain::payment::{NewPayment, Reservation};
use payrelay::domain::timestamp::Timestamp;
use payrelay::kafka::publisher::KafkaPublisher;
use payrelay::relay::publisher::{PublishOutcome, Publisher};
use payrelay::runtime::worker::{Waker, Worker};
use payrelay::store::Transaction;
use payrelay::store::payment::execute;
use serde_json::json;
use testkit::bench::load::{self, payment};
use testkit::bench::{
    Figure, Goal, Plan, Table, delivery, folder, kafka_settings, percentile, unless_transactions,
};
use testkit::http::Client;
use testkit::kafka::Broker;
use testkit::process::{Options, Payrelay};
use testkit::slack::{Answer, FakeSlack};
use testkit::store::Database;
use testkit::wait_until;

/// When each event, by its id, reached a point.
type Moments = Arc<Mutex<HashMap<i64, Instant>>>;

/// Remembers when each event was acked.
struct Timed {
    inner: KafkaPublisher,
    acked: Moments,
}

impl Publisher for Timed {
    fn publish(&mut self, batch: &[Event]) -> PublishOutcome {
        let published = self.inner.publish(batch);
        let now = Instant::now();
        let mut acked = self.acked.lock().unwrap();
        for receipt in &published.receipts {
            acked.entry(receipt.outbox_id).or_insert(now);
        }
        published
    }

    fn name(&self) -> &'static str {
        self.inner.name()
    }
}

/// Pays without HTTP, so that the moment of the commit is known.
struct Payer {
    database: Database,
    waker: Waker,
    committed: Moments,
}

impl Payer {
    fn pay(&self, number: i64) {
        let new = NewPayment {
            user_id: number % 1000,
            reservations: vec![Reservation {
                reservation_id: number,
                seat_price: 1,
            }],
        };
        let committed = Arc::clone(&self.committed);
        let waker = self.waker.clone();
        let work = move |tx: &Transaction<'_>| execute(tx, &new, "KRW", None, Timestamp::now());
        let done = move |result: Result<Vec<_>, _>| {
            let now = Instant::now();
            waker.wake();
            assert!(result.is_ok());
            committed.lock().unwrap().insert(number, now);
        };
        self.database.store().submit(1, work, done).unwrap();
    }

    /// Payments from number 2, each at the moment when it is due; returns how many.
    fn pay_at_rate(&self, rate: f64, span: Duration) -> i64 {
        let total = (rate * span.as_secs_f64()) as i64;
        let start = Instant::now();
        for number in 0..total {
            let due = start + Duration::from_secs_f64(number as f64 / rate);
            thread::sleep(due.saturating_duration_since(Instant::now()));
            self.pay(number + 2);
        }
        total
    }
}

/// From the end of the commit to the broker's acknowledgement, in milliseconds. The store, the
/// relay and the publisher are payrelay's.
fn commit_to_ack(broker: &Broker, topic: &str, rate: f64, span: Duration) -> Vec<f64> {
    let database = Database::open_in(folder());
    let settings = kafka_settings(broker, topic);
    let acked = Moments::default();
    let publisher = Timed {
        inner: KafkaPublisher::new(settings, database.store().clone()).unwrap(),
        acked: Arc::clone(&acked),
    };
    let (relay, waker) = testkit::bench::relay(&database, publisher);
    let worker = Worker::spawn("relay", &unbounded().0, |stop| relay.run(&stop)).unwrap();
    let payer = Payer {
        database,
        waker,
        committed: Moments::default(),
    };
    // One payment is one event, in order: the numbers are the outbox's ids. The first one connects.
    payer.pay(1);
    wait_until("the first ack", Duration::from_mins(1), || {
        acked.lock().unwrap().contains_key(&1)
    });
    let total = payer.pay_at_rate(rate, span);
    wait_until("the last ack", Duration::from_mins(1), || {
        acked.lock().unwrap().len() as i64 == total + 1
    });
    worker
        .stop(Instant::now() + Duration::from_secs(10))
        .unwrap();
    let acked = acked.lock().unwrap();
    let committed = payer.committed.lock().unwrap();
    let needed = (2..total + 2).map(|id| {
        acked[&id]
            .saturating_duration_since(committed[&id])
            .as_secs_f64()
            * 1000.0
    });
    needed.collect()
}

/// The real binary in front of the broker and a fake for Slack, unpaced.
fn start(broker: &Broker, slack: &FakeSlack, dir: &std::path::Path, topic: &str) -> Payrelay {
    let slack = slack.url();
    let bootstrap = broker.bootstrap();
    let env = [
        ("PAYRELAY_PUBLISHER_KIND", "kafka"),
        ("PAYRELAY_KAFKA_DELIVERY", delivery()),
        ("PAYRELAY_KAFKA_BOOTSTRAP_SERVERS", &bootstrap),
        ("PAYRELAY_KAFKA_TOPIC", topic),
        // Each is another node, and a group belongs to one.
        ("PAYRELAY_KAFKA_GROUP", topic),
        ("PAYRELAY_SLACK_WEBHOOK_URL", &slack),
        ("PAYRELAY_SLACK_MESSAGES_PER_SECOND", "100000"),
        ("PAYRELAY_SLACK_SUMMARY_OVER", "0"),
    ];
    Payrelay::start(Options::new(dir, &env))
}

/// From before the request is sent to when Slack has the message: more than from the commit, never
/// less.
fn request_to_slack(broker: &Broker, topic: &str, count: u64) -> Vec<f64> {
    let slack = FakeSlack::start();
    let dir = folder();
    let arrived = Arc::new(Mutex::new(HashMap::new()));
    let arrivals = Arc::clone(&arrived);
    slack.answer_with(move |_, text| {
        let id: u64 = text.split(' ').nth(1).unwrap().parse().unwrap();
        arrivals.lock().unwrap().insert(id, Instant::now());
        Answer::Ok
    });
    let payrelay = start(broker, &slack, dir.path(), topic);
    let mut client = Client::connect(payrelay.addr());
    let mut sent = Vec::new();
    for id in 1..=count {
        sent.push(Instant::now());
        let reservation = json!({"reservation_id": id, "seat_price": 1});
        let body = json!({"user_id": id, "reservations": [reservation]});
        assert_eq!(client.post_json("/payments", &body).status, 201);
        wait_until("the message", Duration::from_mins(1), || {
            arrived.lock().unwrap().contains_key(&id)
        });
    }
    let arrived = arrived.lock().unwrap();
    let needed =
        (2..=count).map(|id| (arrived[&id] - sent[id as usize - 1]).as_secs_f64() * 1000.0);
    needed.collect()
}

#[derive(Default)]
struct Percentiles {
    p50: Figure,
    p99: Figure,
}

/// The figures at 600 (slow) and at 6,000 (fast) payments a second.
#[derive(Default)]
struct Figures {
    ack_slow: Percentiles,
    ack_fast: Percentiles,
    post_slow: Percentiles,
    post_fast: Percentiles,
    slack: Figure,
}

impl Figures {
    fn measure_ack(&mut self, broker: &Broker, run: usize, span: Duration) {
        for (name, rate, figures) in [
            ("slow", 600.0, &mut self.ack_slow),
            ("fast", 6000.0, &mut self.ack_fast),
        ] {
            let mut values = commit_to_ack(broker, &format!("{name}-{run}"), rate, span);
            figures.p50.0.push(percentile(&mut values, 50.0));
            figures.p99.0.push(percentile(&mut values, 99.0));
        }
    }

    fn measure_post(&mut self, broker: &Broker, run: usize, span: Duration) {
        let slack = FakeSlack::start();
        let dir = folder();
        // At ten times the rate Slack's fake would fall behind and take the machine with it: it
        // hangs instead.
        slack.answer_with(|_, _| Answer::Hang);
        let payrelay = start(broker, &slack, dir.path(), &format!("post-{run}"));
        for (first, rate, figures) in [
            (4_u64 << 32, 600.0, &mut self.post_slow),
            (6 << 32, 6000.0, &mut self.post_fast),
        ] {
            let mut outcome = load::open(payrelay.addr(), 16, rate, span, move |out, number| {
                payment(out, number % 1000, first + number, 1);
            });
            assert_eq!(outcome.other, 0);
            figures.p50.0.push(outcome.percentile(50.0));
            figures.p99.0.push(outcome.percentile(99.0));
        }
    }

    fn measure_slack(&mut self, broker: &Broker, run: usize, count: u64) {
        let mut values = request_to_slack(broker, &format!("slack-{run}"), count);
        self.slack.0.push(percentile(&mut values, 50.0));
    }

    fn table(self) -> Table {
        let mut table = Table::new("latency");
        let ack = "commit to Kafka's ack";
        table.row(
            format!("600/s: {ack}, p50"),
            "ms",
            self.ack_slow.p50,
            unless_transactions(Goal::AtMost(0.5)),
        );
        let slow99 = self.ack_slow.p99;
        table.row(
            format!("600/s: {ack}, p99"),
            "ms",
            slow99.clone(),
            unless_transactions(Goal::AtMost(4.0)),
        );
        let fast = self.ack_fast;
        table.row(format!("6,000/s: {ack}, p50"), "ms", fast.p50, Goal::None);
        let against = ("at 600/s", slow99);
        let name = format!("6,000/s: {ack}, p99");
        table.against(name, "ms", fast.p99, against, Goal::RatioAtMost(2.0));
        let slow = self.post_slow;
        table.row("600/s: POST, p50", "ms", slow.p50, Goal::None);
        table.row(
            "600/s: POST, p99",
            "ms",
            slow.p99.clone(),
            Goal::AtMost(3.0),
        );
        let fast = self.post_fast;
        table.row("6,000/s: POST, p50", "ms", fast.p50, Goal::None);
        let against = ("at 600/s", slow.p99);
        let name = "6,000/s: POST, p99";
        table.against(name, "ms", fast.p99, against, Goal::RatioAtMost(2.0));
        let name = "one at a time: from before the POST to Slack's 200, p50";
        table.row(name, "ms", self.slack, Goal::AtMost(5.0));
        table
    }
}

fn main() {
    let plan = Plan::from_args();
    let span = Duration::from_secs(if plan.quick { 3 } else { 15 });
    let broker = Broker::start("4.4.0");
    // A broker that has just started compiles itself first.
    let _ = commit_to_ack(&broker, "warm-up", 2000.0, span);
    let mut figures = Figures::default();
    for run in 0..plan.runs {
        figures.measure_ack(&broker, run, span);
        figures.measure_post(&broker, run, span);
        figures.measure_slack(&broker, run, if plan.quick { 200 } else { 1000 });
    }
    figures.table().finish();
}
