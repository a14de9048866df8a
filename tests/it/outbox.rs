//! The relay, the notifier and the scheduler step by step, on a real database and without their
//! threads.

use std::num::NonZeroUsize;
use std::time::Duration;

use payrelay::config;
use payrelay::domain::event::Event;
use payrelay::domain::payment_record::RecordFormat;
use payrelay::domain::timestamp::Timestamp;
use payrelay::relay::in_process::InProcess;
use payrelay::relay::publisher::{PublishError, PublishOutcome, Publisher};
use payrelay::relay::{self, Relay, Step};
use payrelay::runtime::health::HealthHandle;
use payrelay::runtime::worker::{Stop, Waker};
use payrelay::sampler::Sampler;
use payrelay::scheduler::{self, Scheduler};
use payrelay::store::arrival;
use payrelay::store::delivery::{self, Carrier};
use payrelay::store::outbox;
use payrelay::store::publication::{self, Destination, Receipt};
use payrelay::store::timeline;

use testkit::store::Database;
use testkit::wait_until;

const DAY: Duration = Duration::from_hours(24);

fn relay(database: &Database, publisher: impl Publisher + 'static) -> Relay {
    let store = database.store().clone();
    Relay::new(
        store,
        Box::new(publisher),
        relay::Options {
            batch_max: 10,
            format: RecordFormat::Id,
            wake: Waker::new().1,
            notifiers: Waker::new().0,
            health: HealthHandle::up(),
            reconnect_max: Duration::from_secs(5),
        },
    )
}

fn publish_all(database: &Database) {
    let mut relay = relay(database, InProcess);
    while relay.step() == Step::Progress {}
}

/// A scheduler, and the sampler that looks for it.
fn scheduler(database: &Database, relay: Waker) -> (Scheduler, Sampler) {
    let settings = config::Scheduler {
        interval: Duration::from_mins(1),
        retry_after: Duration::from_mins(1),
        retention: 7 * DAY,
    };
    let keys = config::Idempotency {
        retention: DAY,
        keys_max: NonZeroUsize::MIN,
    };
    let store = database.store();
    let (sampler, snapshots) = Sampler::new(store.clone(), &["default".to_owned()], None);
    (
        Scheduler::new(
            store.clone(),
            scheduler::Options {
                settings,
                keys,
                relay,
                notifiers: Waker::new().0,
                snapshots,
            },
        ),
        sampler,
    )
}

/// A publisher that takes a script's number of events at each call, and remembers what it was
/// given.
struct Scripted {
    take: Vec<usize>,
    /// Whether it says so when it takes less than it is given.
    reports_unavailable: bool,
    given: crossbeam_channel::Sender<Vec<i64>>,
}

impl Publisher for Scripted {
    fn publish(&mut self, batch: &[Event]) -> PublishOutcome {
        let ids: Vec<i64> = batch.iter().map(|event| event.outbox_id).collect();
        let count = if self.take.is_empty() {
            ids.len()
        } else {
            self.take.remove(0).min(ids.len())
        };
        let place = Destination::Topic {
            partition: 0,
            offset: None,
        };
        let receipts = ids[..count]
            .iter()
            .map(|id| Receipt {
                outbox_id: *id,
                place: place.clone(),
            })
            .collect();
        let error = (self.reports_unavailable && count < ids.len())
            .then(|| PublishError::Unavailable("the script says so".into()));
        self.given.send(ids).unwrap();
        PublishOutcome {
            receipts,
            progress: None,
            error,
        }
    }

    fn name(&self) -> &'static str {
        "the script"
    }
}

#[test]
fn a_failed_payment_has_its_event_and_the_others_continue() {
    let database = Database::open();
    database.pay(1, [10]);
    let payments = database.pay(2, [9, 10, 11]);
    let failures: Vec<_> = payments
        .iter()
        .map(|payment| payment.failure.as_deref())
        .collect();
    assert_eq!(failures, [None, Some("already paid"), None]);
    assert_eq!(
        payments
            .iter()
            .map(|payment| payment.id)
            .collect::<Vec<_>>(),
        [2, 3, 4],
        "ids have no gaps"
    );
    let events = database
        .store()
        .read(|connection| outbox::unpublished_outbox_events(connection, 0, 10, RecordFormat::Id))
        .unwrap();
    let kinds: Vec<_> = events.iter().map(|event| event.kind.as_str()).collect();
    assert_eq!(
        kinds,
        [
            "payment.completed",
            "payment.completed",
            "payment.failed",
            "payment.completed"
        ]
    );
}

