//! No more threads, little memory: a refusal at the start, and no half-dead process later.

use std::time::Duration;

use super::{Connecting, LIMIT, for_at_least, load, request};
use testkit::hostile::Machine;
use testkit::kafka::Broker;
use testkit::process::{Payrelay, run_to_exit};
use testkit::slack::{Answer, FakeSlack};
use testkit::wait_until;

#[test]
fn a_machine_without_capacity_for_threads_is_reported_at_the_start() {
    let machine = Machine::new();
    for threads in [1, 2, 3, 8, 12, 14] {
        machine.set("threads", &threads.to_string());
        let output = run_to_exit(machine.options(&[]));
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(
            error.contains("the operating system starts no further thread"),
            "{threads}: {error}"
        );
        assert!(!error.contains("panic"), "{threads}: {error}");
        assert_eq!(output.status.code(), Some(75), "{threads}: {error}");
    }
    machine.set("threads", "40");
    let mut payrelay = Payrelay::start(machine.options(&[]));
    assert_eq!(
        Connecting::new(payrelay.addr())
            .post(&request(1, 1))
            .unwrap()
            .0,
        201
    );
    assert_eq!(payrelay.terminate().code(), Some(0), "{}", payrelay.log());
}

#[test]
fn a_running_payrelay_starts_no_further_thread() {
    let machine = Machine::new();
    let mut slack = FakeSlack::start();
    let (broker, mut proxy) = Broker::start_behind_proxy("4.4.0");
    let env = [
        ("PAYRELAY_PUBLISHER_KIND", "kafka"),
        // A name, so that it has to be resolved.
        (
            "PAYRELAY_KAFKA_BOOTSTRAP_SERVERS",
            &broker.bootstrap().replace("127.0.0.1", "localhost"),
        ),
        (
            "PAYRELAY_SLACK_WEBHOOK_URL",
            &slack.url().replace("127.0.0.1", "localhost"),
        ),
        ("PAYRELAY_SLACK_MESSAGES_PER_SECOND", "1000"),
        ("PAYRELAY_SLACK_SUMMARY_OVER", "0"),
        ("PAYRELAY_SCHEDULER_INTERVAL", "20ms"),
        ("PAYRELAY_SCHEDULER_RETENTION", "1ms"),
    ];
    let mut payrelay = Payrelay::start(machine.options(&env));
    machine.set("threads", "0");
    let answers = load(
        &machine,
        payrelay.addr(),
        32,
        for_at_least(Duration::from_secs(2)),
    );
    assert!(
        answers.refused.is_empty() && answers.lost == 0,
        "{}",
        payrelay.log()
    );
    // Slack and Kafka stop and restart: connections are made again.
    slack.stop();
    let more = load(
        &machine,
        payrelay.addr(),
        4,
        for_at_least(Duration::from_millis(300)),
    );
    payrelay.wait_for_log("Slack unavailable", LIMIT);
    proxy.cut();
    let more_yet = load(
        &machine,
        payrelay.addr(),
        4,
        for_at_least(Duration::from_millis(300)),
    );
    payrelay.wait_for_log("Kafka (publisher) unavailable", LIMIT);
    proxy.heal();
    slack.answer_with(|_, _| Answer::Ok);
    slack.start_again();
    let delivered = [&answers, &more, &more_yet]
        .iter()
        .map(|answers| answers.acknowledged.len())
        .sum();
    wait_until("every payment to be delivered", LIMIT * 2, || {
        slack.lines().len() >= delivered
    });
    assert_eq!(payrelay.terminate().code(), Some(0), "{}", payrelay.log());
    assert!(!payrelay.log().contains("panic"), "{}", payrelay.log());
}
