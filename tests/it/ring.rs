//! The ring of transactional ids: whichever id a dead process used last, nothing is lost, doubled
//! or out of order. On the transactions of before and since KIP-890 (Kafka 3.9 and 4.x).

use std::num::NonZeroUsize;
use std::thread;
use std::time::Duration;

use payrelay::config::DeliveryGuarantee::ExactlyOnce;
use payrelay::kafka::publisher::{KafkaPublisher, Options};
use payrelay::relay::publisher::{PublishError, Publisher};

use testkit::kafka::Broker;
use testkit::publishing::{TOPIC, mark, publish, settings, unpublished};
use testkit::store::Database;
use testkit::topic::OpenTransaction;
use testkit::{topic, wait_for, wait_until};

const LIMIT: Duration = Duration::from_mins(1);

/// The producers that take turns.
const RING_SIZE: usize = 4;

/// The largest ring that a process of this node may have used.
const RING_SIZE_MAX: usize = 8;

fn publisher_with_ring(broker: &Broker, database: &Database, ring_size: usize) -> KafkaPublisher {
    let options = Options {
        ring_size: NonZeroUsize::new(ring_size).unwrap(),
        ..Options::default()
    };
    let store = database.store().clone();
    KafkaPublisher::with_options(settings(broker, 1, ExactlyOnce), store, options).unwrap()
}

fn publisher(broker: &Broker, database: &Database) -> KafkaPublisher {
    publisher_with_ring(broker, database, RING_SIZE)
}

/// Every id that a process of this node may have used, the one of earlier versions last.
fn transactional_ids(database: &Database) -> Vec<String> {
    let node = database.store().node();
    let of_ring = (0..RING_SIZE_MAX).map(|index| format!("payrelay-{node}-{index}"));
    of_ring.chain([format!("payrelay-{node}")]).collect()
}

/// Payments 1, 2, 3 ... of one user, one at a time: the event, the payment and the value on the
/// topic have the same number.
struct Payments<'a> {
    database: &'a Database,
    last: i64,
}

impl<'a> Payments<'a> {
    fn new(database: &'a Database) -> Self {
        Self { database, last: 0 }
    }

    fn pay(&mut self) -> i64 {
        self.last += 1;
        self.database.pay(1, [self.last]);
        self.last
    }

    /// A transaction of a dead process that has published the next payment's event, and has not
    /// committed it.
    fn pay_in_open_transaction(&mut self, bootstrap: &str, id: &str) -> OpenTransaction {
        let number = self.pay();
        let event_id = self.database.store().node().event_id(number);
        OpenTransaction::begin(bootstrap, id, TOPIC, &number.to_string(), &event_id)
    }

    /// One batch for each payment, so that the next producer of the ring has its turn.
    fn pay_and_publish(&mut self, publisher: &mut KafkaPublisher, count: usize) {
        for _ in 0..count {
            self.pay();
            publish(publisher, self.database);
        }
    }

    /// Every payment is on the topic once, in order, for `read_committed` consumers.
    fn assert_on_topic(&self, broker: &Broker, case: &str) {
        let all: Vec<i64> = (1..=self.last).collect();
        let bootstrap = broker.bootstrap_inside();
        let found = topic::read_all(&bootstrap, TOPIC, all.len(), LIMIT);
        let numbers: Vec<i64> = found.iter().map(|one| one.value.parse().unwrap()).collect();
        assert_eq!(numbers, all, "{case}");
    }
}

/// The dead process has one record on the broker in an open transaction, and one on its way.
fn a_late_record_of_each_id_is_refused(version: &str) {
    let (broker, mut proxy) = Broker::start_behind_proxy(version);
    let database = Database::open();
    let mut payments = Payments::new(&database);
    payments.pay_and_publish(&mut publisher(&broker, &database), 1);
    for id in transactional_ids(&database) {
        let dead = payments.pay_in_open_transaction(&broker.bootstrap(), &id);
        let late = payments.pay();
        proxy.hold();
        let event_id = database.store().node().event_id(late);
        dead.die_while_sending(TOPIC, &late.to_string(), &event_id);
        let mut next = publisher(&broker, &database);
        publish(&mut next, &database);
        proxy.heal();
        payments.pay_and_publish(&mut next, RING_SIZE + 1);
        payments.assert_on_topic(&broker, &id);
    }
}

