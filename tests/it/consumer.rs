//! What the consumer does where the topic does not bring what was published, on real brokers.

use std::fs;
use std::num::NonZeroUsize;
use std::time::Duration;

use payrelay::config;
use payrelay::config::DeliveryGuarantee::{AtLeastOnce, ExactlyOnce};
use payrelay::domain::timestamp::Timestamp;
use payrelay::kafka::consumer::Consumer;
use payrelay::relay::publisher::Publisher;
use payrelay::runtime::health::HealthHandle;
use payrelay::runtime::worker::Waker;
use payrelay::store::dead_letter;
use payrelay::store::dead_letter_action::{self, DeadLetterAction, DeadLetterRequest, Selection};
use serde_json::{Value, json};

use super::audit::audit;
use testkit::kafka::Broker;
use testkit::publishing::{
    TOPIC, consume, consumer, positioned, publish, publisher, settings, unpublished,
};
use testkit::store::Database;
use testkit::{topic, wait_for, wait_until};

const LIMIT: Duration = Duration::from_mins(1);
const DELIVERIES: &str = "SELECT count(*) FROM delivery";

/// The findings and the notes of an audit, as kinds and counts.
#[track_caller]
fn audited(database: Database, broker: &Broker) -> (Value, Value) {
    let left = database.close();
    let bootstrap = broker.bootstrap();
    let env = [
        ("PAYRELAY_PUBLISHER_KIND", "kafka"),
        ("PAYRELAY_KAFKA_BOOTSTRAP_SERVERS", &bootstrap),
    ];
    let (_, json, error) = audit(left.path(), &env, &["--json"]);
    let report: Value = serde_json::from_str(&json).unwrap_or_else(|_| panic!("{json}{error}"));
    let seen = |name: &str| -> Value {
        report[name]
            .as_array()
            .unwrap()
            .iter()
            .map(|seen| json!([seen["kind"], seen["count"]]))
            .collect()
    };
    (seen("findings"), seen("notes"))
}

#[test]
fn batches_that_cannot_be_decoded_become_dead_letters_and_cost_no_event() {
    let mut broker = Broker::start("4.4.0");
    let database = Database::open();
    drop(positioned(&broker, &database));
    for batch in 0..10 {
        database.pay(1, [2 * batch, 2 * batch + 1]);
        publish(
            &mut publisher(&broker, &database, 1, AtLeastOnce),
            &database,
        );
    }
    // Published, and not marked: a starting publisher has to read it, and cannot.
    database.pay(1, [100, 101]);
    let mut dying = publisher(&broker, &database, 1, AtLeastOnce);
    let acknowledged = wait_for("the broker to acknowledge them", LIMIT, || {
        let receipts = dying.publish(&unpublished(&database)).receipts;
        (!receipts.is_empty()).then_some(receipts.len())
    });
    assert_eq!(acknowledged, 2);
    drop(dying);
    broker.stop();
    // The first one, two in a row, and the last one.
    for (batch, first) in [(0, 0), (4, 8), (5, 10), (10, 20)] {
        assert_eq!(broker.corrupt(TOPIC, 0, |_| batch), Some(first..=first + 1));
    }
    broker.restart();
    database.pay(1, [102]);
    publish(
        &mut publisher(&broker, &database, 1, AtLeastOnce),
        &database,
    );
    consume(&mut consumer(&broker, &database), &database, DELIVERIES, 23);
    let reasons = "SELECT count(*) FROM dead_letter WHERE reason LIKE '%cannot be decoded%' \
        AND \"offset\" IN (0, 8, 20)";
    assert_eq!(database.number(reasons), 3);
    assert_eq!(database.number("SELECT count(*) FROM dead_letter"), 3);
    let (findings, notes) = audited(database, &broker);
    assert_eq!(
        (findings, notes),
        (json!([]), json!([["dead-letters", 3], ["undecodable", 6]]))
    );
}

#[test]
fn a_batch_that_inflates_beyond_16_mib_becomes_a_dead_letter_and_costs_no_event() {
    let broker = Broker::start("4.4.0");
    let database = Database::open();
    let mut consumer = positioned(&broker, &database);
    topic::put_inflating(&broker.bootstrap(), TOPIC, 17 * 1024 * 1024);
    database.pay(1, 1..=3);
    publish(
        &mut publisher(&broker, &database, 1, ExactlyOnce),
        &database,
    );
    consume(&mut consumer, &database, DELIVERIES, 3);
    let letters = "SELECT count(*) FROM dead_letter \
        WHERE reason LIKE 'the records 0 to 0 cannot be decoded%'";
    assert_eq!(database.number(letters), 1);
    assert_eq!(database.number("SELECT sum(gaps) FROM topic_partition"), 0);
    assert_eq!(
        audited(database, &broker),
        (json!([]), json!([["dead-letters", 1]]))
    );
}

