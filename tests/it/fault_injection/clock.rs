//! The clock jumps, both ways, while payments come: their order and their fate do not hang on it.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use rusqlite::Connection;
use serde_json::Value;

use super::{Connecting, LIMIT, for_at_least, load, number, request, verify};
use testkit::hostile::Machine;
use testkit::process::Payrelay;
use testkit::slack::{Answer, FakeSlack};
use testkit::wait_until;

const DAY: i64 = 86_400;

#[test]
fn a_clock_jump_loses_and_doubles_nothing_and_stops_no_thread() {
    let machine = Machine::new();
    let slack = FakeSlack::start();
    let env = [
        ("PAYRELAY_SLACK_WEBHOOK_URL", slack.url()),
        ("PAYRELAY_SLACK_MESSAGES_PER_SECOND", "1000".to_owned()),
        ("PAYRELAY_SLACK_SUMMARY_OVER", "0".to_owned()),
        ("PAYRELAY_SCHEDULER_INTERVAL", "50ms".to_owned()),
    ];
    let env = env.each_ref().map(|(name, value)| (*name, value.as_str()));
    let mut payrelay = Payrelay::start(machine.options(&env));
    let done = AtomicBool::new(false);
    let answers = thread::scope(|scope| {
        scope.spawn(|| {
            // By a day and back, by ten years and back, to before any client paid.
            for seconds in [DAY, -DAY, 3650 * DAY, 0, -3650 * DAY, 60].iter().cycle() {
                machine.set("clock", &seconds.to_string());
                thread::park_timeout(Duration::from_millis(250));
                if done.load(Ordering::Relaxed) {
                    return;
                }
            }
        });
        let answers = load(
            &machine,
            payrelay.addr(),
            8,
            for_at_least(Duration::from_secs(4)),
        );
        done.store(true, Ordering::Relaxed);
        answers
    });
    assert!(
        answers.refused.is_empty() && answers.lost == 0,
        "{:?}\n{}",
        answers.refused,
        payrelay.log()
    );
    machine.set("clock", "0");
    let delivered = answers.acknowledged.len();
    wait_until("every payment to be delivered", LIMIT * 2, || {
        slack.lines().len() >= delivered
    });
    let ids: Vec<i64> = slack.lines().iter().map(|line| id_of(line)).collect();
    assert!(
        ids.is_sorted()
            && ids.iter().collect::<HashSet<_>>().len() == delivered
            && ids.len() == delivered,
        "once and in order"
    );
    assert_eq!(payrelay.terminate().code(), Some(0), "{}", payrelay.log());
    let connection = Connection::open(machine.database()).unwrap();
    // Those that were delivered ten years ago by the clock of that moment are purged: they are
    // finished.
    let purged = number(
        &connection,
        "SELECT count(*) FROM payment WHERE id NOT IN (SELECT payment_id FROM outbox)",
    );
    assert_eq!(
        number(&connection, "SELECT count(*) FROM payment"),
        i64::try_from(delivered).unwrap()
    );
    eprintln!("{delivered} payments, {purged} of them purged");
    let unfinished = "SELECT count(*) FROM outbox o LEFT JOIN delivery d ON d.outbox_id = o.id \
                      WHERE o.status <> 'PUBLISHED' OR d.status <> 'DELIVERED'";
    assert_eq!(number(&connection, unfinished), 0);
}

/// "Payment 7 COMPLETED: ..."
fn id_of(line: &str) -> i64 {
    line.split(' ').nth(1).unwrap().parse().unwrap()
}

#[test]
fn a_clock_years_ahead_purges_no_unfinished_event() {
    let machine = Machine::new();
    let slack = FakeSlack::start();
    slack.answer_with(|_, _| Answer::Status(500));
    let env = [
        ("PAYRELAY_SLACK_WEBHOOK_URL", slack.url()),
        ("PAYRELAY_SCHEDULER_INTERVAL", "20ms".to_owned()),
    ];
    let env = env.each_ref().map(|(name, value)| (*name, value.as_str()));
    let mut payrelay = Payrelay::start(machine.options(&env));
    let mut client = Connecting::new(payrelay.addr());
    let paid = client.post(&request(101, 3)).unwrap().1["payments"].clone();
    wait_until("a try", LIMIT, || slack.attempts() > 0);
    let shown = |client: &mut Connecting| -> Vec<Value> {
        (1..=3)
            .map(|id| client.get(&format!("/payments/{id}")).unwrap().1)
            .collect()
    };
    let rounds = || payrelay.log().matches("summary:").count();
    for seconds in [3650 * DAY, -3650 * DAY] {
        machine.set("clock", &seconds.to_string());
        let before = rounds();
        wait_until("rounds of the scheduler by the other clock", LIMIT, || {
            rounds() >= before + 5
        });
        for (stored, now) in paid.as_array().unwrap().iter().zip(shown(&mut client)) {
            assert_eq!(
                stored["executed_at"], now["executed_at"],
                "times are shown as they were stored"
            );
            assert_eq!(now["event"]["status"], "PUBLISHED", "{now}");
        }
        let later = client
            .post(&request(201 + seconds.abs() + seconds.signum(), 1))
            .unwrap();
        assert_eq!(later.0, 201, "{later:?}");
    }
    machine.set("clock", "0");
    slack.answer_with(|_, _| Answer::Ok);
    client.resume_slack();
    wait_until("all to be delivered, in order", LIMIT * 2, || {
        slack
            .lines()
            .iter()
            .map(|line| id_of(line))
            .collect::<Vec<_>>()
            == [1, 2, 3, 4, 5]
    });
    assert_eq!(payrelay.terminate().code(), Some(0), "{}", payrelay.log());
    verify_times(&Connection::open(machine.database()).unwrap());
}

/// Nothing that was stored is nonsense: what happened first has the smaller id, whatever its time.
fn verify_times(connection: &Connection) {
    verify(connection, &[]);
    assert_eq!(
        number(
            connection,
            "SELECT count(*) FROM delivery WHERE delivered_at IS NULL"
        ),
        0
    );
}
