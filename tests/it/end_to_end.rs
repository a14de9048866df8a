//! The real binary between a real Kafka and a fake for Slack: one payment all the way, outages,
//! kills, and ten thousand payments counted at both ends.

use std::collections::{BTreeMap, BTreeSet};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use testkit::http::Client;
use testkit::kafka::Broker;
use testkit::process::{Options, Payrelay};
use testkit::slack::{Answer, FakeSlack};
use testkit::topic::{self, Found};
use testkit::{wait_for, wait_until};

const LIMIT: Duration = Duration::from_mins(1);
const TOPIC: &str = "payment-event";
const AWAY: &str = "Kafka (publisher) unavailable";
const SILENT: &str = "Kafka (publisher) unavailable: no answer within 3 s";

struct Fixture {
    dir: tempfile::TempDir,
    slack: FakeSlack,
    bootstrap: String,
}

impl Fixture {
    fn new(bootstrap: String) -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            slack: FakeSlack::start(),
            bootstrap,
        }
    }

    fn start(&self) -> Payrelay {
        self.start_with(&[])
    }

    fn start_with(&self, more: &[(&str, &str)]) -> Payrelay {
        let slack = self.slack.url();
        let bootstrap = self.bootstrap.as_str();
        let mut env = vec![
            ("PAYRELAY_PUBLISHER_KIND", "kafka"),
            ("PAYRELAY_KAFKA_BOOTSTRAP_SERVERS", bootstrap),
            ("PAYRELAY_SLACK_WEBHOOK_URL", &slack),
            // Each payment has a line, and few have a message of their own.
            ("PAYRELAY_SLACK_MESSAGES_PER_SECOND", "100000"),
            ("PAYRELAY_SLACK_SUMMARY_OVER", "0"),
            ("PAYRELAY_SLACK_DIGEST_OVER", "50"),
        ];
        env.extend(more);
        Payrelay::start(Options::new(self.dir.path(), &env))
    }

    fn topic(&self) -> Vec<Found> {
        topic::read(&self.bootstrap, TOPIC, LIMIT)
    }

    /// For as long as more of them come: each takes two syncs, and the disk may be slow.
    fn wait_for_messages(&self, count: usize) {
        let mut come = 0;
        while come < count {
            wait_until(
                &format!("payment {} of {count} at Slack", come + 1),
                LIMIT,
                || self.lines() > come,
            );
            come = self.lines();
        }
    }

    fn lines(&self) -> usize {
        self.slack.lines().len()
    }

    /// At Slack: payments 1 to `count`, each once.
    fn assert_delivered_once(&self, count: usize) {
        let messages = self.slack.lines();
        let ids: BTreeSet<_> = messages.iter().map(|message| id_of(message)).collect();
        assert_eq!((messages.len(), ids.len()), (count, count));
        assert_eq!((ids.first(), ids.last()), (Some(&1), Some(&count)));
    }

    /// On the topic: payments 1 to `count`, each once, and those of a user in commit order.
    fn assert_published_once(&self, count: usize) {
        let found = self.topic();
        let ids: BTreeSet<usize> = found
            .iter()
            .map(|record| record.value.parse().unwrap())
            .collect();
        assert_eq!((found.len(), ids.len()), (count, count));
        assert_eq!((ids.first(), ids.last()), (Some(&1), Some(&count)));
        let mut last: BTreeMap<&str, usize> = BTreeMap::new();
        for record in &found {
            let id = record.value.parse().unwrap();
            let before = last.insert(&record.key, id).unwrap_or(0);
            assert!(
                before < id,
                "user {}: payment {before} before {id}",
                record.key
            );
        }
    }
}

fn id_of(message: &str) -> usize {
    message
        .split(' ')
        .nth(1)
        .and_then(|id| id.parse().ok())
        .unwrap_or_else(|| panic!("not a line: {message}"))
}

fn pay(client: &mut Client, user: i64, reservations: impl IntoIterator<Item = i64>) -> Value {
    let reservations: Vec<_> = reservations
        .into_iter()
        .map(|id| json!({"reservation_id": id, "seat_price": 5}))
        .collect();
    let response = client.post_json(
        "/payments",
        &json!({"user_id": user, "reservations": reservations}),
    );
    assert_eq!(response.status, 201);
    response.json()
}

fn way(client: &mut Client, id: usize) -> Value {
    client.get(&format!("/payments/{id}")).json()
}

