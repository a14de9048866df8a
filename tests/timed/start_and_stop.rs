//! How long a start and a stop may take, also when Kafka, Slack or the reader of the log hangs.

use std::time::{Duration, Instant};

use testkit::http::{Client, pay};
use testkit::kafka::Broker;
use testkit::pipeline::{Pipeline, SILENT, outages};
use testkit::process::{Options, Payrelay};
use testkit::slack::{Answer, FakeSlack};
use testkit::timed::alone;
use testkit::{wait_for, wait_until};

const LIMIT: Duration = Duration::from_mins(1);

#[test]
fn a_slack_that_hangs_does_not_delay_the_stop_beyond_its_limit() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let slack = FakeSlack::start();
    slack.answer_with(|_, _| Answer::Hang);
    let url = slack.url();
    let env = [("PAYRELAY_SLACK_WEBHOOK_URL", url.as_str())];
    let mut payrelay = Payrelay::start(Options::new(dir.path(), &env));
    pay(&mut Client::connect(payrelay.addr()), 1, [1]);
    wait_until("the POST that hangs", LIMIT, || slack.attempts() >= 1);
    let asked = Instant::now();
    assert_eq!(payrelay.terminate().code(), Some(0), "{}", payrelay.log());
    assert!(asked.elapsed() < Duration::from_secs(10));
}

#[test]
fn an_unread_log_delays_neither_payments_nor_the_stop() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    // Each payment has a line in the log.
    let env = [("PAYRELAY_SLACK_SINK", "log")];
    let mut payrelay = Payrelay::start(Options::new(dir.path(), &env));
    let mut client = Client::connect(payrelay.addr());
    payrelay.block_log();
    // Lines of some 130 bytes: more than the pipe and the queue hold.
    for request in 0..12 {
        pay(&mut client, 1, request * 1000..(request + 1) * 1000);
    }
    wait_until(
        "every payment to be delivered",
        Duration::from_mins(1),
        || client.get("/payments/12000").json()["notification"]["status"] == "DELIVERED",
    );
    assert_eq!(client.get("/health/ready").json()["status"], "ready");
    let asked = Instant::now();
    assert_eq!(payrelay.terminate().code(), Some(0));
    assert!(
        asked.elapsed() < Duration::from_secs(10),
        "{:?}",
        asked.elapsed()
    );
}

#[test]
fn a_second_sigint_ends_the_process_at_once() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let slack = FakeSlack::start();
    slack.answer_with(|_, _| Answer::Hang);
    let env = [
        ("PAYRELAY_SLACK_WEBHOOK_URL", slack.url()),
        ("PAYRELAY_SLACK_TIMEOUT", "8s".to_owned()),
    ];
    let env = env.each_ref().map(|(name, value)| (*name, value.as_str()));
    let mut payrelay = Payrelay::start(Options::new(dir.path(), &env));
    pay(&mut Client::connect(payrelay.addr()), 1, [1]);
    wait_until("the POST that hangs", LIMIT, || slack.attempts() >= 1);
    payrelay.signal("INT");
    payrelay.wait_for_log("stopping: SIGINT", LIMIT);
    let asked = Instant::now();
    payrelay.signal("INT");
    let status = wait_for("the end", LIMIT, || payrelay.try_exit());
    assert_eq!(status.code(), Some(71));
    assert!(
        asked.elapsed() < Duration::from_secs(4),
        "{:?}",
        asked.elapsed()
    );
}

#[test]
fn a_kafka_that_hangs_does_not_delay_the_stop_beyond_its_limit() {
    let _alone = alone();
    let (broker, mut proxy) = Broker::start_behind_proxy("4.4.0");
    let pipeline = Pipeline::new(broker.bootstrap());
    let mut payrelay = pipeline.start();
    let mut client = Client::connect(payrelay.addr());
    pay(&mut client, 1, 1..=10);
    pipeline.wait_for_messages(10);
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
fn a_restarted_node_continues_within_two_seconds() {
    let _alone = alone();
    let broker = Broker::start("4.4.0");
    let pipeline = Pipeline::new(broker.bootstrap());
    let mut total = 0;
    // A first start does all that a later one does, and makes the topic and the group.
    let mut first_start = None;
    for _ in 0..3 {
        let mut payrelay = pipeline.start();
        let mut client = Client::connect(payrelay.addr());
        let started = Instant::now();
        total += 50;
        pay(&mut client, 1, total - 49..=total);
        let delivered = usize::try_from(total).unwrap();
        pipeline.wait_for_messages(delivered - 49);
        let accepted = started.elapsed();
        let limit = *first_start.get_or_insert(accepted) + Duration::from_secs(2);
        assert!(
            accepted < limit,
            "the first record came after {accepted:?}, and may take {limit:?}"
        );
        pipeline.wait_for_messages(delivered);
        // Not while the last answer is being recorded: that one message could show twice.
        wait_until("the delivery to be recorded", LIMIT, || {
            client.get(&format!("/payments/{delivered}")).json()["notification"]["status"]
                == "DELIVERED"
        });
        payrelay.kill9();
    }
    pipeline.assert_delivered_once(150);
    pipeline.assert_published_once(150);
}
