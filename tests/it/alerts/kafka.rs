//! Faults of Kafka and of the way there.

use std::time::Duration;

use testkit::hostile::Machine;
use testkit::http::Client;
use testkit::kafka::Broker;
use testkit::pipeline::TOPIC;
use testkit::process::{Options, Payrelay};
use testkit::scrape::Scrape;
use testkit::topic::{self, OpenTransaction};
use testkit::wait_until;

use super::super::fencing::{Node, fence, two_copies};
use super::{FAULT, check, healthy, is_well, pay, shift_times};

const LIMIT: Duration = Duration::from_mins(1);

const PENDING: &str = "payrelay_outbox_pending_events";
const ATTEMPT: &str = "payrelay_relay_attempt_timestamp_seconds";

#[test]
fn a_kafka_that_cannot_be_reached_and_a_stuck_relay_are_alerts() {
    let machine = Machine::new();
    let (broker, mut proxy) = Broker::start_behind_proxy("4.4.0");
    let bootstrap = broker.bootstrap();
    let env = [
        ("PAYRELAY_PUBLISHER_KIND", "kafka"),
        ("PAYRELAY_KAFKA_BOOTSTRAP_SERVERS", &*bootstrap),
    ];
    let payrelay = Payrelay::start(machine.options(&env));
    pay(&payrelay, 1);
    let well = healthy(&payrelay);

    proxy.cut();
    pay(&payrelay, 2);
    Scrape::until(payrelay.addr(), "an event that waits", |scrape| {
        scrape.value(PENDING) > 0.5
    });
    let sql = "UPDATE outbox SET created_at = created_at - 600000000 WHERE status = 'INIT'";
    shift_times("PayrelayKafkaLate", &machine.database(), sql);
    let age = "payrelay_outbox_oldest_pending_age_seconds";
    let first = Scrape::until(payrelay.addr(), "an old event", |scrape| {
        scrape.value(age) > 300.0
    });
    // The relay tries again and again.
    let before = first.value(ATTEMPT);
    let last = Scrape::until(payrelay.addr(), "another attempt", |scrape| {
        scrape.value(ATTEMPT) > before
    });
    let late = well
        .clone()
        .then(FAULT, first, last)
        .fires(Duration::from_secs(45), &[])
        .fires(Duration::from_secs(75), &["PayrelayKafkaLate"])
        .fires(Duration::from_mins(30), &["PayrelayKafkaLate"]);
    check(&late);

    // A record with another time than its row would be no event of this database.
    let sql = "UPDATE outbox SET created_at = created_at + 600000000 WHERE status = 'INIT'";
    shift_times("PayrelayKafkaLate", &machine.database(), sql);
    machine.set("hang", "-wal");
    proxy.heal();
    let first = Scrape::until(payrelay.addr(), "a relay without heartbeat", |scrape| {
        let relay = "payrelay_thread_heartbeat_timestamp_seconds{thread=\"relay\"}";
        scrape.age(relay) > 45.0 && scrape.age(ATTEMPT) > 45.0
    });
    let before = first.value(age);
    let last = Scrape::until(payrelay.addr(), "an older event", |scrape| {
        scrape.value(age) > before + 1.0
    });
    machine.clear("hang");
    let threads = ["consumer", "relay", "scheduler", "writer"];
    let threads = threads.map(|name| format!("PayrelayThreadStuck{{thread=\"{name}\"}}"));
    let mut expected: Vec<&str> = threads.iter().map(String::as_str).collect();
    expected.push("PayrelayRefusesPayments");
    let stuck = well
        .then(FAULT, first, last)
        .fires(Duration::from_secs(15), &[])
        .fires(Duration::from_secs(45), &["PayrelayRefusesPayments"])
        .fires(Duration::from_secs(200), &expected);
    expected.extend(["PayrelayKafkaLate", "PayrelayNotPublishing"]);
    let stuck = stuck.fires(Duration::from_mins(20), &expected);
    check(&stuck);
    check(&healthy(&payrelay));
}

