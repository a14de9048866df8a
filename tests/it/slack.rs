//! Whatever Slack answers. The notifier runs step by step by a clock of the test's, and the real
//! binary with channels, digests and dead letters.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufReader, Write as _};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use payrelay::config::{self, Config, DEFAULT_CHANNEL, Secret};
use payrelay::domain::timestamp::Timestamp;
use payrelay::runtime::health::{HealthHandle, HealthLevel};
use payrelay::runtime::metrics::Metrics;
use payrelay::runtime::resume::ResumeHandle;
use payrelay::runtime::worker::Waker;
use payrelay::slack::channel::{Sink, SlackChannel};
use payrelay::slack::message::MessageStyle;
use payrelay::slack::notifier::{self, Notifier, Step};
use payrelay::slack::webhook::Webhook;
use payrelay::store::dead_letter::{DeadLetterFilter, DeadRecord};
use payrelay::store::dead_letter_action::{self, DeadLetterAction, DeadLetterRequest, Selection};
use payrelay::store::delivery::{Carrier, DeliveryStatus};
use payrelay::store::timeline;
use payrelay::store::{Transaction, dead_letter, delivery};
use proptest::prelude::*;
use rustls::ServerConfig;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use serde_json::{Value, json};

use testkit::http::{Client, Response, read_head};
use testkit::listen::{Server, free_port};
use testkit::process::{Options, Payrelay, origin_with_sudo, run_command, run_to_exit};
use testkit::random::proptest_config;
use testkit::slack::{Answer, FakeSlack};
use testkit::store::Database;
use testkit::{wait_for, wait_until};

const LIMIT: Duration = Duration::from_mins(1);
const PROBE: Duration = Duration::from_mins(5);

/// A notifier on a clock that only the test moves.
struct NotifierFixture {
    notifier: Notifier,
    clock: Arc<AtomicU64>,
    part: HealthHandle,
    resume: ResumeHandle,
    metrics: Metrics,
}

impl NotifierFixture {
    fn new(
        database: &Database,
        slack: Option<&FakeSlack>,
        change: impl FnOnce(&mut Config, &mut usize),
    ) -> Self {
        Self::at(database, slack.map(FakeSlack::url), change)
    }

    fn at(
        database: &Database,
        url: Option<String>,
        change: impl FnOnce(&mut Config, &mut usize),
    ) -> Self {
        let mut config = Config::load("", &BTreeMap::new()).unwrap().config;
        // Each payment alone and at once, unless the test is about something else.
        config.slack.messages_per_second = 100_000.0;
        // Longer than any machine takes to answer.
        config.slack.timeout = Duration::from_secs(20);
        // What each test asks for; a summary has no lines.
        config.slack.summary_over = 0;
        let mut digest_over = usize::MAX >> 1;
        change(&mut config, &mut digest_over);
        let channel = default_channel(url, &config.slack, digest_over);
        let (waker, woken) = Waker::new();
        let part = HealthHandle::up();
        let resume = ResumeHandle::new(waker);
        let clock = Arc::new(AtomicU64::new(0));
        let now = Arc::clone(&clock);
        let notifier = Notifier::new(
            database.store().clone(),
            channel,
            notifier::Options {
                wake: woken,
                resume: resume.clone(),
                health: part.clone(),
            },
        )
        .with_clock(Box::new(move || {
            Duration::from_micros(now.load(Ordering::Relaxed))
        }));
        Self {
            notifier,
            clock,
            part,
            resume,
            metrics: database.store().metrics().clone(),
        }
    }

    fn plain(database: &Database, slack: &FakeSlack) -> Self {
        Self::new(database, Some(slack), |_, _| {})
    }

    fn with_digests(database: &Database, slack: &FakeSlack, over: usize) -> Self {
        Self::new(database, Some(slack), |_, digest_over| *digest_over = over)
    }

    fn advance(&self, by: Duration) {
        self.clock.fetch_add(
            u64::try_from(by.as_micros()).unwrap() + 1,
            Ordering::Relaxed,
        );
    }

    fn step(&mut self) -> Step {
        self.notifier.step()
    }

    /// Steps until the notifier waits, and says for how long.
    #[track_caller]
    fn wait(&mut self) -> Duration {
        loop {
            match self.step() {
                // The pace, which is not what these tests are about.
                Step::RetryAfter(wait) if wait < Duration::from_millis(1) => self.advance(wait),
                Step::RetryAfter(wait) => return wait,
                Step::Progress => {}
                Step::Idle => panic!("nothing waits"),
            }
        }
    }

    /// Steps, and waits as long as it takes, until nothing is left.
    #[track_caller]
    fn finish(&mut self) {
        for _ in 0..10_000 {
            match self.step() {
                Step::RetryAfter(wait) => self.advance(wait),
                Step::Progress => {}
                Step::Idle => return,
            }
        }
        panic!("something waits for ever: {:?}", self.part.get());
    }
}

/// The channel "default", with a webhook or with the log.
fn default_channel(url: Option<String>, slack: &config::Slack, digest_over: usize) -> SlackChannel {
    let style = MessageStyle {
        completed: slack.line_completed.clone(),
        failed: slack.line_failed.clone(),
        zone: slack.time_zone.clone(),
        public_url: None,
    };
    let sink = match url {
        Some(url) => Sink::Webhook(Box::new(Webhook::new(Secret::new(url), slack).unwrap())),
        None => Sink::Log,
    };
    SlackChannel {
        name: DEFAULT_CHANNEL.to_owned(),
        sink,
        style,
        messages_per_second: slack.messages_per_second,
        burst: slack.burst.get(),
        digest_over,
        digest_max: slack.digest_max.get(),
        summary_over: slack.summary_over,
        probe_interval: PROBE,
    }
}

fn completed(ids: impl IntoIterator<Item = i64>) -> Vec<String> {
    ids.into_iter()
        .map(|id| format!("Payment {id} COMPLETED: user 1 paid 100 KRW for reservation {id}"))
        .collect()
}

fn delivered(database: &Database, id: i64) -> delivery::Notification {
    let way = database
        .store()
        .read(|connection| timeline::find_payment_timeline(connection, id))
        .unwrap()
        .unwrap();
    way.notification.unwrap()
}

fn id_of(line: &str) -> i64 {
    line.split(' ').nth(1).unwrap().parse().unwrap()
}

/// A database with this number of payments of user 1 that wait to be delivered.
fn waiting(count: i64) -> Database {
    let database = Database::open();
    database.pay(1, 1..=count);
    database.publish();
    database
}

/// Answers the first requests with these, and the others well.
fn script(slack: &FakeSlack, answers: impl Into<Vec<Answer>>) {
    let answers = answers.into();
    slack.answer_with(move |nth, _| answers.get(nth).cloned().unwrap_or(Answer::Ok));
}

