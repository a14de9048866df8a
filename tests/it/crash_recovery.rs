//! The real binary is killed with SIGKILL at random moments under load. Meanwhile Kafka is killed,
//! cut off, stalled and slowed down, and Slack fails. In the mix, records or the whole topic are
//! deleted, a batch is corrupted, and the clock jumps. An older copy of the database is restored,
//! the reader of the log is blocked, and a copy of the database runs alongside. In the end nothing
//! is lost and nothing is there twice.
//!
//! The short form is part of `cargo test`. `PAYRELAY_FORCE_KILLS` sets how many kills,
//! `PAYRELAY_TEST_SEED` repeats the moments and faults of an earlier run (not the machine's
//! timing).

mod checks;
mod client;

use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use self::checks::Known;
use self::client::{Clients, Workload};
use testkit::hostile::Machine;
use testkit::kafka::Broker;
use testkit::process::{Options, Payrelay, run_to_exit};
use testkit::proxy::Proxy;
use testkit::slack::{Answer, FakeSlack};
use testkit::store::wait_until_all_is_delivered;
use testkit::{let_time_pass, random, topic, wait_until};

const LIMIT: Duration = Duration::from_mins(3);
const TOPIC: &str = "payment-event";
const PARTITIONS: i32 = 3;
const CLIENTS: u64 = 6;
const USERS: u64 = 20;
const HOUR: i64 = 3600;

/// A number from the environment, for the long form.
fn setting(name: &str) -> Option<u64> {
    let text = env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name} is not a number: {text:?}")),
    )
}

/// What was done.
#[derive(Debug, Default)]
struct Done {
    kills: u64,
    kills_while_starting: u64,
    kafka_kills: u64,
    cuts: u64,
    stalls: u64,
    slow_times: u64,
    /// Starts that found events on the topic that were not recorded as published.
    reconciled: u64,
    deletions: u64,
    recreations: u64,
    corruptions: u64,
    clock_jumps: u64,
    restores: u64,
    blocked_logs: u64,
    strays: u64,
    /// Payments whose delivery had an unknown outcome, as the log counts them.
    unknown_outcomes: usize,
}

struct Scene {
    machine: Machine,
    /// Where a copy of the database runs, and where copies lie.
    elsewhere: tempfile::TempDir,
    broker: Broker,
    proxy: Proxy,
    slack: FakeSlack,
    /// A copy that runs alongside posts here: it delivers what its file says, and knows no better.
    stray_slack: FakeSlack,
    workload: Arc<Workload>,
    clients: Option<Clients>,
    known: Known,
    phase: usize,
    random: fastrand::Rng,
    delivery: &'static str,
    /// Whether the faults of topic, clock, file and log are part of it.
    mix: bool,
    done: Done,
}

impl Scene {
    fn options(&self, args: &[&str]) -> Options {
        let env = [
            ("PAYRELAY_PUBLISHER_KIND", "kafka"),
            ("PAYRELAY_KAFKA_BOOTSTRAP_SERVERS", &self.broker.bootstrap()),
            ("PAYRELAY_KAFKA_PARTITIONS", &PARTITIONS.to_string()),
            ("PAYRELAY_KAFKA_DELIVERY", self.delivery),
            ("PAYRELAY_SLACK_WEBHOOK_URL", &self.slack.url()),
            ("PAYRELAY_SLACK_MESSAGES_PER_SECOND", "100000"),
            ("PAYRELAY_SLACK_SUMMARY_OVER", "0"),
            ("PAYRELAY_SLACK_BURST", "1000"),
            ("PAYRELAY_SLACK_TIMEOUT", "300ms"),
            ("PAYRELAY_SLACK_PROBE_INTERVAL", "100ms"),
            // The purge has its part in it.
            ("PAYRELAY_SCHEDULER_INTERVAL", "300ms"),
            (
                "PAYRELAY_SCHEDULER_RETENTION",
                if self.mix { "30s" } else { "4s" },
            ),
            // The clock jumps by days, and a key must outlive its client's last try.
            ("PAYRELAY_IDEMPOTENCY_RETENTION", "30d"),
        ];
        let args = args.iter().map(|arg| (*arg).into()).collect();
        Options {
            args,
            ..self.machine.options(&env)
        }
    }

