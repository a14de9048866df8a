//! The audit by the real binary: nothing is found where nothing is wrong, also under load. Each
//! inconsistency is found, and is named by its kind.

use std::fs;
use std::io::{Seek as _, SeekFrom, Write as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use krafka::admin::{CreateTopicsOptions, NewTopic};
use krafka::{Kafka, Record};
use payrelay::audit::{AuditOptions, AuditProgress, run_audit};
use payrelay::config::Config;
use rusqlite::Connection;
use serde_json::{Value, json};
use tempfile::TempDir;

use testkit::http::{Client, pay};
use testkit::kafka::Broker;
use testkit::process::{Options, Payrelay, run_command, run_to_exit};
use testkit::slack::FakeSlack;
use testkit::store::wait_until_all_is_delivered;
use testkit::{StopOnDrop, topic, wait_until};

const LIMIT: Duration = Duration::from_mins(1);

/// Exit code, standard output, standard error.
pub fn audit(dir: &Path, env: &[(&str, &str)], args: &[&str]) -> (Option<i32>, String, String) {
    run_command(dir, env, &[&["audit"], args].concat())
}

/// A database that a real payrelay has made, which has ended. Payments 1 to 3 are of user 1, 4 and
/// 5 of user 2.
struct Node {
    dir: TempDir,
    id: String,
}

impl Node {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut payrelay = Payrelay::start(Options::new(dir.path(), &[]));
        let mut client = Client::connect(payrelay.addr());
        pay(&mut client, 1, 1..=3);
        pay(&mut client, 2, 4..=5);
        let delivered = |client: &mut Client, id| {
            client.get(&format!("/payments/{id}")).json()["notification"]["status"] == "DELIVERED"
        };
        wait_until("all to be delivered", LIMIT, || {
            (1..=5).all(|id| delivered(&mut client, id))
        });
        assert_eq!(payrelay.terminate().code(), Some(0));
        let node = Self {
            dir,
            id: String::new(),
        };
        let id = node
            .connection()
            .query_row("SELECT id FROM node", [], |row| row.get(0))
            .unwrap();
        Self { id, ..node }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("payrelay.db")
    }

    fn connection(&self) -> Connection {
        let connection = Connection::open(self.path()).unwrap();
        connection
            .pragma_update(None, "foreign_keys", false)
            .unwrap();
        connection
    }

    /// Changes the database as no payrelay does.
    fn doctor(&self, sql: &str) -> &Self {
        self.connection().execute_batch(sql).unwrap();
        self
    }

    /// The kinds of findings and of notes; the exit code goes with the findings.
    #[track_caller]
    fn found(&self, env: &[(&str, &str)]) -> (Vec<String>, Vec<String>) {
        let (code, json, error) = audit(self.dir.path(), env, &["--json"]);
        assert_eq!(error, "");
        let report: Value = serde_json::from_str(&json).unwrap_or_else(|_| panic!("{json}"));
        let kinds = |name: &str| -> Vec<String> {
            let seen = report[name].as_array().unwrap();
            assert!(
                seen.iter()
                    .all(|seen| seen["count"].as_i64() > Some(0) && seen["examples"] != json!([])),
                "{json}"
            );
            seen.iter()
                .map(|seen| seen["kind"].as_str().unwrap().to_owned())
                .collect()
        };
        let findings = kinds("findings");
        assert_eq!(code, Some(i32::from(!findings.is_empty())), "{json}");
        (findings, kinds("notes"))
    }

    #[track_caller]
    fn assert_found(&self, findings: &[&str], notes: &[&str]) {
        assert_eq!(self.found(&[]), (own(findings), own(notes)));
    }
}

