//! How fast the outbox goes to a real Kafka: read in order, published, each row marked durably. The
//! baseline is what the same client sends without a database.
#![expect(clippy::unwrap_used, reason = "a benchmark fails by panicking")]
#![expect(clippy::cast_precision_loss, reason = "figures are small")]

use std::time::{Duration, Instant};

use payrelay::domain::event::{Event, EventType};
use payrelay::domain::timestamp::Timestamp;
use payrelay::kafka::publisher::KafkaPublisher;
use payrelay::relay::Step;
use payrelay::relay::publisher::Publisher;
use testkit::bench::{Figure, Goal, Plan, Table, folder, kafka_settings, unless_transactions};
use testkit::kafka::Broker;
use testkit::store::Database;

fn publisher(broker: &Broker, topic: &str, database: &Database) -> KafkaPublisher {
    let settings = kafka_settings(broker, topic);
    let mut publisher = KafkaPublisher::new(settings, database.store().clone()).unwrap();
    // Connected, and the topic made, before anything is timed.
    while publisher.publish(&events(0..1)).error.is_some() {}
    publisher
}

fn events(ids: std::ops::Range<i64>) -> Vec<Event> {
    let created_at = Timestamp::now();
    let event = |id| Event {
        outbox_id: id,
        payment_id: id,
        user_id: id % 1000,
        kind: EventType::Completed,
        created_at,
        trace: None,
    };
    ids.map(event).collect()
}

/// Events a second, batches of 1,000, each awaited.
fn without_a_database(publisher: &mut KafkaPublisher, count: i64) -> f64 {
    let started = Instant::now();
    for first in (0..count).step_by(1000) {
        assert!(
            publisher
                .publish(&events(first..first + 1000))
                .error
                .is_none()
        );
    }
    count as f64 / started.elapsed().as_secs_f64()
}

fn drain(database: &Database, publisher: impl Publisher + 'static, count: i64) -> f64 {
    let (mut relay, _waker) = testkit::bench::relay(database, publisher);
    let started = Instant::now();
    while relay.step() == Step::Progress {}
    let elapsed = started.elapsed();
    assert_eq!(
        database.number("SELECT count(*) FROM outbox WHERE status = 'PUBLISHED'"),
        count
    );
    count as f64 / elapsed.as_secs_f64()
}

fn main() {
    let plan = Plan::from_args();
    let count: i64 = if plan.quick { 50_000 } else { 200_000 };
    let broker = Broker::start("4.4.0");
    let mut drained = Figure::default();
    let mut raw = Figure::default();
    for run in 0..plan.runs {
        let database = Database::open_in(folder());
        for first in (0..count).step_by(1000) {
            database.pay(first % 997, first..first + 1000);
        }
        let topic = format!("drain-{run}");
        raw.0.push(without_a_database(
            &mut publisher(&broker, &format!("raw-{run}"), &database),
            count,
        ));
        let publisher = publisher(&broker, &topic, &database);
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