#[test]
fn a_429_delays_the_channel_and_counts_no_attempt() {
    let database = waiting(2);
    let slack = FakeSlack::start();
    let after = |value: &str| Answer::StatusWith(429, vec![("Retry-After".into(), value.into())]);
    let soon = jiff::Timestamp::now() + Duration::from_secs(90);
    let date = jiff::fmt::rfc2822::DateTimePrinter::new()
        .timestamp_to_rfc9110_string(&soon)
        .unwrap();
    script(&slack, [after("30"), after(&date), Answer::Status(429)]);
    let mut fixture = NotifierFixture::plain(&database, &slack);
    assert_eq!(fixture.wait().as_secs(), 30, "seconds");
    assert_eq!(fixture.part.get().state, HealthLevel::RateLimited);
    assert!(
        !fixture.part.get().is_failing(),
        "to be limited is no failure"
    );
    assert!(matches!(fixture.step(), Step::RetryAfter(_)));
    assert_eq!(slack.attempts(), 1, "nothing goes within the pause");
    fixture.advance(Duration::from_secs(30));
    let left = || Duration::try_from(soon.duration_since(jiff::Timestamp::now())).unwrap();
    let longest = left();
    let wait = fixture.wait();
    let shortest = left();
    // The date that was sent has no fraction of a second.
    assert!(
        wait <= longest && wait + Duration::from_secs(1) > shortest,
        "a date: {wait:?}"
    );
    fixture.advance(Duration::from_secs(90));
    let wait = fixture.wait();
    assert!(wait >= Duration::from_secs(1), "none named: {wait:?}");
    fixture.finish();
    assert_eq!(slack.messages(), completed(1..=2));
    assert_eq!(
        delivered(&database, 1).attempts,
        1,
        "only the one that was accepted"
    );
    assert_eq!(fixture.part.get().state, HealthLevel::Up);
}

#[test]
fn failed_deliveries_back_off_and_keep_their_order() {
    let database = waiting(3);
    let slack = FakeSlack::start();
    script(
        &slack,
        [
            Answer::Status(500),
            Answer::Status(503),
            Answer::CloseAfterRead,
            Answer::Status(502),
        ],
    );
    let mut fixture = NotifierFixture::plain(&database, &slack);
    let mut waited = Duration::ZERO;
    for failures in 1..=4_u32 {
        while delivered(&database, 1).attempts < failures {
            match fixture.step() {
                Step::RetryAfter(wait) => {
                    waited += wait;
                    fixture.advance(wait);
                }
                step => assert_eq!(step, Step::Progress),
            }
        }
        assert_eq!(
            slack.attempts(),
            failures as usize,
            "and no other message before this one"
        );
        assert!(fixture.part.get().is_failing());
    }
    // Full jitter draws each of three waits from nothing up to half a second, a second, two
    // seconds.
    assert!(waited > Duration::from_millis(10), "{waited:?}");
    fixture.finish();
    assert_eq!(slack.messages(), completed(1..=3));
    let first = delivered(&database, 1);
    assert_eq!(
        (
            first.status.as_str(),
            first.attempts,
            first.unknown_outcomes
        ),
        ("DELIVERED", 5, 1)
    );
    assert_eq!(first.last_error.as_deref(), Some("Slack answered 502"));
    assert!(!fixture.part.get().is_failing());
}

#[test]
fn a_disabled_channel_is_paused_probed_and_resumed() {
    let closed = [
        Answer::Word(403, "action_prohibited"),
        Answer::Word(404, "no_service"),
        Answer::Word(410, "channel_is_archived"),
        Answer::StatusWith(
            302,
            vec![("Location".into(), "http://elsewhere.example/".into())],
        ),
    ];
    for answer in closed {
        let database = waiting(50);
        let slack = FakeSlack::start();
        script(&slack, [answer.clone(), answer.clone()]);
        let mut fixture = NotifierFixture::plain(&database, &slack);
        assert_eq!(fixture.wait(), PROBE, "{answer:?}");
        assert_eq!(
            (fixture.part.get().state, slack.attempts()),
            (HealthLevel::Paused, 1),
            "not row after row"
        );
        fixture.advance(PROBE);
        assert_eq!(fixture.wait(), PROBE, "one slow probe");
        assert_eq!(slack.attempts(), 2);
        fixture.resume.resume_now();
        assert_eq!(fixture.step(), Step::Progress, "the operator need not wait");
        fixture.finish();
        assert_eq!(slack.messages(), completed(1..=50));
        assert_eq!(fixture.part.get().state, HealthLevel::Up);
        assert_eq!(database.number("SELECT count(*) FROM dead_letter"), 0);
    }
}

#[test]
fn a_channel_that_rejects_every_payload_is_paused_without_dead_letters() {
    let database = waiting(200);
    let slack = FakeSlack::start();
    slack.answer_with(|_, _| Answer::Word(400, "invalid_payload"));
    let mut fixture =
        NotifierFixture::new(&database, Some(&slack), |_, digest_over| *digest_over = 5);
    while fixture.part.get().state != HealthLevel::Paused {
        match fixture.step() {
            Step::RetryAfter(wait) => fixture.advance(wait),
            step => assert_eq!(step, Step::Progress),
        }
    }
    assert_eq!(fixture.wait(), PROBE);
    let attempts = slack.attempts();
    assert!(attempts <= 8, "{attempts} requests to find out");
    assert_eq!(database.number("SELECT count(*) FROM dead_letter"), 0);
    slack.answer_with(|_, _| Answer::Ok);
    fixture.finish();
    assert_eq!(slack.lines(), completed(1..=200));
}

#[test]
fn many_payments_share_digests_and_few_are_delivered_alone() {
    let database = waiting(1000);
    let slack = FakeSlack::start();
    let mut fixture =
        NotifierFixture::new(&database, Some(&slack), |_, digest_over| *digest_over = 5);
    fixture.finish();
    let count = slack.count();
    assert!(
        (5..=6).contains(&count),
        "up to 200 in each, as far as 12,000 characters go: {count}"
    );
    assert_eq!(slack.lines(), completed(1..=1000));
    database.pay(1, 1001..=1005);
    database.publish();
    fixture.finish();
    assert_eq!(slack.messages()[count..], completed(1001..=1005));
    assert_eq!(delivered(&database, 1).delivered_in, Some(Carrier::Digest));
    let first = slack.messages()[0].clone();
    let heading = first.lines().next().unwrap();
    let number: i64 = heading.split(' ').next().unwrap().parse().unwrap();
    let sum = if number == 200 {
        "20,000".to_owned()
    } else {
        format!("{},{:03}", number / 10, number % 10 * 100)
    };
    assert_eq!(
        heading,
        format!("{number} payments, 1 to {number}: {number} COMPLETED ({sum} KRW)")
    );
    let blocks = &slack.bodies()[0]["blocks"];
    assert_eq!(
        blocks[0]["text"]["text"],
        format!("{number} payments, 1 to {number}")
    );
}

#[test]
fn a_digest_delivers_all_of_its_payments_or_none() {
    let database = waiting(100);
    let slack = FakeSlack::start();
    script(
        &slack,
        [
            Answer::Status(500),
            Answer::Status(429),
            Answer::CloseAfterRead,
        ],
    );
    let mut fixture =
        NotifierFixture::new(&database, Some(&slack), |_, digest_over| *digest_over = 5);
    let delivered = || database.number("SELECT count(*) FROM delivery WHERE status = 'DELIVERED'");
    while slack.count() == 0 {
        assert_eq!(delivered(), 0);
        match fixture.step() {
            Step::RetryAfter(wait) => fixture.advance(wait),
            step => assert_eq!(step, Step::Progress),
        }
    }
    assert_eq!((slack.count(), delivered()), (1, 100));
    assert_eq!(slack.lines(), completed(1..=100));
}

