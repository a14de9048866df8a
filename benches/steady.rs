//! What the whole system holds, with the broker on the same machine: HTTP in, Kafka, the delivery
//! table, all at once. Also what that costs in memory and time.
#![expect(clippy::unwrap_used, reason = "a benchmark fails by panicking")]
#![expect(clippy::cast_precision_loss, reason = "figures are small")]

use std::time::{Duration, Instant};

use payrelay::runtime::metrics::Metrics;
use rusqlite::Connection;
use testkit::bench::cost::{Usage, rss_mb, usage};
use testkit::bench::load::{self, Since, payment};
use testkit::bench::{Figure, Goal, Plan, Table, delivery, folder};
use testkit::kafka::Broker;
use testkit::process::{Options, Payrelay};
use testkit::slack::{Answer, FakeSlack};
use testkit::wait_until;

/// Connections of the clients: enough that none waits for its own last answer.
const CONNECTIONS: u64 = 128;

const MOMENT: Duration = Duration::from_secs(4);

/// Events that may wait at the end: what comes in a fifth of a second.
const WAITING_S: f64 = 0.2;

/// The whole system: the real binary, a real broker, and a Slack that takes the first message and
/// does not answer.
struct System {
    payrelay: Payrelay,
    _slack: FakeSlack,
    dir: tempfile::TempDir,
}

impl System {
    fn start(broker: &Broker, topic: &str) -> Self {
        let slack = FakeSlack::start();
        let dir = folder();
        slack.answer_with(|_, _| Answer::Hang);
        let url = slack.url();
        let bootstrap = broker.bootstrap();
        let env = [
            ("PAYRELAY_PUBLISHER_KIND", "kafka"),
            ("PAYRELAY_KAFKA_DELIVERY", delivery()),
            ("PAYRELAY_KAFKA_BOOTSTRAP_SERVERS", bootstrap.as_str()),
            ("PAYRELAY_KAFKA_TOPIC", topic),
            ("PAYRELAY_KAFKA_GROUP", topic),
            ("PAYRELAY_SLACK_WEBHOOK_URL", &url),
        ];
        let payrelay = Payrelay::start(Options::new(dir.path(), &env));
        let system = Self {
            payrelay,
            _slack: slack,
            dir,
        };
        // Both Kafka threads are connected before anything is timed.
        load::open(
            system.payrelay.addr(),
            1,
            10.0,
            Duration::from_secs(1),
            |out, number| {
                payment(out, 0, number, 1);
            },
        );
        wait_until("the first deliveries", Duration::from_mins(1), || {
            system.backlog() == 0
        });
        system
    }

    /// Events that are committed and not yet in the delivery table. There is one partition: they
    /// come in order.
    fn backlog(&self) -> i64 {
        let connection = Connection::open(self.dir.path().join("payrelay.db")).unwrap();
        let sql = "SELECT ifnull((SELECT max(id) FROM outbox), 0) - ifnull((SELECT max(outbox_id) \
            FROM delivery), 0)";
        connection.query_row(sql, [], |row| row.get(0)).unwrap()
    }
}

/// Whether a rate is held, and the p99 of POST at it.
struct Held {
    held: bool,
    p99: f64,
}

fn hold(broker: &Broker, topic: &str, rate: f64, span: Duration) -> Held {
    let system = System::start(broker, topic);
    let mut outcome = load::paced(
        system.payrelay.addr(),
        CONNECTIONS,
        rate,
        (span, Since::Due),
        |out, number| {
            payment(out, number % 1000, (1 << 40) + number, 1);
        },
    );
    let backlog = system.backlog() as f64;
    let late = outcome.elapsed.saturating_sub(span);
    let held =
        outcome.other == 0 && late < Duration::from_millis(300) && backlog < rate * WAITING_S;
    testkit::bench::print_line(&format!(
        "{rate:.0}/s: {} ({backlog} wait, the last answer {late:.0?} late)",
        if held { "held" } else { "not held" }
    ));
    Held {
        held,
        p99: outcome.percentile(99.0),
    }
}

/// The highest rate, in steps of a tenth, that is held for `span`.
fn highest(broker: &Broker, run: usize, first: f64, span: Duration) -> (f64, f64) {
    let mut rate = first;
    for attempt in 0.. {
        let topic = |part| format!("steady-{run}-{attempt}-{part}");
        // What is not held for a moment need not be tried for long.
        if hold(broker, &topic("moment"), rate, MOMENT).held {
            let result = hold(broker, &topic("span"), rate, span);
            if result.held {
                return (rate, result.p99);
            }
        }
        rate *= 0.9;
    }
    unreachable!("some rate is held")
}

/// Where to begin: the rate doubles until it is not held for a moment.
fn guess(broker: &Broker) -> f64 {
    let mut rate = 2000.0;
    while hold(broker, &format!("guess-{rate}"), rate, MOMENT).held {
        rate *= 1.5;
    }
    rate
}

