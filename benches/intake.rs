//! How many durable payments a second, and how long each takes: by connections, and against three
//! baselines.

use std::path::Path;
use std::time::Duration;

use testkit::bench::load::{self, Outcome, payment};
use testkit::bench::{Figure, Goal, Plan, Table, baseline, folder, percentile};
use testkit::process::{Options, Payrelay};
use testkit::store::Database;

/// The real binary on a database of its own. While Kafka is unavailable only the intake works; with
/// the application publisher every payment is also relayed and written to the log.
fn start(dir: &Path, publisher: &str) -> Payrelay {
    let env = [
        ("PAYRELAY_PUBLISHER_KIND", publisher),
        ("PAYRELAY_KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:1"),
    ];
    Payrelay::start(Options::new(dir, &env))
}

const WARM_UP: Duration = Duration::from_millis(500);

fn intake(address: std::net::SocketAddr, connections: usize, plan: Plan, run: u64) -> Outcome {
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

fn main() {
    let plan = Plan::from_args();
    let mut table = Table::new("intake");
    for connections in [1, 8, 64, 256]
        .into_iter()
        .filter(|count| plan.connections.is_none_or(|only| only == *count))
    {
        let mut rates: [Figure; 4] = Default::default();
        let mut latencies: [Figure; 3] = Default::default();
        let mut bare = Figure::default();
        let mut embedded = Figure::default();
        for run in 0..plan.runs as u64 {
            let dir = folder();
            let payrelay = start(dir.path(), "kafka");
            let mut outcome = intake(payrelay.addr(), connections, plan, run);
            assert_eq!(outcome.other, 0);
            rates[0].0.push(outcome.rate());
            for (figure, percent) in latencies.iter_mut().zip([50.0, 99.0, 99.9]) {
                figure.0.push(outcome.percentile(percent));
            }
            let refused = load::closed(
                payrelay.addr(),
                connections,
                (WARM_UP, plan.span),
                422,
                |out, _| {
                    payment(out, 1, 1, 0);
                },
            );
            rates[2].0.push(refused.rate());
            drop(payrelay);

            let dir = folder();
            let payrelay = start(dir.path(), "application");
            embedded
                .0
                .push(intake(payrelay.addr(), connections, plan, run).rate());
            drop(payrelay);

            let database = Database::open_in(folder());
            rates[3].0.push(baseline::bare_writer(
                database.store(),
                connections,
                plan.span,
                1,
            ));
            drop(database);

            let dir = folder();
            drop(start(dir.path(), "kafka"));
            let address = baseline::transaction_per_request(&dir.path().join("payrelay.db"));
            rates[1]
                .0
                .push(intake(address, connections, plan, run).rate());

            let mut times = baseline::bare_commits(&dir.path().join("bare.db"), 2000);
            bare.0.push(percentile(&mut times, 50.0));
        }
        let [ours, per_request, without_database, writer] = rates;
        let name = |what| format!("{connections} connections: {what}");
        let goal = match connections {
            8 => Goal::RatioAtLeast(4.0),
            64 => Goal::RatioAtLeast(20.0),
            _ => Goal::None,
        };
        table.against(
            name("payments"),
            "/s",
            ours.clone(),
            ("a transaction a request", per_request),
            goal,
        );
        table.against(
            "",
            "/s",
            ours.clone(),
            ("HTTP without a database", without_database),
            Goal::None,
        );
        let goal = if connections == 64 {
            Goal::RatioAtLeast(0.6)
        } else {
            Goal::None
        };
        table.against("", "/s", ours, ("the writer without HTTP", writer), goal);
        table.row(
            name("payments, each also relayed in the process"),
            "/s",
            embedded,
            Goal::None,
        );
        let [p50, p99, p999] = latencies;
        if connections == 1 {
            table.against(
                name("p50"),
                "ms",
                p50,
                ("a bare fsynced commit", bare),
                Goal::RatioAtMost(1.2),
            );
        } else {
            table.row(name("p50"), "ms", p50, Goal::None);
        }
        let goal = if connections == 256 {
            Goal::AtMost(8.0)
        } else {
            Goal::None
        };
        table.row(name("p99"), "ms", p99, goal);
        table.row(name("p99.9"), "ms", p999, Goal::None);
    }
    let mut hundreds = Figure::default();
    for run in 0..plan.runs as u64 {
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
        hundreds.0.push(outcome.rate() * 100.0);
    }
    table.row(
        "requests of 100 reservations, 8 connections: payments",
        "/s",
        hundreds,
        Goal::AtLeast(100_000.0),
    );
    table.finish();
}