fn any_answer() -> impl Strategy<Value = Answer> {
    prop_oneof![
        6 => Just(Answer::Ok),
        1 => (0_u32..100).prop_map(|seconds| {
            Answer::StatusWith(429, vec![("Retry-After".into(), seconds.to_string())])
        }),
        1 => Just(Answer::Status(429)),
        1 => Just(Answer::Status(500)),
        1 => Just(Answer::CloseAfterRead),
        1 => Just(Answer::Half),
        1 => Just(Answer::Word(404, "no_service")),
    ]
}

fn any_answer_or_refusal() -> impl Strategy<Value = Answer> {
    prop_oneof![
        any_answer(),
        Just(Answer::Word(413, "too_large")),
        Just(Answer::Word(400, "invalid_payload"))
    ]
}

proptest! {
    #![proptest_config(proptest_config(24))]

    #[test]
    fn every_payment_is_delivered_once_in_order_whatever_slack_answers(
        answers in proptest::collection::vec(any_answer(), 0..30),
        count in 1_i64..400,
        over in 0_usize..20,
    ) {
        let database = waiting(count);
        let slack = FakeSlack::start();
        script(&slack, answers);
        let mut fixture = NotifierFixture::with_digests(&database, &slack, over);
        fixture.finish();
        prop_assert_eq!(slack.lines(), completed(1..=count));
        let undelivered = "SELECT count(*) FROM delivery WHERE status <> 'DELIVERED'";
        prop_assert_eq!(database.number(undelivered), 0);
    }

    /// Rejections that have nothing to do with the payments: none is lost, and none is a dead
    /// letter.
    #[test]
    fn no_payment_is_lost_or_delivered_twice_whatever_slack_rejects(
        answers in proptest::collection::vec(any_answer_or_refusal(), 0..40),
        count in 1_i64..100,
        over in 0_usize..20,
    ) {
        let database = waiting(count);
        let slack = FakeSlack::start();
        script(&slack, answers);
        let mut fixture = NotifierFixture::with_digests(&database, &slack, over);
        fixture.finish();
        let mut known: Vec<_> =
            slack.lines().iter().map(|line| id_of(line)).collect();
        prop_assert_eq!(database.number("SELECT count(*) FROM dead_letter"), 0);
        known.sort_unstable();
        prop_assert_eq!(known, (1..=count).collect::<Vec<_>>());
        prop_assert_eq!(database.number("SELECT count(*) FROM delivery \
            WHERE status IN ('PENDING', 'SENDING')"), 0);
    }
}

#[test]
fn the_notifier_keeps_the_rate_limit() {
    let database = waiting(10);
    let slack = FakeSlack::start();
    let mut fixture = NotifierFixture::new(&database, Some(&slack), |config, _| {
        config.slack.messages_per_second = 1.0;
    });
    let mut waited = Duration::ZERO;
    loop {
        match fixture.step() {
            Step::RetryAfter(wait) => {
                waited += wait;
                fixture.advance(wait);
            }
            Step::Progress => {}
            Step::Idle => break,
        }
    }
    assert_eq!((slack.count(), waited.as_secs()), (10, 9));
}

#[test]
fn a_lost_response_is_counted_and_the_message_is_sent_again() {
    for answer in [Answer::Hang, Answer::CloseAfterRead, Answer::Half] {
        let database = waiting(1);
        let slack = FakeSlack::start();
        script(&slack, [answer.clone()]);
        let mut fixture = NotifierFixture::new(&database, Some(&slack), |config, _| {
            config.slack.timeout = Duration::from_secs(1);
        });
        fixture.finish();
        let notification = delivered(&database, 1);
        assert_eq!(
            (notification.unknown_outcomes, notification.attempts),
            (1, 2),
            "{answer:?}"
        );
        assert_eq!(fixture.metrics.totals().unknown_outcomes, 1);
        assert_eq!(slack.count(), 1);
    }
}

#[test]
fn a_refused_connection_has_a_known_outcome() {
    let database = waiting(1);
    let mut slack = FakeSlack::start();
    slack.stop();
    let mut fixture = NotifierFixture::plain(&database, &slack);
    while delivered(&database, 1).attempts == 0 {
        let _ = fixture.step();
    }
    assert_eq!(delivered(&database, 1).unknown_outcomes, 0);
    let error = fixture.part.get().error.unwrap();
    assert!(
        !error.contains("secret-token") && !error.is_empty(),
        "{error}"
    );
    slack.start_again();
    fixture.finish();
    assert_eq!(slack.count(), 1);
}

#[test]
fn the_delivery_is_sending_before_the_post() {
    let database = waiting(1);
    let slack = FakeSlack::start();
    let seen = Arc::new(Mutex::new(String::new()));
    let store = database.store().clone();
    let saw = Arc::clone(&seen);
    slack.answer_with(move |_, _| {
        let status = store
            .read(|c| c.query_row("SELECT status FROM delivery", [], |row| row.get(0)))
            .unwrap();
        *saw.lock().unwrap() = status;
        Answer::Ok
    });
    let mut fixture = NotifierFixture::plain(&database, &slack);
    fixture.finish();
    drop(fixture);
    slack.answer_with(|_, _| Answer::Ok);
    assert_eq!(*seen.lock().unwrap(), "SENDING");
    assert_eq!(delivered(&database, 1).status, DeliveryStatus::Delivered);
}

#[test]
fn a_payment_that_cannot_be_delivered_is_dead_lettered_and_the_others_continue() {
    let database = waiting(3);
    let slack = FakeSlack::start();
    let other = rusqlite::Connection::open(database.path()).unwrap();
    other
        .execute_batch("PRAGMA foreign_keys = OFF; DELETE FROM payment WHERE id = 2")
        .unwrap();
    let mut fixture = NotifierFixture::plain(&database, &slack);
    fixture.finish();
    assert_eq!(slack.messages(), completed([1, 3]));
    assert_eq!(
        database.number("SELECT count(*) FROM delivery WHERE outbox_id = 2 AND status = 'DEAD'"),
        1
    );
    let letters = database
        .store()
        .read(|connection| dead_letter::list_dead_letters(connection, DeadLetterFilter::Open, 0, 9))
        .unwrap();
    assert_eq!(
        (letters.len(), letters[0].reason.as_str()),
        (1, "its payment does not exist")
    );
}

fn rejected() -> Answer {
    Answer::Word(400, "invalid_payload")
}

/// Steps until the channel pauses.
fn until_paused(fixture: &mut NotifierFixture) {
    while fixture.part.get().state != HealthLevel::Paused {
        match fixture.step() {
            Step::RetryAfter(wait) => fixture.advance(wait),
            step => assert_eq!(step, Step::Progress),
        }
    }
}

#[test]
fn a_short_burst_of_rejections_loses_no_payment() {
    for rejections in 1..=6 {
        let database = waiting(20);
        let slack = FakeSlack::start();
        script(&slack, vec![rejected(); rejections]);
        let mut fixture =
            NotifierFixture::new(&database, Some(&slack), |_, digest_over| *digest_over = 5);
        fixture.finish();
        assert_eq!(slack.lines(), completed(1..=20), "{rejections}");
        assert_eq!(
            database.number("SELECT count(*) FROM dead_letter"),
            0,
            "{rejections}"
        );
    }
}