#[test]
fn a_late_record_of_each_id_is_refused_on_kafka_4_4_0() {
    a_late_record_of_each_id_is_refused("4.4.0");
}

#[test]
fn a_late_record_of_each_id_is_refused_on_kafka_3_9_2() {
    a_late_record_of_each_id_is_refused("3.9.2");
}

/// A process with a ring of eight dies with a batch on its way, under each id in turn. The next
/// process has a smaller ring.
fn a_late_batch_of_a_larger_ring_is_refused(version: &str) {
    let (broker, mut proxy) = Broker::start_behind_proxy(version);
    let database = Database::open();
    let mut payments = Payments::new(&database);
    for index in 0..RING_SIZE_MAX {
        let mut dead = publisher_with_ring(&broker, &database, RING_SIZE_MAX);
        payments.pay_and_publish(&mut dead, index + 1);
        proxy.hold();
        payments.pay();
        let answer = dead.publish(&unpublished(&database));
        assert!(answer.error.is_some(), "its batch is on its way");
        drop(dead);
        let mut next = publisher_with_ring(&broker, &database, 1 + index % RING_SIZE);
        publish(&mut next, &database);
        proxy.heal();
        payments.pay_and_publish(&mut next, 2);
        payments.assert_on_topic(&broker, &format!("id {index}"));
    }
}

#[test]
fn a_late_batch_of_a_larger_ring_is_refused_on_kafka_4_4_0() {
    a_late_batch_of_a_larger_ring_is_refused("4.4.0");
}

#[test]
fn a_late_batch_of_a_larger_ring_is_refused_on_kafka_3_9_2() {
    a_late_batch_of_a_larger_ring_is_refused("3.9.2");
}

/// The dead process is killed when its transaction is open and has a record, or while it asks for
/// the commit. Or it is killed between the acknowledgement of the commit and the mark.
fn a_process_killed_at_any_point_doubles_and_loses_nothing(version: &str) {
    let broker = Broker::start(version);
    let bootstrap = broker.bootstrap();
    let database = Database::open();
    let mut payments = Payments::new(&database);
    payments.pay_and_publish(&mut publisher(&broker, &database), 1);
    for id in transactional_ids(&database) {
        let open = payments.pay_in_open_transaction(&bootstrap, &id);
        payments.pay_and_publish(&mut publisher(&broker, &database), 1);
        assert!(!open.commit(), "{id}: its commit comes too late");
        payments.assert_on_topic(&broker, &format!("{id}, open"));
        for turns in [1, 2, 3, 5, 8, 13, 100] {
            payments
                .pay_in_open_transaction(&bootstrap, &id)
                .die_while_committing(turns);
            payments.pay_and_publish(&mut publisher(&broker, &database), 1);
            payments.assert_on_topic(&broker, &format!("{id}, {turns} turns of its commit"));
        }
    }
    for batches in 0..=RING_SIZE {
        let mut dead = publisher(&broker, &database);
        payments.pay_and_publish(&mut dead, batches);
        payments.pay();
        wait_until("the acknowledgement", LIMIT, || {
            !dead.publish(&unpublished(&database)).receipts.is_empty()
        });
        drop(dead);
        payments.pay_and_publish(&mut publisher(&broker, &database), 1);
        payments.assert_on_topic(&broker, &format!("unmarked after {batches} batches"));
    }
}

#[test]
fn a_process_killed_at_any_point_doubles_and_loses_nothing_on_kafka_4_4_0() {
    a_process_killed_at_any_point_doubles_and_loses_nothing("4.4.0");
}

#[test]
fn a_process_killed_at_any_point_doubles_and_loses_nothing_on_kafka_3_9_2() {
    a_process_killed_at_any_point_doubles_and_loses_nothing("3.9.2");
}

