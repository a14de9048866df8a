//! The contract of the Kafka publisher and consumer, on a real Kafka and on the client's fake broker.

use std::time::Duration;

use payrelay::config;
use payrelay::consumer::{Consumer, Step};
use payrelay::event::Event;
use payrelay::outage::Part;
use payrelay::publisher::Publisher;
use payrelay::publisher::kafka::KafkaPublisher;
use payrelay::store::outbox::{self, Place, Receipt};
use payrelay::worker::Waker;

use super::harness::cluster::{Cluster, Fake};
use super::harness::kafka::Broker;
use super::harness::store::Database;
use super::harness::{topic, wait_for, wait_until};

const LIMIT: Duration = Duration::from_mins(1);
const TOPIC: &str = "payment-event";

/// One test for each of the contract's points and each kind of cluster.
macro_rules! contract {
    ($($point:ident),* $(,)?) => {
        mod on_the_fake_broker {
            $(#[test] fn $point() { super::$point(&mut super::Fake::start()); })*
        }
        mod on_a_real_kafka {
            $(#[test] fn $point() { super::$point(&mut super::Broker::start("4.4.0")); })*
        }
    };
}

contract![
    records_are_cloud_events_in_commit_order,
    a_broker_that_is_away_at_the_start_loses_nothing,
    a_broker_that_goes_in_the_middle_loses_and_doubles_nothing,
    what_comes_is_stored_once_and_the_offset_committed,
    what_is_not_ours_is_kept_aside_and_the_rest_goes_on,
];

fn settings(cluster: &dyn Cluster, partitions: i32) -> config::Kafka {
    config::Kafka {
        bootstrap_servers: vec![cluster.bootstrap()],
        topic: TOPIC.into(),
        group: "payment-group".into(),
        partitions,
    }
}

fn publisher(cluster: &dyn Cluster, database: &Database, partitions: i32) -> KafkaPublisher {
    KafkaPublisher::new(settings(cluster, partitions), database.store().node().clone()).unwrap()
}

fn unpublished(database: &Database) -> Vec<Event> {
    database.store().read(|connection| outbox::unpublished(connection, 0, 100_000)).unwrap()
}

/// Publishes as the relay does: until all of it has a receipt, and marks it.
fn publish(publisher: &mut KafkaPublisher, database: &Database) -> Vec<Receipt> {
    let mut receipts = Vec::new();
    wait_until("all events to be published", LIMIT, || {
        let events = unpublished(database);
        if events.is_empty() {
            return true;
        }
        let taken = publisher.publish(&events).receipts;
        let now = payrelay::clock::Timestamp::now();
        receipts.extend(taken.clone());
        database.store().write(move |tx| outbox::mark_published(tx, &taken, now)).unwrap();
        false
    });
    receipts
}

fn consumer(cluster: &dyn Cluster, database: &Database) -> Consumer {
    Consumer::new(settings(cluster, 1), database.store().clone(), Waker::new().0, Part::up()).unwrap()
}

fn consume(consumer: &mut Consumer, database: &Database, sql: &str, count: i64) {
    wait_until(sql, LIMIT, || {
        let _ = consumer.step();
        database.number(sql) >= count
    });
    assert_eq!(database.number(sql), count);
}

fn records_are_cloud_events_in_commit_order(cluster: &mut dyn Cluster) {
    let database = Database::open();
    for user in 0..40 {
        database.pay(user % 7, [user, 1000]);
    }
    let events = unpublished(&database);
    let receipts = publish(&mut publisher(cluster, &database, 3), &database);
    let found = topic::read(&cluster.bootstrap(), TOPIC, LIMIT);
    assert_eq!(found.len(), events.len());
    assert_eq!(receipts.len(), events.len());
    for event in &events {
        let id = database.store().node().event_id(event.outbox_id);
        let record = found.iter().find(|record| record.header("ce_id") == id).unwrap();
        let expected = event.to_record(database.store().node(), payrelay::clock::Timestamp::now());
        assert_eq!((&record.key, &record.value), (&expected.key, &expected.value));
        assert_eq!(record.timestamp_ms, expected.timestamp_ms);
        let headers: Vec<_> = expected.headers.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        assert_eq!(record.headers, headers);
        let receipt = receipts.iter().find(|receipt| receipt.outbox_id == event.outbox_id).unwrap();
        assert_eq!(receipt.place, Place::Topic { partition: record.partition, offset: Some(record.offset) });
    }
    assert_commit_order(&found);
}

/// Of each partition, and so of each user: payment ids rise.
fn assert_commit_order(found: &[topic::Found]) {
    let ids = |partition| found.iter().filter(move |record| record.partition == partition).map(number);
    for partition in 0..3 {
        assert!(ids(partition).is_sorted(), "partition {partition}");
    }
}

fn number(record: &topic::Found) -> i64 {
    record.value.parse().unwrap()
}

fn a_broker_that_is_away_at_the_start_loses_nothing(cluster: &mut dyn Cluster) {
    let database = Database::open();
    database.pay(1, 1..=10);
    cluster.take_away();
    let mut publisher = publisher(cluster, &database, 1);
    let answer = publisher.publish(&unpublished(&database));
    assert_eq!(answer.receipts, []);
    assert!(answer.away.is_some());
    cluster.give_back();
    publish(&mut publisher, &database);
    let found = topic::read(&cluster.bootstrap(), TOPIC, LIMIT);
    assert_eq!(found.iter().map(number).collect::<Vec<_>>(), (1..=10).collect::<Vec<_>>());
}

fn a_broker_that_goes_in_the_middle_loses_and_doubles_nothing(cluster: &mut dyn Cluster) {
    let database = Database::open();
    let mut publisher = publisher(cluster, &database, 1);
    database.pay(1, 1..=100);
    publish(&mut publisher, &database);
    database.pay(1, 101..=200);
    cluster.take_away();
    // Handed over, never answered: it stays in flight.
    assert!(publisher.publish(&unpublished(&database)).away.is_some());
    database.pay(1, 201..=300);
    cluster.give_back();
    publish(&mut publisher, &database);
    let found = topic::read(&cluster.bootstrap(), TOPIC, LIMIT);
    assert_eq!(found.iter().map(number).collect::<Vec<_>>(), (1..=300).collect::<Vec<_>>());
}

fn what_comes_is_stored_once_and_the_offset_committed(cluster: &mut dyn Cluster) {
    let database = Database::open();
    database.pay(1, 1..=50);
    publish(&mut publisher(cluster, &database, 1), &database);
    let mut first = consumer(cluster, &database);
    consume(&mut first, &database, "SELECT count(*) FROM delivery", 50);
    // The same record twice: a copy under the same event id.
    let copy = &topic::read(&cluster.bootstrap(), TOPIC, LIMIT)[7];
    let headers: Vec<_> = copy.headers.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    topic::put(&cluster.bootstrap(), TOPIC, Some(&copy.key), Some(copy.value.as_bytes()), &headers);
    database.pay(1, [51]);
    publish(&mut publisher(cluster, &database, 1), &database);
    consume(&mut first, &database, "SELECT count(*) FROM delivery", 51);
    assert_eq!(database.number("SELECT count(*) FROM dead_letter"), 0);
    drop(first);
    // A new process of the same node goes on behind what was committed: it stores the new event and nothing else.
    database.pay(1, [52]);
    publish(&mut publisher(cluster, &database, 1), &database);
    let mut second = consumer(cluster, &database);
    let stored = wait_for("the second process's first records", LIMIT, || match second.step() {
        Step::Stored(0) | Step::Away(_) => None,
        Step::Stored(count) => Some(count),
    });
    assert_eq!(stored, 1);
}

fn what_is_not_ours_is_kept_aside_and_the_rest_goes_on(cluster: &mut dyn Cluster) {
    let database = Database::open();
    database.pay(1, [1]);
    publish(&mut publisher(cluster, &database, 1), &database);
    let ours = database.store().node().event_id(1);
    let unknown = database.store().node().event_id(77);
    let bootstrap = cluster.bootstrap();
    topic::put(&bootstrap, TOPIC, None, Some(b"1"), &[]);
    topic::put(&bootstrap, TOPIC, Some("k"), Some(b"1"), &[("ce_id", "other-node-1")]);
    topic::put(&bootstrap, TOPIC, Some("1"), Some(&[0xff, 0]), &[("ce_id", &ours)]);
    topic::put(&bootstrap, TOPIC, Some("1"), None, &[("ce_id", &ours)]);
    topic::put(&bootstrap, TOPIC, Some("1"), Some(b"2"), &[("ce_id", &ours)]);
    topic::put(&bootstrap, TOPIC, Some("1"), Some(b"77"), &[("ce_id", &unknown)]);
    database.pay(1, [2]);
    publish(&mut publisher(cluster, &database, 1), &database);
    let mut consumer = consumer(cluster, &database);
    consume(&mut consumer, &database, "SELECT count(*) FROM delivery", 2);
    assert_eq!(database.number("SELECT count(*) FROM dead_letter"), 6);
    let letters: Vec<(String, String, i64, i64)> = database
        .store()
        .read(|connection| {
            let sql = "SELECT reason, topic, \"partition\", \"offset\" FROM dead_letter ORDER BY id";
            let mut statement = connection.prepare(sql)?;
            let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?)))?;
            rows.collect()
        })
        .unwrap();
    let reasons = [
        "no ce_id header",
        "not one of this node's",
        "not a payment id",
        "not a payment id",
        "no event of this",
        "no event of this",
    ];
    for (index, (letter, reason)) in letters.iter().zip(reasons).enumerate() {
        assert!(letter.0.contains(reason), "{letter:?}");
        assert_eq!((letter.1.as_str(), letter.2, letter.3), (TOPIC, 0, i64::try_from(index).unwrap() + 1));
    }
}
