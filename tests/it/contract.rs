//! The contract of the Kafka publisher and consumer, on a real Kafka and on the client's fake
//! broker.

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use payrelay::config::{
    self, DeliveryGuarantee,
    DeliveryGuarantee::{AtLeastOnce, ExactlyOnce},
};
use payrelay::domain::event::Event;
use payrelay::domain::event::{RecordKey, RecordSource};
use payrelay::domain::node_id::NodeId;
use payrelay::domain::payment_record::RecordFormat;
use payrelay::domain::timestamp::Timestamp;
use payrelay::kafka::consumer::{Consumer, Step};
use payrelay::kafka::publisher::KafkaPublisher;
use payrelay::relay::publisher::{PublishError, PublishOutcome, Publisher};
use payrelay::relay::{self, Relay};
use payrelay::runtime::health::HealthHandle;
use payrelay::runtime::metrics::ScrapeFormat;
use payrelay::runtime::worker::Waker;
use payrelay::store::dead_letter_action::{self, DeadLetterAction, DeadLetterRequest, Selection};
use payrelay::store::publication::{self, Destination, Receipt};
use prometheus_client::registry::Registry;

use testkit::cluster::{Cluster, Fake};
use testkit::kafka::Broker;
use testkit::process::{Options, Payrelay};
use testkit::publishing::{
    TOPIC, consume, consumer, look_after, mark, positioned, publish, publish_and_note, publisher,
    settings, unpublished,
};
use testkit::store::{Database, wait_until_all_is_delivered};
use testkit::{topic, wait_for, wait_until};

const LIMIT: Duration = Duration::from_mins(1);

