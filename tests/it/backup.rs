//! Backups while the real binary is running, and a node that was restored from one.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rusqlite::{Connection, OpenFlags};

use testkit::http::{Client, pay};
use testkit::kafka::Broker;
use testkit::process::{Options, Payrelay, run_to_exit};
use testkit::proxy::Proxy;
use testkit::slack::FakeSlack;
use testkit::topic;
use testkit::{StopOnDrop, wait_until};

const LIMIT: Duration = Duration::from_secs(20);
const JUMP: i64 = 1_000_000_000_000;

fn backup(dir: &Path, file: &Path) -> Output {
    let args = vec!["backup".to_owned(), file.to_str().unwrap().to_owned()];
    run_to_exit(Options {
        args,
        ..Options::new(dir, &[])
    })
}

fn read<T: rusqlite::types::FromSql>(file: &Path, sql: &str) -> T {
    let connection = Connection::open_with_flags(file, OpenFlags::SQLITE_OPEN_READ_ONLY).unwrap();
    connection.query_row(sql, [], |row| row.get(0)).unwrap()
}

/// What the clients have seen while backups are made.
#[derive(Default)]
struct Seen {
    acknowledged: AtomicI64,
    slowest_ms: AtomicI64,
}

impl Seen {
    fn pay_until(&self, address: SocketAddr, number: i64, stop: &AtomicBool) {
        let mut client = Client::connect(address);
        for turn in 0.. {
            let asked = Instant::now();
            pay(&mut client, number, [1_000_000 * number + turn]);
            self.acknowledged.fetch_add(1, Ordering::SeqCst);
            let needed = i64::try_from(asked.elapsed().as_millis()).unwrap();
            self.slowest_ms.fetch_max(needed, Ordering::SeqCst);
            if stop.load(Ordering::SeqCst) {
                return;
            }
        }
    }
}

/// A sound database with at least this number of payments, each with its event and history.
fn assert_whole(copy: &Path, at_least: i64) {
    assert_eq!(read::<String>(copy, "PRAGMA integrity_check"), "ok");
    let payments: i64 = read(copy, "SELECT count(*) FROM payment");
    assert!(
        payments >= at_least,
        "{payments} of {at_least} acknowledged payments"
    );
    assert_eq!(read::<i64>(copy, "SELECT count(*) FROM outbox"), payments);
    assert_eq!(
        read::<i64>(copy, "SELECT max(id) FROM payment"),
        payments,
        "no gaps"
    );
    assert!(read::<Option<i64>>(copy, "SELECT backed_up_at FROM node").is_some());
}

#[test]
fn a_backup_is_consistent_while_clients_pay() {
    let dir = tempfile::tempdir().unwrap();
    let payrelay = Payrelay::start(Options::new(dir.path(), &[]));
    let mut client = Client::connect(payrelay.addr());
    for turn in 0..50 {
        pay(&mut client, turn, turn * 1000..(turn + 1) * 1000);
    }
    let seen = Seen::default();
    seen.acknowledged.store(50_000, Ordering::SeqCst);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let address = payrelay.addr();
        for number in 1..=4 {
            let seen = &seen;
            let stop = &stop;
            scope.spawn(move || seen.pay_until(address, number, stop));
        }
        // Also when something here fails: the scope waits for the threads.
        let _over = StopOnDrop(&stop);
        for number in 0..3 {
            let before = seen.acknowledged.load(Ordering::SeqCst);
            let copy = dir.path().join(format!("copy-{number}.db"));
            let began = Instant::now();
            let output = backup(dir.path(), &copy);
            assert_eq!(output.status.code(), Some(0), "{output:?}");
            let meanwhile = seen.acknowledged.load(Ordering::SeqCst) - before;
            println!(
                "{meanwhile} requests in the {:.1?} of a backup",
                began.elapsed()
            );
            assert!(meanwhile > 0, "no client could pay during the backup");
            assert_whole(&copy, before);
        }
    });
    println!("the slowest answer: {:?} ms", seen.slowest_ms);
    let database = dir.path().join("payrelay.db");
    assert_eq!(
        read::<Option<i64>>(&database, "SELECT backed_up_at FROM node"),
        None
    );
}

#[test]
fn an_impossible_backup_is_refused_and_leaves_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("copy.db");
    let output = backup(dir.path(), &copy);
    assert_eq!(
        output.status.code(),
        Some(78),
        "there is no database: {output:?}"
    );
    let mut payrelay = Payrelay::start(Options::new(dir.path(), &[]));
    assert_eq!(backup(dir.path(), &copy).status.code(), Some(0));
    let first = fs::read(&copy).unwrap();
    let output = backup(dir.path(), &copy);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.code() == Some(78) && error.contains("a backup never replaces a file"),
        "{error}"
    );
    assert_eq!(fs::read(&copy).unwrap(), first);
    assert_eq!(
        backup(dir.path(), &dir.path().join("nowhere").join("copy.db"))
            .status
            .code(),
        Some(78)
    );
    assert_eq!(
        backup(dir.path(), &dir.path().join("payrelay.db"))
            .status
            .code(),
        Some(78)
    );
    payrelay.terminate();
    let names: Vec<_> = fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert!(
        names
            .iter()
            .all(|name| !name.to_str().unwrap().contains(".part")),
        "{names:?}"
    );
    // Also of a payrelay that does not run.
    assert_eq!(
        backup(dir.path(), &dir.path().join("cold.db"))
            .status
            .code(),
        Some(0)
    );
}

