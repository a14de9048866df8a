//! Force: the real binary is killed with SIGKILL at random moments under load, while Kafka is killed, cut off, stalled and
//! slowed down, and Slack fails. In the end nothing is lost and nothing is there twice.
//!
//! The short form is part of `cargo test`. `PAYRELAY_FORCE_KILLS` sets how many kills, `PAYRELAY_FORCE_SEED` repeats the
//! moments and faults of an earlier run (not the machine's timing).

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::io::{self, BufReader, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::harness::http::{read_body, read_head};
use super::harness::kafka::Broker;
use super::harness::process::{Options, Payrelay, run_to_exit};
use super::harness::proxy::Proxy;
use super::harness::slack::{Answer, FakeSlack};
use super::harness::store::wait_until_all_is_told;
use super::harness::{pass, topic};

const LIMIT: Duration = Duration::from_mins(3);
const TOPIC: &str = "payment-event";
const TILLS: u64 = 6;
const USERS: u64 = 20;

/// A number from the environment, for the long form.
fn setting(name: &str) -> Option<u64> {
    let text = env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is not a number: {text:?}")))
}

/// Where payrelay listens at the moment; the port changes with each start.
type Door = Mutex<Option<SocketAddr>>;

/// What all clients share.
#[derive(Default)]
struct Shop {
    door: Door,
    closing: AtomicBool,
    answered: AtomicUsize,
}

/// A request that was answered 201, with the answer.
struct Receipt {
    user: u64,
    reservations: BTreeSet<u64>,
    payments: Vec<i64>,
}

/// A client that repeats each request under its key until it is answered.
struct Till {
    number: u64,
    random: fastrand::Rng,
    shop: Arc<Shop>,
    connection: Option<BufReader<TcpStream>>,
}

impl Till {
    fn work(mut self) -> Vec<Receipt> {
        let mut receipts = Vec::new();
        while !self.shop.closing.load(Ordering::Relaxed) {
            receipts.push(self.pay(receipts.len()));
        }
        receipts
    }

    fn pay(&mut self, turn: usize) -> Receipt {
        let user = self.random.u64(0..USERS);
        let count = self.random.u64(1..=3);
        // Some are paid already.
        let reservations: BTreeSet<u64> = (0..count).map(|_| self.random.u64(0..200_000)).collect();
        let list: Vec<Value> = reservations.iter().map(|id| json!({"reservation_id": id, "seat_price": 100})).collect();
        let body = json!({"user_id": user, "reservations": list}).to_string();
        let request = format!(
            "POST /payments HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n\
             Idempotency-Key: \"till-{}-{turn}\"\r\nContent-Length: {}\r\n\r\n{body}",
            self.number,
            body.len()
        );
        let answer = self.until_answered(&request);
        if self.random.u8(0..20) == 0 {
            assert_eq!(self.until_answered(&request), answer, "the same answer to the same key, byte for byte");
        }
        let answer: Value = serde_json::from_slice(&answer).unwrap();
        let payments = answer["payments"].as_array().unwrap().iter().map(|payment| payment["id"].as_i64().unwrap());
        self.shop.answered.fetch_add(1, Ordering::Relaxed);
        Receipt { user, reservations, payments: payments.collect() }
    }

    fn until_answered(&mut self, request: &str) -> Vec<u8> {
        let began = Instant::now();
        loop {
            match self.ask(request) {
                Ok((201, body)) => return body,
                // Too much work, or stopping: the client comes again.
                Ok((503, _)) | Err(_) => self.connection = None,
                Ok((status, body)) => panic!("{status}: {}", String::from_utf8_lossy(&body)),
            }
            assert!(began.elapsed() < LIMIT, "no answer within {LIMIT:?}");
            pass(Duration::from_millis(2));
        }
    }

    fn ask(&mut self, request: &str) -> io::Result<(u16, Vec<u8>)> {
        if self.connection.is_none() {
            let door = self.shop.door.lock().unwrap().ok_or(io::ErrorKind::NotConnected)?;
            let stream = TcpStream::connect(door)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(Duration::from_secs(20)))?;
            self.connection = Some(BufReader::new(stream));
        }
        let connection = self.connection.as_mut().ok_or(io::ErrorKind::NotConnected)?;
        connection.get_mut().write_all(request.as_bytes())?;
        let (line, headers) = read_head(connection)?.ok_or(io::ErrorKind::UnexpectedEof)?;
        let status = line.split(' ').nth(1).and_then(|status| status.parse().ok());
        Ok((status.ok_or(io::ErrorKind::InvalidData)?, read_body(connection, &headers)?))
    }
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
    /// Starts that found events on the topic that were not marked.
    words_unmarked: u64,
}