#[test]
fn records_deleted_while_the_consumer_is_behind_are_backfilled_and_wake_the_notifier() {
    for left in 0..=2 {
        let broker = Broker::start("4.4.0");
        let database = Database::open();
        drop(positioned(&broker, &database));
        let (notifier, woken) = Waker::new();
        let settings = settings(&broker, 1, ExactlyOnce);
        let mut consumer = Consumer::new(
            settings,
            database.store().clone(),
            notifier,
            HealthHandle::up(),
        )
        .unwrap();
        database.pay(1, [1]);
        publish(
            &mut publisher(&broker, &database, 1, AtLeastOnce),
            &database,
        );
        consume(&mut consumer, &database, DELIVERIES, 1);
        while woken.try_recv().is_ok() {}
        // It is connected, and does not read.
        database.pay(1, 2..=6);
        publish(
            &mut publisher(&broker, &database, 1, AtLeastOnce),
            &database,
        );
        topic::truncate(&broker.bootstrap(), TOPIC, 0, 6 - left);
        consume(&mut consumer, &database, DELIVERIES, 6);
        assert!(woken.try_recv().is_ok());
        assert_eq!(audited(database, &broker).0, json!([]));
    }
}

/// The clock was two days ahead when they were published, to a topic that was deleted since. Rows
/// with a delivery hide them at first.
#[test]
fn events_with_a_publication_time_in_the_future_are_backfilled() {
    let broker = Broker::start("4.4.0");
    let database = Database::open();
    let mut consumer = positioned(&broker, &database);
    for first in (1..=12_000).step_by(1000) {
        database.pay(1, first..first + 1000);
    }
    let later = Timestamp::now().plus(Duration::from_hours(48)).as_micros();
    let lose = format!(
        "UPDATE outbox SET status = 'PUBLISHED', published_at = {later}, \"partition\" = 0;
         INSERT INTO delivery (outbox_id, channel, status, created_at, delivered_at)
            SELECT id, 'default', 'DELIVERED', 1, 1 FROM outbox WHERE id <= 11900"
    );
    database
        .store()
        .write(move |tx| tx.execute_batch(&lose))
        .unwrap();
    consume(&mut consumer, &database, DELIVERIES, 12_000);
}

#[test]
fn a_copy_that_is_older_than_the_groups_offsets_loses_no_event() {
    let broker = Broker::start("4.4.0");
    let database = Database::open();
    for user in 1..=9 {
        database.pay(user, [user]);
    }
    let folder = database.close();
    let copy = tempfile::tempdir().unwrap();
    fs::copy(
        folder.path().join("payrelay.db"),
        copy.path().join("payrelay.db"),
    )
    .unwrap();

    let database = Database::open_in(folder);
    publish(
        &mut publisher(&broker, &database, 3, ExactlyOnce),
        &database,
    );
    let mut first = consumer(&broker, &database);
    consume(&mut first, &database, DELIVERIES, 9);
    wait_until("the group's offsets to be committed", LIMIT, || {
        let _ = first.step();
        topic::committed(&broker.bootstrap(), "payment-group")
            .values()
            .sum::<i64>()
            >= 9
    });
    drop((first, database));

    let database = Database::open_in(copy);
    publish(
        &mut publisher(&broker, &database, 3, ExactlyOnce),
        &database,
    );
    consume(&mut consumer(&broker, &database), &database, DELIVERIES, 9);
    assert_eq!(audited(database, &broker), (json!([]), json!([])));
}

#[test]
fn foreign_records_beyond_the_limit_are_only_counted() {
    let broker = Broker::start("4.4.0");
    let database = Database::open();
    drop(positioned(&broker, &database));
    let settings = config::Kafka {
        dead_records_max: NonZeroUsize::new(5).unwrap(),
        ..settings(&broker, 1, ExactlyOnce)
    };
    let mut consumer = Consumer::new(
        settings,
        database.store().clone(),
        Waker::new().0,
        HealthHandle::up(),
    )
    .unwrap();
    let put = |count| {
        (0..count)
            .for_each(|_| topic::put(&broker.bootstrap(), TOPIC, None, Some(b"not ours"), &[]));
    };
    put(12);
    consume(
        &mut consumer,
        &database,
        "SELECT records_dropped FROM node",
        7,
    );
    assert_eq!(database.number("SELECT count(*) FROM dead_letter"), 5);

    let node = database.store().node().clone();
    let now = Timestamp::now();
    let discard = move |tx: &payrelay::store::Transaction<'_>| {
        dead_letter_action::act_on_dead_letters(
            tx,
            DeadLetterRequest {
                action: DeadLetterAction::Discard,
                which: Selection::Open { after: 0, limit: 3 },
                dry_run: false,
                node: &node,
                origin: "http",
                reason: None,
                now,
            },
        )
    };
    assert_eq!(database.store().write(discard).unwrap().len(), 3);
    let purge = |cutoff| {
        database
            .store()
            .write(move |tx| dead_letter::purge_dead_letters(tx, cutoff, 2))
            .unwrap()
    };
    assert_eq!(purge(now), 0, "not before the retention is over");
    let later = now.plus(Duration::from_secs(1));
    assert_eq!([purge(later), purge(later), purge(later)], [2, 1, 0]);
    put(4);
    consume(
        &mut consumer,
        &database,
        "SELECT records_dropped FROM node",
        8,
    );
    assert_eq!(database.number("SELECT count(*) FROM dead_letter"), 5);
    assert_eq!(
        audited(database, &broker),
        (
            json!([]),
            json!([["dead-letters", 5], ["dropped-records", 1]])
        )
    );
}