/// The coordinator forgets an id that was quiet for too long. A process that still has its producer
/// acquires it again, and does not mistake that for another process.
fn ids_that_expired_are_acquired_again(version: &str) {
    let broker = Broker::start_with(
        version,
        "transactional.id.expiration.ms=1000
transaction.remove.expired.transaction.cleanup.interval.ms=200
producer.id.expiration.ms=1000
producer.id.expiration.check.interval.ms=200
",
    );
    let database = Database::open();
    let mut payments = Payments::new(&database);
    let mut publisher = publisher(&broker, &database);
    let ids = transactional_ids(&database);
    for round in 0..3 {
        payments.pay_and_publish(&mut publisher, RING_SIZE + 1);
        wait_until("the coordinator to forget every id", LIMIT, || {
            ids.iter()
                .all(|id| topic::transaction_state(&broker.bootstrap(), id).is_empty())
        });
        payments.pay();
        wait_until("the event to be published", LIMIT, || {
            let outcome = publisher.publish(&unpublished(&database));
            let is_fenced = matches!(outcome.error, Some(PublishError::Fenced(_)));
            assert!(!is_fenced, "round {round}: {:?}", outcome.error);
            !mark(&database, outcome).is_empty()
        });
        payments.assert_on_topic(&broker, &format!("round {round}"));
    }
}

#[test]
fn ids_that_expired_are_acquired_again_on_kafka_4_4_0() {
    ids_that_expired_are_acquired_again("4.4.0");
}

#[test]
fn ids_that_expired_are_acquired_again_on_kafka_3_9_2() {
    ids_that_expired_are_acquired_again("3.9.2");
}

/// A consumer that reads while the producers take turns sees the events in commit order.
fn a_consumer_sees_events_in_commit_order_across_ids(version: &str) {
    const EVENTS: usize = 300;
    let broker = Broker::start(version);
    let database = Database::open();
    let mut payments = Payments::new(&database);
    let mut publisher = publisher(&broker, &database);
    payments.pay_and_publish(&mut publisher, 1);
    thread::scope(|scope| {
        let consumer = scope.spawn(|| topic::follow(&broker.bootstrap(), TOPIC, EVENTS, LIMIT));
        payments.pay_and_publish(&mut publisher, EVENTS - 1);
        let seen = consumer.join().unwrap();
        let expected: Vec<String> = (1..=EVENTS).map(|number| number.to_string()).collect();
        assert_eq!(seen, expected);
    });
}

#[test]
fn a_consumer_sees_events_in_commit_order_across_ids_on_kafka_4_4_0() {
    a_consumer_sees_events_in_commit_order_across_ids("4.4.0");
}

#[test]
fn a_consumer_sees_events_in_commit_order_across_ids_on_kafka_3_9_2() {
    a_consumer_sees_events_in_commit_order_across_ids("3.9.2");
}

/// A batch that the broker rejects because of one record stops the ring, and its events go alone.
/// Only the offending one becomes a dead letter, whichever producer had its turn.
#[test]
fn a_rejected_record_is_isolated_at_each_turn_of_the_ring() {
    let broker = Broker::start("4.4.0");
    for turn in 0..RING_SIZE {
        let database = Database::open();
        let mut payments = Payments::new(&database);
        topic::create(&broker.bootstrap(), TOPIC, &[("max.message.bytes", "280")]);
        let mut publisher = publisher(&broker, &database);
        payments.pay_and_publish(&mut publisher, turn);
        let offending = payments.pay() + 1;
        payments.pay();
        payments.pay();
        let trace = format!(
            "UPDATE outbox SET traceparent = \
                '00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01' WHERE id = {offending}"
        );
        let store = database.store();
        store.write(move |tx| tx.execute_batch(&trace)).unwrap();
        publish(&mut publisher, &database);
        let found = wait_for("the other events", LIMIT, || {
            let found = topic::read(&broker.bootstrap(), TOPIC, LIMIT);
            (found.len() == turn + 2).then_some(found)
        });
        let numbers: Vec<i64> = found.iter().map(|one| one.value.parse().unwrap()).collect();
        let expected: Vec<i64> = (1..=payments.last).filter(|n| *n != offending).collect();
        assert_eq!(numbers, expected, "turn {turn}");
        let rejected = "SELECT id FROM outbox WHERE status = 'REJECTED'";
        assert_eq!(database.number(rejected), offending, "turn {turn}");
        drop(publisher);
        topic::delete(&broker.bootstrap(), TOPIC, LIMIT);
    }
}