/// How often the publisher was unavailable so far, once it is not: a new broker may be slow, and
/// one outage is one line.
fn outages(payrelay: &Payrelay) -> usize {
    let over = || {
        payrelay.count_in_log(AWAY) == payrelay.count_in_log("Kafka (publisher) available again")
    };
    wait_until("the publisher to be well", LIMIT, over);
    payrelay.count_in_log(AWAY)
}

#[test]
fn one_payment_all_the_way() {
    let broker = Broker::start("4.4.0");
    let fixture = Fixture::new(broker.bootstrap());
    let mut payrelay = fixture.start();
    let mut client = Client::connect(payrelay.addr());
    pay(&mut client, 42, [1001]);
    fixture.wait_for_messages(1);
    assert_eq!(
        fixture.slack.messages(),
        ["Payment 1 COMPLETED: user 42 paid 5 KRW for reservation 1001"]
    );
    // A record may be accepted and delivered before the relay has marked it.
    let way = wait_for("both ends to be recorded", LIMIT, || {
        let way = way(&mut client, 1);
        let done =
            way["event"]["status"] == "PUBLISHED" && way["notification"]["status"] == "DELIVERED";
        done.then_some(way)
    });
    assert_eq!(
        (&way["event"]["partition"], &way["event"]["offset"]),
        (&json!(0), &json!(0)),
        "{way}"
    );
    let record = &fixture.topic()[0];
    assert_eq!((record.key.as_str(), record.value.as_str()), ("42", "1"));
    assert_eq!(record.header("ce_id"), way["event"]["id"].as_str().unwrap());
    assert_eq!(
        record.header("ce_time"),
        way["event"]["created_at"].as_str().unwrap()
    );
    assert_eq!(record.header("traceparent"), "");

    let trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let body = r#"{"user_id":42,"reservations":[{"reservation_id":1001,"seat_price":5}]}"#;
    let head = "POST /payments HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n";
    let request = format!(
        "{head}traceparent: {trace}\r\ntracestate: a=1\r\ntracestate: b=2\r\nContent-Length: \
            {}\r\n\r\n{body}",
        body.len()
    );
    client.send_raw(request.as_bytes()).unwrap();
    assert_eq!(client.read_response().status, 201);
    fixture.wait_for_messages(2);
    assert_eq!(
        fixture.slack.messages()[1],
        "Payment 2 FAILED: user 42, reservation 1001: already paid"
    );
    let record = &fixture.topic()[1];
    assert_eq!(
        (record.header("ce_type"), record.header("traceparent")),
        ("payment.failed", trace)
    );
    assert_eq!(record.header("tracestate"), "a=1,b=2");
    assert_eq!(payrelay.terminate().code(), Some(0), "{}", payrelay.log());
    assert!(
        !payrelay.log().contains("secret-token"),
        "the webhook is in the log"
    );
}

#[test]
fn kafka_away_at_the_start_then_there() {
    let mut broker = Broker::start("4.4.0");
    broker.kill();
    let fixture = Fixture::new(broker.bootstrap());
    let payrelay = fixture.start();
    let mut client = Client::connect(payrelay.addr());
    for id in 1..=20 {
        pay(&mut client, id, [id]);
    }
    payrelay.wait_for_log("Kafka (publisher) unavailable", LIMIT);
    let ready = client.get("/health/ready");
    assert_eq!(
        (ready.status, &ready.json()["status"]),
        (200, &json!("degraded"))
    );
    wait_until("the sampler to count the events", LIMIT, || {
        client.get("/health/ready").json()["pending"]["unpublished"]["count"] == 20
    });
    broker.restart();
    fixture.wait_for_messages(20);
    fixture.assert_delivered_once(20);
    fixture.assert_published_once(20);
    for (line, count) in [
        ("(publisher) unavailable", 1),
        ("(publisher) available again", 1),
        ("(consumer) unavailable", 1),
    ] {
        assert_eq!(payrelay.log().matches(line).count(), count, "{line}");
    }
}

#[test]
fn kafka_killed_in_the_middle_and_back() {
    let mut broker = Broker::start("4.4.0");
    let fixture = Fixture::new(broker.bootstrap());
    let payrelay = fixture.start();
    let address = payrelay.addr();
    let paying = thread::spawn(move || {
        let mut client = Client::connect(address);
        for id in 1..=3000 {
            pay(&mut client, id % 5, [id]);
        }
    });
    fixture.wait_for_messages(50);
    let before = outages(&payrelay);
    broker.kill();
    paying.join().unwrap();
    payrelay.wait_for_another(AWAY, before, LIMIT);
    broker.restart();
    fixture.wait_for_messages(3000);
    fixture.assert_delivered_once(3000);
    fixture.assert_published_once(3000);
}