fn own(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

#[test]
fn the_audit_of_a_sound_database_finds_nothing() {
    let node = Node::new();
    node.assert_found(&[], &[]);
    let (code, text, _) = audit(node.dir.path(), &[], &[]);
    let expected = format!(
        "node: {}\n\
         payments: 5 COMPLETED, 0 FAILED\n\
         outbox: 0 INIT, 5 PUBLISHED, 0 REJECTED, 0 purged\n\
         topic: none (publisher.kind is \"application\")\n\
         deliveries: 0 PENDING, 0 SENDING, 5 DELIVERED, 0 DEAD, 0 DISCARDED\n\
         verdict: nothing found\n",
        node.id
    );
    assert_eq!((code, text), (Some(0), expected));
}

/// A finding, and what has to be done to the database for it.
const DATABASE_CASES: [(&str, &str); 18] = [
    (
        "double-payment",
        "DROP INDEX payment_paid; UPDATE payment SET reservation_id = (SELECT reservation_id \
            FROM payment WHERE id = 1) WHERE id = 2",
    ),
    (
        "broken-chain",
        "UPDATE payment SET previous_id = NULL WHERE id = 3",
    ),
    (
        "broken-chain",
        "UPDATE payment SET previous_id = 1 WHERE id = 3",
    ),
    (
        "history-head",
        "INSERT INTO payment (user_id, reservation_id, amount, currency, status, executed_at) \
            VALUES (9, 9, 9, 'KRW', 'COMPLETED', 9); INSERT INTO outbox (payment_id, user_id, \
            type, created_at) VALUES (6, 9, 'payment.completed', 9);",
    ),
    (
        "history-head",
        "UPDATE user_history SET last_payment_id = 2 WHERE user_id = 1",
    ),
    ("history-head", "DELETE FROM user_history WHERE user_id = 1"),
    (
        "no-event",
        "DELETE FROM delivery WHERE outbox_id = 3; DELETE FROM outbox WHERE id = 3",
    ),
    ("no-event", "UPDATE node SET events_purged = 1"),
    ("wrong-event", "UPDATE outbox SET user_id = 9 WHERE id = 2"),
    (
        "wrong-event",
        "UPDATE outbox SET type = 'payment.failed' WHERE id = 2",
    ),
    (
        "orphan-delivery",
        "DELETE FROM outbox WHERE id = 3; UPDATE node SET events_purged = 1",
    ),
    (
        "rejected",
        "UPDATE outbox SET status = 'REJECTED', rejection = 'no', published_at = NULL \
            WHERE id = 5; DELETE FROM delivery WHERE outbox_id = 5",
    ),
    (
        "id-reuse",
        "UPDATE sqlite_sequence SET seq = 2 WHERE name = 'payment'",
    ),
    (
        "id-reuse",
        "DELETE FROM sqlite_sequence WHERE name = 'outbox'",
    ),
    ("unconsumed", "DELETE FROM delivery WHERE outbox_id = 4"),
    (
        "foreign-key",
        "INSERT INTO dead_letter_action VALUES (1, 77, 'discard', 'http', NULL, 'done', 1)",
    ),
    (
        "undeliverable",
        "UPDATE delivery SET status = 'PENDING', delivered_at = NULL, channel = 'x' \
            WHERE outbox_id = 3",
    ),
    (
        "undeliverable",
        "UPDATE delivery SET status = 'DEAD', delivered_at = NULL WHERE outbox_id = 3",
    ),
];

/// An idempotency key of this number of payments, from this one on.
fn insert_key(first: i64, count: i64) -> String {
    format!(
        "INSERT INTO idempotency_key (client, key, body_hash, first_payment_id, payment_count, \
            arrived_at) VALUES ('', 'k', x'00', {first}, {count}, 1)"
    )
}

#[test]
fn the_audit_finds_each_inconsistency_of_the_database() {
    let keys = [(77, 1), (5, 2), (3, 2)]
        .map(|(first, count)| ("broken-idempotency-key", insert_key(first, count)));
    let cases = DATABASE_CASES
        .map(|(kind, sql)| (kind, sql.to_owned()))
        .into_iter()
        .chain(keys);
    let clean = Node::new();
    for (kind, sql) in cases {
        let dir = tempfile::tempdir().unwrap();
        let node = Node {
            dir,
            id: clean.id.clone(),
        };
        fs::copy(clean.path(), node.path()).unwrap();
        let (found, noted) = node.doctor(&sql).found(&[]);
        assert_eq!((found, noted), (own(&[kind]), vec![]), "{sql}");
    }
}

#[test]
fn the_audit_notes_what_an_operator_should_know() {
    let node = Node::new();
    let letter = "INSERT INTO dead_letter (outbox_id, payment_id, reason, received_at) \
        VALUES (1, 1, 'no', 1)";
    node.doctor(letter).assert_found(&[], &["dead-letters"]);
    // What Kafka did not take, a person did not want.
    node.doctor(
        "UPDATE outbox SET status = 'REJECTED', rejection = 'no', published_at = NULL WHERE id = 1",
    );
    node.assert_found(&["rejected"], &["dead-letters"]);
    node.doctor("DELETE FROM delivery WHERE outbox_id = 1");
    let args = ["dead-letters", "discard", "1", "--reason", "no", "--yes"]
        .map(str::to_owned)
        .to_vec();
    let discard = run_to_exit(Options {
        args,
        ..Options::new(node.dir.path(), &[])
    });
    assert_eq!(discard.status.code(), Some(0));
    node.assert_found(&[], &["discarded"]);
    node.doctor(
        "UPDATE outbox SET status = 'PUBLISHED', rejection = NULL, published_at = 1 WHERE id = 1",
    );
    node.doctor("DELETE FROM dead_letter_action");
    // Purged, and counted.
    node.doctor("DELETE FROM dead_letter")
        .doctor("DELETE FROM delivery WHERE outbox_id < 3");
    node.doctor("DELETE FROM outbox WHERE id < 3; UPDATE node SET events_purged = 2")
        .assert_found(&[], &[]);
}

#[test]
fn the_audit_finds_a_row_that_an_index_lacks() {
    let node = Node::new();
    node.doctor(
        "PRAGMA writable_schema = ON; CREATE TABLE kept AS SELECT * FROM sqlite_schema \
            WHERE name = 'delivery_waiting'; DELETE FROM sqlite_schema \
            WHERE name = 'delivery_waiting'",
    );
    node.doctor("UPDATE delivery SET status = 'PENDING', delivered_at = NULL WHERE outbox_id = 3");
    node.doctor(
        "PRAGMA writable_schema = ON; INSERT INTO sqlite_schema SELECT * \
        FROM kept; DROP TABLE kept",
    );
    node.assert_found(&["damaged"], &[]);
}

#[test]
fn the_audit_finds_a_corrupt_file() {
    let node = Node::new();
    let connection = node.connection();
    let page = |name: &str| -> i64 {
        let sql = "SELECT (SELECT rootpage FROM sqlite_schema WHERE name = ?1) - 1";
        connection.query_row(sql, [name], |row| row.get(0)).unwrap()
    };
    let size: i64 = connection
        .pragma_query_value(None, "page_size", |row| row.get(0))
        .unwrap();
    let index = page("payment_paid");
    let table = page("payment");
    drop(connection);
    let damage = |page: i64| {
        let mut file = fs::File::options().write(true).open(node.path()).unwrap();
        file.seek(SeekFrom::Start(u64::try_from(page * size).unwrap()))
            .unwrap();
        file.write_all(&vec![0xff; usize::try_from(size).unwrap()])
            .unwrap();
    };
    damage(index);
    assert_eq!(node.found(&[]).0, ["damaged"]);
    damage(table);
    assert_eq!(node.found(&[]).0, ["damaged"]);
    let (_, text, _) = audit(node.dir.path(), &[], &["--limit", "100"]);
    assert!(text.matches("\n  looking for ").count() > 1, "{text}");
}

#[test]
fn the_audit_limits_examples_and_not_counts() {
    let node = Node::new();
    node.doctor("DELETE FROM delivery");
    let (code, text, _) = audit(node.dir.path(), &[], &["--limit", "2"]);
    let expected = "FOUND unconsumed: 5 events that were published and have no delivery, for more \
        than 60 s or although the consumer has passed them\n  event 1 of payment 1\n  event 2 of \
        payment 2\n  and 3 more\nverdict: 1 kind of finding\n";
    assert!(code == Some(1) && text.ends_with(expected), "{text}");
}

#[test]
fn the_audit_of_a_backup_does_not_change_it() {
    let node = Node::new();
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("copy.db");
    let args = ["backup", copy.to_str().unwrap()]
        .map(str::to_owned)
        .to_vec();
    let output = run_to_exit(Options {
        args,
        ..Options::new(node.dir.path(), &[])
    });
    assert_eq!(output.status.code(), Some(0));
    let before = fs::read(&copy).unwrap();
    let env = [
        ("PAYRELAY_DATABASE_PATH", copy.to_str().unwrap()),
        ("PAYRELAY_PUBLISHER_KIND", "kafka"),
    ];
    let (code, text, error) = audit(folder.path(), &env, &["--file-only"]);
    assert!(
        code == Some(0) && text.contains("note backup: 1") && text.contains("topic: not read"),
        "{text}{error}"
    );
    assert_eq!(
        fs::read_dir(folder.path()).unwrap().count(),
        1,
        "it has left files behind"
    );
    assert!(
        fs::read(&copy).unwrap() == before,
        "it has changed the copy"
    );
    // A missing file, or one that is no database, is reported.
    let nowhere = [("PAYRELAY_DATABASE_PATH", "nowhere.db")];
    assert_eq!(audit(folder.path(), &nowhere, &["--file-only"]).0, Some(78));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

/// A database with a topic that was written by hand. Each event of the database says that it was
/// published to where the topic has it.
struct OnTopic<'a> {
    node: Node,
    broker: &'a Broker,
    topic: String,
}

impl<'a> OnTopic<'a> {
    /// The events, in the order in which they are put on a topic of their own.
    fn new(clean: &Node, broker: &'a Broker, topic: &str, events: &[i64]) -> Self {
        make(broker, topic);
        let node = Node {
            dir: tempfile::tempdir().unwrap(),
            id: clean.id.clone(),
        };
        fs::copy(clean.path(), node.path()).unwrap();
        let this = Self {
            node,
            broker,
            topic: topic.to_owned(),
        };
        for (offset, event) in events.iter().enumerate() {
            this.put(*event, user_of(*event), &event.to_string());
            this.doctor(&format!(
                "UPDATE outbox SET \"partition\" = 0, \"offset\" = {offset} WHERE id = {event}"
            ));
        }
        this
    }

    /// The progress of an audit ends with all offsets of the topic, and all checks.
    #[track_caller]
    fn assert_progress(&self, offsets: u64) {
        let variables = [
            (
                "PAYRELAY_DATABASE_PATH",
                self.node.path().display().to_string(),
            ),
            ("PAYRELAY_PUBLISHER_KIND", "kafka".to_owned()),
            ("PAYRELAY_KAFKA_BOOTSTRAP_SERVERS", self.broker.bootstrap()),
            ("PAYRELAY_KAFKA_TOPIC", self.topic.clone()),
        ];
        let variables = variables.map(|(name, value)| (name.to_owned(), value));
        let loaded = Config::load("", &variables.into()).unwrap();
        let options = AuditOptions {
            file_only: false,
            limit: 1,
        };
        let progress = AuditProgress::default();
        run_audit(&loaded.config, options, &progress).unwrap();
        assert_eq!(progress.offsets(), (offsets, offsets));
        let (done, total) = progress.checks();
        assert!(done == total && total > 20, "{done} of {total}");
    }

    fn put(&self, event: i64, key: &str, value: &str) {
        let id = format!("{}-{event}", self.node.id);
        topic::put(
            &self.broker.bootstrap(),
            &self.topic,
            Some(key),
            Some(value.as_bytes()),
            &[("ce_id", &id)],
        );
    }

    fn doctor(&self, sql: &str) -> &Self {
        self.node.doctor(sql);
        self
    }

    #[track_caller]
    fn assert_found(&self, findings: &[&str], notes: &[&str]) {
        let found = self.node.found(&env(&self.broker.bootstrap(), &self.topic));
        assert_eq!(found, (own(findings), own(notes)));
    }

    #[track_caller]
    fn assert_reported(&self, line: &str) {
        let report = self.report();
        assert!(report.contains(line), "{report}");
    }

    fn report(&self) -> String {
        audit(
            self.node.dir.path(),
            &env(&self.broker.bootstrap(), &self.topic),
            &[],
        )
        .1
    }
}

fn user_of(event: i64) -> &'static str {
    if event <= 3 { "1" } else { "2" }
}