/// One test for each of the contract's points, each kind of cluster, and each kind of delivery.
macro_rules! contract {
    ($($point:ident),* $(,)?) => {
        contract!(exactly_once_on_the_fake_broker, Fake::start(), ExactlyOnce, $($point)*);
        contract!(at_least_once_on_the_fake_broker, Fake::start(), AtLeastOnce, $($point)*);
        contract!(exactly_once_on_a_real_kafka, Broker::start("4.4.0"), ExactlyOnce, $($point)*);
        contract!(at_least_once_on_a_real_kafka, Broker::start("4.4.0"), AtLeastOnce, $($point)*);
    };
    ($name:ident, $cluster:expr, $delivery:ident, $($point:ident)*) => {
        mod $name {
            use super::*;

            $(#[test] fn $point() { super::$point(&mut $cluster, $delivery); })*
        }
    };
}

contract![
    records_are_cloud_events_in_commit_order,
    a_broker_unavailable_at_the_start_loses_nothing,
    a_broker_restart_loses_and_doubles_nothing,
    published_but_unmarked_events_are_reconciled,
    consumed_events_are_stored_once_and_their_offset_is_committed,
    foreign_records_are_dead_lettered_and_others_are_consumed,
];

fn records_are_cloud_events_in_commit_order(
    cluster: &mut dyn Cluster,
    delivery: DeliveryGuarantee,
) {
    let database = Database::open();
    for user in 0..40 {
        database.pay(user % 7, [user, 1000]);
    }
    let events = unpublished(&database);
    let receipts = publish(&mut publisher(cluster, &database, 3, delivery), &database);
    let found = topic::read_all(&cluster.bootstrap(), TOPIC, events.len(), LIMIT);
    assert_eq!(found.len(), events.len());
    assert_eq!(receipts.len(), events.len());
    for event in &events {
        let id = database.store().node().event_id(event.outbox_id);
        let record = found
            .iter()
            .find(|record| record.header("ce_id") == id)
            .unwrap();
        let now = Timestamp::now();
        let source = RecordSource {
            node: database.store().node().clone(),
            incarnation: now,
            key: RecordKey::User,
        };
        let expected = event.to_record(&source, 0, now);
        assert_eq!(
            (&record.key, &record.value),
            (&expected.key, &expected.value)
        );
        let age_ms = now.as_millis() - record.timestamp_ms;
        assert!(
            (0..60_000).contains(&age_ms),
            "the time of publishing: {age_ms} ms ago"
        );
        let headers: Vec<_> = expected
            .headers
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect();
        assert_eq!(record.headers, headers);
        let receipt = receipts
            .iter()
            .find(|receipt| receipt.outbox_id == event.outbox_id)
            .unwrap();
        assert_eq!(
            receipt.place,
            Destination::Topic {
                partition: record.partition,
                offset: Some(record.offset)
            }
        );
    }
    assert_commit_order(&found);
}

/// Of each partition, and so of each user: payment ids rise.
fn assert_commit_order(found: &[topic::Found]) {
    let ids = |partition| {
        found
            .iter()
            .filter(move |record| record.partition == partition)
            .map(number)
    };
    for partition in 0..3 {
        assert!(ids(partition).is_sorted(), "partition {partition}");
    }
}

fn number(record: &topic::Found) -> i64 {
    record.value.parse().unwrap()
}

fn a_broker_unavailable_at_the_start_loses_nothing(
    cluster: &mut dyn Cluster,
    delivery: DeliveryGuarantee,
) {
    let database = Database::open();
    database.pay(1, 1..=10);
    cluster.become_unavailable();
    let mut publisher = publisher(cluster, &database, 1, delivery);
    let answer = publisher.publish(&unpublished(&database));
    assert_eq!(answer.receipts, []);
    assert!(answer.error.is_some());
    cluster.become_available();
    publish(&mut publisher, &database);
    let found = topic::read_all(&cluster.bootstrap(), TOPIC, 10, LIMIT);
    assert_eq!(
        found.iter().map(number).collect::<Vec<_>>(),
        (1..=10).collect::<Vec<_>>()
    );
}

fn a_broker_restart_loses_and_doubles_nothing(
    cluster: &mut dyn Cluster,
    delivery: DeliveryGuarantee,
) {
    let database = Database::open();
    let mut publisher = publisher(cluster, &database, 1, delivery);
    database.pay(1, 1..=100);
    publish_and_note(&mut publisher, &database);
    database.pay(1, 101..=200);
    cluster.become_unavailable();
    // Handed over, never answered: it stays in flight.
    assert!(publisher.publish(&unpublished(&database)).error.is_some());
    database.pay(1, 201..=300);
    cluster.become_available();
    publish_and_note(&mut publisher, &database);
    // The killed broker may return with a hanging transaction, which the publisher ends.
    look_after(&mut publisher, &database);
    let found = topic::read_all(&cluster.bootstrap(), TOPIC, 300, LIMIT);
    assert_eq!(
        found.iter().map(number).collect::<Vec<_>>(),
        (1..=300).collect::<Vec<_>>()
    );
}

fn published_but_unmarked_events_are_reconciled(
    cluster: &mut dyn Cluster,
    delivery: DeliveryGuarantee,
) {
    let database = Database::open();
    for user in 0..20 {
        database.pay(user, [user, 1000 + user]);
    }
    // The process dies between the acknowledgement and the mark.
    let mut dead = publisher(cluster, &database, 3, delivery);
    let lost = wait_for("the acknowledgement", LIMIT, || {
        let receipts = dead.publish(&unpublished(&database)).receipts;
        (!receipts.is_empty()).then_some(receipts)
    });
    drop(dead);
    assert_eq!((lost.len(), unpublished(&database).len()), (40, 40));
    database.pay(3, [2000, 2001]);
    publish(&mut publisher(cluster, &database, 3, delivery), &database);
    let found = topic::read_all(&cluster.bootstrap(), TOPIC, 42, LIMIT);
    assert_eq!(
        found.iter().map(number).collect::<BTreeSet<_>>(),
        (1..=42).collect()
    );
    assert_eq!(found.len(), 42, "none is there twice");
    assert_commit_order(&found);
    for Receipt { outbox_id, place } in lost {
        let Destination::Topic { partition, offset } = place else {
            panic!("{place:?}")
        };
        let sql = format!(
            "SELECT count(*) FROM outbox WHERE id = {outbox_id} AND \"partition\" = {partition} \
                AND \"offset\" = {}",
            offset.unwrap()
        );
        assert_eq!(database.number(&sql), 1, "{sql}");
    }
}

fn consumed_events_are_stored_once_and_their_offset_is_committed(
    cluster: &mut dyn Cluster,
    delivery: DeliveryGuarantee,
) {
    let database = Database::open();
    let mut first = positioned(cluster, &database);
    database.pay(1, 1..=50);
    publish(&mut publisher(cluster, &database, 1, delivery), &database);
    consume(&mut first, &database, "SELECT count(*) FROM delivery", 50);
    // The same record twice: a copy under the same event id.
    let copy = &topic::read(&cluster.bootstrap(), TOPIC, LIMIT)[7];
    let headers: Vec<_> = copy
        .headers
        .iter()
        .map(|(name, value)| (name.as_str(), value.as_str()))
        .collect();
    topic::put(
        &cluster.bootstrap(),
        TOPIC,
        Some(&copy.key),
        Some(copy.value.as_bytes()),
        &headers,
    );
    database.pay(1, [51]);
    publish(&mut publisher(cluster, &database, 1, delivery), &database);
    consume(&mut first, &database, "SELECT count(*) FROM delivery", 51);
    assert_eq!(database.number("SELECT count(*) FROM dead_letter"), 0);
    drop(first);
    // A new process of the same node continues after the committed offset: it stores the new event
    // and nothing else.
    database.pay(1, [52]);
    publish(&mut publisher(cluster, &database, 1, delivery), &database);
    let mut second = consumer(cluster, &database);
    let stored = wait_for(
        "the second process's first records",
        LIMIT,
        || match second.step() {
            Step::Stored(0) | Step::RetryAfter(_) => None,
            Step::Stored(count) => Some(count),
        },
    );
    assert_eq!(stored, 1);
}

/// Six records that this node cannot have written, each with the reason why.
fn put_foreign_records(bootstrap: &str, node: &NodeId) -> [&'static str; 6] {
    let own = node.event_id(1);
    let unknown = node.event_id(77);
    let put = |key, value, id: &str| topic::put(bootstrap, TOPIC, key, value, &[("ce_id", id)]);
    topic::put(bootstrap, TOPIC, None, Some(b"1"), &[]);
    put(Some("k"), Some(b"1"), "other-node-1");
    put(Some("1"), Some(&[0xff, 0]), &own);
    put(Some("1"), None, &own);
    put(Some("1"), Some(b"2"), &own);
    put(Some("1"), Some(b"77"), &unknown);
    [
        "no ce_id header",
        "not one of this node's",
        "neither a payment id",
        "neither a payment id",
        "no event of this",
        "no event of this",
    ]
}

struct Letter {
    reason: String,
    topic: String,
    partition: i64,
    offset: i64,
}

fn letters(database: &Database) -> Vec<Letter> {
    let sql = "SELECT reason, topic, \"partition\", \"offset\" FROM dead_letter ORDER BY id";
    let read = |connection: &payrelay::store::Connection| {
        let mut statement = connection.prepare(sql)?;
        let rows = statement.query_map([], |row| {
            Ok(Letter {
                reason: row.get(0)?,
                topic: row.get(1)?,
                partition: row.get(2)?,
                offset: row.get(3)?,
            })
        })?;
        rows.collect()
    };
    database.store().read(read).unwrap()
}

fn foreign_records_are_dead_lettered_and_others_are_consumed(
    cluster: &mut dyn Cluster,
    delivery: DeliveryGuarantee,
) {
    let database = Database::open();
    let mut consumer = positioned(cluster, &database);
    database.pay(1, [1]);
    publish(&mut publisher(cluster, &database, 1, delivery), &database);
    let reasons = put_foreign_records(&cluster.bootstrap(), database.store().node());
    database.pay(1, [2]);
    publish(&mut publisher(cluster, &database, 1, delivery), &database);
    consume(&mut consumer, &database, "SELECT count(*) FROM delivery", 2);
    assert_eq!(database.number("SELECT count(*) FROM dead_letter"), 6);
    // Four of them have an id of this node.
    let metrics = database.store().metrics();
    let metrics = metrics.encode(ScrapeFormat::Text, &Registry::default());
    assert!(
        metrics.contains("payrelay_unknown_events_total 4\n"),
        "{metrics}"
    );
    let letters = letters(&database);
    // The marker of a transaction is somewhere between them.
    assert!(letters.is_sorted_by_key(|letter| letter.offset) && letters[0].offset > 0);
    for (letter, reason) in letters.iter().zip(reasons) {
        assert!(letter.reason.contains(reason), "{}", letter.reason);
        assert_eq!((letter.topic.as_str(), letter.partition), (TOPIC, 0));
    }
}

/// What the topic has once it has this number of records, as payment ids in order.
fn on_topic(cluster: &dyn Cluster, count: usize) -> Vec<i64> {
    topic::read_all(&cluster.bootstrap(), TOPIC, count, LIMIT)
        .iter()
        .map(number)
        .collect()
}

#[test]
fn an_open_transaction_of_a_dead_process_never_becomes_visible() {
    let broker = Broker::start("4.4.0");
    let database = Database::open();
    database.pay(1, [1]);
    publish(
        &mut publisher(&broker, &database, 1, ExactlyOnce),
        &database,
    );
    database.pay(1, [2]);
    let node = database.store().node();
    let id = format!("payrelay-{node}");
    let dead =
        topic::OpenTransaction::begin(&broker.bootstrap(), &id, TOPIC, "2", &node.event_id(2));
    publish(
        &mut publisher(&broker, &database, 1, ExactlyOnce),
        &database,
    );
    assert!(!dead.commit(), "its commit comes too late");
    assert_eq!(on_topic(&broker, 2), [1, 2]);
}

#[test]
fn a_second_process_of_the_same_node_stops_the_first() {
    two_of_the_same_node("4.4.0");
}

/// With the transactions of before KIP-890.
#[test]
fn a_second_process_of_the_same_node_stops_the_first_on_kafka_3_9_2() {
    two_of_the_same_node("3.9.2");
}

fn two_of_the_same_node(version: &str) {
    let broker = Broker::start(version);
    let database = Database::open();
    database.pay(1, [1]);
    let mut first = publisher(&broker, &database, 1, ExactlyOnce);
    let mut second = publisher(&broker, &database, 1, ExactlyOnce);
    publish(&mut first, &database);
    // Each takes the id over from the other, once; fenced again, one of them stops.
    let mut reservation = 1;
    let error = wait_for("one of them to stop", LIMIT, || {
        [&mut second, &mut first].into_iter().find_map(|publisher| {
            reservation += 1;
            database.pay(1, [reservation]);
            let published = publisher.publish(&unpublished(&database));
            let error = published.error.clone();
            mark(&database, published);
            error.filter(|error| matches!(error, PublishError::Fenced(_)))
        })
    });
    drop((first, second));
    reservation += 1;
    database.pay(1, [reservation]);
    assert!(matches!(error, PublishError::Fenced(_)), "{error:?}");
    let mut relay = Relay::new(
        database.store().clone(),
        Box::new(Fenced),
        relay::Options {
            batch_max: 10,
            format: RecordFormat::Id,
            wake: Waker::new().1,
            notifiers: Waker::new().0,
            health: HealthHandle::up(),
            reconnect_max: Duration::from_secs(5),
        },
    );
    assert_eq!(relay.step(), relay::Step::Fenced);
    publish(
        &mut publisher(&broker, &database, 1, ExactlyOnce),
        &database,
    );
    let all: Vec<i64> = (1..=reservation).collect();
    assert_eq!(on_topic(&broker, all.len()), all);
}

/// A batch that the network delivers late: its sender is dead by then, and the next process has
/// published. Returns what is on the topic.
fn with_a_batch_that_comes_too_late(delivery: DeliveryGuarantee) -> Vec<i64> {
    let (broker, mut proxy) = Broker::start_behind_proxy("4.4.0");
    let database = Database::open();
    let mut dead = publisher(&broker, &database, 1, delivery);
    database.pay(1, 1..=5);
    publish(&mut dead, &database);
    proxy.hold();
    database.pay(1, 6..=10);
    assert!(
        dead.publish(&unpublished(&database)).error.is_some(),
        "its batch is in progress"
    );
    drop(dead);
    publish(&mut publisher(&broker, &database, 1, delivery), &database);
    proxy.heal();
    // This number of records, once the broker has the held bytes.
    on_topic(&broker, if delivery == AtLeastOnce { 15 } else { 10 });
    database.pay(1, 11..=12);
    publish(&mut publisher(&broker, &database, 1, delivery), &database);
    on_topic(&broker, 12)
}

#[test]
fn the_broker_rejects_a_late_batch_of_a_fenced_producer() {
    assert_eq!(
        with_a_batch_that_comes_too_late(ExactlyOnce),
        (1..=12).collect::<Vec<_>>()
    );
}

/// The one hole that the look before publishing leaves without transactions: this is what they are
/// for.
#[test]
fn a_late_batch_is_published_twice_without_transactions() {
    let found = with_a_batch_that_comes_too_late(AtLeastOnce);
    assert_eq!(
        found,
        (1..=10).chain(6..=10).chain(11..=12).collect::<Vec<_>>()
    );
}

#[test]
fn the_relay_notices_added_partitions_and_a_recreated_topic() {
    let broker = Broker::start("4.4.0");
    let database = Database::open();
    let deliveries = "SELECT count(*) FROM delivery";
    let mut consumer = consumer(&broker, &database);
    let mut reservation = 0;
    let mut continue_publishing = |publisher: &mut KafkaPublisher, users: i64| {
        for user in 0..users {
            reservation += 1;
            database.pay(user, [reservation]);
        }
        publish(publisher, &database);
        consume(&mut consumer, &database, deliveries, reservation);
    };
    continue_publishing(&mut publisher(&broker, &database, 1, ExactlyOnce), 3);
    topic::add_partitions(&broker.bootstrap(), TOPIC, 3, LIMIT);
    // A new one sees them at once.
    let mut publisher = publisher(&broker, &database, 1, ExactlyOnce);
    continue_publishing(&mut publisher, 30);
    assert!(
        database.number("SELECT count(*) FROM topic_partition WHERE consumed_to > 0") > 1,
        "others were used"
    );
    topic::delete(&broker.bootstrap(), TOPIC, LIMIT);
    continue_publishing(&mut publisher, 3);
}

struct Fenced;

impl Publisher for Fenced {
    fn publish(&mut self, _: &[Event]) -> PublishOutcome {
        PublishOutcome {
            error: Some(PublishError::Fenced("another one".into())),
            ..PublishOutcome::default()
        }
    }

    fn name(&self) -> &'static str {
        "a fenced one"
    }
}

