//! The Kafka publisher and consumer in the process of a test, on a real cluster or on a fake one.

use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use payrelay::config::{self, DeliveryGuarantee};
use payrelay::domain::event::Event;
use payrelay::domain::event::RecordKey;
use payrelay::domain::node_role::NodeRole;
use payrelay::domain::payment_record::RecordFormat;
use payrelay::domain::timestamp::Timestamp;
use payrelay::kafka::consumer::Consumer;
use payrelay::kafka::publisher::KafkaPublisher;
use payrelay::relay::publisher::{PublishError, PublishOutcome, Publisher};
use payrelay::runtime::health::HealthHandle;
use payrelay::runtime::worker::Waker;
use payrelay::store::publication::{self, Receipt};
use payrelay::store::topic as store_topic;
use payrelay::store::{Transaction, outbox, unseen};

use super::cluster::Cluster;
use super::store::Database;
use super::tls::{PASSWORD, Secure, USER};
use super::wait_until;

const LIMIT: Duration = Duration::from_mins(1);

pub const TOPIC: &str = "payment-event";

/// A publisher whose topic was deleted repeats its batch for this long before it gives it up. Then
/// it looks at what there is, and what the tests wait for comes after that.
const GIVEN_UP: Duration = Duration::from_secs(45);

pub fn settings(
    cluster: &dyn Cluster,
    partitions: i32,
    delivery: DeliveryGuarantee,
) -> config::Kafka {
    config::Kafka {
        bootstrap_servers: vec![cluster.bootstrap()],
        topic: TOPIC.into(),
        group: "payment-group".into(),
        partitions,
        delivery,
        format: RecordFormat::Id,
        compression: config::Compression::None,
        key: RecordKey::User,
        role: NodeRole::Single,
        reconnect_max: Duration::from_secs(5),
        dead_records_max: NonZeroUsize::MAX,
        security: config::KafkaSecurity::default(),
    }
}

pub fn publisher(
    cluster: &dyn Cluster,
    database: &Database,
    partitions: i32,
    delivery: DeliveryGuarantee,
) -> KafkaPublisher {
    KafkaPublisher::new(
        settings(cluster, partitions, delivery),
        database.store().clone(),
    )
    .expect("the settings are valid")
}

pub fn unpublished(database: &Database) -> Vec<Event> {
    database
        .store()
        .read(|connection| {
            outbox::unpublished_outbox_events(connection, 0, 100_000, RecordFormat::Id)
        })
        .expect("the database can be read")
}

/// Publishes as the relay does: until all of it has a receipt, and marks it.
pub fn publish(publisher: &mut KafkaPublisher, database: &Database) -> Vec<Receipt> {
    let mut receipts = Vec::new();
    wait_until("all events to be published", GIVEN_UP + LIMIT, || {
        let events = unpublished(database);
        if events.is_empty() {
            return true;
        }
        receipts.extend(mark(database, publisher.publish(&events)));
        false
    });
    receipts
}

/// As the relay does it.
pub fn mark(database: &Database, published: PublishOutcome) -> Vec<Receipt> {
    let PublishOutcome {
        receipts, progress, ..
    } = published;
    let accepted = receipts.clone();
    let mark = move |tx: &Transaction<'_>| {
        publication::record_publications(tx, &accepted, Timestamp::now())?;
        progress
            .iter()
            .try_for_each(|progress| store_topic::save_published_topic_offsets(tx, progress))
    };
    database
        .store()
        .write(mark)
        .expect("the database can be written");
    receipts
}

pub fn consumer(cluster: &dyn Cluster, database: &Database) -> Consumer {
    Consumer::new(
        settings(cluster, 1, DeliveryGuarantee::ExactlyOnce),
        database.store().clone(),
        Waker::new().0,
        HealthHandle::up(),
    )
    .expect("the settings are valid")
}

/// A consumer that has its position: what is published from now on comes from the topic.
pub fn positioned(cluster: &dyn Cluster, database: &Database) -> Consumer {
    let mut consumer = consumer(cluster, database);
    wait_until("the consumer to have its position", LIMIT, || {
        let _ = consumer.step();
        database.number("SELECT count(*) FROM topic_partition WHERE consumed_to IS NOT NULL") > 0
    });
    consumer
}

pub fn consume(consumer: &mut Consumer, database: &Database, sql: &str, count: i64) {
    wait_until(sql, LIMIT, || {
        let _ = consumer.step();
        database.number(sql) >= count
    });
    assert_eq!(database.number(sql), count);
}

/// These settings, on the listener that asks for a user.
pub fn as_user(secure: &Secure, settings: config::Kafka) -> config::Kafka {
    let sasl = config::KafkaSasl {
        mechanism: config::SaslMechanism::Plain,
        username: USER.to_owned(),
        password: config::Secret::new(PASSWORD),
    };
    let security = config::KafkaSecurity {
        tls: None,
        sasl: Some(sasl),
    };
    config::Kafka {
        bootstrap_servers: vec![secure.sasl()],
        security,
        ..settings
    }
}

/// One step of the relay, which also notes what may not be visible yet. Returns its error.
pub fn step(publisher: &mut KafkaPublisher, database: &Database) -> Option<PublishError> {
    let answer = publisher.publish(&unpublished(database));
    mark_and_note(database, answer)
}

/// As the relay does it, with what may not be visible yet.
pub fn mark_and_note(database: &Database, published: PublishOutcome) -> Option<PublishError> {
    let PublishOutcome {
        receipts,
        progress,
        error,
    } = published;
    let mark = move |tx: &Transaction<'_>| {
        publication::record_publications(tx, &receipts, Timestamp::now())?;
        let Some(progress) = &progress else {
            return Ok(());
        };
        unseen::note_unseen(tx, &progress.topic, &receipts)?;
        store_topic::save_published_topic_offsets(tx, progress)
    };
    database
        .store()
        .write(mark)
        .expect("the database can be written");
    error
}

/// Publishes all events, and notes what may not be visible yet.
pub fn publish_and_note(publisher: &mut KafkaPublisher, database: &Database) {
    wait_until("all events to be published", LIMIT, || {
        let _ = step(publisher, database);
        database.number("SELECT count(*) FROM outbox WHERE status = 'INIT'") == 0
    });
}

/// Works as the relay does while no payment comes, until nothing is to be looked after.
pub fn look_after(publisher: &mut KafkaPublisher, database: &Database) {
    let work = "SELECT (SELECT count(*) FROM outbox WHERE status = 'INIT') + (SELECT count(*) \
        FROM topic_unseen)";
    wait_until("everything to be visible", LIMIT, || {
        let is_due = publisher.due().is_some_and(|at| at <= Instant::now());
        if is_due || database.number("SELECT count(*) FROM outbox WHERE status = 'INIT'") > 0 {
            let _ = step(publisher, database);
        }
        database.number(work) == 0
    });
}
