//! Two processes that publish as one node: one is fenced, and keeps accepting payments; and
//! databases that are older than the topic. On real brokers, and on the fake one where it needs no
//! second process.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use payrelay::domain::event::Event;
use payrelay::domain::payment_record::RecordFormat;
use payrelay::domain::timestamp::Timestamp;
use payrelay::relay::publisher::{PublishError, PublishOutcome, Publisher};
use payrelay::relay::{self, Relay, Step};
use payrelay::runtime::health::{HealthHandle, HealthLevel};
use payrelay::runtime::worker::Waker;
use payrelay::store::OfflineStore;
use payrelay::store::publication::{Destination, Receipt};
use payrelay::store::relay_action::{self, RelayAction};
use serde_json::{Value, json};

use testkit::http::{self, Client};
use testkit::kafka::Broker;
use testkit::process::{Options, Payrelay, run_to_exit};
use testkit::store::Database;
use testkit::{topic, wait_until};

const LIMIT: Duration = Duration::from_mins(1);
const TOPIC: &str = "payment-event";

/// Fenced at its first call; publishes at the later ones.
struct FencedOnce(Arc<AtomicUsize>);

impl Publisher for FencedOnce {
    fn publish(&mut self, batch: &[Event]) -> PublishOutcome {
        if self.0.fetch_add(1, Ordering::SeqCst) == 0 {
            return PublishOutcome {
                error: Some(PublishError::Fenced("another one".into())),
                ..PublishOutcome::default()
            };
        }
        let receipt = |event: &Event| Receipt {
            outbox_id: event.outbox_id,
            place: Destination::Delivery,
        };
        PublishOutcome {
            receipts: batch.iter().map(receipt).collect(),
            ..PublishOutcome::default()
        }
    }

    fn name(&self) -> &'static str {
        "a publisher"
    }
}

#[test]
fn a_fenced_relay_pauses_until_an_operator_resumes_it() {
    for origin in ["http, token boss", "local user operator"] {
        let database = Database::open();
        database.pay(1, [1]);
        // What was asked for before is not meant.
        database
            .store()
            .write(|tx| {
                relay_action::record_relay_action(
                    tx,
                    RelayAction::Resume,
                    "http",
                    None,
                    Timestamp::now(),
                )
            })
            .unwrap();
        let calls = Arc::new(AtomicUsize::new(0));
        let publisher = Box::new(FencedOnce(Arc::clone(&calls)));
        let store = database.store().clone();
        let part = HealthHandle::up();
        let mut relay = Relay::new(
            store,
            publisher,
            relay::Options {
                batch_max: 10,
                format: RecordFormat::Id,
                wake: Waker::new().1,
                notifiers: Waker::new().0,
                health: part.clone(),
                reconnect_max: Duration::from_secs(5),
            },
        );
        for _ in 0..3 {
            assert_eq!(relay.step(), Step::Fenced);
        }
        assert_eq!(
            calls.load(Ordering::SeqCst),
            1,
            "it asks nothing of Kafka meanwhile"
        );
        assert_eq!(part.get().state, HealthLevel::Fenced);
        assert!(part.get().error.unwrap().contains("payrelay outbox resume"));
        database.pay(1, [2]);
        database
            .store()
            .write(move |tx| {
                relay_action::record_relay_action(
                    tx,
                    RelayAction::Resume,
                    origin,
                    None,
                    Timestamp::now(),
                )
            })
            .unwrap();
        while relay.step() == Step::Progress {}
        assert_eq!(
            database.number("SELECT count(*) FROM outbox WHERE status = 'PUBLISHED'"),
            2,
            "{origin:?}"
        );
        assert_eq!(part.get().state, HealthLevel::Up);
    }
}

pub struct Node<'a> {
    dir: &'a Path,
    bootstrap: &'a str,
    pub payrelay: Payrelay,
}

impl<'a> Node<'a> {
    pub fn start(dir: &'a Path, bootstrap: &'a str) -> Self {
        let env = [
            ("PAYRELAY_PUBLISHER_KIND", "kafka"),
            ("PAYRELAY_KAFKA_BOOTSTRAP_SERVERS", bootstrap),
        ];
        Self {
            dir,
            bootstrap,
            payrelay: Payrelay::start(Options::new(dir, &env)),
        }
    }

    fn post(&self, path: &str, body: &Value) -> u16 {
        Client::connect(self.payrelay.addr())
            .post_json(path, body)
            .status
    }

    pub fn pay(&self, reservation: i64) {
        http::pay(&mut Client::connect(self.payrelay.addr()), 1, [reservation]);
    }

    fn component(&self, name: &str) -> String {
        let health = Client::connect(self.payrelay.addr())
            .get("/health/ready")
            .json();
        health["components"][name]["state"]
            .as_str()
            .unwrap()
            .to_owned()
    }

    fn count(&self, what: &str) -> i64 {
        let sql = format!("SELECT count(*) FROM {what}");
        let database = OfflineStore::open(&self.dir.join("payrelay.db")).unwrap();
        database
            .read(move |connection| connection.query_row(&sql, [], |row| row.get(0)))
            .unwrap()
    }