fn a_record_that_the_broker_rejects_is_dead_lettered(delivery: DeliveryGuarantee) {
    let broker = Broker::start("4.4.0");
    let database = Database::open();
    database.pay(1, 1..=4);
    let trace = "UPDATE outbox \
        SET traceparent = '00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01' WHERE id = 2";
    database
        .store()
        .write(move |tx| tx.execute_batch(trace))
        .unwrap();
    // Large enough for each of the events, but not for the one with a trace.
    topic::create(&broker.bootstrap(), TOPIC, &[("max.message.bytes", "280")]);
    let mut consumer = positioned(&broker, &database);
    let mut publisher = publisher(&broker, &database, 1, delivery);
    publish(&mut publisher, &database);
    assert_eq!(on_topic(&broker, 3), [1, 3, 4]);
    assert_eq!(
        database.number(
            "SELECT id FROM outbox WHERE status = 'REJECTED' AND rejection LIKE '%TooLarge%'"
        ),
        2
    );
    assert_eq!(
        database.number("SELECT outbox_id FROM dead_letter WHERE state = 'OPEN'"),
        2
    );
    // A person makes it fit, and sends it again.
    let node = database.store().node().clone();
    let replay = move |tx: &payrelay::store::Transaction<'_>| {
        tx.execute_batch("UPDATE outbox SET traceparent = NULL")?;
        let which = Selection::Open {
            after: 0,
            limit: 10,
        };
        let now = Timestamp::now();
        let order = DeadLetterRequest {
            action: DeadLetterAction::Replay,
            which,
            dry_run: false,
            node: &node,
            origin: "http",
            reason: None,
            now,
        };
        dead_letter_action::act_on_dead_letters(tx, order)
    };
    let outcomes = database.store().write(replay).unwrap();
    assert_eq!(
        (outcomes[0].outcome.as_str(), outcomes[0].resolved),
        ("waits to be published again", true)
    );
    publish(&mut publisher, &database);
    assert_eq!(on_topic(&broker, 4), [1, 3, 4, 2]);
    consume(&mut consumer, &database, "SELECT count(*) FROM delivery", 4);
    assert_eq!(
        database.number("SELECT inversions FROM topic_partition"),
        1,
        "it came after later ones, and that shows"
    );
}