fn env<'a>(bootstrap: &'a str, topic: &'a str) -> [(&'a str, &'a str); 3] {
    [
        ("PAYRELAY_PUBLISHER_KIND", "kafka"),
        ("PAYRELAY_KAFKA_BOOTSTRAP_SERVERS", bootstrap),
        ("PAYRELAY_KAFKA_TOPIC", topic),
    ]
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(work)
}

/// A topic with one partition.
fn make(broker: &Broker, name: &str) {
    block_on(async {
        let kafka = Kafka::builder(broker.bootstrap()).connect().await.unwrap();
        let topic = NewTopic::new(name, 1, 1).unwrap();
        kafka
            .admin()
            .create_topics([topic], CreateTopicsOptions::default())
            .await
            .unwrap()
            .remove(name)
            .unwrap()
            .unwrap();
    });
}

const IN_ORDER: [i64; 5] = [1, 2, 3, 4, 5];

/// A broker, and a database from which each case of a topic is copied.
struct Topics {
    broker: Broker,
    clean: Node,
}

impl Topics {
    fn new() -> Self {
        Self {
            broker: Broker::start("4.4.0"),
            clean: Node::new(),
        }
    }

    fn with(&self, topic: &str, events: &[i64]) -> OnTopic<'_> {
        OnTopic::new(&self.clean, &self.broker, topic, events)
    }
}

