//! Events that were acknowledged and are not visible: a transaction of ours that hangs after the
//! broker was killed, and one that an abort takes along. On real brokers and, where it needs no
//! transaction that hangs, on the fake one.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use payrelay::config;
use payrelay::domain::event::Event;
use payrelay::domain::timestamp::Timestamp;
use payrelay::domain::topic::Topic;
use payrelay::kafka::publisher::KafkaPublisher;
use payrelay::relay::publisher::{PublishError, PublishOutcome, Publisher};
use payrelay::store::outbox;
use payrelay::store::publication::{self, Destination, Receipt};
use payrelay::store::topic as store_topic;
use payrelay::store::{OfflineStore, Transaction, unseen};
use serde_json::json;

use testkit::cluster::{Cluster, Fake};
use testkit::http::Client;
use testkit::kafka::Broker;
use testkit::process::{Options, Payrelay, run_to_exit};
use testkit::slack::FakeSlack;
use testkit::store::Database;
use testkit::{topic, wait_for, wait_until};

const LIMIT: Duration = Duration::from_mins(1);
const TOPIC: &str = "payment-event";

/// A transaction of ours that is not visible after this time is looked into.
const VISIBLE_WITHIN: Duration = Duration::from_secs(5);

/// Until everything is delivered after the broker has come back, though no client pays.
const DELIVERED_WITHIN: Duration = Duration::from_secs(30);

fn publisher(cluster: &dyn Cluster, database: &Database, partitions: i32) -> KafkaPublisher {
    let settings = config::Kafka {
        bootstrap_servers: vec![cluster.bootstrap()],
        topic: TOPIC.into(),
        group: "payment-group".into(),
        partitions,
        delivery: config::DeliveryGuarantee::ExactlyOnce,
        dead_records_max: std::num::NonZeroUsize::MAX,
        security: config::KafkaSecurity::default(),
    };
    KafkaPublisher::new(settings, database.store().clone()).unwrap()
}

/// One step of the relay. Returns its error.
fn step(publisher: &mut KafkaPublisher, database: &Database) -> Option<PublishError> {
    let answer = publisher.publish(&unpublished(database));
    mark(database, answer)
}

fn unpublished(database: &Database) -> Vec<Event> {
    database
        .store()
        .read(|connection| outbox::unpublished_outbox_events(connection, 0, 1000))
        .unwrap()
}

/// As the relay does it.
fn mark(database: &Database, published: PublishOutcome) -> Option<PublishError> {
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
    database.store().write(mark).unwrap();
    error
}

fn publish(publisher: &mut KafkaPublisher, database: &Database) {
    wait_until("all events to be published", LIMIT, || {
        let _ = step(publisher, database);
        database.number("SELECT count(*) FROM outbox WHERE status = 'INIT'") == 0
    });
}