/// An event that is suspected goes outside of a transaction once: no other one goes along, in its
/// batch or instead of it.
#[test]
fn new_events_wait_while_a_rejected_event_is_retested() {
    let broker = Broker::start("4.4.0");
    let trace = "UPDATE outbox \
        SET traceparent = '00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01' WHERE id = 1";
    // They come after it was refused this number of times.
    for refusals in 0..=3 {
        let database = Database::open();
        database.pay(1, [1]);
        database
            .store()
            .write(move |tx| tx.execute_batch(trace))
            .unwrap();
        topic::create(&broker.bootstrap(), TOPIC, &[("max.message.bytes", "280")]);
        let mut publisher = publisher(&broker, &database, 1, ExactlyOnce);
        let mut calls = 0;
        let receipts = wait_for("the event to be rejected", LIMIT, || {
            if calls == refusals {
                database.pay(1, 2..=5);
            }
            calls += 1;
            let receipts = publisher.publish(&unpublished(&database)).receipts;
            (!receipts.is_empty()).then_some(receipts)
        });
        assert!(
            matches!(
                receipts.as_slice(),
                [Receipt {
                    outbox_id: 1,
                    place: Destination::Rejected(_)
                }]
            ),
            "{receipts:?}"
        );
        database
            .store()
            .write(move |tx| publication::record_publications(tx, &receipts, Timestamp::now()))
            .unwrap();
        publish(&mut publisher, &database);
        let all = if calls > refusals {
            vec![2, 3, 4, 5]
        } else {
            Vec::new()
        };
        assert_eq!(on_topic(&broker, all.len()), all);
        drop(publisher);
        topic::delete(&broker.bootstrap(), TOPIC, LIMIT);
    }
}