    fn start(&self) -> Payrelay {
        let payrelay = Payrelay::start(self.options(&[]));
        *self.workload.address.lock().unwrap() = Some(payrelay.addr());
        payrelay
    }

    /// Slack takes most messages; what it does to the others changes with each.
    fn let_slack_fail(&self) {
        self.slack.answer_with(|nth, _| match nth % 37 {
            3 => Answer::Status(500),
            7 => Answer::StatusWith(429, vec![("Retry-After".into(), "0".into())]),
            13 => Answer::CloseAfterRead,
            23 => Answer::Half,
            31 => Answer::Hang,
            _ => Answer::Ok,
        });
    }

    /// A life of payrelay, from its start to its end, with whatever else happens meanwhile.
    fn round(&mut self, kafka_is_there: bool) {
        if self.random.u8(0..6) == 0 {
            let after = Duration::from_micros(self.random.u64(0..60_000));
            Payrelay::kill_while_it_starts(self.options(&[]), after);
            self.done.kills_while_starting += 1;
            self.done.kills += 1;
            return;
        }
        let mut payrelay = self.start();
        // In some lives the network is as the last one has left it.
        if self.random.u8(0..4) > 0 {
            self.proxy.heal();
            if kafka_is_there {
                // The moments that matter are those between the ack and its record: they come with
                // each batch.
                self.wait_for_progress();
            }
        }
        if self.mix {
            self.disturb(&payrelay, kafka_is_there);
        }
        match self.random.u8(0..12) {
            0 => {
                self.proxy.cut();
                self.done.cuts += 1;
            }
            1 | 2 => {
                self.proxy.heal();
                self.proxy.stall();
                self.done.stalls += 1;
            }
            3 => {
                self.proxy.heal();
                self.proxy
                    .slow(Duration::from_millis(self.random.u64(1..30)));
                self.done.slow_times += 1;
            }
            _ => {}
        }
        let_time_pass(Duration::from_micros(self.random.u64(0..40_000)));
        *self.workload.address.lock().unwrap() = None;
        payrelay.kill9();
        self.done.kills += 1;
        self.count(&payrelay.log());
        // What was held back arrives now, after its sender's end.
        if self.random.bool() {
            self.proxy.heal();
        }
    }

    fn count(&mut self, log: &str) {
        self.done.reconciled += u64::from(log.contains("are on the topic already"));
        self.done.unknown_outcomes += unknown_outcomes(log);
    }

    /// Faults in a life of payrelay.
    fn disturb(&mut self, payrelay: &Payrelay, kafka_is_there: bool) {
        match self.random.u8(0..16) {
            0 | 1 => {
                const SHIFTS: [i64; 5] = [0, 2 * HOUR, -2 * HOUR, 48 * HOUR, -48 * HOUR];
                let shift = SHIFTS[self.random.usize(0..SHIFTS.len())];
                self.machine.set("clock", &shift.to_string());
                self.done.clock_jumps += 1;
            }
            2 | 3 => {
                payrelay.block_log();
                self.done.blocked_logs += 1;
            }
            4 if kafka_is_there => {
                let partition = self.random.i32(0..PARTITIONS);
                topic::truncate_to_end(&self.broker.bootstrap_inside(), TOPIC, partition);
                self.done.deletions += 1;
            }
            _ => {}
        }
    }

    /// Faults between two lives of payrelay.
    fn interlude(&mut self) {
        match self.random.u8(0..12) {
            0 => self.recreate_topic(),
            1 => self.corrupt_batch(),
            2 => self.run_stray_copy(),
            _ => {}
        }
    }