/// Works as the relay does while no payment comes, until nothing is to be looked after.
fn look_after(publisher: &mut KafkaPublisher, database: &Database) {
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

fn on_topic(cluster: &dyn Cluster) -> Vec<i64> {
    let mut ids: Vec<i64> = topic::read(&cluster.bootstrap(), TOPIC, LIMIT)
        .iter()
        .map(|record| record.value.parse().unwrap())
        .collect();
    ids.sort_unstable();
    ids
}

fn audit(dir: &Path, bootstrap: &str) -> (bool, String) {
    let env = [
        ("PAYRELAY_PUBLISHER_KIND", "kafka"),
        ("PAYRELAY_KAFKA_BOOTSTRAP_SERVERS", bootstrap),
    ];
    let mut options = Options::new(dir, &env);
    options.args = vec!["audit".into()];
    let output = run_to_exit(options);
    (
        output.status.success(),
        String::from_utf8_lossy(&output.stdout).into_owned(),
    )
}

/// Whether a transaction is open although its coordinator calls it over. A coordinator that comes
/// back first ends what it has in preparation.
fn hangs(broker: &Broker, id: &str, partitions: i32) -> bool {
    wait_for("the coordinator's verdict", LIMIT, || {
        let state = topic::transaction_state(&broker.bootstrap(), id);
        let is_open = !topic::open_transactions(&broker.bootstrap(), TOPIC, partitions).is_empty();
        (!is_open || state == "CompleteCommit").then_some(is_open)
    })
}

/// Has the broker come back with a transaction of ours that hangs. The publisher that began it is
/// dead by then, and had published `turn` batches before: that decides the transactional id.
/// Returns how many payments were needed.
fn hang(broker: &mut Broker, database: &Database, partitions: i32, turn: i64) -> i64 {
    const TRIES: i64 = 50;
    let id = format!("payrelay-{}-{turn}", database.store().node());
    for attempt in 1..=TRIES {
        let payment = attempt * (turn + 1);
        let mut publisher = publisher(&*broker, database, partitions);
        for earlier in payment - turn..payment {
            database.pay(earlier, [earlier]);
            publish(&mut publisher, database);
        }
        database.pay(payment, [payment]);
        let answer = wait_for("the acknowledgement", LIMIT, || {
            let answer = publisher.publish(&unpublished(database));
            (!answer.receipts.is_empty()).then_some(answer)
        });
        broker.kill();
        mark(database, answer);
        drop(publisher);
        broker.restart();
        if hangs(broker, &id, partitions) {
            println!("a transaction of {id} hangs after {attempt} kills");
            return payment;
        }
    }
    panic!("{TRIES} kills of the broker, and no transaction hangs");
}

fn a_transaction_that_hangs_is_found_and_mended(partitions: i32, turn: i64) {
    let mut broker = Broker::start("4.4.0");
    let database = Database::open();
    let payments = hang(&mut broker, &database, partitions, turn);
    let hanging = topic::open_transactions(&broker.bootstrap(), TOPIC, partitions);
    let dir = database.path().parent().unwrap().to_owned();
    wait_until("the audit to find it", LIMIT, || {
        let (clean, report) = audit(&dir, &broker.bootstrap());
        !clean && report.contains("FOUND invisible: 1 ")
    });
    let all: Vec<i64> = (1..=payments).collect();
    assert!(on_topic(&broker).len() < all.len(), "{hanging:?}");

    // A new process, to which no client comes.
    let mut publisher = publisher(&broker, &database, partitions);
    look_after(&mut publisher, &database);
    assert_eq!(on_topic(&broker), all);
    assert_eq!(
        topic::open_transactions(&broker.bootstrap(), TOPIC, partitions),
        []
    );
    let (clean, report) = audit(&dir, &broker.bootstrap());
    assert!(report.contains("verdict: "), "{report}");
    // No consumer runs here.
    assert!(
        clean || !report.contains("FOUND invisible") && !report.contains("FOUND missing"),
        "{report}"
    );
    // It also publishes what comes next.
    database.pay(1, [1000]);
    publish(&mut publisher, &database);
    look_after(&mut publisher, &database);
    assert_eq!(on_topic(&broker).len(), all.len() + 1);
}

#[test]
fn a_transaction_that_hangs_is_found_and_mended_on_one_partition() {
    a_transaction_that_hangs_is_found_and_mended(1, 0);
}

#[test]
fn a_transaction_that_hangs_is_found_and_mended_under_the_second_id() {
    a_transaction_that_hangs_is_found_and_mended(1, 1);
}

#[test]
fn a_transaction_that_hangs_is_found_and_mended_under_the_third_id() {
    a_transaction_that_hangs_is_found_and_mended(1, 2);
}

#[test]
fn a_transaction_that_hangs_is_found_and_mended_under_the_last_id() {
    a_transaction_that_hangs_is_found_and_mended(1, 3);
}

#[test]
fn a_transaction_that_hangs_is_found_and_mended_on_three_partitions() {
    a_transaction_that_hangs_is_found_and_mended(3, 0);
}

/// How often the broker is killed: `PAYRELAY_TEST_BROKER_KILLS`, for the long form.
fn kills() -> i64 {
    std::env::var("PAYRELAY_TEST_BROKER_KILLS").map_or(5, |text| text.parse().expect("a number"))
}

fn a_broker_that_dies_when_an_event_is_published_hides_nothing(partitions: &str) {
    let mut broker = Broker::start("4.4.0");
    let bootstrap = broker.bootstrap();
    let dir = tempfile::tempdir().unwrap();
    let slack = FakeSlack::start();
    let url = slack.url();
    let env = [
        ("PAYRELAY_PUBLISHER_KIND", "kafka"),
        ("PAYRELAY_KAFKA_BOOTSTRAP_SERVERS", &*bootstrap),
        ("PAYRELAY_KAFKA_PARTITIONS", partitions),
        ("PAYRELAY_SLACK_WEBHOOK_URL", &url),
        ("PAYRELAY_SLACK_MESSAGES_PER_SECOND", "100000"),
        ("PAYRELAY_SLACK_SUMMARY_OVER", "0"),
        ("PAYRELAY_SLACK_DIGEST_OVER", "1000000"),
    ];
    let payrelay = Payrelay::start(Options::new(dir.path(), &env));
    let database = OfflineStore::open(&dir.path().join("payrelay.db")).unwrap();
    let number = |sql: &'static str| {
        database
            .read(|tx| tx.query_row(sql, [], |row| row.get::<_, i64>(0)))
            .unwrap()
    };
    let mut slowest = Duration::ZERO;
    for payment in 1..=kills() {
        let body = json!({ "user_id": payment, "reservations": [{ "reservation_id": payment, "seat_price": 1 }] });
        assert_eq!(
            Client::connect(payrelay.addr())
                .post_json("/payments", &body)
                .status,
            201
        );
        wait_until("the event to be PUBLISHED", LIMIT, || {
            number("SELECT count(*) FROM outbox WHERE status = 'PUBLISHED'") == payment
        });
        broker.kill();
        broker.restart();
        let back = Instant::now();
        wait_until("everything to be delivered", DELIVERED_WITHIN, || {
            number("SELECT count(*) FROM delivery WHERE status = 'DELIVERED'") == payment
        });
        // The delivery may have come before the kill: then the look at what is visible is still to
        // come.
        wait_until("everything to be visible", DELIVERED_WITHIN, || {
            number("SELECT count(*) FROM topic_unseen") == 0
        });
        assert_eq!(on_topic(&broker), (1..=payment).collect::<Vec<_>>());
        slowest = slowest.max(back.elapsed());
    }
    let (clean, report) = audit(dir.path(), &bootstrap);
    assert!(clean, "{report}");
    let messages: BTreeSet<_> = slack.messages().into_iter().collect();
    assert_eq!(i64::try_from(messages.len()), Ok(kills()));
    let mended = payrelay.count_in_log("although its coordinator has ended it");
    println!(
        "{} kills, {mended} transactions hung, delivered and visible within {slowest:.1?}",
        kills()
    );
}