#[test]
fn the_audit_finds_each_inconsistency_of_the_topic() {
    let topics = Topics::new();
    ignores_records_of_others(&topics);
    finds_duplicates_and_events_out_of_order(&topics);
    finds_events_that_the_topic_does_not_have(&topics);
    finds_records_that_contradict_the_database(&topics);
    finds_events_that_are_not_marked_or_not_consumed(&topics);
}

fn ignores_records_of_others(topics: &Topics) {
    let case = topics.with("clean", &IN_ORDER);
    case.assert_found(&[], &[]);
    let bootstrap = topics.broker.bootstrap();
    topic::put(&bootstrap, "clean", None, Some(b"1"), &[]);
    let of_another = [("ce_id", "other-1")];
    topic::put(&bootstrap, "clean", Some("1"), Some(b"1"), &of_another);
    case.assert_found(&[], &[]);
    case.assert_reported(
        "topic: clean, 5 records of this node, 2 of others; partition 0 from offset 0 to 7\n",
    );
}

fn finds_duplicates_and_events_out_of_order(topics: &Topics) {
    let case = topics.with("duplicate", &IN_ORDER);
    case.put(2, "1", "2");
    case.assert_found(&["duplicate"], &[]);
    case.assert_reported("  event 2: partition/offset 0/1, 0/5\n");

    let case = topics.with("late", &[1, 3, 2, 4, 5]);
    case.assert_found(&["out-of-order"], &[]);
    case.assert_reported("  event 2 behind 3: partition 0, offset 2\n");
    let letter = "INSERT INTO dead_letter (outbox_id, payment_id, reason, state, received_at) \
        VALUES (2, 2, 'too large', 'REPLAYED', 1); INSERT INTO dead_letter_action \
        VALUES (1, 1, 'replay', 'http', NULL, 'waits to be published again', 1)";
    case.doctor(letter).assert_found(&[], &["sent-again"]);
    // It then could not be delivered.
    case.doctor("UPDATE dead_letter SET state = 'OPEN'")
        .assert_found(&[], &["dead-letters", "sent-again"]);
}