#[test]
fn a_record_that_the_broker_rejects_is_dead_lettered_exactly_once() {
    a_record_that_the_broker_rejects_is_dead_lettered(ExactlyOnce);
}

#[test]
fn a_record_that_the_broker_rejects_is_dead_lettered_at_least_once() {
    a_record_that_the_broker_rejects_is_dead_lettered(AtLeastOnce);
}

/// A database whose events are published to a topic, at least once.
struct Published {
    broker: Broker,
    database: Database,
}

impl Published {
    fn publish(&self, first: i64, last: i64) {
        self.database.pay(1, first..=last);
        let mut publisher = publisher(&self.broker, &self.database, 1, AtLeastOnce);
        publish(&mut publisher, &self.database);
    }

    fn consume(&self, consumer: &mut Consumer, deliveries: i64) {
        let sql = "SELECT count(*) FROM delivery";
        consume(consumer, &self.database, sql, deliveries);
    }

    /// Duplicates, gaps, inversions, and the offset to which is consumed.
    fn counted(&self) -> (i64, i64, i64, i64) {
        let number = |what| {
            let sql = format!("SELECT {what} FROM topic_partition");
            self.database.number(&sql)
        };
        (
            number("duplicates"),
            number("gaps"),
            number("inversions"),
            number("consumed_to"),
        )
    }