#[test]
fn a_channel_that_accepts_one_message_loses_no_payment_and_is_probed() {
    let database = waiting(100);
    let slack = FakeSlack::start();
    slack.answer_with(|_, _| rejected());
    let mut fixture = NotifierFixture::plain(&database, &slack);
    until_paused(&mut fixture);
    for probe in 0..20 {
        let before = slack.attempts();
        fixture.advance(PROBE);
        if probe == 3 {
            // One message of the probe goes through, and what follows is rejected again.
            let accepted = slack.attempts();
            slack.answer_with(move |nth, _| {
                if nth == accepted {
                    Answer::Ok
                } else {
                    rejected()
                }
            });
            assert_eq!(fixture.step(), Step::Progress);
            until_paused(&mut fixture);
            continue;
        }
        assert_eq!(fixture.wait(), PROBE);
        assert_eq!(slack.attempts(), before + 1, "a probe is one message");
    }
    assert_eq!(
        (
            slack.lines().len(),
            database.number("SELECT count(*) FROM dead_letter")
        ),
        (1, 0)
    );
    slack.answer_with(|_, _| Answer::Ok);
    fixture.finish();
    assert_eq!(slack.lines(), completed(1..=100));
}

#[test]
fn a_channel_that_rejects_blocks_gets_plain_text() {
    let database = waiting(3);
    let slack = FakeSlack::start();
    let mut fixture = NotifierFixture::plain(&database, &slack);
    slack.answer_to_bodies(|body| {
        if body.get("blocks").is_some() {
            rejected()
        } else {
            Answer::Ok
        }
    });
    fixture.finish();
    assert_eq!(slack.messages(), completed(1..=3));
    assert!(
        slack
            .bodies()
            .iter()
            .all(|body| body.get("blocks").is_none())
    );
}

#[test]
fn three_messages_without_a_response_pause_the_channel() {
    let database = waiting(1);
    let slack = FakeSlack::start();
    slack.answer_with(|_, _| Answer::Half);
    let mut fixture = NotifierFixture::plain(&database, &slack);
    until_paused(&mut fixture);
    assert_eq!(
        (slack.attempts(), delivered(&database, 1).unknown_outcomes),
        (3, 3)
    );
}

#[test]
fn an_html_page_is_no_delivery() {
    let database = waiting(1);
    let slack = FakeSlack::start();
    let failed = Answer::Word(200, "{\"ok\":false}");
    script(
        &slack,
        [
            Answer::Word(200, "<html>sign in</html>"),
            failed,
            Answer::Word(200, "no_service"),
        ],
    );
    let mut fixture = NotifierFixture::plain(&database, &slack);
    fixture.finish();
    assert_eq!(
        (
            delivered(&database, 1).attempts,
            delivered(&database, 1).unknown_outcomes
        ),
        (4, 0)
    );
}

#[test]
fn a_server_that_closes_idle_connections_causes_no_unknown_outcome() {
    // It answers one request of each connection, promises to keep it, and closes it.
    let listener = free_port();
    let address = listener.local_addr().unwrap();
    let count = Arc::new(AtomicUsize::new(0));
    let served = Arc::clone(&count);
    let _server = Server::start(listener, move |stream| {
        let mut reader = BufReader::new(stream);
        if let Ok(Some((_, headers))) = read_head(&mut reader) {
            testkit::http::read_body(&mut reader, &headers).unwrap();
            let answer = "HTTP/1.1 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nok";
            reader.get_mut().write_all(answer.as_bytes()).unwrap();
            served.fetch_add(1, Ordering::SeqCst);
        }
    });
    let database = waiting(10);
    let mut fixture =
        NotifierFixture::at(&database, Some(format!("http://{address}/x")), |_, _| {});
    fixture.finish();
    assert_eq!(
        (
            count.load(Ordering::SeqCst),
            fixture.metrics.totals().unknown_outcomes
        ),
        (10, 0)
    );
}

#[test]
fn one_summary_covers_very_many_pending_payments() {
    let database = waiting(1500);
    let slack = FakeSlack::start();
    let mut fixture = NotifierFixture::new(&database, Some(&slack), |config, digest_over| {
        *digest_over = 5;
        config.slack.summary_over = 1000;
    });
    // A summary whose answer is lost is counted for each payment, and sent again.
    script(&slack, [Answer::Half, Answer::Status(500)]);
    fixture.finish();
    assert_eq!(slack.count(), 1);
    let body = &slack.bodies()[0];
    let text = body["text"].as_str().unwrap();
    assert!(
        text.starts_with("1500 payments, 1 to 1500: 1500 COMPLETED (150,000 KRW); "),
        "{text}"
    );
    assert_eq!(
        database.number("SELECT count(*) FROM delivery WHERE status = 'DELIVERED'"),
        1500
    );
    assert_eq!(
        database.number("SELECT count(*) FROM delivery WHERE unknown_outcomes = 1"),
        1500
    );
    assert_eq!(
        delivered(&database, 700).delivered_in,
        Some(Carrier::Summary)
    );
    database.pay(2, [1, 2, 2001]);
    database.publish();
    fixture.finish();
    assert_eq!(
        delivered(&database, 1503).delivered_in,
        Some(Carrier::Single)
    );
}

#[test]
fn a_busy_channel_delivers_within_seconds() {
    let database = Database::open();
    let slack = FakeSlack::start();
    let mut fixture = NotifierFixture::new(&database, Some(&slack), |config, digest_over| {
        config.slack.messages_per_second = 1.0;
        config.slack.summary_over = 1000;
        *digest_over = 5;
    });
    // 800 payments in each of 60 seconds, by the notifier's clock.
    let mut longest = 0;
    for second in 0..60 {
        database.pay(1, second * 800..(second + 1) * 800);
        database.publish();
        let mut left = Duration::from_secs(1);
        loop {
            match fixture.step() {
                Step::RetryAfter(wait) if wait <= left => {
                    left -= wait;
                    fixture.advance(wait);
                }
                Step::RetryAfter(_) | Step::Idle => break,
                Step::Progress => {}
            }
        }
        fixture.advance(left);
        let waiting = database.number("SELECT count(*) FROM delivery WHERE status <> 'DELIVERED'");
        longest = longest.max(waiting);
    }
    assert!(
        longest <= 4 * 800,
        "{longest} payments waited: more than four seconds of them"
    );
    fixture.finish();
    assert_eq!(
        database.number("SELECT count(*) FROM delivery WHERE status <> 'DELIVERED'"),
        0
    );
}

#[test]
fn a_response_that_repeats_the_webhook_is_redacted() {
    for (status, page) in [
        (404, "Cannot POST /services/T000/B000/secret-token"),
        (400, "<p>/services/T000/B000/secret"),
    ] {
        let database = waiting(1);
        let slack = FakeSlack::start();
        slack.answer_with(move |_, _| Answer::Word(status, page));
        let mut fixture = NotifierFixture::plain(&database, &slack);
        let _ = fixture.wait();
        let shown = format!("{:?} {:?}", fixture.part.get(), delivered(&database, 1));
        assert!(
            !shown.contains("secret") && !shown.contains("T000"),
            "{shown}"
        );
        assert!(
            shown.contains(&format!("Slack answered {status}")),
            "{shown}"
        );
    }
}

