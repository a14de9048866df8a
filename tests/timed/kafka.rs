//! How soon payrelay notices what Kafka does, and says it.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use krafka::admin::AclOperation;
use payrelay::config;
use payrelay::config::DeliveryGuarantee::{AtLeastOnce, ExactlyOnce};
use payrelay::kafka::consumer::{Consumer, Step};
use payrelay::kafka::publisher::KafkaPublisher;
use payrelay::relay::publisher::{PublishError, Publisher};
use payrelay::runtime::health::HealthHandle;
use payrelay::runtime::worker::Waker;

use testkit::cluster::{Cluster, Fake};
use testkit::http::{Client, pay};
use testkit::kafka::Broker;
use testkit::process::{Options, Payrelay, run_command};
use testkit::publishing::{
    TOPIC, as_user, consume, look_after, publish, publish_and_note, publisher, settings, step,
    unpublished,
};
use testkit::store::{Database, wait_until_all_is_delivered};
use testkit::timed::alone;
use testkit::tls::USER;
use testkit::{topic, wait_for, wait_until};

const LIMIT: Duration = Duration::from_mins(1);
const DELIVERIES: &str = "SELECT count(*) FROM delivery";

fn unavailable_within_5_s(consumer: &mut Consumer, part: &HealthHandle, fault: Instant) {
    wait_until("the consumer to be unavailable", LIMIT, || {
        let _ = consumer.step();
        part.get().is_failing()
    });
    assert!(
        fault.elapsed() < Duration::from_secs(5),
        "{:?}",
        fault.elapsed()
    );
}

#[test]
fn a_broker_that_dies_or_hangs_makes_the_consumer_unavailable_within_5_s_until_it_answers() {
    let _alone = alone();
    let (mut broker, mut proxy) = Broker::start_behind_proxy("4.4.0");
    let database = Database::open();
    let part = HealthHandle::up();
    let settings = settings(&broker, 1, ExactlyOnce);
    let store = database.store().clone();
    let mut consumer = Consumer::new(settings, store, Waker::new().0, part.clone()).unwrap();
    let recovered = |consumer: &mut Consumer| {
        wait_until("the consumer to be up", LIMIT, || {
            let _ = consumer.step();
            !part.get().is_failing()
        });
    };
    database.pay(1, [1]);
    publish(
        &mut publisher(&broker, &database, 1, ExactlyOnce),
        &database,
    );
    consume(&mut consumer, &database, DELIVERIES, 1);
    recovered(&mut consumer);

    proxy.stall();
    unavailable_within_5_s(&mut consumer, &part, Instant::now());
    for _ in 0..5 {
        assert!(matches!(
            consumer.step(),
            Step::Stored(0) | Step::RetryAfter(_)
        ));
        assert!(part.get().is_failing(), "it hangs");
    }
    proxy.heal();
    recovered(&mut consumer);

    broker.become_unavailable();
    unavailable_within_5_s(&mut consumer, &part, Instant::now());
    broker.become_available();
    recovered(&mut consumer);
}

/// Waits until the publisher says which right is missing; it publishes nothing meanwhile.
fn missing_right(publisher: &mut KafkaPublisher, database: &Database) -> String {
    wait_for(
        "the publisher to say why it does not publish",
        LIMIT,
        || {
            let outcome = publisher.publish(&unpublished(database));
            assert_eq!(
                outcome.receipts,
                [],
                "nothing is published, and nothing is rejected"
            );
            match outcome.error {
                Some(PublishError::Unavailable(why)) if why.contains("AUTHORIZATION_FAILED") => {
                    Some(why)
                }
                _ => None,
            }
        },
    )
}

/// The events wait, and are published in their order once the right is there again.
#[test]
fn the_publisher_names_a_revoked_right_and_the_command_that_grants_it() {
    let _alone = alone();
    let (broker, secure) = Broker::start_secure("4.4.0");
    for delivery in [ExactlyOnce, AtLeastOnce] {
        let database = Database::open();
        let settings = as_user(
            &secure,
            config::Kafka {
                topic: format!("{delivery:?}"),
                ..settings(&broker, 1, delivery)
            },
        );
        let topic = settings.topic.clone();
        let mut publisher = KafkaPublisher::new(settings, database.store().clone()).unwrap();
        database.pay(1, 1..=3);
        publish(&mut publisher, &database);
        // What is allowed expressly denies the rest.
        topic::allow(&broker.bootstrap(), USER, &topic, AclOperation::Read);
        let revoked_at = Instant::now();
        database.pay(1, 4..=6);
        let error = missing_right(&mut publisher, &database);
        assert!(
            revoked_at.elapsed() < Duration::from_secs(10),
            "{:?}",
            revoked_at.elapsed()
        );
        assert!(
            error.contains("grant WRITE") && error.contains(&format!("--topic {topic}")),
            "{error}"
        );
        topic::allow(&broker.bootstrap(), USER, &topic, AclOperation::Write);
        publish(&mut publisher, &database);
        let values: Vec<_> = topic::read_all(&broker.bootstrap(), &topic, 6, LIMIT)
            .into_iter()
            .map(|found| found.value)
            .collect();
        assert_eq!(values, ["1", "2", "3", "4", "5", "6"]);
    }
}