/// A start next to the WAL of the database that the copy has replaced is refused, and nothing is
/// changed.
fn assert_refused_with_a_foreign_wal(dir: &Path, env: &[(&str, &str)], copy: &Path) {
    let refused = run_to_exit(Options::new(dir, env));
    let error = String::from_utf8_lossy(&refused.stderr);
    assert!(
        refused.status.code() == Some(78) && error.contains("payrelay.db-wal"),
        "{error}"
    );
    assert_eq!(
        fs::read(copy).unwrap(),
        fs::read(dir.join("payrelay.db")).unwrap()
    );
}

/// The ids of the payments that Slack has, in their order.
fn ids_in_slack(slack: &FakeSlack) -> Vec<i64> {
    let lines = slack.lines();
    let ids = lines.iter().map(|line| line.split(' ').nth(1).unwrap());
    ids.map(|id| id.parse().unwrap()).collect()
}

fn ids_in_history(client: &mut Client) -> Vec<i64> {
    let page = client.get("/users/1/payment-history").json();
    let payments = page["payments"].as_array().unwrap();
    payments.iter().map(|p| p["id"].as_i64().unwrap()).collect()
}

#[test]
fn a_restored_node_continues_with_new_ids_and_delivers_pending_payments() {
    let dir = tempfile::tempdir().unwrap();
    let database = dir.path().join("payrelay.db");
    let copy = dir.path().join("copy.db");
    let mut slack = FakeSlack::start();
    slack.stop();
    let url = slack.url();
    let env = [
        ("PAYRELAY_SLACK_WEBHOOK_URL", url.as_str()),
        ("PAYRELAY_SLACK_DIGEST_OVER", "1000"),
    ];
    let start = || Payrelay::start(Options::new(dir.path(), &env));
    let mut payrelay = start();
    let mut client = Client::connect(payrelay.addr());
    assert_eq!(pay(&mut client, 1, 1..=3), [1, 2, 3]);
    wait_until("the deliveries", LIMIT, || {
        read::<i64>(&database, "SELECT count(*) FROM delivery") == 3
    });
    assert_eq!(backup(dir.path(), &copy).status.code(), Some(0));
    // Acknowledged, and lost with the disk.
    assert_eq!(pay(&mut client, 1, [4]), [4]);
    payrelay.kill9();
    let node: String = read(&database, "SELECT id FROM node");

    fs::copy(&copy, &database).unwrap();
    assert_refused_with_a_foreign_wal(dir.path(), &env, &copy);
    for suffix in ["-wal", "-shm"] {
        fs::remove_file(dir.path().join(format!("payrelay.db{suffix}"))).unwrap();
    }

    slack.start_again();
    let mut payrelay = start();
    let log = payrelay.log();
    assert!(log.contains("this database is a backup of 20"), "{log}");
    let mut client = Client::connect(payrelay.addr());
    let given = pay(&mut client, 1, [4, 5]);
    let [jumped, next] = given[..] else {
        panic!("{given:?}")
    };
    assert!(jumped > JUMP && next == jumped + 1, "{given:?}");
    assert_eq!(read::<String>(&database, "SELECT id FROM node"), node);
    assert_eq!(read::<i64>(&database, "SELECT max(id) FROM outbox"), next);
    wait_until("what was pending, and what is new", LIMIT, || {
        slack.lines().len() == 5
    });
    assert_eq!(ids_in_slack(&slack), [1, 2, 3, jumped, next]);
    assert_eq!(ids_in_history(&mut client), [next, jumped, 3, 2, 1]);

    assert_eq!(payrelay.terminate().code(), Some(0));
    let payrelay = start();
    assert!(!payrelay.log().contains("is a backup"), "it says so once");
    let after = pay(&mut Client::connect(payrelay.addr()), 1, [6]);
    assert_eq!(after, [next + 1]);
}

#[test]
fn a_backup_restored_twice_issues_no_id_twice() {
    let dir = tempfile::tempdir().unwrap();
    let database = dir.path().join("payrelay.db");
    let copy = dir.path().join("copy.db");
    let mut first = Payrelay::start(Options::new(dir.path(), &[]));
    pay(&mut Client::connect(first.addr()), 1, 1..=3);
    assert_eq!(backup(dir.path(), &copy).status.code(), Some(0));
    assert_eq!(first.terminate().code(), Some(0));
    let mut given = Vec::new();
    for reservation in [4, 5] {
        fs::copy(&copy, &database).unwrap();
        let mut restored = Payrelay::start(Options::new(dir.path(), &[]));
        given.extend(pay(&mut Client::connect(restored.addr()), 1, [reservation]));
        assert_eq!(restored.terminate().code(), Some(0));
    }
    assert!(JUMP < given[0] && given[0] < given[1], "{given:?}");
}