#[test]
fn an_unknown_host_has_a_known_outcome() {
    let database = waiting(1);
    // A resolver without a network may take its time; what counts is its outcome.
    let mut fixture = NotifierFixture::at(
        &database,
        Some("http://no-such-host.invalid/x".into()),
        |_, _| {},
    );
    while delivered(&database, 1).attempts == 0 {
        let _ = fixture.step();
    }
    assert_eq!(
        delivered(&database, 1).unknown_outcomes,
        0,
        "{:?}",
        delivered(&database, 1)
    );
}

#[test]
fn without_a_webhook_messages_are_delivered_to_the_log() {
    let database = waiting(7);
    let mut fixture = NotifierFixture::new(&database, None, |_, _| {});
    assert_eq!(fixture.step(), Step::Progress);
    assert_eq!(fixture.step(), Step::Idle);
    assert_eq!(
        database.number("SELECT count(*) FROM delivery WHERE status = 'DELIVERED'"),
        7
    );
}

/// A certificate for `localhost`, and the configuration of a server that has it.
fn certificate() -> (String, Arc<ServerConfig>) {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap();
    (made.cert.pem(), Arc::new(config))
}

#[test]
fn tls_is_trusted_by_the_ca_file_and_by_nothing_else() {
    let (pem, tls) = certificate();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("ca.pem");
    fs::write(&file, pem).unwrap();
    let database = waiting(1);
    let slack = FakeSlack::start_tls(tls);
    let mut distrustful = NotifierFixture::plain(&database, &slack);
    while delivered(&database, 1).attempts == 0 {
        let _ = distrustful.step();
    }
    assert_eq!(
        (slack.attempts(), delivered(&database, 1).unknown_outcomes),
        (0, 0),
        "{:?}",
        delivered(&database, 1)
    );
    let mut fixture = NotifierFixture::new(&database, Some(&slack), |config, _| {
        config.slack.ca_file = Some(file);
    });
    fixture.finish();
    assert_eq!(slack.messages(), completed([1]));
}

/// A proxy for `CONNECT`; counts the tunnels.
fn proxy() -> (Server, String, Arc<AtomicUsize>) {
    let listener = free_port();
    let address = listener.local_addr().unwrap();
    let tunnels = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&tunnels);
    let server = Server::start(listener, move |client| {
        let mut reader = BufReader::new(client);
        let Ok(Some((line, _))) = read_head(&mut reader) else {
            return;
        };
        let Some(target) = line
            .strip_prefix("CONNECT ")
            .and_then(|rest| rest.split(' ').next())
        else {
            return;
        };
        let Ok(upstream) = TcpStream::connect(target) else {
            return;
        };
        count.fetch_add(1, Ordering::Relaxed);
        let mut to_client = client;
        let _ = to_client.write_all(b"HTTP/1.1 200 Connected\r\n\r\n");
        thread::scope(|scope| {
            scope.spawn(|| {
                let _ = std::io::copy(&mut &upstream, &mut &*client);
                let _ = client.shutdown(Shutdown::Both);
            });
            let _ = std::io::copy(&mut reader, &mut &upstream);
            let _ = upstream.shutdown(Shutdown::Both);
        });
    });
    (server, format!("http://{address}"), tunnels)
}

#[test]
fn a_proxy_is_used_when_one_is_set() {
    let (_server, url, tunnels) = proxy();
    let database = waiting(1);
    let slack = FakeSlack::start();
    let mut fixture = NotifierFixture::new(&database, Some(&slack), |config, _| {
        config.slack.proxy = Some(Secret::new(url));
    });
    fixture.finish();
    assert_eq!((slack.count(), tunnels.load(Ordering::Relaxed)), (1, 1));
}

fn pay(client: &mut Client, user: i64, price: i64, reservations: impl IntoIterator<Item = i64>) {
    let reservations: Vec<_> = reservations
        .into_iter()
        .map(|id| json!({"reservation_id": id, "seat_price": price}))
        .collect();
    let response = client.post_json(
        "/payments",
        &json!({"user_id": user, "reservations": reservations}),
    );
    assert_eq!(response.status, 201);
}

#[test]
fn an_unavailable_route_does_not_delay_another() {
    let [default, failures, large] = [FakeSlack::start(), FakeSlack::start(), FakeSlack::start()];
    let dir = tempfile::tempdir().unwrap();
    let config = format!(
        "[slack]\nmessages_per_second = 1000\n
         [[slack.route]]\nname = 'failures'\nwebhook_url = '{}'\nstatus = 'FAILED'\n
         messages_per_second = 1000\n
         [[slack.route]]\nname = 'large'\namount_min = 1000000\nmessages_per_second = 1000\n",
        failures.url()
    );
    fs::write(dir.path().join("config.toml"), config).unwrap();
    let webhook = default.url();
    let large_url = large.url();
    let env = [
        ("PAYRELAY_SLACK_WEBHOOK_URL", webhook.as_str()),
        ("PAYRELAY_SLACK_ROUTE_1_WEBHOOK_URL", &large_url),
    ];
    failures.answer_with(|_, _| Answer::Word(404, "no_service"));
    let mut payrelay = Payrelay::start(Options::new(dir.path(), &env));
    let mut client = Client::connect(payrelay.addr());
    pay(&mut client, 1, 5, [1, 2]);
    pay(&mut client, 1, 5, [1]);
    pay(&mut client, 1, 1_000_000, [3]);
    pay(&mut client, 1, 1_000_000, [3]);
    wait_until("the messages", LIMIT, || {
        default.lines().len() == 2 && large.lines().len() == 1
    });
    assert!(large.lines()[0].starts_with("Payment 4 COMPLETED"));
    let channels = || client_get(&payrelay, "/admin/channels")["channels"].clone();
    wait_until("the pause", LIMIT, || {
        channels()[1]["state"] == "paused" && channels()[1]["waiting"] == 2
    });
    assert_eq!(
        (&channels()[0]["state"], &channels()[2]["state"]),
        (&json!("up"), &json!("up"))
    );
    let ready = client.get("/health/ready").json();
    assert_eq!(
        (
            &ready["status"],
            &ready["components"]["slack:failures"]["state"]
        ),
        (&json!("degraded"), &json!("paused"))
    );
    assert_eq!(
        client.get("/payments/3").json()["notification"]["channel"],
        "failures"
    );
    failures.answer_with(|_, _| Answer::Ok);
    assert_eq!(
        client
            .post_json("/admin/channels/unknown/resume", &Value::Null)
            .status,
        404
    );
    assert_eq!(
        client
            .post_json("/admin/channels/failures/resume", &Value::Null)
            .status,
        202
    );
    wait_until("the failures", LIMIT, || failures.lines().len() == 2);
    assert!(payrelay.terminate().success());
    assert!(
        !payrelay.log().contains("secret-token"),
        "{}",
        payrelay.log()
    );
}

fn client_get(payrelay: &Payrelay, path: &str) -> Value {
    Client::connect(payrelay.addr()).get(path).json()
}

/// Slack rejects payments 1 and 2, and accepts the others.
fn reject_the_first_two(slack: &FakeSlack) {
    slack.answer_with(|_, text| {
        if text.ends_with(" 1") || text.ends_with(" 2") {
            rejected()
        } else {
            Answer::Ok
        }
    });
}

fn is_paused(client: &mut Client) -> bool {
    client.get("/admin/channels").json()["channels"][0]["state"] == "paused"
}