    /// Deletes the topic; payrelay creates it again.
    fn recreate_topic(&mut self) {
        let published = "SELECT payment_id FROM outbox WHERE status = 'PUBLISHED' \
            AND \"partition\" IS NOT NULL";
        let published = self.ids(published);
        self.known.on_earlier_topics.extend(published);
        topic::delete(&self.broker.bootstrap_inside(), TOPIC, LIMIT);
        self.done.recreations += 1;
    }

    fn corrupt_batch(&mut self) {
        self.broker.stop();
        let partition = self.random.i32(0..PARTITIONS);
        let random = &mut self.random;
        let hit = self
            .broker
            .corrupt(TOPIC, partition, |batches| random.usize(0..batches.max(1)));
        self.broker.restart();
        self.done.corruptions += u64::from(hit.is_some());
    }

    /// A copy of the files runs at the same time as the original, and accepts no payments.
    fn run_stray_copy(&mut self) {
        let copy = tempfile::tempdir_in(self.elsewhere.path()).unwrap();
        for file in ["payrelay.db", "payrelay.db-wal"] {
            if self.machine.folder().join(file).exists() {
                fs::copy(self.machine.folder().join(file), copy.path().join(file)).unwrap();
            }
        }
        let mut options = self.options(&[]);
        options.dir = copy.path().into();
        options
            .env
            .push(("PAYRELAY_SLACK_WEBHOOK_URL".into(), self.stray_slack.url()));
        let mut original = self.start();
        let mut stray = Payrelay::start(options);
        self.proxy.heal();
        self.wait_for_progress();
        let_time_pass(Duration::from_millis(self.random.u64(0..3000)));
        *self.workload.address.lock().unwrap() = None;
        for payrelay in [&mut original, &mut stray] {
            assert!(
                payrelay.try_exit().is_none(),
                "a copy ended the process:\n{}",
                payrelay.log()
            );
            payrelay.kill9();
        }
        self.count(&original.log());
        self.done.kills += 1;
        self.done.strays += 1;
    }

    /// Copies the database while payrelay runs, lets it run on, and puts the copy in its place.
    fn restore_older_copy(&mut self) {
        self.proxy.heal();
        let copy = self
            .elsewhere
            .path()
            .join(format!("copy-{}.db", self.phase));
        let name = copy.to_str().unwrap();
        let mut payrelay = self.start();
        self.run_command(&["backup", name]);
        self.wait_for_progress();
        let_time_pass(Duration::from_millis(self.random.u64(0..1000)));
        *self.workload.address.lock().unwrap() = Some(payrelay.addr());
        let receipts = self.clients.take().unwrap().join();
        self.known.add(&receipts);
        *self.workload.address.lock().unwrap() = None;
        payrelay.kill9();
        self.count(&payrelay.log());
        self.run_command(&["restore", name, "--yes"]);
        self.known
            .restored(self.number("SELECT ifnull(max(id), 0) FROM payment"));
        let undelivered = "SELECT payment_id FROM outbox o LEFT \
            JOIN delivery d ON d.outbox_id = o.id WHERE d.status IS NOT 'DELIVERED'";
        let undelivered = self.ids(undelivered);
        self.known.undelivered_in_copy.extend(undelivered);
        self.phase += 1;
        self.clients = Some(Clients::start(&self.workload, &mut self.random, self.phase));
        self.done.restores += 1;
    }

