//! The audit by the real binary: nothing is found where nothing is wrong, also under load; and each
//! thing that can be wrong is found as what it is.

use std::fs;
use std::io::{Seek as _, SeekFrom, Write as _};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use krafka::admin::{CreateTopicsOptions, NewTopic};
use krafka::{Kafka, Record};
use rusqlite::Connection;
use serde_json::{Value, json};
use tempfile::TempDir;

use testkit::http::{Client, pay};
use testkit::kafka::Broker;
use testkit::process::{Options, Payrelay, run_to_exit};
use testkit::slack::FakeSlack;
use testkit::store::wait_until_all_is_delivered;
use testkit::{StopOnDrop, topic, wait_until};

const LIMIT: Duration = Duration::from_mins(1);

/// Exit code, standard output, standard error.
pub fn audit(dir: &Path, env: &[(&str, &str)], args: &[&str]) -> (Option<i32>, String, String) {
    let args = [&["audit"], args]
        .concat()
        .into_iter()
        .map(str::to_owned)
        .collect();
    let output = run_to_exit(Options {
        args,
        ..Options::new(dir, env)
    });
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (
        output.status.code(),
        text(output.stdout),
        text(output.stderr),
    )
}

/// A database that was made by the real thing, whose payrelay has ended: payments 1 to 3 of user 1,
/// 4 and 5 of user 2.
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
fn nothing_is_found_where_nothing_is_wrong() {
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

#[test]
fn each_thing_that_is_wrong_in_the_database_is_found_as_what_it_is() {
    let payment = "INSERT INTO payment (user_id, reservation_id, amount, currency, status, executed_at) \
        VALUES (9, 9, 9, 'KRW', 'COMPLETED', 9); INSERT INTO outbox (payment_id, user_id, type, \
        created_at) VALUES (6, 9, 'payment.completed', 9);";
    let key = |first: i64, count: i64| {
        format!(
            "INSERT INTO idempotency_key (client, key, body_hash, first_payment_id, \
                payment_count, arrived_at) VALUES ('', 'k', x'00', {first}, {count}, 1)"
        )
    };
    let cases = [
        (
            "double-payment",
            "DROP INDEX payment_paid; UPDATE payment SET reservation_id = (SELECT reservation_id \
                FROM payment WHERE id = 1) WHERE id = 2",
        ),
        ("no-history", payment),
        (
            "no-payment",
            "INSERT INTO payment_history VALUES (99, 9, NULL, 9); INSERT INTO user_history \
                VALUES (9, 99)",
        ),
        (
            "broken-chain",
            "UPDATE payment_history SET previous_id = NULL WHERE payment_id = 3",
        ),
        (
            "broken-chain",
            "UPDATE payment_history SET previous_id = 1 WHERE payment_id = 3",
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
            "INSERT INTO dead_letter_action VALUES (1, 77, 'discard', 'http', 'done', 1)",
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
        ("broken-idempotency-key", &key(77, 1)),
        ("broken-idempotency-key", &key(5, 2)),
        ("broken-idempotency-key", &key(3, 2)),
    ];
    let clean = Node::new();
    for (kind, sql) in cases {
        let dir = tempfile::tempdir().unwrap();
        let node = Node {
            dir,
            id: clean.id.clone(),
        };
        fs::copy(clean.path(), node.path()).unwrap();
        let (found, noted) = node.doctor(sql).found(&[]);
        assert_eq!((found, noted), (own(&[kind]), vec![]), "{sql}");
    }
}

#[test]
fn what_waits_for_a_person_or_is_only_worth_knowing_is_a_note() {
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
    let args = ["dead-letters", "discard", "1"].map(str::to_owned).to_vec();
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
fn a_row_that_an_index_does_not_have_is_found() {
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
fn a_damaged_file_is_found() {
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
fn examples_are_limited_and_counts_are_not() {
    let node = Node::new();
    node.doctor("DELETE FROM delivery");
    let (code, text, _) = audit(node.dir.path(), &[], &["--limit", "2"]);
    let expected = "FOUND unconsumed: 5 events that were published and have no delivery, for more \
        than 60 s or although the consumer has passed them\n  event 1 of payment 1\n  event 2 of \
        payment 2\n  and 3 more\nverdict: 1 kind of finding\n";
    assert!(code == Some(1) && text.ends_with(expected), "{text}");
}

#[test]
fn a_backup_is_looked_at_and_stays_as_it_is() {
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

#[test]
fn a_failing_or_silent_kafka_is_reported_within_half_a_minute() {
    let node = Node::new();
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
        let (code, text, error) = audit(node.dir.path(), &env, &[]);
        assert!(
            code == Some(75) && text.is_empty() && error.contains("--file-only"),
            "{code:?} {text} {error}"
        );
        assert!(asked.elapsed() < Duration::from_secs(30));
        let (code, text, _) = audit(node.dir.path(), &env, &["--file-only"]);
        assert!(
            code == Some(0) && text.contains("verdict: nothing found"),
            "{text}"
        );
    }
}

/// A database beside a topic that was written by hand. Each event of the database says that it was
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

#[test]
fn each_thing_that_is_wrong_with_the_topic_is_found_as_what_it_is() {
    let broker = Broker::start("4.4.0");
    let clean = Node::new();
    let on = |topic: &str, events: &[i64]| OnTopic::new(&clean, &broker, topic, events);

    let case = on("clean", &IN_ORDER);
    case.assert_found(&[], &[]);
    topic::put(&broker.bootstrap(), "clean", None, Some(b"1"), &[]);
    topic::put(
        &broker.bootstrap(),
        "clean",
        Some("1"),
        Some(b"1"),
        &[("ce_id", "other-1")],
    );
    case.assert_found(&[], &[]);
    let line =
        "topic: clean, 5 records of this node, 2 of others; partition 0 from offset 0 to 7\n";
    assert!(case.report().contains(line), "{}", case.report());

    let case = on("duplicate", &IN_ORDER);
    case.put(2, "1", "2");
    case.assert_found(&["duplicate"], &[]);
    assert!(
        case.report()
            .contains("  event 2: partition/offset 0/1, 0/5\n"),
        "{}",
        case.report()
    );

    let case = on("late", &[1, 3, 2, 4, 5]);
    case.assert_found(&["out-of-order"], &[]);
    assert!(
        case.report()
            .contains("  event 2 behind 3: partition 0, offset 2\n"),
        "{}",
        case.report()
    );
    let letter = "INSERT INTO dead_letter (outbox_id, payment_id, reason, state, received_at) \
        VALUES (2, 2, 'too large', 'REPLAYED', 1); INSERT INTO dead_letter_action \
        VALUES (1, 1, 'replay', 'http', 'waits to be published again', 1)";
    case.doctor(letter).assert_found(&[], &["sent-again"]);
    // It then could not be delivered.
    case.doctor("UPDATE dead_letter SET state = 'OPEN'")
        .assert_found(&[], &["dead-letters", "sent-again"]);

    let case = on("missing", &[1, 2, 4, 5]);
    case.doctor("UPDATE outbox SET \"partition\" = 0, \"offset\" = 2 WHERE id = 3")
        .assert_found(&["missing"], &[]);
    assert!(
        case.report()
            .contains("  event 3 of payment 3: not at partition 0, offset 2\n"),
        "{}",
        case.report()
    );
    case.doctor("UPDATE outbox SET \"offset\" = NULL WHERE id = 3")
        .assert_found(&["missing"], &[]);
    // Published after the topic was read: it cannot be judged.
    case.doctor("UPDATE outbox SET \"offset\" = 4 WHERE id = 3")
        .assert_found(&[], &[]);
    case.doctor("UPDATE outbox SET \"offset\" = 3, \"partition\" = 7 WHERE id = 3")
        .assert_found(&["missing"], &[]);

    let case = on("elsewhere", &IN_ORDER);
    case.doctor("UPDATE outbox SET \"offset\" = 0 WHERE id = 3")
        .assert_found(&["missing"], &[]);
    let line = "  event 3 of payment 3: partition 0, offset 2, instead of partition 0, offset 0\n";
    assert!(case.report().contains(line), "{}", case.report());

    for (topic, key, value) in [
        ("key", "9", "5"),
        ("value", "2", "4"),
        ("no-number", "2", "05"),
    ] {
        let case = on(topic, &IN_ORDER[..4]);
        case.put(5, key, value);
        case.doctor("UPDATE outbox SET \"partition\" = 0, \"offset\" = 4 WHERE id = 5");
        case.assert_found(&["mismatch"], &[]);
    }

    let purge = "DELETE FROM delivery WHERE outbox_id = 5; DELETE FROM outbox WHERE id = 5; \
                 UPDATE node SET events_purged = 1";
    on("purged", &IN_ORDER).doctor(purge).assert_found(&[], &[]);
    let case = on("purged-of-another", &IN_ORDER[..4]);
    case.put(5, "9", "5");
    case.doctor(purge).assert_found(&["mismatch"], &[]);
    let case = on("purged-and-unknown", &IN_ORDER[..4]);
    case.put(5, "2", "77");
    case.doctor(purge).assert_found(&["unknown"], &[]);
    let case = on("unknown", &IN_ORDER);
    case.put(99, "2", "99");
    case.assert_found(&["unknown"], &[]);
    let case = on("unknown-id", &IN_ORDER);
    case.put(99, "2", "5");
    case.assert_found(&["unknown"], &[]);

    let case = on("not-marked", &IN_ORDER);
    let unmark = "UPDATE outbox \
        SET status = 'INIT', published_at = NULL, \"partition\" = NULL, \"offset\" = NULL \
        WHERE id = 5";
    case.doctor(unmark).assert_found(&[], &["not-marked"]);

    let case = on("unconsumed", &IN_ORDER);
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

    let case = on("elsewhere-2", &IN_ORDER);
    let found = case.node.found(&env(&broker.bootstrap(), "nowhere"));
    assert_eq!(
        found,
        (own(&["missing"]), vec![]),
        "a topic that is not there has lost everything"
    );
    assert_eq!(
        clean.found(&env(&broker.bootstrap(), "nowhere")),
        (vec![], vec![]),
        "nothing was ever published there"
    );
}

#[test]
fn transactions_and_what_the_broker_deleted_are_no_finding() {
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
fn events_of_an_earlier_incarnation_of_the_topic_are_a_note_and_not_missing() {
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
        "INSERT INTO topic_incarnation VALUES ('recreated', x'{hex}', 3, 1)"
    ));
    case.assert_found(&[], &["earlier-incarnation"]);
    let note =
        "note earlier-incarnation: 3 events were published to an earlier incarnation of the topic";
    assert!(case.report().contains(note), "{}", case.report());
    // A later one that is not there is missing all the same.
    case.doctor("UPDATE outbox SET \"partition\" = 0, \"offset\" = 0 WHERE id = 5");
    case.assert_found(&["missing"], &["earlier-incarnation"]);
}

#[test]
fn a_system_that_works_is_clean_at_every_moment() {
    let broker = Broker::start("4.4.0");
    let slack = FakeSlack::start();
    let bootstrap = broker.bootstrap();
    let url = slack.url();
    let dir = tempfile::tempdir().unwrap();
    let kafka = env(&bootstrap, "payment-event");
    let more = [
        ("PAYRELAY_KAFKA_PARTITIONS", "3"),
        ("PAYRELAY_SLACK_WEBHOOK_URL", url.as_str()),
        ("PAYRELAY_SLACK_MESSAGES_PER_SECOND", "100000"),
        ("PAYRELAY_SLACK_SUMMARY_OVER", "0"),
        // The purge continues meanwhile.
        ("PAYRELAY_SCHEDULER_INTERVAL", "200ms"),
        ("PAYRELAY_SCHEDULER_RETENTION", "1s"),
    ];
    let mut payrelay = Payrelay::start(Options::new(dir.path(), &[&kafka[..], &more[..]].concat()));
    let stop = AtomicBool::new(false);
    let clean = |when: &str| -> Value {
        let asked = Instant::now();
        let (code, json, error) = audit(dir.path(), &kafka, &["--json"]);
        assert_eq!(code, Some(0), "{when}: {json}{error}");
        println!("{when}: {:.1?}: {json}", asked.elapsed());
        serde_json::from_str(&json).unwrap()
    };
    let count = |report: &Value, part: &str| -> i64 {
        report[part]
            .as_object()
            .unwrap()
            .values()
            .map(|count| count.as_i64().unwrap())
            .sum()
    };
    thread::scope(|scope| {
        for number in 1..=4 {
            let stop = &stop;
            let address = payrelay.addr();
            scope.spawn(move || {
                let mut client = Client::connect(address);
                // Not without end: each makes the audits longer, and on a slow machine more are
                // accepted meanwhile.
                for turn in 0..1000 {
                    pay(&mut client, turn % 7, [100_000 * number + turn, turn]);
                    if stop.load(Ordering::SeqCst) {
                        return;
                    }
                }
            });
        }
        let _over = StopOnDrop(&stop);
        wait_until("the first to be delivered: all parts work", LIMIT, || {
            slack.count() > 0
        });
        for turn in 0..8 {
            clean(&format!("under load {turn}"));
        }
    });
    wait_until_all_is_delivered(&dir.path().join("payrelay.db"), LIMIT);
    wait_until("the purge", LIMIT, || {
        clean("being purged")["events_purged"].as_i64() > Some(0)
    });
    let report = clean("idle");
    let payments = count(&report, "payments");
    assert_eq!(
        (&report["topic"]["records"], &report["notes"]),
        (&json!(payments), &json!([]))
    );
    assert!(payments > 100, "{report}");
    assert_eq!(payrelay.terminate().code(), Some(0), "{}", payrelay.log());
    assert_eq!(count(&clean("stopped"), "payments"), payments);

    let mut payrelay = Payrelay::start(Options::new(dir.path(), &[&kafka[..], &more[..]].concat()));
    pay(&mut Client::connect(payrelay.addr()), 1, [7_000_000]);
    let delivered = |slack: &FakeSlack| {
        slack
            .lines()
            .iter()
            .any(|line| line.contains("reservation 7000000"))
    };
    wait_until("the last to be delivered", LIMIT, || delivered(&slack));
    payrelay.kill9();
    assert_eq!(count(&clean("after kill -9"), "payments"), payments + 1);
}