fn open_letters(client: &mut Client) -> Value {
    client.get("/admin/dead-letters").json()["dead_letters"].clone()
}

/// The status of the response to a skip of the channel's first payment.
fn skip(client: &mut Client, channel: &str, body: &Value) -> u16 {
    let path = format!("/admin/channels/{channel}/skip");
    client.post_json(&path, body).status
}

/// Neither a channel that is not paused, nor an unknown one, nor one without a reason is skipped.
fn assert_bad_skips_are_refused(client: &mut Client) {
    for bad in [
        json!({}),
        json!({"reason": ""}),
        json!({"reason": "x", "more": 1}),
    ] {
        assert_eq!(skip(client, "default", &bad), 422, "{bad}");
    }
    let unknown_channel = skip(client, "nowhere", &json!({"reason": "x"}));
    assert_eq!(unknown_channel, 404);
}

/// A webhook that gets messages as fast as it answers.
fn env_without_pace(url: &str) -> [(&str, &str); 2] {
    [
        ("PAYRELAY_SLACK_WEBHOOK_URL", url),
        ("PAYRELAY_SLACK_MESSAGES_PER_SECOND", "1000"),
    ]
}

#[test]
fn a_channel_that_an_operator_pauses_sends_nothing_until_it_is_resumed() {
    let slack = FakeSlack::start();
    let dir = tempfile::tempdir().unwrap();
    let url = slack.url();
    let env = env_without_pace(&url);
    let command = |args: &[&str]| {
        let (code, stdout, _) = run_command(dir.path(), &env, args);
        (code, stdout)
    };
    let mut payrelay = Payrelay::start(Options::new(dir.path(), &env));
    let mut client = Client::connect(payrelay.addr());
    pay(&mut client, 1, 5, [1]);
    wait_until("the first payment", LIMIT, || slack.lines().len() == 1);
    let (code, said) = command(&["channels", "pause", "default", "--reason", "inventory"]);
    let paused = "paused: its payments wait until it is resumed\n";
    assert_eq!((code, said.as_str()), (Some(0), paused));
    let health = client.get("/health/ready").json();
    let channel = &health["components"]["slack"];
    let error = channel["error"].as_str().unwrap();
    assert!(
        error.starts_with("by local user ") && error.ends_with("(\"inventory\")"),
        "{channel}"
    );
    assert_eq!(
        (&channel["state"], &health["status"]),
        (&json!("paused"), &json!("degraded"))
    );
    pay(&mut client, 1, 5, [2]);

    // It stays paused after a restart.
    assert!(payrelay.terminate().success());
    drop(payrelay);
    let payrelay = Payrelay::start(Options::new(dir.path(), &env));
    payrelay.wait_for_log("channel default: still paused by local user", LIMIT);
    let mut client = Client::connect(payrelay.addr());
    assert!(is_paused(&mut client));
    pay(&mut client, 1, 5, [3]);
    wait_until("both to wait for the channel", LIMIT, || {
        client.get("/payments/3").json()["notification"]["channel"] == "default"
    });
    assert_eq!(slack.attempts(), 1);
    let reason = json!({"reason": "it is over"});
    let response = client.post_json("/admin/channels/default/resume", &reason);
    assert_eq!(response.status, 202);
    wait_until("both payments", LIMIT, || slack.lines().len() == 3);
    assert!(!is_paused(&mut client));

    // Over HTTP, and another restart: the resume is remembered as well.
    let response = client.post_json("/admin/channels/default/pause", &Value::Null);
    assert_eq!(response.json()["requested"], "pause");
    wait_until("the pause", LIMIT, || is_paused(&mut client));
    let (code, _) = command(&["channels", "resume", "default"]);
    assert_eq!(code, Some(0));
    drop(payrelay);
    let payrelay = Payrelay::start(Options::new(dir.path(), &env));
    pay(&mut Client::connect(payrelay.addr()), 1, 5, [4]);
    wait_until("the last payment", LIMIT, || slack.lines().len() == 4);
}

#[test]
fn a_pause_that_no_notifier_has_seen_holds_after_a_restart() {
    let slack = FakeSlack::start();
    slack.answer_with(|_, _| Answer::Hang);
    let dir = tempfile::tempdir().unwrap();
    let url = slack.url();
    let env = [("PAYRELAY_SLACK_WEBHOOK_URL", url.as_str())];
    let mut payrelay = Payrelay::start(Options::new(dir.path(), &env));
    let mut client = Client::connect(payrelay.addr());
    pay(&mut client, 1, 5, [1]);
    wait_until("a message without an answer", LIMIT, || {
        slack.attempts() == 1
    });
    // The notifier waits for Slack.
    let response = client.post_json("/admin/channels/default/pause", &Value::Null);
    assert_eq!(response.status, 202);
    payrelay.kill9();
    slack.answer_with(|_, _| Answer::Ok);
    let payrelay = Payrelay::start(Options::new(dir.path(), &env));
    let mut client = Client::connect(payrelay.addr());
    wait_until("the pause", LIMIT, || is_paused(&mut client));
    assert_eq!(slack.attempts(), 1);
    let response = client.post_json("/admin/channels/default/resume", &Value::Null);
    assert_eq!(response.status, 202);
    wait_until("the message", LIMIT, || slack.lines().len() == 1);
}

#[test]
fn an_operator_skips_one_payment_of_a_paused_channel() {
    let slack = FakeSlack::start();
    let dir = tempfile::tempdir().unwrap();
    let url = slack.url();
    let env = env_without_pace(&url);
    reject_the_first_two(&slack);
    let payrelay = Payrelay::start(Options::new(dir.path(), &env));
    let mut client = Client::connect(payrelay.addr());
    let command = |args: &[&str]| {
        let (code, stdout, _) = run_command(dir.path(), &env, args);
        (code, stdout)
    };
    let reason = json!({"reason": "Slack does not like it"});
    let status = skip(&mut client, "default", &reason);
    assert_eq!(status, 409, "it is not paused");
    let (code, _) = command(&["channels", "skip", "default", "--reason", "x"]);
    assert_eq!(code, Some(1), "nor for the command");

    pay(&mut client, 1, 5, [1, 2, 3]);
    wait_until("the pause", LIMIT, || is_paused(&mut client));
    assert_bad_skips_are_refused(&mut client);
    // The list has the counts of the last sample.
    let listed = wait_for("the list to count them", LIMIT, || {
        let (code, listed) = command(&["channels", "list"]);
        (code == Some(0) && listed.contains("  3  ")).then_some(listed)
    });
    assert!(
        listed.contains("\ndefault  paused ") && listed.contains("400 invalid_payload"),
        "{listed}"
    );
    payrelay.wait_for_log("then run `payrelay channels resume default`", LIMIT);
    let response = client.post_json("/admin/channels/default/skip", &reason);
    assert_eq!(response.status, 202);
    let response = response.json();
    assert_eq!(
        (&response["requested"], &response["channel"]),
        (&json!("skip"), &json!("default")),
        "the outcome is not known yet: {response}"
    );
    wait_until("the first dead letter", LIMIT, || {
        open_letters(&mut client).as_array().unwrap().len() == 1
    });
    assert_eq!(
        open_letters(&mut client)[0]["reason"],
        "skipped by http: Slack does not like it"
    );
    let attempts =
        |client: &mut Client| client.get("/payments/2").json()["notification"]["attempts"].as_u64();
    wait_until("the next payment to be tried, and the pause", LIMIT, || {
        attempts(&mut client) >= Some(1) && is_paused(&mut client)
    });

    let (code, _) = command(&["channels", "skip", "nowhere", "--reason", "x"]);
    assert_eq!(code, Some(1));
    let (code, said) = command(&["channels", "skip", "default", "--reason", "as well"]);
    assert_eq!(
        (code, said.as_str()),
        (Some(0), "payment 2 is dead letter 2 now\n")
    );
    wait_until("the third payment", LIMIT, || slack.lines().len() == 1);
    drop(payrelay);
    let (code, _) = command(&["channels", "resume", "default"]);
    assert_eq!(code, Some(75), "no payrelay runs");
}

