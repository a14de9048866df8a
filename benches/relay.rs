//! How fast the outbox goes to a real Kafka: read in order, published, each row marked durably. The
//! baseline is what the same client sends without a database.

use std::time::Duration;

use testkit::bench::ack::{Kind, backlog, drain, without_database};
use testkit::bench::{Figure, Goal, Plan, Table, guarantee, unless_transactions};
use testkit::kafka::Broker;

fn main() {
    let plan = Plan::from_args();
    let count: i64 = if plan.quick { 50_000 } else { 200_000 };
    let broker = Broker::start("4.4.0");
    let mut drained = Figure::default();
    let mut raw = Figure::default();
    for run in 0..plan.runs {
        let database = backlog(count);
        let topic = format!("drain-{run}");
        let kind = Kind::of(guarantee());
        let mut bare = kind.publisher(&broker, &format!("raw-{run}"), &database);
        raw.0.push(without_database(&mut bare, count));
        drop(bare);
        let publisher = kind.publisher(&broker, &topic, &database);
        drained.0.push(drain(&database, publisher, count));
        // The broker shall not clean up while the next run is timed.
        assert!(
            !testkit::topic::read(&broker.bootstrap(), &topic, Duration::from_mins(1)).is_empty()
        );
    }
    let mut table = Table::new("relay");
    let name = format!("{count} events drained in order, each marked");
    table.against(
        name,
        "/s",
        drained.clone(),
        ("the same client without a database", raw),
        Goal::RatioAtLeast(0.7),
    );
    table.row(
        "",
        "/s",
        drained,
        unless_transactions(Goal::AtLeast(150_000.0)),
    );
    table.finish();
}