fn finds_events_that_the_topic_does_not_have(topics: &Topics) {
    let case = topics.with("missing", &[1, 2, 4, 5]);
    case.doctor("UPDATE outbox SET \"partition\" = 0, \"offset\" = 2 WHERE id = 3")
        .assert_found(&["missing"], &[]);
    case.assert_reported("  event 3 of payment 3: not at partition 0, offset 2\n");
    case.doctor("UPDATE outbox SET \"offset\" = NULL WHERE id = 3")
        .assert_found(&["missing"], &[]);
    // Published after the topic was read: it cannot be judged.
    case.doctor("UPDATE outbox SET \"offset\" = 4 WHERE id = 3")
        .assert_found(&[], &[]);
    case.doctor("UPDATE outbox SET \"offset\" = 3, \"partition\" = 7 WHERE id = 3")
        .assert_found(&["missing"], &[]);

    let case = topics.with("elsewhere", &IN_ORDER);
    case.doctor("UPDATE outbox SET \"offset\" = 0 WHERE id = 3")
        .assert_found(&["missing"], &[]);
    case.assert_reported(
        "  event 3 of payment 3: partition 0, offset 2, instead of partition 0, offset 0\n",
    );

    let case = topics.with("elsewhere-2", &IN_ORDER);
    let bootstrap = topics.broker.bootstrap();
    let nowhere = env(&bootstrap, "nowhere");
    assert_eq!(
        case.node.found(&nowhere),
        (own(&["missing"]), vec![]),
        "a topic that is not there has lost everything"
    );
    assert_eq!(
        topics.clean.found(&nowhere),
        (vec![], vec![]),
        "nothing was ever published there"
    );
}