#[test]
fn the_relay_publishes_in_commit_order_and_retries_only_unacknowledged_events() {
    let database = Database::open();
    database.pay(1, 1..=4);
    let (given, seen) = crossbeam_channel::unbounded();
    let mut relay = relay(
        &database,
        Scripted {
            take: vec![0, 2],
            reports_unavailable: true,
            given,
        },
    );
    assert!(matches!(relay.step(), Step::RetryAfter(_)));
    assert!(matches!(relay.step(), Step::RetryAfter(_)));
    assert_eq!(relay.step(), Step::Progress);
    assert_eq!(relay.step(), Step::Idle);
    assert_eq!(
        seen.try_iter().collect::<Vec<_>>(),
        [vec![1, 2, 3, 4], vec![1, 2, 3, 4], vec![3, 4]]
    );
    assert_eq!(
        database.number("SELECT count(*) FROM outbox WHERE status = 'PUBLISHED'"),
        4
    );
}

#[test]
fn unacknowledged_events_are_published_before_later_ones() {
    let database = Database::open();
    database.pay(1, 1..=15);
    let (given, seen) = crossbeam_channel::unbounded();
    // As the Kafka publisher does when the answers of an earlier call arrive: fewer, and no
    // error.
    let mut relay = relay(
        &database,
        Scripted {
            take: vec![3, 10, 0],
            reports_unavailable: false,
            given,
        },
    );
    while relay.step() == Step::Progress {}
    let batches = seen
        .try_iter()
        .map(|batch| (batch[0], batch.len()))
        .collect::<Vec<_>>();
    assert_eq!(batches, [(1, 10), (4, 10), (14, 2), (14, 2)]);
    assert_eq!(
        database.number("SELECT count(*) FROM outbox WHERE status = 'PUBLISHED'"),
        15
    );
}

#[test]
fn published_but_unrecorded_events_are_not_published_again() {
    let database = Database::open();
    database.pay(1, 1..=4);
    let execute = |sql: &'static str| {
        database
            .store()
            .write(move |tx| tx.execute_batch(sql))
            .unwrap();
    };
    execute(
        "CREATE TRIGGER refuse BEFORE UPDATE ON outbox BEGIN SELECT RAISE(ABORT, 'no space'); END",
    );
    let (given, seen) = crossbeam_channel::unbounded();
    let mut relay = relay(
        &database,
        Scripted {
            take: vec![],
            reports_unavailable: true,
            given,
        },
    );
    assert_eq!(relay.step(), Step::Progress, "it is being recorded");
    assert!(
        matches!(relay.step(), Step::RetryAfter(_)),
        "the database refused"
    );
    database.pay(1, [5]);
    assert!(
        matches!(relay.step(), Step::RetryAfter(_)),
        "nothing more is published before it is recorded"
    );
    execute("DROP TRIGGER refuse");
    while relay.step() == Step::Progress {}
    assert_eq!(
        seen.try_iter().collect::<Vec<_>>(),
        [vec![1, 2, 3, 4], vec![5]]
    );
    assert_eq!(
        database.number("SELECT count(*) FROM outbox WHERE status = 'PUBLISHED'"),
        5
    );
}

#[test]
fn the_application_publisher_marks_and_delivers_in_one_transaction() {
    let database = Database::open();
    database.pay(1, 1..=25);
    publish_all(&database);
    assert_eq!(
        database.number("SELECT count(*) FROM outbox WHERE status = 'PUBLISHED'"),
        25
    );
    assert_eq!(
        database.number("SELECT count(*) FROM delivery WHERE status = 'PENDING'"),
        25
    );
}

#[test]
fn the_purge_deletes_only_finished_events() {
    let database = Database::open();
    let now = Timestamp::now();
    let long_ago = now.minus(8 * DAY);
    database.pay_at(long_ago, 1, 1..=1203);
    let mark = move |tx: &payrelay::store::Transaction<'_>| {
        // 1: INIT. 2: published, not delivered. 3: delivered yesterday. The others: finished long
        // ago.
        let published: Vec<_> = (2..=1203)
            .map(|outbox_id| Receipt {
                outbox_id,
                place: Destination::Delivery,
            })
            .collect();
        publication::record_publications(tx, &published, long_ago)?;
        delivery::mark_deliveries_delivered(
            tx,
            &(4..=1203).collect::<Vec<_>>(),
            Carrier::Single,
            long_ago,
        )?;
        delivery::mark_deliveries_delivered(tx, &[3], Carrier::Single, now.minus(DAY))
    };
    database.store().write(mark).unwrap();
    let (_held, stop) = Stop::new();
    scheduler(&database, Waker::new().0)
        .0
        .step(now, &stop)
        .unwrap();
    assert_eq!(database.number("SELECT count(*) FROM outbox"), 3);
    assert_eq!(database.number("SELECT sum(id) FROM outbox"), 6);
    assert_eq!(database.number("SELECT events_purged FROM node"), 1200);
    assert_eq!(database.number("SELECT count(*) FROM delivery"), 2);
    assert_eq!(
        database.number("SELECT count(*) FROM payment"),
        1203,
        "payments stay"
    );
    let way = database
        .store()
        .read(|connection| timeline::find_payment_timeline(connection, 4))
        .unwrap()
        .unwrap();
    assert_eq!((way.event, way.notification), (None, None));
}