    fn run_command(&self, args: &[&str]) {
        let output = run_to_exit(self.options(args));
        assert_eq!(
            output.status.code(),
            Some(0),
            "{args:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }

    /// Until something was published in this life, but not for ever: the other side may be on its
    /// way back.
    fn wait_for_progress(&self) {
        let published = || {
            self.number(
                "SELECT ifnull(max(published_at), 0) FROM outbox \
                    WHERE id > (SELECT max(id) - 5000 FROM outbox)",
            )
        };
        let before = published();
        let limit = Instant::now() + Duration::from_secs(3);
        while published() == before && Instant::now() < limit {
            let_time_pass(Duration::from_millis(3));
        }
    }

    fn run(mut self, kills: u64) {
        let started = Instant::now();
        self.let_slack_fail();
        self.clients = Some(Clients::start(&self.workload, &mut self.random, 0));
        // Kafka is killed now and then, and comes back some kills later.
        let mut back_at = None;
        // Twice in the middle an older copy is restored.
        let mut restore_at = vec![kills * 3 / 4, kills * 2 / 5];
        while self.done.kills < kills {
            if back_at.is_some_and(|kill| self.done.kills >= kill) {
                self.broker.restart();
                back_at = None;
            } else if back_at.is_none() && self.done.kills % 70 == 40 {
                self.broker.kill();
                self.done.kafka_kills += 1;
                back_at = Some(self.done.kills + 8);
            }
            if self.mix && back_at.is_none() {
                if restore_at
                    .last()
                    .is_some_and(|kill| self.done.kills >= *kill)
                {
                    restore_at.pop();
                    self.restore_older_copy();
                }
                self.interlude();
            }
            self.round(back_at.is_none());
        }
        if back_at.is_some() {
            self.broker.restart();
        }
        self.proxy.heal();
        self.machine.set("clock", "0");
        self.slack.answer_with(|_, _| Answer::Ok);
        let mut payrelay = self.start();
        let receipts = self.clients.take().unwrap().join();
        self.known.add(&receipts);
        wait_until_all_is_delivered(&self.database(), LIMIT);
        wait_until("the topic to have every acknowledged event", LIMIT, || {
            self.number("SELECT count(*) FROM outbox WHERE status = 'INIT'") == 0
        });
        assert_eq!(payrelay.terminate().code(), Some(0), "{}", payrelay.log());
        self.count(&payrelay.log());
        println!(
            "{}: {:?}; {:.0?} in all",
            self.delivery,
            self.done,
            started.elapsed()
        );
        self.check();
    }

    fn database(&self) -> PathBuf {
        self.machine.database()
    }

    fn number(&self, sql: &str) -> i64 {
        let connection = payrelay::store::OfflineStore::open(&self.database()).unwrap();
        connection
            .read(|connection| connection.query_row(sql, [], |row| row.get(0)))
            .unwrap()
    }

    fn ids(&self, sql: &str) -> BTreeSet<i64> {
        let connection = payrelay::store::OfflineStore::open(&self.database()).unwrap();
        let read = |connection: &payrelay::store::Connection| {
            connection
                .prepare(sql)?
                .query_map([], |row| row.get(0))?
                .collect()
        };
        connection.read(read).unwrap()
    }
}

/// How many payments the log counts whose delivery has an unknown outcome. Their POST had no
/// answer, or they were being delivered when the process before was killed.
fn unknown_outcomes(log: &str) -> usize {
    let in_flight = |line: &str| {
        let (before, _) = line.split_once(" in flight when payrelay")?;
        let (before, _noun) = before.rsplit_once(' ')?;
        before.rsplit(' ').next()?.parse::<usize>().ok()
    };
    log.lines().filter_map(in_flight).sum()
}

fn scene(delivery: &'static str, mix: bool) -> Scene {
    let seed = random::seed(|| fastrand::u64(..));
    let (broker, proxy) = Broker::start_behind_proxy("4.4.0");
    Scene {
        machine: Machine::new(),
        elsewhere: tempfile::tempdir().unwrap(),
        broker,
        proxy,
        slack: FakeSlack::start(),
        stray_slack: FakeSlack::start(),
        workload: Arc::default(),
        clients: None,
        known: Known::default(),
        phase: 0,
        random: fastrand::Rng::with_seed(seed),
        delivery,
        mix,
        done: Done::default(),
    }
}

#[test]
fn kills_and_faults_lose_and_double_no_event() {
    scene("exactly-once", true).run(setting("PAYRELAY_FORCE_KILLS").unwrap_or(80));
}

#[test]
fn kills_without_transactions_lose_no_event_and_keep_the_order() {
    scene("at-least-once", false).run(setting("PAYRELAY_FORCE_KILLS").unwrap_or(250) / 5);
}