    /// A consumer of a group whose offset is this one.
    fn consumer_of_group_at(&self, offset: i64) -> Consumer {
        let group = format!("group-{offset}");
        topic::commit(&self.broker.bootstrap(), &group, TOPIC, offset);
        let settings = config::Kafka {
            group,
            ..settings(&self.broker, 1, ExactlyOnce)
        };
        let store = self.database.store().clone();
        Consumer::new(settings, store, Waker::new().0, HealthHandle::up()).unwrap()
    }
}

#[test]
fn the_consumer_resumes_from_the_offsets_in_the_database() {
    let this = Published {
        broker: Broker::start("4.4.0"),
        database: Database::open(),
    };
    let bootstrap = this.broker.bootstrap();
    let next_consumer = || consumer(&this.broker, &this.database);
    let mut first = positioned(&this.broker, &this.database);
    this.publish(1, 10);
    this.consume(&mut first, 10);
    drop(first);

    // The group's offset was set back, and then far ahead: neither brings anything twice, nor loses
    // anything.
    for offset in [0, 13] {
        let last = this.database.number("SELECT max(id) FROM outbox");
        this.publish(last + 1, last + 3);
        this.consume(&mut this.consumer_of_group_at(offset), last + 3);
    }
    assert_eq!(this.counted(), (0, 0, 0, 16));

    // The retention deletes unconsumed records: their events are delivered all the same.
    this.publish(17, 20);
    topic::truncate(&bootstrap, TOPIC, 0, 18);
    this.consume(&mut next_consumer(), 20);
    assert_eq!(this.counted(), (0, 2, 0, 20));

    // All records are deleted while the consumer runs.
    let mut running = next_consumer();
    this.publish(21, 22);
    this.consume(&mut running, 22);
    this.publish(23, 25);
    topic::truncate(&bootstrap, TOPIC, 0, 25);
    drop(running);
    this.consume(&mut next_consumer(), 25);
    assert_eq!(this.counted().1, 5);

    // Deleted and recreated: the lost events are delivered, and the new one is read from its
    // beginning.
    this.publish(26, 28);
    topic::delete(&bootstrap, TOPIC, LIMIT);
    this.publish(29, 60);
    let mut last = next_consumer();
    this.consume(&mut last, 60);
    wait_until("the new topic to be consumed", LIMIT, || {
        let _ = last.step();
        this.counted().3 == 32
    });
}