#[test]
fn a_second_process_of_the_node_is_an_alert() {
    let broker = Broker::start("4.4.0");
    let bootstrap = broker.bootstrap();
    let folders = two_copies(&broker);
    let nodes = [0, 1].map(|index: usize| Node::start(folders[index].path(), &bootstrap));
    let well = healthy(&nodes[0].payrelay);
    let (fenced, _other, reservation) = fence(nodes);
    let address = fenced.payrelay.addr();
    fenced.pay(reservation + 1);
    // The partition changes hands between the two consumers: that is no fault of this test.
    let is_consuming =
        |scrape: &Scrape| scrape.value("payrelay_component_up{component=\"consumer\"}") > 0.5;
    let first = Scrape::until(address, "a fenced publisher", |scrape| {
        is_consuming(scrape)
            && scrape.value("payrelay_publisher_fenced") > 0.5
            && scrape.value(PENDING) > 0.5
            && scrape.value("payrelay_dead_letters_open{kind=\"record\"}") > 0.5
    });
    let age = "payrelay_outbox_oldest_pending_age_seconds";
    let before = first.value(age);
    let last = Scrape::until(address, "older events", |scrape| {
        is_consuming(scrape) && scrape.value(age) > before + 2.0
    });
    let history = well
        .then(FAULT, first, last)
        .fires(Duration::from_secs(45), &[])
        .fires(Duration::from_secs(75), &["PayrelayFenced"])
        // Its events are late as well by then, and the other process's records are not its own.
        .fires(
            Duration::from_mins(9),
            &["PayrelayFenced", "PayrelayKafkaLate"],
        )
        .fires(
            Duration::from_mins(11),
            &["PayrelayDeadLetters", "PayrelayFenced", "PayrelayKafkaLate"],
        );
    check(&history);
}

#[test]
fn events_that_are_hidden_lost_or_out_of_order_are_alerts() {
    let broker = Broker::start("4.4.0");
    let bootstrap = broker.bootstrap();
    let folder = tempfile::tempdir().unwrap();
    let env = [
        ("PAYRELAY_PUBLISHER_KIND", "kafka"),
        ("PAYRELAY_KAFKA_BOOTSTRAP_SERVERS", &*bootstrap),
    ];
    let payrelay = Payrelay::start(Options::new(folder.path(), &env));
    pay(&payrelay, 1);
    let well = healthy(&payrelay);
    let stranger = || OpenTransaction::begin(&bootstrap, "stranger", TOPIC, "77", "stranger-1");
    let hide = |reservation| {
        pay(&payrelay, reservation);
        let unconsumed = "payrelay_unconsumed_events";
        Scrape::until(payrelay.addr(), "a hidden event", |scrape| {
            scrape.value(unconsumed) > 0.5 && scrape.value(PENDING) < 0.5
        });
    };

    let open = stranger();
    hide(2);
    let sql = "UPDATE outbox SET published_at = published_at - 600000000 WHERE id = 2";
    shift_times(
        "PayrelayUndelivered",
        &folder.path().join("payrelay.db"),
        sql,
    );
    let age = "payrelay_unconsumed_oldest_age_seconds";
    let first = Scrape::until(payrelay.addr(), "an unavailable consumer", |scrape| {
        let up = "payrelay_component_up{component=\"consumer\"}";
        scrape.value(up) < 0.5 && scrape.value(age) > 300.0
    });
    let before = first.value(age);
    let last = Scrape::until(payrelay.addr(), "an older event", |scrape| {
        scrape.value(age) > before + 1.0
    });
    let hidden = well
        .then(FAULT, first, last)
        .fires(Duration::from_secs(45), &[])
        .fires(Duration::from_secs(75), &["PayrelayUndelivered"])
        .fires(
            Duration::from_secs(315),
            &["PayrelayConsumerLate", "PayrelayUndelivered"],
        );
    check(&hidden);
    open.abort();
    // A publisher that saw the transaction looks at the topic before it publishes again.
    pay(&payrelay, 3);
    wait_until("a publisher that publishes", LIMIT, || {
        let payment = Client::connect(payrelay.addr()).get("/payments/3").json();
        payment["notification"]["status"] == "DELIVERED"
    });

    let well = healthy(&payrelay);
    let open = stranger();
    hide(4);
    topic::truncate_to_end(&bootstrap, TOPIC, 0);
    open.abort();
    let last = Scrape::until(payrelay.addr(), "a gap", |scrape| {
        scrape.value("payrelay_topic_gaps_total{partition=\"0\"}") > 0.5 && is_well(scrape)
    });
    let order = "PayrelayOrderBroken{partition=\"0\"}";
    let history = well
        .then(FAULT, last.clone(), last)
        .fires(Duration::from_secs(15), &[order])
        .fires(Duration::from_mins(16), &[]);
    check(&history);
}