#[test]
fn a_network_that_stalls_and_is_cut_loses_and_doubles_nothing() {
    let (broker, mut proxy) = Broker::start_behind_proxy("4.4.0");
    let fixture = Fixture::new(broker.bootstrap());
    let payrelay = fixture.start();
    let mut client = Client::connect(payrelay.addr());
    pay(&mut client, 1, 1..=100);
    fixture.wait_for_messages(100);
    outages(&payrelay);
    let before = payrelay.count_in_log(SILENT);
    proxy.stall();
    pay(&mut client, 1, 101..=200);
    payrelay.wait_for_another(SILENT, before, LIMIT);
    proxy.heal();
    fixture.wait_for_messages(200);
    let before = outages(&payrelay);
    proxy.cut();
    pay(&mut client, 1, 201..=300);
    payrelay.wait_for_another(AWAY, before, LIMIT);
    proxy.heal();
    fixture.wait_for_messages(300);
    fixture.assert_delivered_once(300);
    let inside = topic::read(&broker.bootstrap_inside(), TOPIC, LIMIT);
    assert_eq!(inside.len(), 300);
}

#[test]
fn a_kafka_that_hangs_does_not_delay_the_stop_beyond_its_limit() {
    let (broker, mut proxy) = Broker::start_behind_proxy("4.4.0");
    let fixture = Fixture::new(broker.bootstrap());
    let mut payrelay = fixture.start();
    let mut client = Client::connect(payrelay.addr());
    pay(&mut client, 1, 1..=10);
    fixture.wait_for_messages(10);
    outages(&payrelay);
    let before = payrelay.count_in_log(SILENT);
    proxy.stall();
    pay(&mut client, 1, 11..=20);
    payrelay.wait_for_another(SILENT, before, LIMIT);
    let asked = Instant::now();
    assert_eq!(payrelay.terminate().code(), Some(0), "{}", payrelay.log());
    assert!(asked.elapsed() < Duration::from_secs(10));
}

#[test]
fn slack_failing_then_well() {
    let broker = Broker::start("4.4.0");
    let fixture = Fixture::new(broker.bootstrap());
    fixture.slack.answer_with(|nth, _| {
        if nth < 3 {
            Answer::Status(500)
        } else {
            Answer::Ok
        }
    });
    let payrelay = fixture.start();
    let mut client = Client::connect(payrelay.addr());
    pay(&mut client, 1, 1..=20);
    payrelay.wait_for_log("Slack unavailable: Slack answered 500", LIMIT);
    fixture.wait_for_messages(20);
    payrelay.wait_for_log("Slack available again after", LIMIT);
    fixture.assert_delivered_once(20);
    assert_eq!(
        fixture
            .slack
            .messages()
            .iter()
            .map(|m| id_of(m))
            .collect::<Vec<_>>(),
        (1..=20).collect::<Vec<_>>()
    );
    wait_until("the delivery to be recorded", LIMIT, || {
        way(&mut client, 20)["notification"]["status"] == "DELIVERED"
    });
    assert_eq!(way(&mut client, 1)["notification"]["attempts"], 4);
}

#[test]
fn a_duplicate_record_is_delivered_once() {
    let broker = Broker::start("4.4.0");
    let fixture = Fixture::new(broker.bootstrap());
    let payrelay = fixture.start();
    let mut client = Client::connect(payrelay.addr());
    pay(&mut client, 1, 1..=3);
    fixture.wait_for_messages(3);
    for copy in fixture.topic() {
        let headers: Vec<_> = copy
            .headers
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
            .collect();
        topic::put(
            &fixture.bootstrap,
            TOPIC,
            Some(&copy.key),
            Some(copy.value.as_bytes()),
            &headers,
        );
    }
    topic::put(&fixture.bootstrap, TOPIC, Some("1"), Some(b"not ours"), &[]);
    pay(&mut client, 1, [4]);
    fixture.wait_for_messages(4);
    payrelay.wait_for_log(
        "dead-lettered 1 records of payment-event and dropped 0, the first at 0@",
        LIMIT,
    );
    fixture.assert_delivered_once(4);
}

