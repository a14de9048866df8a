//! How many durable payments a second, and how long each takes: by connections, and against three
//! baselines.
#![expect(clippy::cast_precision_loss, reason = "figures are small")]

use std::net::SocketAddr;
use std::path::Path;

use testkit::bench::load::{self, Outcome, payment};
use testkit::bench::{
    Figure, Goal, Plan, Table, WARM_UP, baseline, folder, percentile, start_without_kafka,
};
use testkit::process::Payrelay;
use testkit::store::Database;

/// The real binary on a database of its own. While Kafka is unavailable only the intake works; with
/// the application publisher every payment is also relayed and written to the log.
fn start(dir: &Path, publisher: &str) -> Payrelay {
    start_without_kafka(dir, &[("PAYRELAY_PUBLISHER_KIND", publisher)])
}

fn intake(address: SocketAddr, connections: usize, plan: Plan, run: u64) -> Outcome {
    let base = (run + 1) << 32;
    load::closed(
        address,
        connections,
        (WARM_UP, plan.span),
        201,
        move |out, number| {
            payment(out, number % 1000, base + number, 1);
        },
    )
}

/// The figures of one number of connections.
#[derive(Default)]
struct Figures {
    payments: Figure,
    /// A transaction a request, by another program.
    per_request: Figure,
    /// Refused by payrelay before the database.
    without_database: Figure,
    /// The store's writer without HTTP.
    writer: Figure,
    /// With the relay in the same process.
    embedded: Figure,
    p50: Figure,
    p99: Figure,
    p999: Figure,
    /// A commit that is synced, without payrelay.
    bare_commit: Figure,
}

impl Figures {
    fn measure(&mut self, connections: usize, plan: Plan, run: u64) {
        self.measure_payrelay(connections, plan, run);
        self.measure_embedded(connections, plan, run);
        self.measure_baselines(connections, plan, run);
    }

    /// Payments, and refusals that need no database.
    fn measure_payrelay(&mut self, connections: usize, plan: Plan, run: u64) {
        let dir = folder();
        let payrelay = start(dir.path(), "kafka");
        let mut outcome = intake(payrelay.addr(), connections, plan, run);
        assert_eq!(outcome.other, 0);
        self.payments.0.push(outcome.rate());
        self.p50.0.push(outcome.percentile(50.0));
        self.p99.0.push(outcome.percentile(99.0));
        self.p999.0.push(outcome.percentile(99.9));
        let refused = load::closed(
            payrelay.addr(),
            connections,
            (WARM_UP, plan.span),
            422,
            |out, _| {
                payment(out, 1, 1, 0);
            },
        );
        self.without_database.0.push(refused.rate());
    }

    fn measure_embedded(&mut self, connections: usize, plan: Plan, run: u64) {
        let dir = folder();
        let payrelay = start(dir.path(), "application");
        let outcome = intake(payrelay.addr(), connections, plan, run);
        self.embedded.0.push(outcome.rate());
    }

    fn measure_baselines(&mut self, connections: usize, plan: Plan, run: u64) {
        let database = Database::open_in(folder());
        let rate = baseline::bare_writer(database.store(), connections, plan.span, 1);
        self.writer.0.push(rate);
        drop(database);

        let dir = folder();
        drop(start(dir.path(), "kafka"));
        let address = baseline::transaction_per_request(&dir.path().join("payrelay.db"));
        let outcome = intake(address, connections, plan, run);
        self.per_request.0.push(outcome.rate());

        let mut times = baseline::bare_commits(&dir.path().join("bare.db"), 2000);
        self.bare_commit.0.push(percentile(&mut times, 50.0));
    }

    fn add_rows(self, table: &mut Table, connections: usize) {
        let name = |what| format!("{connections} connections: {what}");
        table.against(
            name("payments"),
            "/s",
            self.payments.clone(),
            ("a transaction a request", self.per_request),
            match connections {
                8 => Goal::RatioAtLeast(4.5),
                64 => Goal::RatioAtLeast(15.0),
                _ => Goal::None,
            },
        );
        table.against(
            "",
            "/s",
            self.payments.clone(),
            ("HTTP without a database", self.without_database),
            Goal::None,
        );
        table.against(
            "",
            "/s",
            self.payments.clone(),
            ("the writer without HTTP", self.writer),
            only_if(connections == 64, Goal::RatioAtLeast(0.7)),
        );
        table.row(
            name("payments, each also relayed in the process"),
            "/s",
            self.embedded,
            Goal::None,
        );
        if connections == 1 {
            let baseline = ("a bare fsynced commit", self.bare_commit);
            table.against(
                name("p50"),
                "ms",
                self.p50,
                baseline,
                Goal::RatioAtMost(1.6),
            );
        } else {
            table.row(name("p50"), "ms", self.p50, Goal::None);
        }
        let turn = |rate: &f64| connections as f64 / rate * 1000.0;
        let turns = Figure(self.payments.0.iter().map(turn).collect());
        let baseline = ("a turn of all connections at this rate", turns);
        let goal = only_if(connections == 256, Goal::RatioAtMost(1.5));
        table.against(name("p99"), "ms", self.p99, baseline, goal);
        table.row(name("p99.9"), "ms", self.p999, Goal::None);
    }
}

fn only_if(condition: bool, goal: Goal) -> Goal {
    if condition { goal } else { Goal::None }
}

/// Payments a second with requests of 100 reservations.
fn hundreds(plan: Plan, run: u64) -> f64 {
    let dir = folder();
    let payrelay = start(dir.path(), "kafka");
    let base = (run + 1) << 32;
    let outcome = load::closed(
        payrelay.addr(),
        8,
        (WARM_UP, plan.span),
        201,
        move |out, number| {
            payment(out, number % 1000, base + number * 100, 100);
        },
    );
    outcome.rate() * 100.0
}

fn main() {
    let plan = Plan::from_args();
    let runs = plan.runs as u64;
    let mut table = Table::new("intake");
    let mut singles = Figure::default();
    for connections in [1, 8, 64, 256] {
        if plan.connections.is_some_and(|only| only != connections) {
            continue;
        }
        let mut figures = Figures::default();
        (0..runs).for_each(|run| figures.measure(connections, plan, run));
        if connections == 64 {
            singles = figures.payments.clone();
        }
        figures.add_rows(&mut table, connections);
    }
    table.against(
        "requests of 100 reservations, 8 connections: payments",
        "/s",
        Figure((0..runs).map(|run| hundreds(plan, run)).collect()),
        ("64 connections with one", singles),
        Goal::RatioAtLeast(3.0),
    );
    table.finish();
}
