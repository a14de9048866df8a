//! Five thousand payments in the time that Slack's limits allow.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use testkit::http::{Client, pay};
use testkit::process::{Options, Payrelay};
use testkit::slack::{Answer, FakeSlack};
use testkit::timed::alone;
use testkit::wait_until;

const COUNT: i64 = 5000;
const USERS: i64 = 50;

/// A Slack that accepts twenty messages a second, and fails a fifth of them.
struct LimitedSlack {
    slack: FakeSlack,
    /// Messages beyond the limit.
    limited: Arc<AtomicUsize>,
    /// Messages whose answer was lost.
    lost: Arc<Mutex<Vec<String>>>,
}

impl LimitedSlack {
    fn start() -> Self {
        let slack = FakeSlack::start();
        let limited = Arc::new(AtomicUsize::new(0));
        let lost = Arc::new(Mutex::new(Vec::new()));
        let limiting = Arc::clone(&limited);
        let losing = Arc::clone(&lost);
        let window = Mutex::new((Instant::now(), 0));
        slack.answer_with(move |nth, text| {
            let mut window = window.lock().unwrap();
            if window.0.elapsed() > Duration::from_secs(1) {
                *window = (Instant::now(), 0);
            }
            window.1 += 1;
            // A burst may fall into one second with the steady rate.
            if window.1 > 25 {
                limiting.fetch_add(1, Ordering::Relaxed);
                return Answer::StatusWith(429, vec![("Retry-After".into(), "1".into())]);
            }
            match nth % 10 {
                3 => Answer::Status(500),
                7 => {
                    losing.lock().unwrap().push(text.to_owned());
                    Answer::CloseAfterRead
                }
                _ => Answer::Ok,
            }
        });
        Self {
            slack,
            limited,
            lost,
        }
    }

    /// All payments are shown once; every tenth failed.
    fn assert_each_is_shown_once(&self) {
        let lines = self.slack.lines();
        let ids: BTreeSet<_> = lines.iter().map(|line| id_of(line)).collect();
        assert_eq!(ids, (1..=COUNT).collect(), "every payment is delivered");
        assert_eq!(
            lines.len(),
            ids.len(),
            "what was lost here was never shown, so nothing shows twice"
        );
        assert!(!self.lost.lock().unwrap().is_empty());
        assert_eq!(
            self.limited.load(Ordering::Relaxed),
            0,
            "payrelay keeps the pace by itself"
        );
        let failed = lines.iter().filter(|line| line.contains(" FAILED: "));
        assert_eq!(failed.count(), 500);
    }

    fn assert_order_of_each_user(&self) {
        let lines = self.slack.lines();
        let mut newest: BTreeMap<&str, i64> = BTreeMap::new();
        for line in &lines {
            let rest = line.split("user ").nth(1).unwrap();
            let user = rest.split([' ', ',']).next().unwrap();
            let id = id_of(line);
            let before = newest.insert(user, id).unwrap_or(0);
            assert!(before < id, "user {user}: {before} before {id}");
        }
    }
}

fn id_of(line: &str) -> i64 {
    line.split(' ').nth(1).unwrap().parse().unwrap()
}

/// 500 payments a second; every tenth for a reservation that is paid already.
fn pay_all(payrelay: &Payrelay) {
    let mut client = Client::connect(payrelay.addr());
    let started = Instant::now();
    for id in 0..COUNT {
        let reservation = if id % 10 == 9 { id - 1 } else { id };
        pay(&mut client, reservation % USERS, [reservation]);
        let due = started + Duration::from_millis(2) * u32::try_from(id).unwrap();
        thread::park_timeout(due.saturating_duration_since(Instant::now()));
    }
}

/// Every payment is delivered once, in order for each user, and in the time that the limits allow.
#[test]
fn five_thousand_payments_reach_a_limited_and_failing_slack_within_30_s() {
    let _alone = alone();
    let limited = LimitedSlack::start();
    let dir = tempfile::tempdir().unwrap();
    let url = limited.slack.url();
    let env = [
        ("PAYRELAY_SLACK_WEBHOOK_URL", url.as_str()),
        ("PAYRELAY_SLACK_MESSAGES_PER_SECOND", "20"),
    ];
    let payrelay = Payrelay::start(Options::new(dir.path(), &env));
    let started = Instant::now();
    pay_all(&payrelay);
    let paid = started.elapsed();
    // At twenty messages a second, a digest for each second of payments, and the backoff of a few
    // failures in a row.
    wait_until("every payment", Duration::from_secs(30), || {
        limited.slack.lines().len() >= usize::try_from(COUNT).unwrap()
    });
    println!(
        "5,000 payments posted in {paid:.1?}, delivered after {:.1?} in {} messages",
        started.elapsed(),
        limited.slack.count()
    );
    limited.assert_each_is_shown_once();
    limited.assert_order_of_each_user();
}