/// How the database was copied before it was lost.
#[derive(Clone, Copy, PartialEq)]
enum Copied {
    ByBackup,
    /// The files of a stopped payrelay, against the documentation.
    Plainly,
}

/// A payrelay with Kafka behind a proxy.
struct Node {
    dir: tempfile::TempDir,
    broker: Broker,
    proxy: Proxy,
}

impl Node {
    fn new() -> Self {
        let (broker, proxy) = Broker::start_behind_proxy("4.4.0");
        let dir = tempfile::tempdir().unwrap();
        Self { dir, broker, proxy }
    }

    fn start(&self) -> (Payrelay, Client) {
        let bootstrap = self.broker.bootstrap();
        let env = [
            ("PAYRELAY_PUBLISHER_KIND", "kafka"),
            ("PAYRELAY_KAFKA_BOOTSTRAP_SERVERS", bootstrap.as_str()),
        ];
        let payrelay = Payrelay::start(Options::new(self.dir.path(), &env));
        let client = Client::connect(payrelay.addr());
        (payrelay, client)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn number(&self, sql: &str) -> i64 {
        read(&self.path("payrelay.db"), sql)
    }

    fn wait_for_deliveries(&self, count: i64) {
        // A record may be accepted and delivered before the relay has marked it.
        let sql = "SELECT count(*) FROM delivery JOIN outbox ON outbox.id = outbox_id \
                   WHERE delivery.status = 'DELIVERED' AND outbox.status = 'PUBLISHED'";
        wait_until("the deliveries", 3 * LIMIT, || self.number(sql) == count);
    }

    /// Ten payments are published; ten are in the copy and not published; five are paid after it.
    fn lose_the_database(&mut self, how: Copied) {
        let (mut payrelay, mut client) = self.start();
        pay(&mut client, 1, 1..=10);
        self.wait_for_deliveries(10);
        self.proxy.cut();
        pay(&mut client, 1, 11..=20);
        let copy = self.path("copy.db");
        if how == Copied::ByBackup {
            assert_eq!(backup(self.dir.path(), &copy).status.code(), Some(0));
        } else {
            assert_eq!(payrelay.terminate().code(), Some(0));
            fs::copy(self.path("payrelay.db"), &copy).unwrap();
            (payrelay, client) = self.start();
        }
        self.proxy.heal();
        pay(&mut client, 1, 21..=25);
        self.wait_for_deliveries(25);
        payrelay.kill9();
        for suffix in ["", "-wal", "-shm"] {
            fs::remove_file(self.path(&format!("payrelay.db{suffix}"))).unwrap();
        }
    }
}

/// What was published after the copy is on the topic already; what was accepted after it is not in
/// the database any more.
fn a_restored_node_publishes_nothing_twice(how: Copied) {
    let mut node = Node::new();
    node.lose_the_database(how);
    fs::copy(node.path("copy.db"), node.path("payrelay.db")).unwrap();
    node.proxy.cut();
    let (mut payrelay, mut client) = node.start();
    let mut given = pay(&mut client, 2, [100]);
    assert!(
        match how {
            Copied::ByBackup => given[0] > JUMP,
            Copied::Plainly => given == [21],
        },
        "{given:?}"
    );
    node.proxy.heal();
    node.wait_for_deliveries(21);
    // Each of the five payments that are lost is a dead letter, for a person to see.
    let letters = "SELECT count(*) FROM dead_letter WHERE state = 'OPEN'";
    wait_until("what was lost to be reported", LIMIT, || {
        node.number(letters) == 5
    });
    if how == Copied::Plainly {
        // The id was given twice: the event gets another one. The payment keeps its own, which a
        // client has.
        payrelay.wait_for_log("the database is an older copy", LIMIT);
        payrelay.wait_for_log("1 unpublished events have new ids", LIMIT);
        given.extend(pay(&mut client, 2, [101]));
        assert!(given[1] > JUMP, "{given:?}");
        node.wait_for_deliveries(22);
    }
    let ids: Vec<i64> = topic::read(&node.broker.bootstrap(), "payment-event", LIMIT)
        .iter()
        .map(|record| record.value.parse().unwrap())
        .collect();
    assert_eq!(ids, (1..=25).chain(given).collect::<Vec<_>>());
    let unpublished = node.number("SELECT count(*) FROM outbox WHERE status = 'INIT'");
    assert_eq!(unpublished, 0);
    assert_eq!(payrelay.terminate().code(), Some(0));
}

#[test]
fn a_node_restored_from_a_backup_publishes_nothing_twice() {
    a_restored_node_publishes_nothing_twice(Copied::ByBackup);
}

#[test]
fn a_node_restored_from_a_plain_copy_publishes_nothing_twice() {
    a_restored_node_publishes_nothing_twice(Copied::Plainly);
}
