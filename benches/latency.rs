//! How long a payment takes on its way at a steady rate, open loop: to the client, to Kafka, to
//! Slack.
#![expect(clippy::unwrap_used, reason = "a benchmark fails by panicking")]
#![expect(clippy::cast_possible_truncation, reason = "figures are small")]

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::json;
use testkit::bench::ack::{Kind, at_rate};
use testkit::bench::load::{self, payment};
use testkit::bench::{
    Figure, Goal, Plan, Table, delivery, folder, guarantee, percentile, unless_transactions,
};
use testkit::http::Client;
use testkit::kafka::Broker;
use testkit::process::{Options, Payrelay};
use testkit::slack::{Answer, FakeSlack};
use testkit::wait_until;

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
            let topic = format!("{name}-{run}");
            let mut values = at_rate(broker, &topic, Kind::of(guarantee()), rate, span).ack_ms;
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
    let _ = at_rate(&broker, "warm-up", Kind::of(guarantee()), 2000.0, span);
    let mut figures = Figures::default();
    for run in 0..plan.runs {
        figures.measure_ack(&broker, run, span);
        figures.measure_post(&broker, run, span);
        figures.measure_slack(&broker, run, if plan.quick { 200 } else { 1000 });
    }
    figures.table().finish();
}