struct Costs {
    idle_rss: f64,
    idle_cpu: f64,
    load_rss: f64,
    load_us: f64,
    threads: f64,
}

/// Idle after the first payments, then 64 connections as fast as they can.
fn costs(broker: &Broker, topic: &str, span: Duration) -> Costs {
    let system = System::start(broker, topic);
    let pid = system.payrelay.pid();
    let before = usage(pid);
    let started = Instant::now();
    // Nothing happens: that is what is measured.
    std::thread::sleep(span);
    let idle_cpu = (usage(pid).cpu_s - before.cpu_s) / started.elapsed().as_secs_f64() * 100.0;
    let idle_rss = rss_mb(pid);
    let before = usage(pid);
    let outcome = load::closed(
        system.payrelay.addr(),
        64,
        (Duration::ZERO, span),
        201,
        |out, number| {
            payment(out, number % 1000, (1 << 40) + number, 1);
        },
    );
    let Usage {
        cpu_s,
        rss_max_mb,
        threads,
    } = usage(pid);
    let load_us = (cpu_s - before.cpu_s) * 1e6 / outcome.good as f64;
    Costs {
        idle_rss,
        idle_cpu,
        load_rss: rss_max_mb,
        load_us,
        threads: threads as f64,
    }
}

#[derive(Default)]
struct Figures {
    idle_rss: Figure,
    idle_cpu: Figure,
    load_rss: Figure,
    load_us: Figure,
    threads: Figure,
    rate: Figure,
    p99: Figure,
}

impl Figures {
    fn measure(&mut self, broker: &Broker, span: Duration, calm: Duration) {
        for run in 0..3 {
            let costs = costs(broker, &format!("cost-{run}"), calm);
            self.idle_rss.0.push(costs.idle_rss);
            self.idle_cpu.0.push(costs.idle_cpu);
            self.load_rss.0.push(costs.load_rss);
            self.load_us.0.push(costs.load_us);
            self.threads.0.push(costs.threads);
        }
        // Not lower by each run that was unlucky: each begins where the guess was.
        let first = guess(broker);
        for run in 0..3 {
            let (rate, p99) = highest(broker, run, first, span);
            self.rate.0.push(rate);
            self.p99.0.push(p99);
        }
    }

    fn add_rows(self, table: &mut Table, span: Duration) {
        let seconds = span.as_secs();
        let name = format!("the highest rate held for {seconds} s: HTTP in, Kafka, delivery table");
        table.row(name, "/s", self.rate, Goal::None);
        table.row("POST at that rate, p99", "ms", self.p99, Goal::None);
        let name = "RSS, idle after the first payments";
        table.row(name, "MB", self.idle_rss, Goal::AtMost(15.0));
        let name = "processor, idle";
        table.row(name, "% of a core", self.idle_cpu, Goal::AtMost(0.5));
        let name = "RSS at most, 64 connections as fast as they can";
        table.row(name, "MB", self.load_rss, Goal::AtMost(40.0));
        let name = "processor for a payment, with Kafka both ways";
        let counting = Figure((0..5).map(|_| counting_us()).collect());
        table.row(name, "us", self.load_us.clone(), Goal::None);
        let name = "counting a payment in the metrics, from the request to Slack";
        let baseline = ("all processor time of a payment", self.load_us);
        table.against(name, "us", counting, baseline, Goal::RatioAtMost(0.01));
        table.row("threads", "", self.threads, Goal::None);
    }
}

/// What a payment costs in the metrics, on its whole way, without the histograms of a commit, which
/// many payments share.
fn counting_us() -> f64 {
    const PAYMENTS: u32 = 200_000;
    let metrics = Metrics::default();
    let route = metrics.http().add_route("/payments", &["POST"], &[201]);
    let channel = metrics.channel("default");
    let began = Instant::now();
    for _ in 0..PAYMENTS {
        let started = Instant::now();
        let waited = Duration::from_millis(3);
        metrics.http().completed.inc();
        route.answered("POST", 201, started.elapsed());
        metrics.relay().latency.observe(waited, None);
        metrics.consumer().latency.observe(waited);
        channel.latency.observe(waited, None);
    }
    began.elapsed().as_secs_f64() * 1e6 / f64::from(PAYMENTS)
}

fn main() {
    let plan = Plan::from_args();
    let span = Duration::from_secs(if plan.quick { 15 } else { 60 });
    let calm = Duration::from_secs(if plan.quick { 5 } else { 20 });
    let broker = Broker::start("4.4.0");
    let mut figures = Figures::default();
    figures.measure(&broker, span, calm);
    let binary = testkit::paths::binary().metadata().unwrap().len() as f64 / 1e6;
    let mut table = Table::new("steady");
    figures.add_rows(&mut table, span);
    table.row("the binary", "MB", Figure(vec![binary]), Goal::AtMost(12.0));
    table.finish();
}