fn finds_records_that_contradict_the_database(topics: &Topics) {
    for (topic, key, value) in [
        ("key", "9", "5"),
        ("value", "2", "4"),
        ("no-number", "2", "05"),
    ] {
        let case = topics.with(topic, &IN_ORDER[..4]);
        case.put(5, key, value);
        case.doctor("UPDATE outbox SET \"partition\" = 0, \"offset\" = 4 WHERE id = 5");
        case.assert_found(&["mismatch"], &[]);
    }

    let purge = "DELETE FROM delivery WHERE outbox_id = 5; DELETE FROM outbox WHERE id = 5; \
                 UPDATE node SET events_purged = 1";
    topics
        .with("purged", &IN_ORDER)
        .doctor(purge)
        .assert_found(&[], &[]);
    let case = topics.with("purged-of-another", &IN_ORDER[..4]);
    case.put(5, "9", "5");
    case.doctor(purge).assert_found(&["mismatch"], &[]);
    let case = topics.with("purged-and-unknown", &IN_ORDER[..4]);
    case.put(5, "2", "77");
    case.doctor(purge).assert_found(&["unknown"], &[]);
    let case = topics.with("unknown", &IN_ORDER);
    case.put(99, "2", "99");
    case.assert_found(&["unknown"], &[]);
    let case = topics.with("unknown-id", &IN_ORDER);
    case.put(99, "2", "5");
    case.assert_found(&["unknown"], &[]);
}

fn finds_events_that_are_not_marked_or_not_consumed(topics: &Topics) {
    let case = topics.with("not-marked", &IN_ORDER);
    let unmark = "UPDATE outbox \
        SET status = 'INIT', published_at = NULL, \"partition\" = NULL, \"offset\" = NULL \
        WHERE id = 5";
    case.doctor(unmark).assert_found(&[], &["not-marked"]);

    let case = topics.with("unconsumed", &IN_ORDER);
    let age = |age_s: i64| {
        format!(
            "UPDATE outbox \
                SET published_at = CAST(unixepoch('subsec') * 1000000 AS INTEGER) - {age_s}000000 \
                WHERE id = 3"
        )
    };
    case.doctor("DELETE FROM delivery WHERE outbox_id = 3")
        .doctor(&age(0))
        .assert_found(&[], &[]);
    case.doctor(&age(61)).assert_found(&["unconsumed"], &[]);
    case.doctor(&age(0));
    let consumed_to = |offset: i64| {
        format!(
            "INSERT OR REPLACE INTO topic_partition (topic, topic_id, \"partition\", consumed_to) \
             SELECT 'unconsumed', zeroblob(16), 0, {offset}"
        )
    };
    case.doctor(&consumed_to(2)).assert_found(&[], &[]);
    case.doctor(&consumed_to(3))
        .assert_found(&["unconsumed"], &[]);
    case.doctor("UPDATE outbox SET \"offset\" = NULL WHERE id = 3")
        .assert_found(&["unconsumed"], &[]);
}