#[test]
fn a_killed_node_continues_within_two_seconds() {
    let broker = Broker::start("4.4.0");
    let fixture = Fixture::new(broker.bootstrap());
    let mut total = 0;
    // A first life does all that a later one does, and makes the topic and the group.
    let mut first_life = None;
    for _ in 0..3 {
        let mut payrelay = fixture.start();
        let mut client = Client::connect(payrelay.addr());
        let started = Instant::now();
        total += 50;
        pay(&mut client, 1, total - 49..=total);
        let delivered = usize::try_from(total).unwrap();
        fixture.wait_for_messages(delivered - 49);
        let accepted = started.elapsed();
        let limit = *first_life.get_or_insert(accepted) + Duration::from_secs(2);
        assert!(
            accepted < limit,
            "the first record came after {accepted:?}, and may take {limit:?}"
        );
        fixture.wait_for_messages(delivered);
        // Not while the last answer is being recorded: that one message could show twice.
        wait_until("the delivery to be recorded", LIMIT, || {
            way(&mut client, delivered)["notification"]["status"] == "DELIVERED"
        });
        payrelay.kill9();
    }
    fixture.assert_delivered_once(150);
    fixture.assert_published_once(150);
}

#[test]
fn what_was_acknowledged_before_sigkill_reaches_both_ends() {
    let broker = Broker::start("4.4.0");
    let fixture = Fixture::new(broker.bootstrap());
    let mut reservation = 0;
    for _ in 0..3 {
        let mut payrelay = fixture.start();
        let mut client = Client::connect(payrelay.addr());
        for _ in 0..100 {
            reservation += 1;
            pay(&mut client, reservation % 3, [reservation]);
        }
        payrelay.kill9();
    }
    let _payrelay = fixture.start();
    let on_topic = || {
        fixture
            .topic()
            .iter()
            .map(|record| record.value.clone())
            .collect::<BTreeSet<_>>()
            .len()
    };
    wait_until("every event on the topic", LIMIT, || on_topic() == 300);
    let delivered = || {
        fixture
            .slack
            .lines()
            .iter()
            .map(|message| id_of(message))
            .collect::<BTreeSet<_>>()
            .len()
    };
    wait_until("every payment at Slack", LIMIT, || delivered() == 300);
}

/// 10,000 payments from 16 connections, every tenth for a reservation that is paid already: 10,000
/// records on the topic in commit order for each user, 10,000 lines at Slack, each exactly once.
fn ten_thousand(version: &str) {
    const CLIENTS: i64 = 16;
    const EACH: i64 = 625;
    let broker = Broker::start(version);
    let fixture = Fixture::new(broker.bootstrap());
    let payrelay = fixture.start_with(&[("PAYRELAY_KAFKA_PARTITIONS", "3")]);
    let started = Instant::now();
    let address = payrelay.addr();
    let clients = (0..CLIENTS).map(|number| {
        thread::spawn(move || {
            let mut client = Client::connect(address);
            let mut failed = 0;
            for turn in 0..EACH {
                let paid_already = turn % 10 == 9;
                let reservation = number * EACH + if paid_already { turn - 1 } else { turn };
                let answer = pay(&mut client, (number * EACH + turn) % 97, [reservation]);
                failed += usize::from(answer["payments"][0]["status"] == "FAILED");
            }
            failed
        })
    });
    let clients: Vec<_> = clients.collect();
    let failed: usize = clients
        .into_iter()
        .map(|client| client.join().unwrap())
        .sum();
    let accepted = started.elapsed();
    fixture.wait_for_messages(10_000);
    println!(
        "{version}: 10000 payments accepted in {accepted:.1?}, delivered to Slack after {:.1?}",
        started.elapsed()
    );
    assert_eq!(failed, 992);
    fixture.assert_published_once(10_000);
    fixture.assert_delivered_once(10_000);
    let delivered_failed = fixture
        .slack
        .lines()
        .iter()
        .filter(|message| message.contains(" FAILED: "))
        .count();
    assert_eq!(delivered_failed, failed);
    let mut client = Client::connect(address);
    wait_until("the last delivery to be recorded", LIMIT, || {
        let pending = client.get("/health/ready").json()["pending"].clone();
        let none = json!({ "count": 0, "oldest_at": null, "oldest_age_s": 0 });
        ["unpublished", "unconsumed", "undelivered", "dead_letters"]
            .iter()
            .all(|what| pending[what] == none)
    });
}

#[test]
fn ten_thousand_payments_on_kafka_4_4_0() {
    ten_thousand("4.4.0");
}

#[test]
fn ten_thousand_payments_on_kafka_3_9_2() {
    ten_thousand("3.9.2");
}
