//! The environment is never an event's fault. Clocks, the topic's settings and missing rights make
//! Kafka unavailable, and the events wait in order. The log says within ten seconds what to do.

use std::time::Duration;

use serde_json::{Value, json};

use testkit::hostile::Machine;
use testkit::http::{self, Client};
use testkit::kafka::Broker;
use testkit::listen::free_port;
use testkit::process::{Options, Payrelay, run_to_exit};
use testkit::slack::FakeSlack;
use testkit::timed::alone;
use testkit::{topic, wait_until};

const LIMIT: Duration = Duration::from_secs(30);

/// How soon a problem is named.
const NAMED: Duration = Duration::from_secs(10);

const TOPIC: &str = "payment-event";

struct Scene {
    machine: Machine,
    broker: Broker,
    slack: FakeSlack,
}

impl Scene {
    fn new(broker: Broker) -> Self {
        Self {
            machine: Machine::new(),
            broker,
            slack: FakeSlack::start(),
        }
    }

    fn start(&self) -> Payrelay {
        Payrelay::start(self.options(&self.broker.bootstrap()))
    }

    fn options(&self, bootstrap: &str) -> Options {
        let env = [
            ("PAYRELAY_PUBLISHER_KIND", "kafka"),
            ("PAYRELAY_KAFKA_BOOTSTRAP_SERVERS", bootstrap),
            ("PAYRELAY_SLACK_WEBHOOK_URL", &self.slack.url()),
            ("PAYRELAY_SLACK_MESSAGES_PER_SECOND", "1000"),
        ];
        self.machine.options(&env)
    }

    fn wait_for_payments(&self, count: usize) {
        wait_until(&format!("{count} payments at Slack"), LIMIT, || {
            self.slack.lines().len() == count
        });
        let ids: Vec<i64> = self
            .slack
            .lines()
            .iter()
            .map(|line| line.split(' ').nth(1).unwrap().parse().unwrap())
            .collect();
        assert!(ids.is_sorted(), "{ids:?}");
    }
}

fn pay(payrelay: &Payrelay, reservations: impl IntoIterator<Item = i64>) {
    http::pay(&mut Client::connect(payrelay.addr()), 1, reservations);
}

fn get(payrelay: &Payrelay, path: &str) -> Value {
    Client::connect(payrelay.addr()).get(path).json()
}

const DAY: i64 = 86_400;

#[test]
fn a_wrong_clock_loses_no_event_on_a_topic_of_ours() {
    let _alone = alone();
    for shift in [2 * DAY, 7200, -2 * DAY] {
        let scene = Scene::new(Broker::start("4.4.0"));
        scene.machine.set("clock", &shift.to_string());
        let payrelay = scene.start();
        pay(&payrelay, 1..=5);
        scene.wait_for_payments(5);
        scene.machine.set("clock", "0");
        pay(&payrelay, 6..=8);
        scene.wait_for_payments(8);
        assert_eq!(
            get(&payrelay, "/admin/dead-letters")["dead_letters"],
            json!([]),
            "{shift}"
        );
    }
}

#[test]
fn events_wait_while_the_topic_rejects_this_machines_clock() {
    let _alone = alone();
    let scene = Scene::new(Broker::start("4.4.0"));
    topic::create(
        &scene.broker.bootstrap(),
        TOPIC,
        &[("message.timestamp.type", "CreateTime")],
    );
    scene.machine.set("clock", &(2 * DAY).to_string());
    let payrelay = scene.start();
    pay(&payrelay, 1..=5);
    payrelay.wait_for_log("this machine's clock is ahead of the broker's", NAMED);
    assert_eq!(
        get(&payrelay, "/health/ready")["components"]["publisher"]["state"],
        "unavailable"
    );
    pay(&payrelay, 6..=7);
    scene.machine.set("clock", "0");
    scene.wait_for_payments(7);
    assert_eq!(
        get(&payrelay, "/admin/dead-letters")["dead_letters"],
        json!([])
    );
}