#[test]
fn the_audit_accepts_aborted_transactions_and_deleted_records() {
    let broker = Broker::start("4.4.0");
    let clean = Node::new();
    let case = OnTopic::new(&clean, &broker, "transactions", &[]);
    let record = |event: i64| {
        let id = format!("{}-{event}", clean.id);
        Record::new("transactions", event.to_string())
            .key(user_of(event))
            .header("ce_id", id)
    };
    block_on(async {
        let kafka = Kafka::builder(broker.bootstrap()).connect().await.unwrap();
        // The open one stays open, however long this takes.
        let producer = kafka
            .producer()
            .metrics_push(false)
            .transaction_timeout(Duration::from_mins(10));
        let producer = producer.build_transactional("by-hand").await.unwrap();
        // 0: event 1, 1: marker, 2: event 2 aborted, 3: marker, 4: event 2, 5: event 3, 6: marker,
        // 7: event 4 open.
        for (events, commit) in [(&[1][..], true), (&[2], false), (&[2, 3], true)] {
            producer.begin().unwrap();
            for event in events {
                let _ = producer.send(record(*event)).await.unwrap();
            }
            if commit {
                producer.commit().await.unwrap();
            } else {
                producer.abort().await.unwrap();
            }
        }
        producer.begin().unwrap();
        let _ = producer.send(record(4)).await.unwrap();
    });
    for (event, offset) in [(1, 0), (2, 4), (3, 5)] {
        case.doctor(&format!(
            "UPDATE outbox SET \"partition\" = 0, \"offset\" = {offset} WHERE id = {event}"
        ));
    }
    case.assert_found(&[], &[]);
    let line = "topic: transactions, 3 records of this node, 0 of others; partition 0 from offset \
        0 to 7\n";
    assert!(case.report().contains(line), "{}", case.report());
    case.assert_progress(7);
    case.doctor("UPDATE outbox SET \"offset\" = 2 WHERE id = 2")
        .assert_found(&["missing"], &[]);
    case.doctor("UPDATE outbox SET \"offset\" = 4 WHERE id = 2");

    block_on(async {
        let kafka = Kafka::builder(broker.bootstrap()).connect().await.unwrap();
        let to = [(krafka::consumer::TopicPartition::new("transactions", 0), 5)];
        let deleted = kafka
            .admin()
            .delete_records(to, krafka::admin::DeleteRecordsOptions::default())
            .await
            .unwrap();
        assert!(deleted.values().all(Result::is_ok), "{deleted:?}");
    });
    case.assert_found(&[], &["deleted-from-topic"]);
    assert!(
        case.report()
            .contains("1 records of this node, 0 of others; partition 0 from offset 5 to 7")
    );
    let note = "note deleted-from-topic: 2 events were published, and the broker has deleted \
        their records";
    assert!(case.report().contains(note), "{}", case.report());
}

#[test]
fn events_of_an_earlier_topic_incarnation_are_noted_and_not_missing() {
    let broker = Broker::start("4.4.0");
    let case = OnTopic::new(&Node::new(), &broker, "recreated", &[1, 2, 3]);
    case.assert_found(&[], &[]);
    topic::delete(&broker.bootstrap(), "recreated", LIMIT);
    make(&broker, "recreated");
    case.put(4, "2", "4");
    case.doctor("UPDATE outbox SET \"partition\" = 0, \"offset\" = 0 WHERE id = 4");
    case.assert_found(&["missing"], &[]);
    let id = block_on(async {
        let kafka = Kafka::builder(broker.bootstrap()).connect().await.unwrap();
        let options = krafka::admin::DescribeTopicsOptions::default();
        kafka
            .admin()
            .describe_topics(["recreated"], options)
            .await
            .unwrap()["recreated"]
            .as_ref()
            .unwrap()
            .topic_id
    });
    let hex = format!("{:032x}", u128::from_be_bytes(id));
    case.doctor(&format!(
        "INSERT INTO topic_incarnation \
            (topic, topic_id, published_before, first_seen_at) VALUES ('recreated', x'{hex}', 3, 1)"
    ));
    case.assert_found(&[], &["earlier-incarnation"]);
    let note =
        "note earlier-incarnation: 3 events were published to an earlier incarnation of the topic";
    assert!(case.report().contains(note), "{}", case.report());
    // A later one that is not there is missing all the same.
    case.doctor("UPDATE outbox SET \"partition\" = 0, \"offset\" = 0 WHERE id = 5");
    case.assert_found(&["missing"], &["earlier-incarnation"]);
}

/// A payrelay with Kafka, whose purge continues while it is audited.
struct System {
    _broker: Broker,
    slack: FakeSlack,
    dir: TempDir,
    env: Vec<(String, String)>,
}

