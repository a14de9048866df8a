//! The disk is full: refused at once, nothing half stored, and back by itself.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rusqlite::Connection;

use super::power::fail_everywhere;
use super::{Answers, Connecting, LIMIT, NO_RESERVE, kill, load, request, verify};
use testkit::hostile::Machine;
use testkit::process::Payrelay;
use testkit::slack::{Answer, FakeSlack};
use testkit::wait_until;

fn count(log: &str, needle: &str) -> usize {
    log.lines().filter(|line| line.contains(needle)).count()
}

#[test]
fn each_loop_logs_a_database_outage_once_at_its_start_and_once_at_its_end() {
    let machine = Machine::new();
    let env = [
        NO_RESERVE,
        ("PAYRELAY_LOG", "debug"),
        ("PAYRELAY_SCHEDULER_INTERVAL", "1s"),
    ];
    let slack = FakeSlack::start();
    slack.answer_with(|_, _| Answer::Status(500));
    let url = slack.url();
    let env = [
        env.as_slice(),
        &[("PAYRELAY_SLACK_WEBHOOK_URL", url.as_str())],
    ]
    .concat();
    let mut payrelay = Payrelay::start(machine.options(&env));
    let mut client = Connecting::new(payrelay.addr());
    assert_eq!(client.post(&request(1, 1)).unwrap().0, 201);
    payrelay.wait_for_log("Slack unavailable", LIMIT);
    machine.set("full", "0");
    payrelay.wait_for_log("notifier default: database error number 3", 2 * LIMIT);
    machine.clear("full");
    payrelay.wait_for_log("notifier default: the database works again", LIMIT);
    assert_eq!(payrelay.terminate().code(), Some(0), "{}", payrelay.log());
    let log = payrelay.log();
    for name in ["relay", "notifier default", "scheduler", "sampler"] {
        let begun = count(&log, &format!(" {name}: database error, retrying"));
        let over = count(&log, &format!(" {name}: the database works again"));
        assert!(begun <= 1 && over <= begun, "{name}: {log}");
    }
    assert_eq!(
        count(&log, "notifier default: database error, retrying"),
        1,
        "{log}"
    );
}

#[test]
fn a_disk_that_fills_under_load_loses_no_accepted_payment_and_stores_no_refused_one() {
    let machine = Machine::recorded();
    let payrelay = Payrelay::start(machine.options(&[NO_RESERVE]));
    let done = AtomicBool::new(false);
    let answers = thread::scope(|scope| {
        scope.spawn(|| {
            // Sometimes there is space for a part of what is to be written.
            for free in ["0", "1000", "5000", "20000"].iter().cycle() {
                machine.set("full", free);
                thread::park_timeout(Duration::from_millis(30));
                machine.clear("full");
                thread::park_timeout(Duration::from_millis(60));
                if done.load(Ordering::Relaxed) {
                    return;
                }
            }
        });
        let begun = Instant::now();
        let enough = |answers: &Answers| {
            let span = if answers.refused.is_empty() {
                2 * LIMIT
            } else {
                Duration::from_secs(3)
            };
            begun.elapsed() > span
        };
        let answers = load(&machine, payrelay.addr(), 16, enough);
        done.store(true, Ordering::Relaxed);
        answers
    });
    assert_eq!(answers.lost, 0, "{}", payrelay.log());
    let statuses: HashSet<_> = answers.refused.iter().map(|(status, ..)| *status).collect();
    assert_eq!(statuses, HashSet::from([507]), "{}", payrelay.log());
    kill(&machine, payrelay);
    fail_everywhere(&machine, &answers.acknowledged);
    let connection = Connection::open(machine.database()).unwrap();
    verify(&connection, &answers.acknowledged);
    let refused: HashSet<i64> = answers.refused.iter().map(|(_, first, _)| *first).collect();
    let delivered: HashSet<i64> = answers
        .acknowledged
        .iter()
        .map(|payment| payment.id)
        .collect();
    let mut stored = connection
        .prepare("SELECT id, reservation_id FROM payment")
        .unwrap();
    for row in stored
        .query_map([], |row| Ok((row.get::<_, i64>(0)?, row.get::<_, i64>(1)?)))
        .unwrap()
    {
        let (id, reservation) = row.unwrap();
        assert!(
            delivered.contains(&id) || !refused.contains(&reservation),
            "payment {id} was refused, and is there"
        );
    }
}