struct Scene {
    dir: tempfile::TempDir,
    broker: Broker,
    proxy: Proxy,
    slack: FakeSlack,
    shop: Arc<Shop>,
    random: fastrand::Rng,
    delivery: &'static str,
    done: Done,
}

impl Scene {
    fn options(&self, args: &[&str]) -> Options {
        let env = [
            ("PAYRELAY_PUBLISHER_KIND", "kafka"),
            ("PAYRELAY_KAFKA_BOOTSTRAP_SERVERS", &self.broker.bootstrap()),
            ("PAYRELAY_KAFKA_PARTITIONS", "3"),
            ("PAYRELAY_KAFKA_DELIVERY", self.delivery),
            ("PAYRELAY_SLACK_WEBHOOK_URL", &self.slack.url()),
            ("PAYRELAY_SLACK_MESSAGES_PER_SECOND", "100000"),
            ("PAYRELAY_SLACK_BURST", "1000"),
            ("PAYRELAY_SLACK_TIMEOUT", "300ms"),
            ("PAYRELAY_SLACK_PROBE_INTERVAL", "100ms"),
            // The purge has its part in it.
            ("PAYRELAY_SCHEDULER_INTERVAL", "300ms"),
            ("PAYRELAY_SCHEDULER_RETENTION", "4s"),
        ];
        let args = args.iter().map(|arg| (*arg).into()).collect();
        Options { args, ..Options::new(self.dir.path(), &env) }
    }