#[test]
fn an_outage_longer_than_the_topics_timestamp_limit_loses_no_event() {
    let _alone = alone();
    let mut scene = Scene::new(Broker::start("4.4.0"));
    let settings = [
        ("message.timestamp.type", "CreateTime"),
        ("message.timestamp.before.max.ms", "5000"),
    ];
    topic::create(&scene.broker.bootstrap(), TOPIC, &settings);
    let payrelay = scene.start();
    pay(&payrelay, [1]);
    scene.wait_for_payments(1);
    scene.broker.kill();
    pay(&payrelay, 2..=6);
    // Older than the topic takes, by the clock of this machine.
    wait_until("the events to be old", LIMIT, || {
        get(&payrelay, "/health/ready")["pending"]["unpublished"]["oldest_age_s"].as_u64() > Some(6)
    });
    scene.broker.restart();
    scene.wait_for_payments(6);
    assert_eq!(
        get(&payrelay, "/admin/dead-letters")["dead_letters"],
        json!([])
    );
}

#[test]
fn the_log_and_health_name_topic_settings_that_lose_records() {
    let _alone = alone();
    let scene = Scene::new(Broker::start("4.4.0"));
    let settings = [
        ("cleanup.policy", "compact"),
        ("message.timestamp.type", "CreateTime"),
        ("retention.ms", "600000"),
    ];
    topic::create(&scene.broker.bootstrap(), TOPIC, &settings);
    let payrelay = scene.start();
    pay(&payrelay, [1]);
    payrelay.wait_for_log("--add-config cleanup.policy=delete", NAMED);
    payrelay.wait_for_log("--add-config message.timestamp.type=LogAppendTime", NAMED);
    scene.wait_for_payments(1);
    let ready = get(&payrelay, "/health/ready");
    assert_eq!(
        (
            &ready["status"],
            ready["warnings"].as_array().unwrap().len()
        ),
        (&json!("ready"), 2),
        "{ready}"
    );
}

#[test]
fn the_log_names_a_wrong_advertised_address_within_10_s() {
    let _alone = alone();
    // The system accepts its connections, and no thread answers.
    let listener = free_port();
    let silent = listener.local_addr().unwrap().to_string();
    for advertised in ["127.0.0.1:1", "kafka.invalid:9092", &silent] {
        let scene = Scene::new(Broker::start_advertising("4.4.0", advertised));
        let listens = scene.broker.listens();
        topic::create(&scene.broker.bootstrap_inside(), TOPIC, &[]);
        let payrelay = Payrelay::start(scene.options(&listens));
        pay(&payrelay, [1]);
        let named = |part: &str| {
            let named = |line: &str| {
                [part, advertised, "advertised.listeners"]
                    .iter()
                    .all(|word| line.contains(word))
            };
            payrelay.log().lines().any(named)
        };
        for part in ["Kafka (publisher)", "Kafka (consumer)"] {
            wait_until(
                &format!("{advertised} in the log of the {part}"),
                NAMED,
                || named(part),
            );
        }
        let audit = Options {
            args: vec!["audit".to_owned()],
            ..scene.options(&listens)
        };
        let audit = run_to_exit(audit);
        let said = String::from_utf8_lossy(&audit.stderr);
        assert_eq!(audit.status.code(), Some(75), "{said}");
        assert!(said.contains(advertised), "{said}");
        let error = get(&payrelay, "/health/ready")["components"]["publisher"]["error"].to_string();
        assert!(error.contains(advertised), "{error}");
    }
}

#[test]
fn forgotten_connections_delay_an_event_by_10_s_at_most() {
    let _alone = alone();
    let (broker, mut proxy) = Broker::start_behind_proxy("4.4.0");
    let scene = Scene::new(broker);
    let payrelay = scene.start();
    pay(&payrelay, [1]);
    scene.wait_for_payments(1);
    let unavailable = "Kafka (publisher) unavailable";
    let available = "Kafka (publisher) available again";
    for id in 2..=7 {
        let before = payrelay.count_in_log(unavailable);
        proxy.hold();
        if id % 2 == 0 {
            // No payment is needed to find that nothing is answered, nor to recover.
            let recovered = payrelay.count_in_log(available);
            payrelay.wait_for_another(unavailable, before, NAMED);
            payrelay.wait_for_another(available, recovered, NAMED);
        }
        pay(&payrelay, [id]);
        wait_until(&format!("event {id} to be published"), NAMED, || {
            get(&payrelay, &format!("/payments/{id}"))["event"]["status"] == "PUBLISHED"
        });
        scene.wait_for_payments(usize::try_from(id).unwrap());
    }
    assert_eq!(
        topic::read(&scene.broker.bootstrap_inside(), TOPIC, LIMIT).len(),
        7,
        "each once"
    );
}
