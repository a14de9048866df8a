//! Payments at a steady rate in this process: how long each waits for its commit, and its event for
//! Kafka's acknowledgement. And a backlog that is drained as fast as Kafka takes it.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use payrelay::config::{self, DeliveryGuarantee};
use payrelay::domain::event::{Event, EventType};
use payrelay::domain::payment::{NewPayment, Reservation};
use payrelay::domain::timestamp::Timestamp;
use payrelay::kafka::publisher::{KafkaPublisher, Options};
use payrelay::relay::Step;
use payrelay::relay::publisher::{PublishOutcome, Publisher};
use payrelay::runtime::worker::{Waker, Worker, WorkerGroup};
use payrelay::store::Transaction;
use payrelay::store::payment::execute_payments;

use super::{folder, kafka_settings, relay};
use crate::kafka::Broker;
use crate::store::Database;
use crate::{lock, wait_until};

/// How events are published.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    pub delivery: DeliveryGuarantee,
    /// How many transactional producers take turns.
    pub ring_size: usize,
}

impl Kind {
    /// The publisher as it is, with one of the two guarantees.
    pub fn of(delivery: DeliveryGuarantee) -> Self {
        let ring_size = Options::default().ring_size.get();
        Self {
            delivery,
            ring_size,
        }
    }

    /// Exactly once, with a ring of this size.
    pub fn ring(ring_size: usize) -> Self {
        let delivery = DeliveryGuarantee::ExactlyOnce;
        Self {
            delivery,
            ring_size,
        }
    }

    /// A publisher that is connected, and whose topic exists.
    pub fn publisher(self, broker: &Broker, topic: &str, database: &Database) -> KafkaPublisher {
        let settings = config::Kafka {
            delivery: self.delivery,
            ..kafka_settings(broker, topic)
        };
        let options = Options {
            ring_size: NonZeroUsize::new(self.ring_size).expect("a ring has a producer"),
            ..Options::default()
        };
        let store = database.store().clone();
        let publisher = KafkaPublisher::with_options(settings, store, options);
        let mut publisher = publisher.expect("a runtime");
        while publisher.publish(&events(0..1)).error.is_some() {}
        publisher
    }
}

/// Events that are in no database.
pub fn events(ids: std::ops::Range<i64>) -> Vec<Event> {
    let created_at = Timestamp::now();
    let event = |id| Event {
        outbox_id: id,
        payment_id: id,
        user_id: id % 1000,
        kind: EventType::Completed,
        created_at,
        trace: None,
        payment: None,
    };
    ids.map(event).collect()
}

/// When each event, by its id, reached a point.
type Moments = Arc<Mutex<HashMap<i64, Instant>>>;

/// Remembers when each event was acknowledged.
struct Timed {
    inner: KafkaPublisher,
    acked: Moments,
}

impl Publisher for Timed {
    fn publish(&mut self, batch: &[Event]) -> PublishOutcome {
        let published = self.inner.publish(batch);
        let now = Instant::now();
        let mut acked = lock(&self.acked);
        for receipt in &published.receipts {
            acked.entry(receipt.outbox_id).or_insert(now);
        }
        published
    }

    fn due(&self) -> Option<Instant> {
        self.inner.due()
    }

    fn name(&self) -> &'static str {
        self.inner.name()
    }
}

/// Pays without HTTP, so that the moment of the commit is known.
struct Payer {
    database: Database,
    waker: Waker,
    due: HashMap<i64, Instant>,
    committed: Moments,
}

impl Payer {
    fn pay(&self, number: i64) {
        let new = NewPayment {
            user_id: number % 1000,
            reservations: vec![Reservation {
                reservation_id: number,
                seat_price: 1,
            }],
        };
        let committed = Arc::clone(&self.committed);
        let waker = self.waker.clone();
        let work =
            move |tx: &Transaction<'_>| execute_payments(tx, &new, "KRW", None, Timestamp::now());
        let done = move |result: Result<Vec<_>, _>| {
            let now = Instant::now();
            waker.wake();
            assert!(result.is_ok());
            lock(&committed).insert(number, now);
        };
        let queued = self.database.store().submit(1, work, done);
        queued.expect("the writer keeps up");
    }