#[test]
fn the_purge_stops_when_asked() {
    let database = Database::open();
    let (held, stop) = Stop::new();
    drop(held);
    scheduler(&database, Waker::new().0)
        .0
        .step(Timestamp::now(), &stop)
        .unwrap();
}

#[test]
fn an_event_stuck_since_its_last_attempt_wakes_the_relay() {
    let database = Database::open();
    let now = Timestamp::now();
    let (waker, woken) = Waker::new();
    let (mut scheduler, mut sampler) = scheduler(&database, waker);
    let (_held, stop) = Stop::new();
    database.pay_at(now.minus(Duration::from_secs(50)), 1, [1]);
    sampler.sample();
    scheduler.step(now, &stop).unwrap();
    assert!(woken.try_recv().is_err(), "it is young");
    scheduler
        .step(now.plus(Duration::from_secs(20)), &stop)
        .unwrap();
    assert!(woken.try_recv().is_ok(), "70 s old, never tried");
    database
        .store()
        .metrics()
        .relay_attempted(now.plus(Duration::from_secs(15)));
    scheduler
        .step(now.plus(Duration::from_secs(70)), &stop)
        .unwrap();
    assert!(woken.try_recv().is_err(), "old, but tried 55 s ago");
}

#[test]
fn a_copy_of_an_event_changes_nothing_even_after_the_purge() {
    use payrelay::domain::event::EventRef;
    use payrelay::store::arrival::AcceptOutcome;
    let database = Database::open();
    let long_ago = Timestamp::now().minus(8 * DAY);
    database.pay_at(long_ago, 1, [1, 2]);
    let accept = |outbox_id, payment_id| {
        let notice = EventRef {
            outbox_id,
            payment_id,
            created_at: None,
        };
        database
            .store()
            .write(move |tx| arrival::accept_arrival(tx, notice, long_ago))
            .unwrap()
    };
    assert_eq!(
        [accept(1, 1), accept(1, 1), accept(1, 2), accept(3, 3)],
        [
            AcceptOutcome::Accepted,
            AcceptOutcome::Duplicate,
            AcceptOutcome::Unknown,
            AcceptOutcome::Unknown
        ]
    );
    assert_eq!(database.number("SELECT count(*) FROM delivery"), 1);
    let finish = move |tx: &payrelay::store::Transaction<'_>| {
        publication::record_publications(
            tx,
            &[Receipt {
                outbox_id: 1,
                place: Destination::Delivery,
            }],
            long_ago,
        )?;
        delivery::mark_deliveries_delivered(tx, &[1], Carrier::Single, long_ago)?;
        outbox::purge_outbox(tx, Timestamp::now(), 10)
    };
    assert_eq!(database.store().write(finish).unwrap(), 1);
    assert_eq!(accept(1, 1), AcceptOutcome::Purged);
    assert_eq!(database.number("SELECT count(*) FROM delivery"), 0);
}

#[test]
fn a_relay_on_its_thread_is_woken_by_the_commit() {
    let database = Database::open();
    let (waker, woken) = Waker::new();
    let relay = Relay::new(
        database.store().clone(),
        Box::new(InProcess),
        relay::Options {
            batch_max: 10,
            format: RecordFormat::Id,
            wake: woken,
            notifiers: Waker::new().0,
            health: HealthHandle::up(),
            reconnect_max: Duration::from_secs(5),
        },
    );
    let group = payrelay::runtime::worker::WorkerGroup::default();
    let worker =
        payrelay::runtime::worker::Worker::spawn("relay", &group, |stop| relay.run(&stop)).unwrap();
    database.pay(1, 1..=3);
    waker.wake();
    wait_until("three deliveries", Duration::from_secs(10), || {
        database.number("SELECT count(*) FROM delivery") == 3
    });
    worker
        .stop(std::time::Instant::now() + Duration::from_secs(10))
        .unwrap();
}