#[test]
fn unconsumed_events_of_an_abandoned_topic_are_backfilled_from_the_outbox() {
    let broker = Broker::start("4.4.0");
    let database = Database::open();
    database.pay(1, 1..=5);
    publish(
        &mut publisher(&broker, &database, 1, ExactlyOnce),
        &database,
    );
    assert_eq!(database.number("SELECT count(*) FROM delivery"), 0);
    let left = database.close();
    let bootstrap = broker.bootstrap();
    let elsewhere = [
        ("PAYRELAY_PUBLISHER_KIND", "kafka"),
        ("PAYRELAY_KAFKA_BOOTSTRAP_SERVERS", bootstrap.as_str()),
        ("PAYRELAY_KAFKA_TOPIC", "another-topic"),
    ];
    for env in [
        &elsewhere[..],
        &[("PAYRELAY_PUBLISHER_KIND", "application")],
    ] {
        let dir = tempfile::tempdir().unwrap();
        let database = dir.path().join("payrelay.db");
        fs::copy(left.path().join("payrelay.db"), &database).unwrap();
        let payrelay = Payrelay::start(Options::new(dir.path(), env));
        wait_until_all_is_delivered(&database, LIMIT);
        payrelay.wait_for_log("backfilled 5 published", LIMIT);
    }
}

#[test]
fn a_missing_partition_delays_no_other_partition() {
    let fake = Fake::start();
    let database = Database::open();
    let pay_and_publish = |first: i64| {
        (first..first + 40).for_each(|id| drop(database.pay(id, [id])));
        publish(&mut publisher(&fake, &database, 2, ExactlyOnce), &database);
    };
    pay_and_publish(1);
    let deliveries = "SELECT count(*) FROM delivery";
    let mut first = consumer(&fake, &database);
    consume(&mut first, &database, deliveries, 40);
    drop(first);
    pay_and_publish(41);
    let gaps = database.number("SELECT sum(gaps) FROM topic_partition");
    // Both ends of the first partition, and then not those of the second.
    let asked = fake.ends_asked();
    fake.refuse_ends(2, 6);
    consume(&mut consumer(&fake, &database), &database, deliveries, 80);
    assert!(
        fake.ends_asked() >= asked + 8,
        "{} times",
        fake.ends_asked() - asked
    );
    let gaps_after = database.number("SELECT sum(gaps) FROM topic_partition");
    assert_eq!(gaps_after, gaps, "the topic has brought the later ones");
}