impl System {
    fn new() -> Self {
        let broker = Broker::start("4.4.0");
        let slack = FakeSlack::start();
        let bootstrap = broker.bootstrap();
        let kafka = env(&bootstrap, "payment-event");
        let url = slack.url();
        let more = [
            ("PAYRELAY_KAFKA_PARTITIONS", "3"),
            ("PAYRELAY_SLACK_WEBHOOK_URL", url.as_str()),
            ("PAYRELAY_SLACK_MESSAGES_PER_SECOND", "100000"),
            ("PAYRELAY_SLACK_SUMMARY_OVER", "0"),
            ("PAYRELAY_SCHEDULER_INTERVAL", "200ms"),
            ("PAYRELAY_SCHEDULER_RETENTION", "1s"),
        ];
        let env = kafka.iter().chain(&more);
        let env = env.map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        let env = env.collect();
        Self {
            env,
            _broker: broker,
            slack,
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn env(&self) -> Vec<(&str, &str)> {
        let pairs = self.env.iter();
        pairs
            .map(|(key, value)| (key.as_str(), value.as_str()))
            .collect()
    }

    fn start(&self) -> Payrelay {
        Payrelay::start(Options::new(self.dir.path(), &self.env()))
    }

    /// The report of an audit, which finds nothing.
    fn assert_clean(&self, when: &str) -> Value {
        let asked = Instant::now();
        let (code, json, error) = audit(self.dir.path(), &self.env()[..3], &["--json"]);
        assert_eq!(code, Some(0), "{when}: {json}{error}");
        println!("{when}: {:.1?}: {json}", asked.elapsed());
        serde_json::from_str(&json).unwrap()
    }

    /// Four clients pay while `work` is done.
    fn under_load(&self, address: SocketAddr, work: impl FnOnce()) {
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            for number in 1..=4 {
                let stop = &stop;
                scope.spawn(move || pay_until(address, number, stop));
            }
            let _over = StopOnDrop(&stop);
            wait_until("the first to be delivered: all parts work", LIMIT, || {
                self.slack.count() > 0
            });
            work();
        });
    }
}

/// Not without end: each payment makes the audits longer, and on a slow machine more are accepted
/// meanwhile.
fn pay_until(address: SocketAddr, number: i64, stop: &AtomicBool) {
    let mut client = Client::connect(address);
    for turn in 0..1000 {
        pay(&mut client, turn % 7, [100_000 * number + turn, turn]);
        if stop.load(Ordering::SeqCst) {
            return;
        }
    }
}

/// The sum of the counts of one part of a report.
fn sum(report: &Value, part: &str) -> i64 {
    let counts = report[part].as_object().unwrap().values();
    counts.map(|count| count.as_i64().unwrap()).sum()
}

#[test]
fn the_audit_of_a_running_system_finds_nothing() {
    let system = System::new();
    let mut payrelay = system.start();
    system.under_load(payrelay.addr(), || {
        for turn in 0..8 {
            system.assert_clean(&format!("under load {turn}"));
        }
    });
    wait_until_all_is_delivered(&system.dir.path().join("payrelay.db"), LIMIT);
    wait_until("the purge", LIMIT, || {
        system.assert_clean("being purged")["events_purged"].as_i64() > Some(0)
    });
    let report = system.assert_clean("idle");
    let payments = sum(&report, "payments");
    assert_eq!(
        (&report["topic"]["records"], &report["notes"]),
        (&json!(payments), &json!([]))
    );
    assert!(payments > 100, "{report}");
    assert_eq!(payrelay.terminate().code(), Some(0), "{}", payrelay.log());
    let stopped = system.assert_clean("stopped");
    assert_eq!(sum(&stopped, "payments"), payments);

    let mut payrelay = system.start();
    pay(&mut Client::connect(payrelay.addr()), 1, [7_000_000]);
    wait_until("the last to be delivered", LIMIT, || {
        let lines = system.slack.lines();
        lines
            .iter()
            .any(|line| line.contains("reservation 7000000"))
    });
    payrelay.kill9();
    let killed = system.assert_clean("after kill -9");
    assert_eq!(sum(&killed, "payments"), payments + 1);
}
