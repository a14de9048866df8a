//! Faults of Slack.

use std::time::Duration;

use testkit::process::{Options, Payrelay, run_command};
use testkit::scrape::Scrape;
use testkit::slack::{Answer, FakeSlack};

use super::{FAULT, check, healthy, is_idle, pay, shift_times};

/// A payrelay that has notified Slack of one payment.
fn start(slack: &FakeSlack, folder: &tempfile::TempDir) -> Payrelay {
    let url = slack.url();
    let env = [
        ("PAYRELAY_SLACK_WEBHOOK_URL", &*url),
        ("PAYRELAY_SLACK_MESSAGES_PER_SECOND", "100"),
    ];
    let payrelay = Payrelay::start(Options::new(folder.path(), &env));
    pay(&payrelay, 1);
    payrelay
}

#[test]
fn a_slack_that_fails_for_long_is_an_alert() {
    let slack = FakeSlack::start();
    let folder = tempfile::tempdir().unwrap();
    let payrelay = start(&slack, &folder);
    let history = healthy(&payrelay);
    slack.answer_with(|_, _| Answer::Status(500));
    pay(&payrelay, 2);
    let waiting = "payrelay_delivery_pending_payments{channel=\"default\"}";
    Scrape::until(payrelay.addr(), "a payment that waits", |scrape| {
        scrape.value(waiting) > 0.5
    });
    let sql = "UPDATE outbox SET created_at = created_at - 1200000000 WHERE id = 2";
    shift_times("PayrelaySlackLate", &folder.path().join("payrelay.db"), sql);
    let age = "payrelay_delivery_oldest_pending_age_seconds{channel=\"default\"}";
    let first = Scrape::until(payrelay.addr(), "an old payment", |scrape| {
        scrape.value(age) > 900.0
    });
    let before = first.value(age);
    let last = Scrape::until(payrelay.addr(), "an older payment", |scrape| {
        scrape.value(age) > before + 1.0
    });
    let late = "PayrelaySlackLate{channel=\"default\"}";
    let history = history
        .then(FAULT, first, last)
        .fires(Duration::from_mins(4), &[])
        .fires(Duration::from_mins(6), &[late])
        .fires(Duration::from_mins(119), &[late]);
    check(&history);
}

#[test]
fn a_closed_channel_is_an_alert() {
    let slack = FakeSlack::start();
    let folder = tempfile::tempdir().unwrap();
    let payrelay = start(&slack, &folder);
    let history = healthy(&payrelay);
    slack.answer_with(|_, _| Answer::Word(410, "channel_is_archived"));
    pay(&payrelay, 2);
    let paused = "payrelay_channel_state{channel=\"default\",state=\"paused\"}";
    let first = Scrape::until(payrelay.addr(), "a paused channel", |scrape| {
        scrape.value(paused) > 0.5
    });
    let age = "payrelay_delivery_oldest_pending_age_seconds{channel=\"default\"}";
    let before = first.value(age);
    let last = Scrape::until(payrelay.addr(), "an older payment", |scrape| {
        scrape.value(age) > before + 1.0
    });
    let channel_paused = "PayrelayChannelPaused{channel=\"default\",state=\"paused\"}";
    let history = history
        .then(FAULT, first, last)
        .fires(Duration::from_secs(45), &[])
        .fires(Duration::from_secs(75), &[channel_paused])
        // It is late as well by then.
        .fires(
            Duration::from_mins(21),
            &[channel_paused, "PayrelaySlackLate{channel=\"default\"}"],
        );
    check(&history);
}

#[test]
fn a_dead_letter_is_an_alert() {
    let slack = FakeSlack::start();
    let folder = tempfile::tempdir().unwrap();
    let payrelay = start(&slack, &folder);
    let history = healthy(&payrelay);
    slack.answer_with(|_, text| {
        if text.contains("reservation 13") {
            Answer::Word(400, "invalid_payload")
        } else {
            Answer::Ok
        }
    });
    pay(&payrelay, 13);
    let paused = "payrelay_channel_state{channel=\"default\",state=\"paused\"}";
    Scrape::until(payrelay.addr(), "a paused channel", |scrape| {
        scrape.value(paused) > 0.5
    });
    let skip = ["channels", "skip", "default", "--reason", "a test"];
    let (code, _, error) = run_command(folder.path(), &[], &skip);
    assert_eq!(code, Some(0), "{error}");
    let open = "payrelay_dead_letters_open{kind=\"delivery\"}";
    Scrape::until(payrelay.addr(), "a dead letter", |scrape| {
        scrape.value(open) > 0.5
    });
    let resume = ["channels", "resume", "default"];
    let (code, _, error) = run_command(folder.path(), &[], &resume);
    assert_eq!(code, Some(0), "{error}");
    pay(&payrelay, 14);
    let last = Scrape::until(payrelay.addr(), "nothing that waits", |scrape| {
        is_idle(scrape) && scrape.value(paused) < 0.5
    });
    let history = history
        .then(FAULT, last.clone(), last)
        .fires(Duration::from_mins(9), &[])
        .fires(Duration::from_mins(11), &["PayrelayDeadLetters"]);
    check(&history);
}