#[test]
fn events_lost_from_the_end_of_a_topic_are_backfilled() {
    let fake = Fake::start();
    let database = Database::open();
    let published = |ids: std::ops::RangeInclusive<i64>| {
        let mut publisher = publisher(&fake, &database, 1, AtLeastOnce);
        for id in ids {
            database.pay(1, [id]);
            publish(&mut publisher, &database);
        }
    };
    let mut first = positioned(&fake, &database);
    published(1..=6);
    let deliveries = "SELECT count(*) FROM delivery";
    consume(&mut first, &database, deliveries, 6);
    drop(first);
    published(7..=9);
    // Three consumed and three unconsumed records are gone; another one is where the first of
    // them was.
    fake.cut_off(TOPIC, 0, 3, 3);
    published(10..=10);
    consume(&mut consumer(&fake, &database), &database, deliveries, 10);
    // Nothing says where it was cut: the partition is read from its end, and what is before that is
    // backfilled.
    assert_eq!(database.number("SELECT gaps FROM topic_partition"), 4);

    // A dead-lettered record does not replace another one at its offset.
    for kept in 1..=2 {
        fake.cut_off(TOPIC, 0, 4, 4);
        let mut next = consumer(&fake, &database);
        wait_until("what is left of the topic to be read", LIMIT, || {
            let _ = next.step();
            database.number("SELECT consumed_to FROM topic_partition") == 4
        });
        drop(next);
        topic::put(&fake.bootstrap(), TOPIC, None, Some(b"not ours"), &[]);
        consume(
            &mut consumer(&fake, &database),
            &database,
            "SELECT count(*) FROM dead_letter",
            kept,
        );
    }
}

#[test]
fn a_consumer_reports_that_its_group_rejects_it() {
    let fake = Fake::start();
    let database = Database::open();
    database.pay(1, 1..=3);
    publish(&mut publisher(&fake, &database, 1, ExactlyOnce), &database);
    fake.refuse_members();
    let part = HealthHandle::up();
    let settings = settings(&fake, 1, ExactlyOnce);
    let store = database.store().clone();
    let mut consumer = Consumer::new(settings, store, Waker::new().0, part.clone()).unwrap();
    wait_until("the consumer to be unavailable", 2 * LIMIT, || {
        let _ = consumer.step();
        part.get().is_failing()
    });
    let error = part.get().error.unwrap();
    assert!(error.contains("gives it 0 of 1 partitions"), "{error}");
    fake.heal();
    consume(&mut consumer, &database, "SELECT count(*) FROM delivery", 3);
    wait_until("the consumer to be back", LIMIT, || {
        let _ = consumer.step();
        !part.get().is_failing()
    });
}

#[test]
fn events_hidden_by_another_producers_transaction_are_reported() {
    let broker = Broker::start("4.4.0");
    let database = Database::open();
    let part = HealthHandle::up();
    let settings = settings(&broker, 1, ExactlyOnce);
    let store = database.store().clone();
    let mut consumer = Consumer::new(settings, store, Waker::new().0, part.clone()).unwrap();
    database.pay(1, 1..=3);
    let mut publisher = publisher(&broker, &database, 1, ExactlyOnce);
    publish(&mut publisher, &database);
    consume(&mut consumer, &database, "SELECT count(*) FROM delivery", 3);
    let stranger =
        topic::OpenTransaction::begin(&broker.bootstrap(), "stranger", TOPIC, "77", "stranger-1");
    database.pay(1, 4..=5);
    publish(&mut publisher, &database);
    wait_until("the consumer to be unavailable", 2 * LIMIT, || {
        let _ = consumer.step();
        part.get().is_failing()
    });
    let error = part.get().error.unwrap();
    assert!(
        error.contains("2 published events have not arrived from the topic"),
        "{error}"
    );
    // Nor is anything published by who cannot see what is there.
    drop(publisher);
    database.pay(1, 6..=6);
    let mut next = self::publisher(&broker, &database, 1, ExactlyOnce);
    let reason = wait_for("the publisher to say why it waits", LIMIT, || {
        match next.publish(&unpublished(&database)) {
            PublishOutcome {
                error: Some(PublishError::Unavailable(reason)),
                ..
            } if reason.contains("transaction") => Some(reason),
            PublishOutcome { receipts, .. } => {
                assert_eq!(receipts, []);
                None
            }
        }
    });
    assert!(reason.contains("partition 0"), "{reason}");
    assert!(stranger.commit());
    publish(&mut next, &database);
    consume(
        &mut consumer,
        &database,
        "SELECT count(*) FROM delivery WHERE outbox_id <= 6",
        6,
    );
}