    fn start(&self) -> Payrelay {
        let payrelay = Payrelay::start(self.options(&[]));
        *self.shop.door.lock().unwrap() = Some(payrelay.addr());
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
                // The moments that matter are those between the broker's word and the mark: they come with each batch.
                self.wait_for_progress();
            }
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
                self.proxy.slow(Duration::from_millis(self.random.u64(1..30)));
                self.done.slow_times += 1;
            }
            _ => {}
        }
        pass(Duration::from_micros(self.random.u64(0..40_000)));
        *self.shop.door.lock().unwrap() = None;
        payrelay.kill9();
        self.done.kills += 1;
        self.done.words_unmarked += u64::from(payrelay.log().contains("are on the topic already"));
        // What was held back arrives now, after its sender's end.
        if self.random.bool() {
            self.proxy.heal();
        }
    }

    /// Until something was published in this life, but not for ever: the other side may be on its way back.
    fn wait_for_progress(&self) {
        let published = || {
            self.number(
                "SELECT ifnull(max(published_at), 0) FROM outbox WHERE id > (SELECT max(id) - 5000 FROM outbox)",
            )
        };
        let (before, limit) = (published(), Instant::now() + Duration::from_secs(3));
        while published() == before && Instant::now() < limit {
            pass(Duration::from_millis(3));
        }
    }

    fn run(mut self, kills: u64) {
        let started = Instant::now();
        self.let_slack_fail();
        let tills: Vec<_> = (0..TILLS)
            .map(|number| {
                let random = self.random.fork();
                let till = Till { number, random, shop: Arc::clone(&self.shop), connection: None };
                thread::spawn(|| till.work())
            })
            .collect();
        // Kafka is killed now and then, and comes back some kills later.
        let mut back_at = None;
        while self.done.kills < kills {
            if back_at.is_some_and(|kill| self.done.kills >= kill) {
                self.broker.restart();
                back_at = None;
            } else if back_at.is_none() && self.done.kills % 70 == 40 {
                self.broker.kill();
                self.done.kafka_kills += 1;
                back_at = Some(self.done.kills + 8);
            }
            self.round(back_at.is_none());
        }
        if back_at.is_some() {
            self.broker.restart();
        }
        self.proxy.heal();
        self.slack.answer_with(|_, _| Answer::Ok);
        let mut payrelay = self.start();
        self.shop.closing.store(true, Ordering::Relaxed);
        let receipts: Vec<Receipt> = tills.into_iter().flat_map(|till| till.join().unwrap()).collect();
        wait_until_all_is_told(&self.database(), LIMIT);
        let unknown = payrelay.log().matches("may show twice").count();
        assert_eq!(payrelay.terminate().code(), Some(0), "{}", payrelay.log());
        self.check(&receipts);
        println!(
            "{}: {:?}; {} requests answered; {unknown} warnings in the last life; {:.0?} in all",
            self.delivery,
            self.done,
            receipts.len(),
            started.elapsed()
        );
    }

    fn database(&self) -> PathBuf {
        self.dir.path().join("payrelay.db")
    }

    fn number(&self, sql: &str) -> i64 {
        let connection = payrelay::store::Beside::open(&self.database()).unwrap();
        connection.read(|connection| connection.query_row(sql, [], |row| row.get(0))).unwrap()
    }

    fn check(&self, receipts: &[Receipt]) {
        // Every request was executed exactly once, and every payment belongs to one that was answered.
        let ids: BTreeSet<i64> = receipts.iter().flat_map(|receipt| receipt.payments.iter().copied()).collect();
        let expected: usize = receipts.iter().map(|receipt| receipt.reservations.len()).sum();
        assert_eq!(ids.len(), expected, "an id was given twice");
        assert_eq!(self.number("SELECT count(*) FROM payment"), i64::try_from(expected).unwrap());
        let of_users: BTreeMap<i64, u64> =
            receipts.iter().flat_map(|receipt| receipt.payments.iter().map(|id| (*id, receipt.user))).collect();

        // Every event is on the topic, once, and those of a user are in commit order.
        let found = topic::read(&self.broker.bootstrap_inside(), TOPIC, LIMIT);
        let mut seen = BTreeSet::new();
        let mut last: BTreeMap<&str, i64> = BTreeMap::new();
        let mut twice = 0;
        for record in &found {
            let id: i64 = record.value.parse().unwrap();
            assert_eq!(of_users.get(&id).map(u64::to_string), Some(record.key.clone()), "payment {id}");
            if !seen.insert(id) {
                twice += 1;
                continue;
            }
            let before = last.insert(&record.key, id).unwrap_or(0);
            assert!(before < id, "user {}: payment {before} before {id}", record.key);
        }
        assert_eq!(seen, ids, "what is on the topic is what was answered");

        // Every payment was told. Twice only where an answer of Slack was lost.
        let lines = self.slack.lines();
        let told: BTreeSet<i64> = lines.iter().map(|line| line.split(' ').nth(1).unwrap().parse().unwrap()).collect();
        assert_eq!(told, ids, "what was told is what was answered");
        println!(
            "{} payments, {} records, {twice} of them twice, {} lines at Slack",
            ids.len(),
            found.len(),
            lines.len()
        );
        // Without transactions a record that the network held back may arrive after its sender's end, and after the next one
        // has looked.
        if twice == 0 || self.delivery == "exactly-once" {
            assert_eq!(twice, 0, "records are on the topic twice");
            let audit = run_to_exit(self.options(&["audit"]));
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            println!("{}", text(&audit.stdout));
            assert_eq!(audit.status.code(), Some(0), "{}\n{}", text(&audit.stdout), text(&audit.stderr));
        }
    }
}

fn scene(delivery: &'static str) -> Scene {
    let seed = setting("PAYRELAY_FORCE_SEED").unwrap_or_else(|| fastrand::u64(..));
    println!("PAYRELAY_FORCE_SEED={seed}");
    let (broker, proxy) = Broker::start_behind_proxy("4.4.0");
    Scene {
        dir: tempfile::tempdir().unwrap(),
        broker,
        proxy,
        slack: FakeSlack::start(),
        shop: Arc::default(),
        random: fastrand::Rng::with_seed(seed),
        delivery,
        done: Done::default(),
    }
}

#[test]
fn two_hundred_kills_lose_nothing_and_double_nothing() {
    scene("exactly-once").run(setting("PAYRELAY_FORCE_KILLS").unwrap_or(200));
}

#[test]
fn without_transactions_kills_lose_nothing_and_keep_the_order() {
    scene("at-least-once").run(setting("PAYRELAY_FORCE_KILLS").unwrap_or(250) / 5);
}