#[test]
fn pending_payments_of_a_webhook_never_go_to_the_log_by_accident() {
    let mut slack = FakeSlack::start();
    slack.stop();
    let dir = tempfile::tempdir().unwrap();
    let url = slack.url();
    let with = [("PAYRELAY_SLACK_WEBHOOK_URL", url.as_str())];
    // A database that never had a webhook starts as before.
    let mut payrelay = Payrelay::start(Options::new(dir.path(), &[]));
    pay(&mut Client::connect(payrelay.addr()), 1, 5, [1]);
    payrelay.wait_for_log("delivered to this log only", LIMIT);
    assert!(payrelay.terminate().success());
    let mut payrelay = Payrelay::start(Options::new(dir.path(), &with));
    pay(&mut Client::connect(payrelay.addr()), 1, 5, 2..=51);
    payrelay.wait_for_log("Slack unavailable", LIMIT);
    assert!(payrelay.terminate().success());
    for env in [[].as_slice(), &[("PAYRELAY_SLACK_WEBHOOK_URL", "")]] {
        let refused = run_to_exit(Options::new(dir.path(), env));
        let error = String::from_utf8_lossy(&refused.stderr);
        assert!(
            refused.status.code() == Some(78)
                && error.contains("50 payments waiting for the channel default"),
            "{error}"
        );
    }
    let payrelay = Payrelay::start(Options::new(dir.path(), &[("PAYRELAY_SLACK_SINK", "log")]));
    wait_until("the log to have them", LIMIT, || {
        payrelay.count_in_log("delivered to this log only") == 50
    });
}

#[test]
fn pending_payments_of_a_removed_route_are_delivered_by_another() {
    let slack = FakeSlack::start();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config.toml");
    let unavailable = "[[slack.route]]\nname = 'old'\nwebhook_url = 'http://127.0.0.1:1/x'\n";
    fs::write(&file, unavailable).unwrap();
    let mut payrelay = Payrelay::start(Options::new(dir.path(), &[]));
    pay(&mut Client::connect(payrelay.addr()), 1, 5, [1]);
    payrelay.wait_for_log("Slack (old) unavailable", LIMIT);
    payrelay.kill9();
    fs::write(&file, "").unwrap();
    let refused = run_to_exit(Options::new(dir.path(), &[]));
    assert_eq!(refused.status.code(), Some(78), "it would go to the log");
    let url = slack.url();
    let _payrelay = Payrelay::start(Options::new(
        dir.path(),
        &[("PAYRELAY_SLACK_WEBHOOK_URL", url.as_str())],
    ));
    wait_until("the message", LIMIT, || slack.count() == 1);
}

/// A payrelay whose Slack rejects two payments.
struct TwoDeadLetters {
    slack: FakeSlack,
    dir: tempfile::TempDir,
    payrelay: Payrelay,
    client: Client,
}

impl TwoDeadLetters {
    fn env(url: &str) -> [(&str, &str); 5] {
        [
            ("PAYRELAY_SLACK_WEBHOOK_URL", url),
            ("PAYRELAY_SLACK_MESSAGES_PER_SECOND", "1000"),
            ("PAYRELAY_SLACK_DIGEST_OVER", "1000"),
            ("PAYRELAY_SCHEDULER_INTERVAL", "50ms"),
            ("SUDO_USER", "operator"),
        ]
    }

    /// An operator skips each rejected payment: it is a dead letter, and the next one is delivered.
    fn new() -> Self {
        let slack = FakeSlack::start();
        reject_the_first_two(&slack);
        let dir = tempfile::tempdir().unwrap();
        let payrelay = Payrelay::start(Options::new(dir.path(), &Self::env(&slack.url())));
        let mut client = Client::connect(payrelay.addr());
        for (refused, accepted) in [(1, 11), (2, 12)] {
            pay(&mut client, 1, 5, [refused]);
            pay(&mut client, 1, 5, [accepted]);
            wait_until("the pause, and an operator who ends it", LIMIT, || {
                skip(&mut client, "default", &json!({"reason": "rejected"})) == 202
            });
            let end = format!(" {accepted}");
            wait_until("the other message", LIMIT, || {
                slack.lines().iter().any(|line| line.ends_with(&end))
            });
        }
        Self {
            slack,
            dir,
            payrelay,
            client,
        }
    }

    fn assert_both_are_open(&mut self) {
        let client = &mut self.client;
        wait_until("two dead letters", LIMIT, || {
            open_letters(client).as_array().unwrap().len() == 2
        });
        let letters = open_letters(client);
        assert_eq!(
            (&letters[0]["payment_id"], &letters[1]["payment_id"]),
            (&json!(1), &json!(3)),
            "{letters}"
        );
        assert_eq!(letters[0]["reason"], "skipped by http: rejected");
        wait_until("the sampler to count the dead letters", LIMIT, || {
            client.get("/health/ready").json()["pending"]["dead_letters"]["count"] == 2
        });
    }

    fn post(&mut self, path: &str) -> Response {
        self.client.post_json(path, &Value::Null)
    }

    fn wait_for_message_of(&self, payment: i64) {
        let start = format!("Payment {payment} ");
        wait_until("the replayed message", LIMIT, || {
            let lines = self.slack.lines();
            lines.iter().any(|line| line.starts_with(&start))
        });
    }

    /// Exit code, and standard output with standard error after it.
    fn command(&self, args: &[&str]) -> (Option<i32>, String) {
        let args = [&["dead-letters"], args].concat();
        let url = self.slack.url();
        let (code, stdout, stderr) = run_command(self.dir.path(), &Self::env(&url), &args);
        (code, stdout + &stderr)
    }
}

#[test]
fn a_client_lists_and_replays_dead_letters() {
    let mut site = TwoDeadLetters::new();
    site.assert_both_are_open();
    site.slack.answer_with(|_, _| Answer::Ok);
    let dry = site
        .post("/admin/dead-letters/1/replay?dry_run=true")
        .json();
    assert_eq!(
        (&dry["dry_run"], &dry["outcomes"][0]["outcome"]),
        (&json!(true), &json!("waits to be delivered again"))
    );
    let open = open_letters(&mut site.client);
    assert_eq!(
        open.as_array().unwrap().len(),
        2,
        "a dry run changes nothing"
    );
    assert_eq!(site.post("/admin/dead-letters/1/replay").status, 200);
    site.wait_for_message_of(1);
    let letter = site.client.get("/admin/dead-letters/1").json();
    assert_eq!(
        (&letter["state"], &letter["actions"][0]["origin"]),
        (&json!("REPLAYED"), &json!("http")),
        "{letter}"
    );
    assert_eq!(site.post("/admin/dead-letters/9/discard").status, 404);
    let page = "POST /admin/dead-letters/discard HTTP/1.1\r\nHost: localhost\r\nOrigin: \
        https://evil.example\r\nContent-Length: 0\r\n\r\n";
    site.client.send_raw(page.as_bytes()).unwrap();
    assert_eq!(
        site.client.read_response().status,
        403,
        "a web page gives no orders"
    );
    let (code, listed) = site.command(&["list", "--json"]);
    assert_eq!((code, listed.lines().count()), (Some(0), 1), "{listed}");
    let (code, listed) = site.command(&["list"]);
    assert_eq!((code, listed.lines().count()), (Some(0), 2), "{listed}");
    assert!(site.payrelay.terminate().success());
}