#[test]
fn payments_are_refused_before_the_disk_is_full_and_stored_ones_continue() {
    let machine = Machine::new();
    let slack = FakeSlack::start();
    slack.answer_with(|_, _| Answer::Status(500));
    machine.set("full", "1000000000");
    let env = [
        ("PAYRELAY_SLACK_WEBHOOK_URL", slack.url()),
        ("PAYRELAY_SLACK_MESSAGES_PER_SECOND", "100".to_owned()),
    ];
    let env = env.each_ref().map(|(name, value)| (*name, value.as_str()));
    let mut payrelay = Payrelay::start(machine.options(&env));
    let mut client = Connecting::new(payrelay.addr());
    for n in 0..20 {
        assert_eq!(client.post(&request(101 + n, 1)).unwrap().0, 201);
    }
    machine.set("full", "100000000");
    payrelay.wait_for_log(
        "disk space low: 95.3 MiB free, below 64.0 payments will be rejected",
        LIMIT,
    );
    assert_eq!(
        client.post(&request(201, 1)).unwrap().0,
        201,
        "a warning refuses nothing"
    );
    machine.set("full", "10000000");
    payrelay.wait_for_log("rejecting payments with 507", LIMIT);
    for n in 0..100 {
        assert_eq!(client.post(&request(301 + n, 1)).unwrap().0, 507);
    }
    let (status, ready) = client.get("/health/ready").unwrap();
    assert_eq!(status, 503);
    assert!(
        ready["components"]["disk"]["error"]
            .as_str()
            .unwrap()
            .contains("database.min_free_bytes"),
        "{ready}"
    );
    slack.answer_with(|_, _| Answer::Ok);
    client.resume_slack();
    wait_until(
        "every payment that was accepted to be delivered",
        LIMIT,
        || slack.lines().len() == 21,
    );
    wait_until("that to be recorded", LIMIT, || {
        client.get("/payments/21").unwrap().1["notification"]["status"] == "DELIVERED"
    });
    machine.clear("full");
    payrelay.wait_for_log("accepting payments again; 100 requests were refused", LIMIT);
    assert_eq!(
        client.post(&request(501, 1)).unwrap().1["payments"][0]["id"],
        22
    );
    let log = payrelay.log();
    for line in [
        "payments will be rejected",
        "rejecting payments with 507",
        "accepting payments again",
    ] {
        assert_eq!(count(&log, line), 1, "{line}: {log}");
    }
    assert_eq!(payrelay.terminate().code(), Some(0));
}

/// Another error than that of a full disk, and one that could be anything.
#[test]
fn an_exhausted_quota_is_503_and_ends_no_thread() {
    let machine = Machine::new();
    let mut payrelay = Payrelay::start(machine.options(&[NO_RESERVE]));
    let mut client = Connecting::new(payrelay.addr());
    machine.set("quota", "0");
    for n in 0..20 {
        assert_eq!(client.post(&request(101 + n, 1)).unwrap().0, 503);
    }
    machine.clear("quota");
    assert_eq!(
        client.post(&request(1001, 1)).unwrap().1["payments"][0]["id"],
        1
    );
    assert_eq!(payrelay.terminate().code(), Some(0), "{}", payrelay.log());
}

/// The WAL is long enough for a checkpoint, and the disk has no space for it.
#[test]
fn a_disk_full_during_a_checkpoint_loses_no_payment() {
    let machine = Machine::new();
    let mut payrelay = Payrelay::start(machine.options(&[NO_RESERVE]));
    let before = load(&machine, payrelay.addr(), 8, |answers| {
        answers.count() > 1500
    });
    machine.set("full", "0");
    let full = load(&machine, payrelay.addr(), 8, |answers| {
        answers.count() > 200
    });
    assert!(full.acknowledged.is_empty() && full.lost == 0);
    // Its last connection copies the log back, or leaves it to the next start.
    assert_eq!(payrelay.terminate().code(), Some(0), "{}", payrelay.log());
    machine.clear("full");
    let mut payrelay = Payrelay::start(machine.options(&[NO_RESERVE]));
    assert_eq!(payrelay.terminate().code(), Some(0), "{}", payrelay.log());
    verify(
        &Connection::open(machine.database()).unwrap(),
        &before.acknowledged,
    );
}
