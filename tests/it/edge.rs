//! `node.role = "edge"`: the node publishes its events to a topic of many nodes, and others deliver
//! them.

use std::path::Path;
use std::time::Duration;

use krafka::producer::murmur2;
use rusqlite::Connection;
use serde_json::{Value, json};

use testkit::http::{Client, pay};
use testkit::kafka::Broker;
use testkit::pipeline::{Pipeline, TOPIC};
use testkit::process::{Options, Payrelay, run_command};
use testkit::topic::{self, Found};
use testkit::{wait_for, wait_until};

const LIMIT: Duration = Duration::from_mins(1);

const PARTITIONS: u32 = 4;

/// Edges of one topic.
struct Fleet {
    broker: Broker,
    dir: tempfile::TempDir,
}

impl Fleet {
    fn new() -> Self {
        let fleet = Self::without_topics();
        let init = ["fleet", "init", "--replication", "1"];
        let (code, _, error) = fleet.run("operator", &init);
        assert_eq!(code, Some(0), "{error}");
        fleet
    }

    fn without_topics() -> Self {
        Self {
            broker: Broker::start("4.4.0"),
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn folder(&self, node: &str) -> std::path::PathBuf {
        let folder = self.dir.path().join(node);
        std::fs::create_dir_all(&folder).unwrap();
        folder
    }

    fn env(&self, node: &str) -> Vec<(String, String)> {
        [
            ("PAYRELAY_NODE_ROLE", "edge"),
            ("PAYRELAY_NODE_ID", node),
            ("PAYRELAY_KAFKA_BOOTSTRAP_SERVERS", &self.broker.bootstrap()),
            ("PAYRELAY_KAFKA_PARTITIONS", &PARTITIONS.to_string()),
            ("PAYRELAY_FLEET_STATUS_INTERVAL", "1s"),
            ("PAYRELAY_FLEET_LATE_AFTER", "10s"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .to_vec()
    }

    fn start(&self, node: &str) -> Payrelay {
        let mut options = Options::new(self.folder(node), &[]);
        options.env = self.env(node);
        Payrelay::start(options)
    }

    /// Runs a command next to an edge.
    fn run(&self, node: &str, arguments: &[&str]) -> (Option<i32>, String, String) {
        let env = self.env(node);
        let env: Vec<(&str, &str)> = env
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
            .collect();
        run_command(&self.folder(node), &env, arguments)
    }

    /// The records of a node once there are `count`, in the order of the partition.
    fn records(&self, node: &str, count: usize) -> Vec<Found> {
        wait_for("the records of a node", LIMIT, || {
            let found = topic::read(&self.broker.bootstrap(), TOPIC, LIMIT);
            let ours: Vec<Found> = found
                .into_iter()
                .filter(|record| record.header("ce_source") == format!("/payrelay/{node}"))
                .collect();
            (ours.len() >= count).then_some(ours)
        })
    }
}

fn database(folder: &Path) -> Connection {
    Connection::open(folder.join("payrelay.db")).unwrap()
}

/// The partition that Kafka's own clients choose for a key.
fn partition_of(node: &str) -> i32 {
    i32::try_from((murmur2(node.as_bytes()) & 0x7fff_ffff) % PARTITIONS).unwrap()
}

/// All in one partition, each naming the one before it and the database.
#[track_caller]
fn assert_chain(records: &[Found], node: &str, folder: &Path) {
    let created_at: i64 = database(folder)
        .query_row("SELECT created_at FROM node", [], |row| row.get(0))
        .unwrap();
    let mut previous = 0;
    for record in records {
        assert_eq!(
            (record.key.as_str(), record.partition),
            (node, partition_of(node))
        );
        assert_eq!(record.header("ce_previous"), previous.to_string());
        assert_eq!(record.header("ce_incarnation"), created_at.to_string());
        let id = record.header("ce_id");
        previous = id.rsplit('-').next().unwrap().parse::<i64>().unwrap();
    }
}

#[test]
fn an_edge_publishes_payments_by_node_and_delivers_nothing() {
    let fleet = Fleet::new();
    let mut edge = fleet.start("shop-7");
    let mut client = Client::connect(edge.addr());
    pay(&mut client, 42, 1001..1021);
    let records = fleet.records("shop-7", 20);
    assert_chain(&records, "shop-7", &fleet.folder("shop-7"));
    let value: Value = serde_json::from_str(&records[19].value).unwrap();
    assert_eq!(value["reservation_id"], 1020);

    let payment = wait_for("the mark", LIMIT, || {
        let payment = client.get("/payments/20").json();
        (payment["event"]["status"] == "PUBLISHED").then_some(payment)
    });
    assert_eq!(payment["notification"], Value::Null, "others deliver it");
    let overview = wait_for("a sample", LIMIT, || {
        let overview = client.get("/overview").json();
        (overview["pending"]["unpublished"]["count"] == 0).then_some(overview)
    });
    assert_eq!(
        (&overview["role"], &overview["status"]),
        (&json!("edge"), &json!("ready"))
    );
    assert_eq!(overview["pending"]["unconsumed"]["count"], 0, "{overview}");
    assert_eq!(overview["channels"], json!([]));
    let components = overview["components"].as_object().unwrap();
    let names: Vec<&String> = components.keys().collect();
    assert_eq!(names, ["database", "disk", "publisher"]);
    let (code, status, _) = fleet.run("shop-7", &["status"]);
    assert_eq!(code, Some(0), "{status}");
    assert!(
        status.contains("publish") && !status.contains("notify"),
        "{status}"
    );
    let (_, shown, _) = fleet.run("shop-7", &["payment", "20"]);
    assert!(
        shown.contains("published") && !shown.contains("consumed"),
        "{shown}"
    );
    let (code, audit, errors) = fleet.run("shop-7", &["audit"]);
    assert_eq!(code, Some(0), "{audit}{errors}");
    assert!(edge.terminate().success(), "{}", edge.log());
    let (code, status, _) = fleet.run("shop-7", &["status"]);
    assert!(code == Some(75) && !status.contains("consume"), "{status}");
}

#[test]
fn edges_share_a_topic_and_keep_their_chains_over_kills_and_new_partitions() {
    let fleet = Fleet::new();
    let nodes = ["shop-1", "shop-2", "shop-3"];
    for round in 0..3_i64 {
        let mut edges: Vec<Payrelay> = nodes.iter().map(|node| fleet.start(node)).collect();
        for edge in &edges {
            let mut client = Client::connect(edge.addr());
            for payment in 0..10 {
                pay(&mut client, payment, [100 * round + payment]);
            }
        }
        if round == 0 {
            // Each has chosen its partition.
            for node in nodes {
                fleet.records(node, 1);
            }
        }
        // The mark of an acknowledged event may be lost: the next start finds it on the topic.
        edges.iter_mut().for_each(Payrelay::kill9);
        if round == 1 {
            topic::add_partitions(&fleet.broker.bootstrap(), TOPIC, 7, LIMIT);
        }
    }
    let edges: Vec<Payrelay> = nodes.iter().map(|node| fleet.start(node)).collect();
    for (node, edge) in nodes.iter().zip(&edges) {
        let records = fleet.records(node, 30);
        assert_eq!(records.len(), 30, "{node}");
        assert_chain(&records, node, &fleet.folder(node));
        let mut client = Client::connect(edge.addr());
        let letters = client.get("/admin/dead-letters").json();
        assert_eq!(
            letters["dead_letters"],
            json!([]),
            "others' records are theirs"
        );
        assert_eq!(client.get("/health/ready").json()["status"], "ready");
        let (code, audit, errors) = fleet.run(node, &["audit"]);
        assert_eq!(code, Some(0), "{audit}{errors}");
    }
}

#[test]
fn an_idle_edge_does_not_read_the_records_of_others_at_its_next_start() {
    let fleet = Fleet::new();
    // Both are on one partition.
    let other = (0..1000)
        .map(|number| format!("other-{number}"))
        .find(|other| partition_of(other) == partition_of("shop-7"))
        .unwrap();
    let busy = fleet.start(&other);
    pay(&mut Client::connect(busy.addr()), 1, 1..101);
    fleet.records(&other, 100);
    let edge = fleet.start("shop-7");
    pay(&mut Client::connect(edge.addr()), 1, [1]);
    fleet.records("shop-7", 1);
    pay(&mut Client::connect(busy.addr()), 1, 101..111);
    fleet.records(&other, 110);
    let folder = fleet.folder("shop-7");
    wait_until("the end of the partition to be saved", LIMIT, || {
        let sql = "SELECT published_to FROM topic_partition";
        let saved = database(&folder).query_row(sql, [], |row| row.get::<_, i64>(0));
        saved.is_ok_and(|published_to| published_to == 111)
    });
}

#[test]
fn a_node_delivers_what_it_has_before_it_becomes_an_edge_and_back() {
    let broker = Broker::start("4.4.0");
    let pipeline = Pipeline::new(broker.bootstrap());
    let own_topic = [("PAYRELAY_KAFKA_TOPIC", "own")];
    let mut single = pipeline.start_with(&own_topic);
    pay(&mut Client::connect(single.addr()), 1, [1]);
    pipeline.wait_for_messages(1);
    assert_eq!(single.terminate().code(), Some(0));
    let connection = database(pipeline.dir.path());
    let delivery = |status: &str| {
        let delivered_at = (status == "DELIVERED").then_some(1);
        let sql = "UPDATE delivery SET status = ?1, delivered_at = ?2";
        connection.execute(sql, (status, delivered_at)).unwrap();
    };
    let bootstrap = broker.bootstrap();
    let edge_env = [
        ("PAYRELAY_NODE_ROLE", "edge"),
        ("PAYRELAY_KAFKA_BOOTSTRAP_SERVERS", bootstrap.as_str()),
    ];
    topic::create(&bootstrap, TOPIC, &[]);
    delivery("PENDING");
    let (code, _, error) = run_command(pipeline.dir.path(), &edge_env, &["serve"]);
    assert_eq!(code, Some(78), "{error}");
    assert!(
        error.contains("1 payment waiting to be delivered"),
        "{error}"
    );
    delivery("DELIVERED");

    let mut edge = Payrelay::start(Options::new(pipeline.dir.path(), &edge_env));
    let mut client = Client::connect(edge.addr());
    pay(&mut client, 1, [2]);
    wait_until("the event to be published", LIMIT, || {
        client.get("/payments/2").json()["event"]["status"] == "PUBLISHED"
    });
    assert!(edge.terminate().success());

    // Single again: the center has delivered payment 2, and this node delivers payment 3.
    let single = pipeline.start_with(&own_topic);
    let mut client = Client::connect(single.addr());
    pay(&mut client, 1, [3]);
    pipeline.wait_for_messages(2);
    wait_until("the delivery", LIMIT, || {
        client.get("/payments/3").json()["notification"]["status"] == "DELIVERED"
    });
    assert!(pipeline.slack.messages()[1].starts_with("Payment 3 "));
    assert_eq!(
        client.get("/payments/2").json()["notification"],
        Value::Null
    );
    let kafka = [
        ("PAYRELAY_PUBLISHER_KIND", "kafka"),
        ("PAYRELAY_KAFKA_TOPIC", "own"),
        ("PAYRELAY_KAFKA_BOOTSTRAP_SERVERS", bootstrap.as_str()),
    ];
    let (code, audit, errors) = run_command(pipeline.dir.path(), &kafka, &["audit"]);
    assert_eq!(code, Some(0), "{audit}{errors}");
}

#[test]
fn the_fleet_is_seen_from_one_place_and_a_silent_node_is_late() {
    let fleet = Fleet::without_topics();
    let fleet_json = |more: &[&str]| {
        let (code, shown, errors) = fleet.run("shop-1", &[&["fleet", "--json"], more].concat());
        let nodes: Vec<Value> = shown
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        (code, nodes, errors)
    };
    let (code, _, error) = fleet_json(&[]);
    assert_eq!(code, Some(75), "{error}");
    assert!(error.contains("payrelay fleet init"), "{error}");

    let init = ["fleet", "init", "--replication", "1"];
    let (code, planned, error) = fleet.run("shop-1", &[&init[..], &["--dry-run"]].concat());
    assert_eq!(code, Some(0), "{error}");
    assert!(
        planned.contains("payment-event.status: would be created"),
        "{planned}"
    );
    let (code, created, error) = fleet.run("shop-1", &init);
    assert_eq!(code, Some(0), "{error}");
    assert_eq!(created.matches(": created; ").count(), 2, "{created}");
    let (_, existing, _) = fleet.run("shop-1", &init);
    assert_eq!(existing.matches(": exists").count(), 2, "{existing}");

    let nodes = ["shop-1", "shop-2"];
    let mut edges: Vec<Payrelay> = nodes.iter().map(|node| fleet.start(node)).collect();
    pay(&mut Client::connect(edges[0].addr()), 1, 1..6);
    let first = wait_for("the reports of both nodes", LIMIT, || {
        let (code, nodes, error) = fleet_json(&[]);
        assert!(matches!(code, Some(0 | 1)), "{error}");
        let has_reported = nodes.len() == 2 && nodes[0]["status"]["events"]["published"] == 5;
        has_reported.then(|| nodes[0].clone())
    });
    assert_eq!(
        (&first["node"], &first["state"]),
        (&json!("shop-1"), &json!("ok"))
    );
    assert_eq!(first["status"]["last_payment"], 5);
    assert!(
        first["clock_skew_ms"].as_i64().unwrap().abs() < 5000,
        "{first}"
    );
    let (_, table, _) = fleet.run("shop-1", &["fleet"]);
    assert!(
        table.contains("on topic") && table.contains("shop-2"),
        "{table}"
    );

    edges[1].kill9();
    wait_until("the silent node to be late", LIMIT, || {
        let (code, nodes, _) = fleet_json(&["--state", "late"]);
        code == Some(1) && nodes.len() == 1 && nodes[0]["node"] == "shop-2"
    });
}

/// What makes a row of a table, in the order of the rows.
fn rows(connection: &Connection, sql: &str) -> Vec<String> {
    let mut statement = connection.prepare(sql).unwrap();
    let columns = statement.column_count();
    let row = |row: &rusqlite::Row<'_>| {
        let cell = |index| row.get_ref(index).map(|value| format!("{value:?}"));
        (0..columns).map(cell).collect::<Result<Vec<_>, _>>()
    };
    let rows = statement.query_map([], row).unwrap();
    rows.map(|row| row.unwrap().join(" ")).collect()
}

#[test]
fn a_lost_edge_is_built_again_from_the_topic_and_gives_no_id_twice() {
    const TABLES: [&str; 3] = [
        "SELECT * FROM payment ORDER BY id",
        "SELECT * FROM user_history ORDER BY user_id",
        // The time of publishing is the broker's.
        "SELECT id, payment_id, user_id, type, traceparent, tracestate, status, created_at, \
            \"partition\", \"offset\" FROM outbox ORDER BY id",
    ];
    let fleet = Fleet::new();
    let other = fleet.start("shop-8");
    pay(&mut Client::connect(other.addr()), 1, 1..4);
    let mut edge = fleet.start("shop-7");
    let mut client = Client::connect(edge.addr());
    for user in 0..20_i64 {
        // Each second payment fails.
        pay(&mut client, user % 7, [1000 + user / 2, 2000 + user]);
    }
    fleet.records("shop-7", 40);
    wait_until("the marks", LIMIT, || {
        client.get("/payments/40").json()["event"]["status"] == "PUBLISHED"
    });
    assert!(edge.terminate().success());
    let folder = fleet.folder("shop-7");
    let before = TABLES.map(|sql| rows(&database(&folder), sql));
    std::fs::rename(&folder, fleet.dir.path().join("lost")).unwrap();

    let restore = ["restore", "--from-topic", "--yes"];
    let (code, shown, error) = fleet.run("shop-7", &restore);
    assert_eq!(code, Some(0), "{shown}{error}");
    assert!(shown.contains("restored 40 payments"), "{shown}");
    let after = TABLES.map(|sql| rows(&database(&folder), sql));
    assert_eq!(before, after);
    let files = std::fs::read_dir(&folder).unwrap();
    let names: Vec<_> = files.map(|file| file.unwrap().file_name()).collect();
    assert!(
        names
            .iter()
            .all(|name| !name.to_string_lossy().contains("rebuilt")),
        "{names:?}"
    );

    let edge = fleet.start("shop-7");
    let mut client = Client::connect(edge.addr());
    let ids = pay(&mut client, 3, [1000, 3000]);
    assert!(ids[0] > 1_000_000, "{ids:?}");
    let failed = client.get(&format!("/payments/{}", ids[0])).json();
    assert_eq!(
        failed["status"], "FAILED",
        "the reservation is paid already"
    );
    let records = fleet.records("shop-7", 42);
    assert_chain(&records, "shop-7", &folder);
    let (code, audit, errors) = fleet.run("shop-7", &["audit"]);
    assert_eq!(code, Some(0), "{audit}{errors}");
    let (code, _, error) = fleet.run("shop-9", &restore);
    assert_eq!(code, Some(1), "{error}");
    assert!(error.contains("is node.id right?"), "{error}");
}

#[test]
fn an_edge_republishes_what_the_topic_has_lost_under_new_ids() {
    let fleet = Fleet::new();
    let edge = fleet.start("shop-7");
    let mut client = Client::connect(edge.addr());
    pay(&mut client, 1, 1..31);
    fleet.records("shop-7", 30);
    wait_until("the marks", LIMIT, || {
        client.get("/payments/30").json()["event"]["status"] == "PUBLISHED"
    });
    topic::truncate(&fleet.broker.bootstrap(), TOPIC, partition_of("shop-7"), 25);
    let republish = ["republish", "--from", "11", "--through", "25"];
    let (code, _, error) = fleet.run("shop-7", &republish);
    assert_eq!(code, Some(64), "{error}");
    let (code, shown, error) = fleet.run("shop-7", &[&republish[..], &["--yes"]].concat());
    assert_eq!(code, Some(0), "{error}");
    assert!(shown.contains("15 events wait"), "{shown}");
    let (code, _, error) = fleet.run("shop-7", &["outbox", "wake"]);
    assert_eq!(code, Some(0), "{error}");
    let records = fleet.records("shop-7", 20);
    let payments: Vec<i64> = records
        .iter()
        .map(|record| {
            let value: Value = serde_json::from_str(&record.value).unwrap();
            value["payment_id"].as_i64().unwrap()
        })
        .collect();
    let expected: Vec<i64> = (26..31).chain(11..26).collect();
    assert_eq!(payments, expected);
    assert_eq!(records[5].header("ce_id"), "shop-7-31");
    assert_eq!(records[5].header("ce_previous"), "30");
    let (code, audit, errors) = fleet.run("shop-7", &["audit"]);
    assert_eq!(code, Some(0), "{audit}{errors}");

    // Republished events that a reader asked for: the topic has both records of each.
    let again = ["republish", "--from", "35", "--through", "40", "--yes"];
    let (code, shown, error) = fleet.run("shop-7", &again);
    assert!(
        code == Some(0) && shown.contains("6 events wait"),
        "{shown}{error}"
    );
    fleet.run("shop-7", &["outbox", "wake"]);
    fleet.records("shop-7", 26);
    drop(edge);
    let folder = fleet.folder("shop-7");
    std::fs::rename(&folder, fleet.dir.path().join("lost")).unwrap();
    let (code, shown, error) = fleet.run("shop-7", &["restore", "--from-topic", "--yes"]);
    assert_eq!(code, Some(0), "{shown}{error}");
    let last = "SELECT max(id) FROM outbox";
    let last: i64 = database(&folder)
        .query_row(last, [], |row| row.get(0))
        .unwrap();
    assert_eq!(last, 51, "one event for each payment, the newest");
}

#[test]
fn a_backup_from_before_the_first_event_of_an_edge_publishes_nothing_twice() {
    let mut fleet = Fleet::new();
    fleet.broker.kill();
    let edge = fleet.start("shop-7");
    pay(&mut Client::connect(edge.addr()), 1, 1..21);
    let copy = fleet.dir.path().join("copy.db");
    let copy = copy.to_str().unwrap().to_owned();
    let (code, _, error) = fleet.run("shop-7", &["backup", &copy]);
    assert_eq!(code, Some(0), "{error}");
    fleet.broker.restart();
    fleet.records("shop-7", 20);
    drop(edge);
    let (code, shown, error) = fleet.run("shop-7", &["restore", &copy, "--yes"]);
    assert_eq!(code, Some(0), "{shown}{error}");
    let edge = fleet.start("shop-7");
    let mut client = Client::connect(edge.addr());
    pay(&mut client, 1, [100]);
    let records = fleet.records("shop-7", 21);
    assert_eq!(records.len(), 21, "none of them twice");
    assert_chain(&records, "shop-7", &fleet.folder("shop-7"));
}

#[test]
fn an_event_of_an_edge_that_later_ones_have_overtaken_gets_a_new_id() {
    let fleet = Fleet::new();
    let mut edge = fleet.start("shop-7");
    let mut client = Client::connect(edge.addr());
    pay(&mut client, 1, 1..6);
    fleet.records("shop-7", 5);
    wait_until("the marks", LIMIT, || {
        client.get("/payments/5").json()["event"]["status"] == "PUBLISHED"
    });
    assert!(edge.terminate().success());
    // As after a transaction that the broker has aborted: the topic does not show the event.
    let folder = fleet.folder("shop-7");
    let waits = "UPDATE outbox SET status = 'INIT', published_at = NULL, \"partition\" = NULL, \
        \"offset\" = NULL WHERE id = 3; UPDATE topic_partition SET published_to = 5; \
        DELETE FROM topic_unseen; UPDATE node SET edge_through = 2, consumed_through = 2";
    database(&folder).execute_batch(waits).unwrap();

    let edge = fleet.start("shop-7");
    let mut client = Client::connect(edge.addr());
    pay(&mut client, 1, [6]);
    let records = fleet.records("shop-7", 7);
    assert_eq!(records.len(), 7, "once, under its new id");
    assert_chain(&records, "shop-7", &folder);
    let ids: Vec<&str> = records
        .iter()
        .map(|record| record.header("ce_id"))
        .collect();
    assert!(!ids[5..].contains(&"shop-7-3"), "{ids:?}");
    let payments = records[5..].iter().map(|record| {
        let value: Value = serde_json::from_str(&record.value).unwrap();
        value["payment_id"].as_i64().unwrap()
    });
    assert!(payments.eq([3, 6]), "in the order of their commits");
}