#[test]
fn a_command_replays_and_discards_dead_letters() {
    let mut site = TwoDeadLetters::new();
    site.assert_both_are_open();
    site.slack.answer_with(|_, _| Answer::Ok);
    assert_eq!(
        site.command(&["discard", "2", "--dry-run"]),
        (Some(0), "would be: 2: discarded\n".into())
    );
    assert_eq!(
        site.command(&["replay", "2"]),
        (Some(0), "2: waits to be delivered again\n".into())
    );
    site.wait_for_message_of(3);
    assert_eq!(
        site.command(&["discard", "2", "--reason", "no", "--yes"]),
        (Some(1), "2: nothing was done: it is REPLAYED\n".into())
    );
    let (code, _) = site.command(&["replay"]);
    assert_eq!(code, Some(64), "which?");
    assert_eq!(
        site.command(&["replay", "7"]),
        (Some(1), "payrelay: there is no dead letter 7\n".into())
    );
    let all = site.client.get("/admin/dead-letters?all=true").json();
    assert_eq!(
        all["dead_letters"][1]["actions"][0]["origin"],
        origin_with_sudo(),
        "{all}"
    );
    assert!(site.payrelay.terminate().success());
}

/// Keeps two records as dead letters: one of event 1, and one of another node.
fn keep_two_records(database: &Database, now: Timestamp) {
    let record = |offset, id: String| DeadRecord {
        topic: "t".into(),
        partition: 0,
        offset,
        written_at_ms: 1,
        reason: "unknown then".into(),
        key: None,
        value: Some(b"1".to_vec()),
        headers: vec![("ce_id".into(), Some(id))],
    };
    let own = database.store().node().event_id(1);
    let records = [record(7, own), record(8, "another-1".into())];
    let keep = move |tx: &Transaction<'_>| {
        records
            .iter()
            .try_for_each(|r| dead_letter::insert_dead_record(tx, r, now))
    };
    database.store().write(keep).unwrap();
}

fn resolve(
    database: &Database,
    action: DeadLetterAction,
    which: Selection,
    now: Timestamp,
) -> Vec<dead_letter_action::DeadLetterOutcome> {
    let node = database.store().node().clone();
    let resolve = move |tx: &Transaction<'_>| {
        let request = DeadLetterRequest {
            action,
            which,
            dry_run: false,
            node: &node,
            origin: "http",
            reason: None,
            now,
        };
        dead_letter_action::act_on_dead_letters(tx, request)
    };
    database.store().write(resolve).unwrap()
}

#[test]
fn replay_accepts_a_dead_record_only_if_its_event_is_known() {
    let database = Database::open();
    database.pay(1, [1]);
    let now = Timestamp::now();
    keep_two_records(&database, now);
    let all = Selection::Open { after: 0, limit: 9 };
    let outcomes = resolve(&database, DeadLetterAction::Replay, all, now);
    let said: Vec<_> = outcomes
        .iter()
        .map(|outcome| (outcome.outcome.as_str(), outcome.resolved))
        .collect();
    let still = "still: its ce_id \"another-1\" is not one of this node's";
    assert_eq!(
        said,
        [("accepted: its delivery is PENDING", true), (still, false)]
    );
    let open = || {
        database
            .store()
            .read(|connection| {
                dead_letter::list_dead_letters(connection, DeadLetterFilter::Open, 0, 9)
            })
            .unwrap()
    };
    assert_eq!(
        (
            open().len(),
            open()[0].id,
            open()[0].count,
            open()[0].actions.len()
        ),
        (1, 2, 2, 1)
    );
    let discarded = resolve(&database, DeadLetterAction::Discard, Selection::Id(2), now);
    assert_eq!(discarded[0].outcome, "discarded");
    let unknown = resolve(&database, DeadLetterAction::Discard, Selection::Id(3), now);
    assert_eq!((open().len(), unknown.len()), (0, 0));
}

#[test]
fn a_payment_dead_lettered_again_keeps_its_dead_letter() {
    let database = waiting(1);
    let node = database.store().node().clone();
    let now = Timestamp::now();
    let twice = move |tx: &Transaction<'_>| {
        delivery::mark_delivery_dead(tx, 1, Some("first"), now)?;
        let which = Selection::Id(1);
        dead_letter_action::act_on_dead_letters(
            tx,
            DeadLetterRequest {
                action: DeadLetterAction::Replay,
                which,
                dry_run: false,
                node: &node,
                origin: "http",
                reason: None,
                now,
            },
        )?;
        delivery::mark_delivery_dead(tx, 1, Some("second"), now)?;
        // It is dead already.
        delivery::mark_delivery_dead(tx, 1, Some("third"), now)?;
        dead_letter::list_dead_letters(tx, DeadLetterFilter::Open, 0, 9)
    };
    let letters = database.store().write(twice).unwrap();
    assert_eq!(
        (letters.len(), letters[0].count, letters[0].reason.as_str()),
        (1, 2, "second")
    );
    assert_eq!(letters[0].payment_id, Some(1));
}

#[test]
fn a_kill_repeats_only_unanswered_deliveries_and_counts_them() {
    let slack = FakeSlack::start();
    slack.answer_with(|nth, _| if nth == 1 { Answer::Hang } else { Answer::Ok });
    let dir = tempfile::tempdir().unwrap();
    let url = slack.url();
    let env = [
        ("PAYRELAY_SLACK_WEBHOOK_URL", url.as_str()),
        ("PAYRELAY_SLACK_MESSAGES_PER_SECOND", "1000"),
        // It is killed while it waits for the answer.
        ("PAYRELAY_SLACK_TIMEOUT", "8s"),
    ];
    let mut payrelay = Payrelay::start(Options::new(dir.path(), &env));
    pay(&mut Client::connect(payrelay.addr()), 1, 5, [1, 2]);
    wait_until("the second POST", LIMIT, || slack.attempts() == 2);
    payrelay.kill9();
    let payrelay = Payrelay::start(Options::new(dir.path(), &env));
    payrelay.wait_for_log("1 delivery in flight when payrelay last stopped", LIMIT);
    wait_until("the second message", LIMIT, || slack.count() == 2);
    assert_eq!(slack.lines().len(), 2, "{:?}", slack.lines());
    let delivered = || client_get(&payrelay, "/payments/2")["notification"].clone();
    wait_until("the mark", LIMIT, || delivered()["status"] == "DELIVERED");
    assert_eq!(delivered()["unknown_outcomes"], 1);
}