#[test]
fn a_broker_that_dies_when_an_event_is_published_hides_nothing_on_one_partition() {
    a_broker_that_dies_when_an_event_is_published_hides_nothing("1");
}

#[test]
fn a_broker_that_dies_when_an_event_is_published_hides_nothing_on_three_partitions() {
    a_broker_that_dies_when_an_event_is_published_hides_nothing("3");
}

/// As a broker leaves them that has acknowledged a commit and lost its marker: on the topic in an
/// open transaction, and PUBLISHED here. The next connection aborts that transaction.
fn what_an_abort_takes_along_is_published_again(cluster: &dyn Cluster) {
    let database = Database::open();
    database.pay(1, 1..=3);
    let mut first = publisher(cluster, &database, 1);
    publish(&mut first, &database);
    drop(first);
    database.pay(1, 4..=4);
    let node = database.store().node();
    let id = format!("payrelay-{node}");
    let hanging =
        topic::OpenTransaction::begin(&cluster.bootstrap(), &id, TOPIC, "4", &node.event_id(4));
    let end = database.number("SELECT published_to FROM topic_partition");
    // Behind the marker of the first batch.
    let place = Destination::Topic {
        partition: 0,
        offset: Some(end + 1),
    };
    acknowledge(
        &database,
        &[Receipt {
            outbox_id: 4,
            place,
        }],
    );
    assert_eq!(on_topic(cluster), [1, 2, 3]);

    let mut next = publisher(cluster, &database, 1);
    assert!(next.due().is_some(), "the event may not be visible");
    look_after(&mut next, &database);
    assert!(!hanging.commit());
    assert_eq!(on_topic(cluster), [1, 2, 3, 4]);
    assert_eq!(
        database.number("SELECT count(*) FROM outbox WHERE status = 'PUBLISHED'"),
        4
    );
}

/// Marks events as the relay does.
fn acknowledge(database: &Database, receipts: &[Receipt]) {
    let sql = "SELECT topic, topic_id FROM topic_partition";
    let receipts = receipts.to_vec();
    let mark = move |tx: &Transaction<'_>| {
        let (name, id): (String, [u8; 16]) =
            tx.query_row(sql, [], |row| Ok((row.get(0)?, row.get(1)?)))?;
        publication::record_publications(tx, &receipts, Timestamp::now())?;
        unseen::note_unseen(
            tx,
            &Topic {
                name: name.into(),
                id,
            },
            &receipts,
        )
    };
    database.store().write(mark).unwrap();
}

#[test]
fn what_an_abort_takes_along_is_published_again_on_the_fake_broker() {
    what_an_abort_takes_along_is_published_again(&Fake::start());
}

#[test]
fn what_an_abort_takes_along_is_published_again_on_kafka_4_4_0() {
    what_an_abort_takes_along_is_published_again(&Broker::start("4.4.0"));
}

#[test]
fn what_an_abort_takes_along_is_published_again_on_kafka_3_9_2() {
    what_an_abort_takes_along_is_published_again(&Broker::start("3.9.2"));
}

#[test]
fn what_is_visible_is_forgotten_within_a_second_or_two() {
    let fake = Fake::start();
    let database = Database::open();
    let mut publisher = publisher(&fake, &database, 3);
    assert_eq!(publisher.due(), None, "nothing was published");
    for user in 1..=20 {
        database.pay(user, [user]);
    }
    publish(&mut publisher, &database);
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
fn a_strangers_transaction_is_named_with_the_command_that_ends_it() {
    let broker = Broker::start("4.4.0");
    let database = Database::open();
    let mut publisher = publisher(&broker, &database, 1);
    database.pay(1, [1]);
    publish(&mut publisher, &database);
    look_after(&mut publisher, &database);
    let stranger =
        topic::OpenTransaction::begin(&broker.bootstrap(), "stranger", TOPIC, "77", "stranger-1");
    let [(0, start)] = topic::open_transactions(&broker.bootstrap(), TOPIC, 1)[..] else {
        panic!("it is open")
    };
    database.pay(1, [2]);
    publish(&mut publisher, &database);
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
    publish(&mut publisher, &database);
    assert!(stranger.commit());
    look_after(&mut publisher, &database);
    assert_eq!(
        database.number("SELECT count(*) FROM outbox WHERE status = 'PUBLISHED'"),
        3
    );
    assert_eq!(on_topic(&broker), [1, 2, 3, 77]);
}
