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
use payrelay::config::{self, DeliveryGuarantee};
use payrelay::domain::event::Event;
use payrelay::domain::payment::{NewPayment, Reservation};
use payrelay::domain::timestamp::Timestamp;
use payrelay::kafka::publisher::KafkaPublisher;
use payrelay::relay::publisher::{PublishOutcome, Publisher};
use payrelay::relay::{self, Relay};
use payrelay::runtime::health::HealthHandle;
use payrelay::runtime::metrics::Metrics;
use payrelay::runtime::worker::{Waker, Worker};
use payrelay::store::payment::execute_payments;
use testkit::bench::load::{self, payment};
use testkit::bench::{
    Figure, Goal, Plan, Table, delivery, folder, percentile, unless_transactions,
};
use testkit::http::Client;
use testkit::kafka::Broker;
use testkit::process::{Options, Payrelay};
use testkit::slack::{Answer, FakeSlack};
use testkit::store::Database;
use testkit::wait_until;

/// Remembers when each event was acked.
struct Timed {
    inner: KafkaPublisher,
    acked: Arc<Mutex<HashMap<i64, Instant>>>,
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

/// From the end of the commit to the broker's word, in milliseconds. The store, the relay and the
/// publisher are payrelay's; payments come from here instead of HTTP, so that the moment of the
/// commit is known.
fn commit_to_ack(broker: &Broker, topic: &str, rate: f64, span: Duration) -> Vec<f64> {
    let database = Database::open_in(folder());
    let settings = config::Kafka {
        bootstrap_servers: vec![broker.bootstrap()],
        topic: topic.into(),
        group: "none".into(),
        partitions: 1,
        delivery: if delivery() == "exactly-once" {
            DeliveryGuarantee::ExactlyOnce
        } else {
            DeliveryGuarantee::AtLeastOnce
        },
        dead_records_max: std::num::NonZeroUsize::MAX,
        security: config::KafkaSecurity::default(),
    };
    let acked = Arc::new(Mutex::new(HashMap::new()));
    let inner = KafkaPublisher::new(settings, database.store().clone()).unwrap();
    let publisher = Timed {
        inner,
        acked: Arc::clone(&acked),
    };
    let (waker, woken) = Waker::new();
    let (notifier, _) = Waker::new();
    let store = database.store().clone();
    let relay = Relay::new(
        store,
        Box::new(publisher),
        relay::Options {
            batch_max: 1000,
            wake: woken,
            notifiers: notifier,
            health: HealthHandle::up(),
            metrics: Metrics::default(),
        },
    );
    let worker = Worker::spawn("relay", &unbounded().0, |stop| relay.run(&stop)).unwrap();

    let committed = Arc::new(Mutex::new(HashMap::new()));
    let pay = |number: i64| {
        let reservations = vec![Reservation {
            reservation_id: number,
            seat_price: 1,
        }];
        let new = NewPayment {
            user_id: number % 1000,
            reservations,
        };
        let (committed, waker) = (Arc::clone(&committed), waker.clone());
        let work = move |tx: &payrelay::store::Transaction<'_>| {
            execute_payments(tx, &new, "KRW", None, Timestamp::now())
        };
        let done = move |result: Result<Vec<_>, _>| {
            let now = Instant::now();
            waker.wake();
            assert!(result.is_ok());
            committed.lock().unwrap().insert(number, now);
        };
        database.store().submit(1, work, done).unwrap();
    };
    // One payment is one event, in order: the numbers are the outbox's ids. The first one connects.
    pay(1);
    wait_until("the first ack", Duration::from_mins(1), || {
        acked.lock().unwrap().contains_key(&1)
    });
    let total = (rate * span.as_secs_f64()) as i64;
    let start = Instant::now();
    for number in 0..total {
        let due = start + Duration::from_secs_f64(number as f64 / rate);
        thread::sleep(due.saturating_duration_since(Instant::now()));
        pay(number + 2);
    }
    wait_until("the last ack", Duration::from_mins(1), || {
        acked.lock().unwrap().len() as i64 == total + 1
    });
    worker
        .stop(Instant::now() + Duration::from_secs(10))
        .unwrap();
    let (acked, committed) = (acked.lock().unwrap(), committed.lock().unwrap());
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
    let (slack, dir) = (FakeSlack::start(), folder());
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
        let body = serde_json::json!({"user_id": id, "reservations": [{"reservation_id": id, "seat_price": 1}]});
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

fn main() {
    let plan = Plan::from_args();
    let span = if plan.quick {
        Duration::from_secs(3)
    } else {
        Duration::from_secs(15)
    };
    let broker = Broker::start("4.4.0");
    // A broker that has just started compiles itself first.
    let _ = commit_to_ack(&broker, "warm-up", 2000.0, span);
    let mut figures: [Figure; 9] = Default::default();
    for run in 0..plan.runs {
        let mut slow = commit_to_ack(&broker, &format!("slow-{run}"), 600.0, span);
        let mut fast = commit_to_ack(&broker, &format!("fast-{run}"), 6000.0, span);
        for (offset, values) in [(0, &mut slow), (2, &mut fast)] {
            figures[offset].0.push(percentile(values, 50.0));
            figures[offset + 1].0.push(percentile(values, 99.0));
        }
        let (slack, dir) = (FakeSlack::start(), folder());
        // At ten times the rate Slack's fake would fall behind and take the machine with it: it
        // hangs instead.
        slack.answer_with(|_, _| Answer::Hang);
        let payrelay = start(&broker, &slack, dir.path(), &format!("post-{run}"));
        for (offset, rate) in [(4, 600.0), (6, 6000.0)] {
            let base = (offset as u64) << 32;
            let mut outcome = load::open(payrelay.addr(), 16, rate, span, move |out, number| {
                payment(out, number % 1000, base + number, 1);
            });
            assert_eq!(outcome.other, 0);
            figures[offset].0.push(outcome.percentile(50.0));
            figures[offset + 1].0.push(outcome.percentile(99.0));
        }
        drop(payrelay);
        let mut to_slack = request_to_slack(
            &broker,
            &format!("slack-{run}"),
            if plan.quick { 200 } else { 1000 },
        );
        figures[8].0.push(percentile(&mut to_slack, 50.0));
    }
    let [
        slow50,
        slow99,
        fast50,
        fast99,
        post50,
        post99,
        post_fast50,
        post_fast99,
        slack,
    ] = figures;
    let mut table = Table::new("latency");
    table.row(
        "600/s: commit to Kafka's ack, p50",
        "ms",
        slow50,
        unless_transactions(Goal::AtMost(0.5)),
    );
    table.row(
        "600/s: commit to Kafka's ack, p99",
        "ms",
        slow99.clone(),
        unless_transactions(Goal::AtMost(4.0)),
    );
    table.row(
        "6,000/s: commit to Kafka's ack, p50",
        "ms",
        fast50,
        Goal::None,
    );
    table.against(
        "6,000/s: commit to Kafka's ack, p99",
        "ms",
        fast99,
        ("at 600/s", slow99),
        Goal::RatioAtMost(2.0),
    );
    table.row("600/s: POST, p50", "ms", post50, Goal::None);
    table.row("600/s: POST, p99", "ms", post99.clone(), Goal::AtMost(3.0));
    table.row("6,000/s: POST, p50", "ms", post_fast50, Goal::None);
    table.against(
        "6,000/s: POST, p99",
        "ms",
        post_fast99,
        ("at 600/s", post99),
        Goal::RatioAtMost(2.0),
    );
    table.row(
        "one at a time: from before the POST to Slack's 200, p50",
        "ms",
        slack,
        Goal::AtMost(5.0),
    );
    table.finish();
}
