//! Events that were acknowledged and are not visible. A transaction of ours hangs after the broker
//! was killed, or an abort removes it. On real brokers and, where it needs no transaction that
//! hangs, on the fake one.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use payrelay::config::DeliveryGuarantee::ExactlyOnce;
use payrelay::domain::timestamp::Timestamp;
use payrelay::domain::topic::Topic;
use payrelay::relay::publisher::Publisher;
use payrelay::store::publication::{self, Destination, Receipt};
use payrelay::store::{OfflineStore, Transaction, unseen};
use serde_json::json;

use testkit::cluster::{Cluster, Fake};
use testkit::http::Client;
use testkit::kafka::Broker;
use testkit::process::{Options, Payrelay, run_to_exit};
use testkit::publishing::{
    TOPIC, look_after, mark_and_note, publish_and_note, publisher, step, unpublished,
};
use testkit::slack::FakeSlack;
use testkit::store::Database;
use testkit::{topic, wait_for, wait_until};

const LIMIT: Duration = Duration::from_mins(1);

/// Until everything is delivered after the broker has come back, though no client pays.
const DELIVERED_WITHIN: Duration = Duration::from_secs(30);

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
        let mut publisher = publisher(&*broker, database, partitions, ExactlyOnce);
        for earlier in payment - turn..payment {
            database.pay(earlier, [earlier]);
            publish_and_note(&mut publisher, database);
        }
        database.pay(payment, [payment]);
        let answer = wait_for("the acknowledgement", LIMIT, || {
            let answer = publisher.publish(&unpublished(database));
            (!answer.receipts.is_empty()).then_some(answer)
        });
        broker.kill();
        mark_and_note(database, answer);
        drop(publisher);
        broker.restart();
        if hangs(broker, &id, partitions) {
            println!("a transaction of {id} hangs after {attempt} kills");
            return payment;
        }
    }
    panic!("{TRIES} kills of the broker, and no transaction hangs");
}

fn a_hanging_transaction_is_found_and_ended(partitions: i32, turn: i64) {
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
    let mut publisher = publisher(&broker, &database, partitions, ExactlyOnce);
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
    publish_and_note(&mut publisher, &database);
    look_after(&mut publisher, &database);
    assert_eq!(on_topic(&broker).len(), all.len() + 1);
}

#[test]
fn a_hanging_transaction_is_found_and_ended_on_one_partition() {
    a_hanging_transaction_is_found_and_ended(1, 0);
}

#[test]
fn a_hanging_transaction_is_found_and_ended_under_the_second_id() {
    a_hanging_transaction_is_found_and_ended(1, 1);
}

#[test]
fn a_hanging_transaction_is_found_and_ended_under_the_third_id() {
    a_hanging_transaction_is_found_and_ended(1, 2);
}

#[test]
fn a_hanging_transaction_is_found_and_ended_under_the_last_id() {
    a_hanging_transaction_is_found_and_ended(1, 3);
}

#[test]
fn a_hanging_transaction_is_found_and_ended_on_three_partitions() {
    a_hanging_transaction_is_found_and_ended(3, 0);
}

/// How often the broker is killed: `PAYRELAY_TEST_BROKER_KILLS`, for the long form.
fn kills() -> i64 {
    std::env::var("PAYRELAY_TEST_BROKER_KILLS").map_or(5, |text| text.parse().expect("a number"))
}

fn a_broker_killed_after_a_publish_hides_no_event(partitions: &str) {
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
        let reservation = json!({ "reservation_id": payment, "seat_price": 1 });
        let body = json!({ "user_id": payment, "reservations": [reservation] });
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
fn a_broker_killed_after_a_publish_hides_no_event_on_one_partition() {
    a_broker_killed_after_a_publish_hides_no_event("1");
}

#[test]
fn a_broker_killed_after_a_publish_hides_no_event_on_three_partitions() {
    a_broker_killed_after_a_publish_hides_no_event("3");
}

/// As a broker leaves them that has acknowledged a commit and lost its marker: on the topic in an
/// open transaction, and PUBLISHED here. The next connection aborts that transaction.
fn aborted_events_are_published_again(cluster: &dyn Cluster) {
    let database = Database::open();
    database.pay(1, 1..=3);
    let mut first = publisher(cluster, &database, 1, ExactlyOnce);
    publish_and_note(&mut first, &database);
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

    let mut next = publisher(cluster, &database, 1, ExactlyOnce);
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
fn aborted_events_are_published_again_on_the_fake_broker() {
    aborted_events_are_published_again(&Fake::start());
}

#[test]
fn aborted_events_are_published_again_on_kafka_4_4_0() {
    aborted_events_are_published_again(&Broker::start("4.4.0"));
}

#[test]
fn aborted_events_are_published_again_on_kafka_3_9_2() {
    aborted_events_are_published_again(&Broker::start("3.9.2"));
}

/// The reconciliation marks the records that it has read before it waits for anything else.
#[test]
fn a_broker_that_goes_silent_after_the_last_record_doubles_nothing() {
    let fake = Fake::start();
    let database = Database::open();
    let mut first = publisher(&fake, &database, 1, ExactlyOnce);
    database.pay(1, 1..=3);
    publish_and_note(&mut first, &database);
    // Published, and not marked.
    database.pay(1, 4..=5);
    let acknowledged = wait_for("the acknowledgement", LIMIT, || {
        let receipts = first.publish(&unpublished(&database)).receipts;
        (!receipts.is_empty()).then_some(receipts.len())
    });
    assert_eq!(acknowledged, 2);
    drop(first);
    assert!(database.number("SELECT count(*) FROM topic_unseen") > 0);

    fake.go_silent_after_a_fetch();
    let mut next = publisher(&fake, &database, 1, ExactlyOnce);
    wait_until("the publisher to wait in vain for offsets", LIMIT, || {
        step(&mut next, &database).is_some() && fake.is_silent()
    });
    fake.heal();
    publish_and_note(&mut next, &database);
    look_after(&mut next, &database);
    assert_eq!(on_topic(&fake), [1, 2, 3, 4, 5]);
}