#[test]
fn the_consumer_names_a_revoked_right_within_10_s() {
    let _alone = alone();
    let (broker, secure) = Broker::start_secure("4.4.0");
    let database = Database::open();
    let part = HealthHandle::up();
    let settings = as_user(&secure, settings(&broker, 1, ExactlyOnce));
    let mut consumer = Consumer::new(
        settings,
        database.store().clone(),
        Waker::new().0,
        part.clone(),
    )
    .unwrap();
    let published = |ids: std::ops::RangeInclusive<i64>| {
        database.pay(1, ids);
        publish(
            &mut publisher(&broker, &database, 1, ExactlyOnce),
            &database,
        );
    };
    published(1..=3);
    consume(&mut consumer, &database, DELIVERIES, 3);
    topic::allow(&broker.bootstrap(), USER, TOPIC, AclOperation::Write);
    let revoked_at = Instant::now();
    wait_until("the consumer to be unavailable", LIMIT, || {
        let _ = consumer.step();
        part.get().is_failing()
    });
    assert!(
        revoked_at.elapsed() < Duration::from_secs(10),
        "{:?}",
        revoked_at.elapsed()
    );
    let error = part.get().error.unwrap();
    assert!(error.contains("grant READ on it"), "{error}");
    published(4..=6);
    topic::allow(&broker.bootstrap(), USER, TOPIC, AclOperation::Read);
    consume(&mut consumer, &database, DELIVERIES, 6);
    wait_until("the consumer to be up", LIMIT, || {
        let _ = consumer.step();
        !part.get().is_failing()
    });
}

/// A transaction of ours that is not visible after this time is looked into.
const VISIBLE_WITHIN: Duration = Duration::from_secs(5);

#[test]
fn visible_events_are_no_longer_watched_after_two_seconds() {
    let _alone = alone();
    let fake = Fake::start();
    let database = Database::open();
    let mut publisher = publisher(&fake, &database, 3, ExactlyOnce);
    assert_eq!(publisher.due(), None, "nothing was published");
    for user in 1..=20 {
        database.pay(user, [user]);
    }
    publish_and_note(&mut publisher, &database);
    assert!(database.number("SELECT count(*) FROM topic_unseen") > 1);
    look_after(&mut publisher, &database);
    // The next look is the one at a quiet connection, after 5 s.
    let due = publisher
        .due()
        .expect("a session that is quiet asks for an answer");
    let left = due.saturating_duration_since(Instant::now());
    assert!(left > Duration::from_secs(2), "{left:?}");
}

#[test]
fn the_publisher_names_a_foreign_transaction_and_the_command_that_ends_it() {
    let _alone = alone();
    let broker = Broker::start("4.4.0");
    let database = Database::open();
    let mut publisher = publisher(&broker, &database, 1, ExactlyOnce);
    database.pay(1, [1]);
    publish_and_note(&mut publisher, &database);
    look_after(&mut publisher, &database);
    let stranger =
        topic::OpenTransaction::begin(&broker.bootstrap(), "stranger", TOPIC, "77", "stranger-1");
    let [(0, start)] = topic::open_transactions(&broker.bootstrap(), TOPIC, 1)[..] else {
        panic!("it is open")
    };
    database.pay(1, [2]);
    publish_and_note(&mut publisher, &database);
    let began = Instant::now();
    let why = wait_for("the publisher to say why", LIMIT, || {
        let is_due = publisher.due().is_some_and(|at| at <= Instant::now());
        match is_due.then(|| step(&mut publisher, &database)).flatten() {
            Some(PublishError::Hidden(why)) => Some(why),
            None => None,
            Some(other) => panic!("{other:?}"),
        }
    });
    assert!(
        began.elapsed() < 2 * VISIBLE_WITHIN + Duration::from_secs(5),
        "{:?}",
        began.elapsed()
    );
    assert!(
        why.contains("event 2 was published and is not visible"),
        "{why}"
    );
    assert!(why.contains("transactional id stranger"), "{why}");
    let command = format!(
        "kafka-transactions.sh --bootstrap-server {} abort --topic {TOPIC} --partition 0 \
            --start-offset {start}",
        broker.bootstrap()
    );
    assert!(why.contains(&command), "{why}");
    // It hides what is published, and does not keep it from being published.
    database.pay(1, [3]);
    publish_and_note(&mut publisher, &database);
    assert!(stranger.commit());
    look_after(&mut publisher, &database);
    assert_eq!(
        database.number("SELECT count(*) FROM outbox WHERE status = 'PUBLISHED'"),
        3
    );
    let mut ids: Vec<_> = topic::read_all(&broker.bootstrap(), TOPIC, 4, LIMIT)
        .into_iter()
        .map(|record| record.value)
        .collect();
    ids.sort_unstable();
    assert_eq!(ids, ["1", "2", "3", "77"]);
}

#[test]
fn the_audit_reports_an_unavailable_kafka_within_half_a_minute() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let mut payrelay = Payrelay::start(Options::new(dir.path(), &[]));
    pay(&mut Client::connect(payrelay.addr()), 1, 1..=3);
    let store = dir.path().join("payrelay.db");
    wait_until_all_is_delivered(&store, LIMIT);
    assert_eq!(payrelay.terminate().code(), Some(0));
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = (silent.local_addr().unwrap().to_string(), silent);
    let closed = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .to_string();
    for address in [closed.as_str(), silent.0.as_str()] {
        let env = [
            ("PAYRELAY_PUBLISHER_KIND", "kafka"),
            ("PAYRELAY_KAFKA_BOOTSTRAP_SERVERS", address),
        ];
        let asked = Instant::now();
        let (code, text, error) = run_command(dir.path(), &env, &["audit"]);
        assert!(
            code == Some(75) && text.is_empty() && error.contains("--file-only"),
            "{code:?} {text} {error}"
        );
        assert!(asked.elapsed() < Duration::from_secs(30));
        let (code, text, _) = run_command(dir.path(), &env, &["audit", "--file-only"]);
        assert!(
            code == Some(0) && text.contains("verdict: nothing found"),
            "{text}"
        );
    }
}
