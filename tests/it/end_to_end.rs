//! The real binary between a real Kafka and a fake for Slack. One payment goes all the way; then
//! come outages, kills, and ten thousand payments counted at both ends.

use std::collections::BTreeSet;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use payrelay::domain::payment_record::{PAYMENT_SCHEMA, PAYMENT_SCHEMA_ID};
use testkit::http::Client;
use testkit::kafka::Broker;
use testkit::pipeline::{Pipeline, SILENT, TOPIC, UNAVAILABLE, id_of, outages};
use testkit::process::run_command;
use testkit::slack::Answer;
use testkit::topic::{self};
use testkit::{wait_for, wait_until};

const LIMIT: Duration = Duration::from_mins(1);

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

#[test]
fn one_payment_reaches_kafka_and_slack() {
    let broker = Broker::start("4.4.0");
    let pipeline = Pipeline::new(broker.bootstrap());
    let mut payrelay = pipeline.start();
    let mut client = Client::connect(payrelay.addr());
    pay(&mut client, 42, [1001]);
    pipeline.wait_for_messages(1);
    assert_eq!(
        pipeline.slack.messages(),
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
    let record = &pipeline.topic()[0];
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
    pipeline.wait_for_messages(2);
    assert_eq!(
        pipeline.slack.messages()[1],
        "Payment 2 FAILED: user 42, reservation 1001: already paid"
    );
    let record = &pipeline.topic()[1];
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
fn payments_wait_until_kafka_is_available() {
    let mut broker = Broker::start("4.4.0");
    broker.kill();
    let pipeline = Pipeline::new(broker.bootstrap());
    let payrelay = pipeline.start();
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
    pipeline.wait_for_messages(20);
    pipeline.assert_delivered_once(20);
    pipeline.assert_published_once(20);
    for (line, count) in [
        ("(publisher) unavailable", 1),
        ("(publisher) available again", 1),
        ("(consumer) unavailable", 1),
    ] {
        assert_eq!(payrelay.log().matches(line).count(), count, "{line}");
    }
}

#[test]
fn a_kafka_restart_under_load_loses_and_doubles_nothing() {
    let mut broker = Broker::start("4.4.0");
    let pipeline = Pipeline::new(broker.bootstrap());
    let payrelay = pipeline.start();
    let address = payrelay.addr();
    let paying = thread::spawn(move || {
        let mut client = Client::connect(address);
        for id in 1..=3000 {
            pay(&mut client, id % 5, [id]);
        }
    });
    pipeline.wait_for_messages(50);
    let before = outages(&payrelay);
    broker.kill();
    paying.join().unwrap();
    payrelay.wait_for_another(UNAVAILABLE, before, LIMIT);
    broker.restart();
    pipeline.wait_for_messages(3000);
    pipeline.assert_delivered_once(3000);
    pipeline.assert_published_once(3000);
}

#[test]
fn a_network_that_stalls_and_is_cut_loses_and_doubles_nothing() {
    let (broker, mut proxy) = Broker::start_behind_proxy("4.4.0");
    let pipeline = Pipeline::new(broker.bootstrap());
    let payrelay = pipeline.start();
    let mut client = Client::connect(payrelay.addr());
    pay(&mut client, 1, 1..=100);
    pipeline.wait_for_messages(100);
    outages(&payrelay);
    let before = payrelay.count_in_log(SILENT);
    proxy.stall();
    pay(&mut client, 1, 101..=200);
    payrelay.wait_for_another(SILENT, before, LIMIT);
    proxy.heal();
    pipeline.wait_for_messages(200);
    let before = outages(&payrelay);
    proxy.cut();
    pay(&mut client, 1, 201..=300);
    payrelay.wait_for_another(UNAVAILABLE, before, LIMIT);
    proxy.heal();
    pipeline.wait_for_messages(300);
    pipeline.assert_delivered_once(300);
    let inside = topic::read(&broker.bootstrap_inside(), TOPIC, LIMIT);
    assert_eq!(inside.len(), 300);
}

#[test]
fn a_failing_slack_loses_and_doubles_nothing() {
    let broker = Broker::start("4.4.0");
    let pipeline = Pipeline::new(broker.bootstrap());
    pipeline.slack.answer_with(|nth, _| {
        if nth < 3 {
            Answer::Status(500)
        } else {
            Answer::Ok
        }
    });
    let payrelay = pipeline.start();
    let mut client = Client::connect(payrelay.addr());
    pay(&mut client, 1, 1..=20);
    payrelay.wait_for_log("Slack unavailable: Slack answered 500", LIMIT);
    pipeline.wait_for_messages(20);
    payrelay.wait_for_log("Slack available again after", LIMIT);
    pipeline.assert_delivered_once(20);
    assert_eq!(
        pipeline
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
    let pipeline = Pipeline::new(broker.bootstrap());
    let payrelay = pipeline.start();
    let mut client = Client::connect(payrelay.addr());
    pay(&mut client, 1, 1..=3);
    pipeline.wait_for_messages(3);
    for copy in pipeline.topic() {
        let headers: Vec<_> = copy
            .headers
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
            .collect();
        topic::put(
            &pipeline.bootstrap,
            TOPIC,
            Some(&copy.key),
            Some(copy.value.as_bytes()),
            &headers,
        );
    }
    topic::put(
        &pipeline.bootstrap,
        TOPIC,
        Some("1"),
        Some(b"not ours"),
        &[],
    );
    pay(&mut client, 1, [4]);
    pipeline.wait_for_messages(4);
    payrelay.wait_for_log(
        "dead-lettered 1 records of payment-event and dropped 0, the first at 0@",
        LIMIT,
    );
    pipeline.assert_delivered_once(4);
}

#[test]
fn acknowledged_payments_reach_kafka_and_slack_after_sigkill() {
    let broker = Broker::start("4.4.0");
    let pipeline = Pipeline::new(broker.bootstrap());
    let mut reservation = 0;
    for _ in 0..3 {
        let mut payrelay = pipeline.start();
        let mut client = Client::connect(payrelay.addr());
        for _ in 0..100 {
            reservation += 1;
            pay(&mut client, reservation % 3, [reservation]);
        }
        payrelay.kill9();
    }
    let _payrelay = pipeline.start();
    let on_topic = || {
        pipeline
            .topic()
            .iter()
            .map(|record| record.value.clone())
            .collect::<BTreeSet<_>>()
            .len()
    };
    wait_until("every event on the topic", LIMIT, || on_topic() == 300);
    let delivered = || {
        pipeline
            .slack
            .lines()
            .iter()
            .map(|message| id_of(message))
            .collect::<BTreeSet<_>>()
            .len()
    };
    wait_until("every payment at Slack", LIMIT, || delivered() == 300);
}

/// 10,000 payments from 16 connections, every tenth for a reservation that is paid already. The
/// topic has 10,000 records, in commit order for each user, and Slack has 10,000 lines, each
/// exactly once.
fn ten_thousand(version: &str) {
    const CLIENTS: i64 = 16;
    const EACH: i64 = 625;
    let broker = Broker::start(version);
    let pipeline = Pipeline::new(broker.bootstrap());
    let payrelay = pipeline.start_with(&[("PAYRELAY_KAFKA_PARTITIONS", "3")]);
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
    pipeline.wait_for_messages(10_000);
    println!(
        "{version}: 10000 payments accepted in {accepted:.1?}, delivered to Slack after {:.1?}",
        started.elapsed()
    );
    assert_eq!(failed, 992);
    pipeline.assert_published_once(10_000);
    pipeline.assert_delivered_once(10_000);
    let delivered_failed = pipeline
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

/// One node changes its format and compression at each start. Its own consumer and audit read all
/// of it, and each value follows the schema.
#[test]
fn payments_as_json_are_read_by_any_application_in_each_compression() {
    let broker = Broker::start("4.4.0");
    let pipeline = Pipeline::new(broker.bootstrap());
    let schema: Value = serde_json::from_str(PAYMENT_SCHEMA).unwrap();
    let validator = jsonschema::validator_for(&schema).unwrap();
    let starts = [
        ("json", "none"),
        ("id", "gzip"),
        ("json", "gzip"),
        ("json", "lz4"),
        ("json", "zstd"),
    ];
    for (count, (format, compression)) in (1..).zip(starts) {
        let env = [
            ("PAYRELAY_KAFKA_FORMAT", format),
            ("PAYRELAY_KAFKA_COMPRESSION", compression),
        ];
        let mut payrelay = pipeline.start_with(&env);
        let mut client = Client::connect(payrelay.addr());
        // The second payment of the reservation fails.
        pay(&mut client, 42, [1001]);
        pay(&mut client, 42, 2000 + 20 * count..2020 + 20 * count);
        let total = 21 * usize::try_from(count).unwrap();
        pipeline.wait_for_messages(total);
        let records = pipeline.topic();
        assert_eq!(records.len(), total);
        for record in &records[total - 21..] {
            if format == "id" {
                assert_eq!(record.header("content-type"), "text/plain");
                continue;
            }
            let content = record.header("content-type");
            let schema_id = record.header("ce_dataschema");
            assert_eq!(
                (content, schema_id),
                ("application/json", PAYMENT_SCHEMA_ID)
            );
            assert_eq!(record.header("ce_partitionkey"), record.key);
            let value: Value = serde_json::from_str(&record.value).unwrap();
            assert!(validator.is_valid(&value), "{value}");
            let stored = client.get(&format!("/payments/{}", value["payment_id"]));
            let stored = stored.json();
            for (field, sent) in value.as_object().unwrap() {
                let name = if field == "payment_id" { "id" } else { field };
                assert_eq!(&stored[name], sent, "{field}: {stored}");
            }
        }
        pipeline.assert_delivered_once(total);
        let bootstrap = pipeline.bootstrap.as_str();
        let kafka = [
            ("PAYRELAY_PUBLISHER_KIND", "kafka"),
            ("PAYRELAY_KAFKA_BOOTSTRAP_SERVERS", bootstrap),
        ];
        let dir = pipeline.dir.path();
        let (code, audit, errors) = run_command(dir, &kafka, &["audit"]);
        assert_eq!(code, Some(0), "{audit}{errors}");
        assert!(payrelay.terminate().success());
    }
}