    fn wait_until_all_is_published(&self) {
        wait_until("everything to be published", LIMIT, || {
            self.count("outbox WHERE status = 'INIT'") == 0
        });
    }

    fn run(&self, args: &[&str]) -> Option<i32> {
        let env = [
            ("PAYRELAY_PUBLISHER_KIND", "kafka"),
            ("PAYRELAY_KAFKA_BOOTSTRAP_SERVERS", self.bootstrap),
        ];
        let mut options = Options::new(self.dir, &env);
        options.args = args.iter().map(|arg| (*arg).to_owned()).collect();
        run_to_exit(options).status.code()
    }
}

/// The database of a node, and a copy of it that another process has.
pub fn two_copies(broker: &Broker) -> [tempfile::TempDir; 2] {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let bootstrap = broker.bootstrap();
    let mut first = Node::start(dirs[0].path(), &bootstrap);
    first.pay(1);
    first.wait_until_all_is_published();
    assert_eq!(first.payrelay.terminate().code(), Some(0));
    fs::copy(
        dirs[0].path().join("payrelay.db"),
        dirs[1].path().join("payrelay.db"),
    )
    .unwrap();
    dirs
}

/// Both publish until one of them is fenced: it pauses, keeps accepting payments, and says so once.
pub fn fence(nodes: [Node<'_>; 2]) -> (Node<'_>, Node<'_>, i64) {
    let mut reservation = 1000;
    let mut fenced = None;
    wait_until("one of them to be fenced", LIMIT, || {
        for (index, node) in nodes.iter().enumerate() {
            reservation += 1;
            node.pay(reservation);
            if node.component("publisher") == "fenced" {
                fenced = Some(index);
                return true;
            }
        }
        false
    });
    let [first, second] = nodes;
    let (fenced, other) = if fenced == Some(0) {
        (first, second)
    } else {
        (second, first)
    };
    (fenced, other, reservation)
}

#[test]
fn a_fenced_node_accepts_payments_and_publishes_them_once_resumed() {
    let broker = Broker::start("4.4.0");
    let bootstrap = broker.bootstrap();
    for way in ["command line", "http", "restart"] {
        let dirs = two_copies(&broker);
        let nodes = [
            Node::start(dirs[0].path(), &bootstrap),
            Node::start(dirs[1].path(), &bootstrap),
        ];
        let (mut fenced, mut other, reservation) = fence(nodes);
        fenced.pay(reservation + 1);
        let health = Client::connect(fenced.payrelay.addr()).get("/health/ready");
        assert_eq!(
            (health.status, health.json()["status"].as_str().unwrap()),
            (200, "degraded")
        );
        assert_eq!(
            fenced
                .payrelay
                .count_in_log("fenced: another process publishes as node"),
            1
        );
        assert_eq!(fenced.payrelay.try_exit(), None);
        assert_eq!(other.payrelay.terminate().code(), Some(0));
        match way {
            "command line" => assert_eq!(fenced.run(&["outbox", "resume"]), Some(0)),
            "http" => assert_eq!(fenced.post("/admin/relay/resume", &Value::Null), 202),
            _ => {
                assert_eq!(fenced.payrelay.terminate().code(), Some(0));
                fenced = Node::start(fenced.dir, fenced.bootstrap);
            }
        }
        fenced.wait_until_all_is_published();
        wait_until("the publisher to be up", LIMIT, || {
            fenced.component("publisher") == "up"
        });
        assert_eq!(fenced.count("outbox WHERE status = 'REJECTED'"), 0, "{way}");
        topic::delete(&bootstrap, TOPIC, LIMIT);
    }
}

/// Both databases then have a payment that the other one does not know.
#[test]
fn a_stray_copy_that_accepts_one_payment_is_reported_by_both_processes() {
    let broker = Broker::start("4.4.0");
    let bootstrap = broker.bootstrap();
    let dirs = two_copies(&broker);
    let mut nodes = [
        Node::start(dirs[0].path(), &bootstrap),
        Node::start(dirs[1].path(), &bootstrap),
    ];
    let [node, stray] = &nodes;
    node.pay(2);
    node.wait_until_all_is_published();
    stray.pay(3);
    stray.wait_until_all_is_published();
    node.pay(4);
    for node in &nodes {
        node.payrelay
            .wait_for_log("that this database did not write", LIMIT);
        wait_until("a dead letter", LIMIT, || {
            node.count("dead_letter WHERE state = 'OPEN'") > 0
        });
    }
    for node in &mut nodes {
        assert_eq!(node.payrelay.terminate().code(), Some(0));
        assert_eq!(node.run(&["audit"]), Some(1), "it is not clean");
    }
}

/// In every delivery mode, and whichever of id, payment and value is not this database's.
#[test]
fn a_record_that_another_process_wrote_as_this_node_is_reported() {
    let broker = Broker::start("4.4.0");
    let bootstrap = broker.bootstrap();
    for delivery in ["exactly-once", "at-least-once"] {
        let dir = tempfile::tempdir().unwrap();
        let env = [
            ("PAYRELAY_NODE_ID", delivery),
            ("PAYRELAY_KAFKA_TOPIC", delivery),
            ("PAYRELAY_KAFKA_GROUP", delivery),
            ("PAYRELAY_KAFKA_DELIVERY", delivery),
            ("PAYRELAY_PUBLISHER_KIND", "kafka"),
            ("PAYRELAY_KAFKA_BOOTSTRAP_SERVERS", &*bootstrap),
        ];
        let node = Node {
            dir: dir.path(),
            bootstrap: &bootstrap,
            payrelay: Payrelay::start(Options::new(dir.path(), &env)),
        };
        node.pay(1);
        wait_until("the delivery", LIMIT, || {
            node.count("delivery WHERE status = 'DELIVERED'") == 1
        });
        for (id, value) in [(77, "1"), (1, "77"), (1, "no payment")] {
            let letters = node.count("dead_letter WHERE state = 'OPEN'");
            let errors = node
                .payrelay
                .count_in_log("that this database did not write");
            let event_id = format!("{delivery}-{id}");
            topic::put(
                &bootstrap,
                delivery,
                Some("1"),
                Some(value.as_bytes()),
                &[("ce_id", &event_id)],
            );
            node.payrelay
                .wait_for_another("that this database did not write", errors, LIMIT);
            assert_eq!(
                node.count("dead_letter WHERE state = 'OPEN'"),
                letters + 1,
                "{event_id} {value}"
            );
        }
        // Another node's is none of its business.
        topic::put(
            &bootstrap,
            delivery,
            Some("1"),
            Some(b"1"),
            &[("ce_id", "another-1")],
        );
        wait_until("the dead letter", LIMIT, || {
            node.count("dead_letter WHERE state = 'OPEN'") == 4
        });
        assert_eq!(
            node.payrelay
                .count_in_log("that this database did not write"),
            3
        );
    }
}

/// A node with a configured id gets a new file, or an old one. Payments that came before Kafka was
/// available have ids that the topic has. They get new ones, and are published in their order.
#[test]
fn events_get_new_ids_if_the_topic_has_their_ids() {
    let (broker, mut proxy) = Broker::start_behind_proxy("4.4.0");
    let bootstrap = broker.bootstrap();
    let env = [
        ("PAYRELAY_NODE_ID", "till-1"),
        ("PAYRELAY_PUBLISHER_KIND", "kafka"),
        ("PAYRELAY_KAFKA_BOOTSTRAP_SERVERS", &*bootstrap),
        ("PAYRELAY_KAFKA_PARTITIONS", "3"),
    ];
    let pay = |payrelay: &Payrelay, user: i64, reservation: i64| {
        let reservation = json!({ "reservation_id": reservation, "seat_price": 1 });
        let body = json!({ "user_id": user, "reservations": [reservation] });
        assert_eq!(
            Client::connect(payrelay.addr())
                .post_json("/payments", &body)
                .status,
            201
        );
    };
    // More events each time than the topic has of the file before.
    let mut all = BTreeSet::new();
    for (round, count) in [3, 2, 8].into_iter().enumerate() {
        let dir = tempfile::tempdir().unwrap();
        if round > 0 {
            proxy.cut();
        }
        let mut payrelay = Payrelay::start(Options::new(dir.path(), &env));
        for user in 1..=count {
            pay(&payrelay, user, user);
            pay(&payrelay, user, 100 + user);
        }
        proxy.heal();
        let database = OfflineStore::open(&dir.path().join("payrelay.db")).unwrap();
        let published = "SELECT count(*) FROM outbox WHERE status = 'PUBLISHED'";
        wait_until("everything to be published", 2 * LIMIT, || {
            let number = database
                .read(|connection| connection.query_row(published, [], |row| row.get::<_, i64>(0)));
            number.unwrap() == 2 * count
        });
        let on_topic = all.len() + usize::try_from(2 * count).unwrap();
        let found = topic::read_all(&broker.bootstrap_inside(), TOPIC, on_topic, LIMIT);
        let ids: BTreeSet<String> = found
            .iter()
            .map(|record| record.header("ce_id").to_owned())
            .collect();
        assert_eq!(ids.len(), found.len(), "each event has an id of its own");
        let new: BTreeSet<String> = ids.difference(&all).cloned().collect();
        assert_eq!(i64::try_from(new.len()), Ok(2 * count));
        for user in 1..=count {
            let of_user = found
                .iter()
                .filter(|record| new.contains(record.header("ce_id")));
            let values: Vec<i64> = of_user
                .filter(|record| record.key == user.to_string())
                .map(|record| record.value.parse().unwrap())
                .collect();
            assert_eq!(values, [2 * user - 1, 2 * user], "in commit order");
        }
        all = ids;
        assert_eq!(payrelay.terminate().code(), Some(0));
    }
}