    /// Payments from number 2, each at the moment when it is due; returns how many.
    fn pay_at_rate(&mut self, rate: f64, span: Duration) -> i64 {
        let total = (rate * span.as_secs_f64()) as i64;
        let start = Instant::now();
        for number in 0..total {
            let due = start + Duration::from_secs_f64(number as f64 / rate);
            thread::sleep(due.saturating_duration_since(Instant::now()));
            self.due.insert(number + 2, due);
            self.pay(number + 2);
        }
        total
    }
}

/// In milliseconds, a value for each payment.
pub struct Times {
    /// From the moment when the payment is due to the end of its commit.
    pub commit_ms: Vec<f64>,
    /// From there to Kafka's acknowledgement.
    pub ack_ms: Vec<f64>,
}

/// Pays at this rate. The store, the relay and the publisher are payrelay's.
pub fn at_rate(broker: &Broker, topic: &str, kind: Kind, rate: f64, span: Duration) -> Times {
    let database = Database::open_in(folder());
    let acked = Moments::default();
    let publisher = Timed {
        inner: kind.publisher(broker, topic, &database),
        acked: Arc::clone(&acked),
    };
    let (relay, waker) = relay(&database, publisher);
    let worker = Worker::spawn("relay", &WorkerGroup::default(), |stop| relay.run(&stop));
    let worker = worker.expect("a thread");
    let mut payer = Payer {
        database,
        waker,
        due: HashMap::new(),
        committed: Moments::default(),
    };
    // One payment is one event, in order: the numbers are the outbox's ids.
    payer.pay(1);
    wait_until("the first acknowledgement", Duration::from_mins(1), || {
        lock(&acked).contains_key(&1)
    });
    let total = payer.pay_at_rate(rate, span);
    wait_until("the last acknowledgement", Duration::from_mins(2), || {
        lock(&acked).contains_key(&(total + 1))
    });
    let stopped = worker.stop(Instant::now() + Duration::from_secs(10));
    stopped.expect("the relay stops");
    let acked = lock(&acked);
    let committed = lock(&payer.committed);
    let ms = |from: Instant, to: Instant| to.saturating_duration_since(from).as_secs_f64() * 1000.0;
    Times {
        commit_ms: (2..total + 2)
            .map(|id| ms(payer.due[&id], committed[&id]))
            .collect(),
        ack_ms: (2..total + 2)
            .map(|id| ms(committed[&id], acked[&id]))
            .collect(),
    }
}

/// Events a second without a database: batches of 1,000, each awaited.
pub fn without_database(publisher: &mut KafkaPublisher, count: i64) -> f64 {
    let started = Instant::now();
    for first in (0..count).step_by(1000) {
        let outcome = publisher.publish(&events(first..first + 1000));
        assert!(outcome.error.is_none(), "{:?}", outcome.error);
    }
    count as f64 / started.elapsed().as_secs_f64()
}

/// A database with this many events that wait.
pub fn backlog(count: i64) -> Database {
    let database = Database::open_in(folder());
    for first in (0..count).step_by(1000) {
        database.pay(first % 997, first..first + 1000);
    }
    database
}

/// Events a second from the database to Kafka, each marked.
pub fn drain(database: &Database, publisher: impl Publisher + 'static, count: i64) -> f64 {
    let (mut relay, _waker) = relay(database, publisher);
    let started = Instant::now();
    while relay.step() == Step::Progress {}
    let elapsed = started.elapsed();
    assert_eq!(
        database.number("SELECT count(*) FROM outbox WHERE status = 'PUBLISHED'"),
        count
    );
    count as f64 / elapsed.as_secs_f64()
}
