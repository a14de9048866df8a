//! Transactional producers that take turns, against a ring of one, in the same run. How long an
//! event waits for Kafka's acknowledgement, and a payment for its commit meanwhile. How fast a
//! backlog is drained. On the transactions since and before KIP-890 (Kafka 4.4 and 3.9).

use std::time::Duration;

use payrelay::config::DeliveryGuarantee;
use testkit::bench::ack::{Kind, at_rate, backlog, drain, without_database};
use testkit::bench::{Figure, Goal, Plan, Table, percentile};
use testkit::kafka::Broker;

/// The two percentiles of a latency.
#[derive(Default, Clone)]
struct Percentiles {
    p50: Figure,
    p99: Figure,
}

impl Percentiles {
    fn push(&mut self, mut values: Vec<f64>) {
        self.p50.0.push(percentile(&mut values, 50.0));
        self.p99.0.push(percentile(&mut values, 99.0));
    }
}

/// The figures of one kind of publisher at one rate.
#[derive(Default, Clone)]
struct Latency {
    ack: Percentiles,
    commit: Percentiles,
}

impl Latency {
    fn measure(&mut self, broker: &Broker, topic: &str, kind: Kind, rate: f64, span: Duration) {
        let times = at_rate(broker, topic, kind, rate, span);
        self.ack.push(times.ack_ms);
        self.commit.push(times.commit_ms);
    }
}

/// The figures of one version of Kafka.
struct Figures {
    version: &'static str,
    broker: Broker,
    slow: [Latency; 3],
    fast: [Latency; 2],
    drained: [Figure; 2],
    bare: Figure,
}

impl Figures {
    fn start(version: &'static str, span: Duration) -> Self {
        let broker = Broker::start(version);
        // A broker that has just started compiles itself first.
        let _ = at_rate(&broker, "warm-up", ring(), 2000.0, span);
        Self {
            version,
            broker,
            slow: <[Latency; 3]>::default(),
            fast: <[Latency; 2]>::default(),
            drained: <[Figure; 2]>::default(),
            bare: Figure::default(),
        }
    }

    fn measure(&mut self, run: usize, span: Duration, count: i64) {
        let kinds = [
            ring(),
            Kind::ring(1),
            Kind::of(DeliveryGuarantee::AtLeastOnce),
        ];
        for (index, kind) in kinds.into_iter().enumerate() {
            let topic = format!("slow-{run}-{index}");
            self.slow[index].measure(&self.broker, &topic, kind, 600.0, span);
        }
        for (index, kind) in kinds.into_iter().take(2).enumerate() {
            let topic = format!("fast-{run}-{index}");
            self.fast[index].measure(&self.broker, &topic, kind, 6000.0, span);
            let database = backlog(count);
            let topic = format!("drain-{run}-{index}");
            let publisher = kind.publisher(&self.broker, &topic, &database);
            self.drained[index]
                .0
                .push(drain(&database, publisher, count));
            if index == 0 {
                let topic = format!("bare-{run}");
                let mut publisher = kind.publisher(&self.broker, &topic, &database);
                self.bare.0.push(without_database(&mut publisher, count));
            }
        }
    }

    fn add_rows(self, table: &mut Table, p50_ratio: f64, drain_ratio: f64) {
        let version = self.version;
        let [slow, slow_one, plain] = self.slow;
        let [fast, fast_one] = self.fast;
        for (rate, ring, one) in [
            ("600/s", slow.clone(), slow_one),
            ("6,000/s", fast, fast_one),
        ] {
            let mut row = |figure: &str, value, baseline, goal| {
                let name = format!("{version}, {rate}: {figure}");
                table.against(name, "ms", value, ("a ring of one", baseline), goal);
            };
            let goal = Goal::RatioAtMost(p50_ratio);
            row("commit to ack, p50", ring.ack.p50, one.ack.p50, goal);
            let goal = Goal::RatioAtMost(0.5);
            row("commit to ack, p99", ring.ack.p99, one.ack.p99, goal);
            let goal = Goal::RatioAtMost(1.3);
            row(
                "payment to commit, p99",
                ring.commit.p99,
                one.commit.p99,
                goal,
            );
        }
        let name = format!("{version}, 600/s: commit to ack, p50");
        let plain = ("at-least-once", plain.ack.p50);
        table.against(name, "ms", slow.ack.p50, plain, Goal::RatioAtMost(4.0));
        let [drained, drained_one] = self.drained;
        let name = format!("{version}: events drained, each marked");
        let goal = Goal::RatioAtLeast(drain_ratio);
        table.against(
            name,
            "/s",
            drained.clone(),
            ("a ring of one", drained_one),
            goal,
        );
        let bare = ("the same ring without a database", self.bare);
        table.against("", "/s", drained, bare, Goal::RatioAtLeast(0.75));
    }
}

/// As payrelay publishes by default.
fn ring() -> Kind {
    Kind::of(DeliveryGuarantee::ExactlyOnce)
}

fn main() {
    let plan = Plan::from_args();
    let span = Duration::from_secs(if plan.quick { 3 } else { 10 });
    let count = if plan.quick { 50_000 } else { 200_000 };
    let mut new = Figures::start("4.4.0", span);
    let mut old = Figures::start("3.9.2", span);
    for run in 0..plan.runs {
        new.measure(run, span, count);
        old.measure(run, span, count);
    }
    let mut table = Table::new("ring");
    new.add_rows(&mut table, 1.0 / 4.0, 1.2);
    old.add_rows(&mut table, 1.0 / 12.0, 4.0);
    table.finish();
}
