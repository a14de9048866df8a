//! Backups beside the real binary, and what a node does that was restored from one.

use std::fs;
use std::path::Path;
use std::process::Output;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rusqlite::{Connection, OpenFlags};

use testkit::http::{Client, pay};
use testkit::kafka::Broker;
use testkit::process::{Options, Payrelay, run_to_exit};
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

#[test]
fn a_backup_is_whole_while_clients_post() {
    let dir = tempfile::tempdir().unwrap();
    let payrelay = Payrelay::start(Options::new(dir.path(), &[]));
    let mut client = Client::connect(payrelay.addr());
    for turn in 0..50 {
        pay(&mut client, turn, turn * 1000..(turn + 1) * 1000);
    }
    let acknowledged = AtomicI64::new(50_000);
    let stop = AtomicBool::new(false);
    let slowest_ms = AtomicI64::new(0);
    thread::scope(|scope| {
        for number in 1..=4 {
            let (acknowledged, stop, slowest_ms, address) =
                (&acknowledged, &stop, &slowest_ms, payrelay.addr());
            scope.spawn(move || {
                let mut client = Client::connect(address);
                for turn in 0.. {
                    let asked = Instant::now();
                    pay(&mut client, number, [1_000_000 * number + turn]);
                    acknowledged.fetch_add(1, Ordering::SeqCst);
                    slowest_ms.fetch_max(
                        i64::try_from(asked.elapsed().as_millis()).unwrap(),
                        Ordering::SeqCst,
                    );
                    if stop.load(Ordering::SeqCst) {
                        return;
                    }
                }
            });
        }
        // Also when something here fails: the scope waits for the threads.
        let _over = StopOnDrop(&stop);
        for number in 0..3 {
            let before = acknowledged.load(Ordering::SeqCst);
            let copy = dir.path().join(format!("copy-{number}.db"));
            let began = Instant::now();
            let output = backup(dir.path(), &copy);
            assert_eq!(output.status.code(), Some(0), "{output:?}");
            let meanwhile = acknowledged.load(Ordering::SeqCst) - before;
            println!(
                "{meanwhile} requests in the {:.1?} of a backup",
                began.elapsed()
            );
            assert!(meanwhile > 0, "no client could pay during the backup");
            assert_eq!(read::<String>(&copy, "PRAGMA integrity_check"), "ok");
            let payments: i64 = read(&copy, "SELECT count(*) FROM payment");
            assert!(
                payments >= before,
                "{payments} of {before} acknowledged payments"
            );
            for table in ["outbox", "payment_history"] {
                assert_eq!(
                    read::<i64>(&copy, &format!("SELECT count(*) FROM {table}")),
                    payments,
                    "{table}"
                );
            }
            assert_eq!(
                read::<i64>(&copy, "SELECT max(id) FROM payment"),
                payments,
                "no gaps"
            );
            assert!(read::<Option<i64>>(&copy, "SELECT backed_up_at FROM node").is_some());
        }
    });
    println!("the slowest answer: {slowest_ms:?} ms");
    assert_eq!(
        read::<Option<i64>>(
            &dir.path().join("payrelay.db"),
            "SELECT backed_up_at FROM node"
        ),
        None
    );
}

#[test]
fn a_backup_that_cannot_be_is_refused_and_leaves_nothing() {
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
    let refused = run_to_exit(Options::new(dir.path(), &env));
    let error = String::from_utf8_lossy(&refused.stderr);
    assert!(
        refused.status.code() == Some(78) && error.contains("payrelay.db-wal"),
        "{error}"
    );
    assert_eq!(fs::read(&copy).unwrap(), fs::read(&database).unwrap());
    for suffix in ["-wal", "-shm"] {
        fs::remove_file(dir.path().join(format!("payrelay.db{suffix}"))).unwrap();
    }

    slack.start_again();
    let mut payrelay = start();
    assert!(
        payrelay.log().contains("this database is a backup of 20"),
        "{}",
        payrelay.log()
    );
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
    let ids: Vec<i64> = slack
        .lines()
        .iter()
        .map(|line| line.split(' ').nth(1).unwrap().parse().unwrap())
        .collect();
    assert_eq!(ids, [1, 2, 3, jumped, next]);
    let page = client.get("/users/1/payment-history").json();
    let history: Vec<_> = page["payments"]
        .as_array()
        .unwrap()
        .iter()
        .map(|p| p["id"].as_i64().unwrap())
        .collect();
    assert_eq!(history, [next, jumped, 3, 2, 1]);

    assert_eq!(payrelay.terminate().code(), Some(0));
    let payrelay = start();
    assert!(!payrelay.log().contains("is a backup"), "it says so once");
    assert_eq!(
        pay(&mut Client::connect(payrelay.addr()), 1, [6]),
        [next + 1]
    );
}

#[test]
fn the_same_backup_put_back_twice_gives_no_id_twice() {
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

/// What was published after the backup is on the topic already; what was accepted after it is not
/// in the database any more. `is_backup`: restored from a backup, or, against the documentation,
/// from a plain copy of the files.
fn a_restored_node_sends_nothing_again(is_backup: bool) {
    let (broker, mut proxy) = Broker::start_behind_proxy("4.4.0");
    let dir = tempfile::tempdir().unwrap();
    let database = dir.path().join("payrelay.db");
    let copy = dir.path().join("copy.db");
    let env = [
        ("PAYRELAY_PUBLISHER_KIND", "kafka"),
        ("PAYRELAY_KAFKA_BOOTSTRAP_SERVERS", &broker.bootstrap()),
    ];
    let start = || Payrelay::start(Options::new(dir.path(), &env));
    let delivered = |count| {
        // A record may be accepted and delivered before the relay has marked it.
        let sql = "SELECT count(*) FROM delivery JOIN outbox ON outbox.id = outbox_id \
                   WHERE delivery.status = 'DELIVERED' AND outbox.status = 'PUBLISHED'";
        wait_until("the deliveries", 3 * LIMIT, || {
            read::<i64>(&database, sql) == count
        });
    };
    let mut payrelay = start();
    let mut client = Client::connect(payrelay.addr());
    pay(&mut client, 1, 1..=10);
    delivered(10);
    proxy.cut();
    pay(&mut client, 1, 11..=20);
    if is_backup {
        assert_eq!(backup(dir.path(), &copy).status.code(), Some(0));
    } else {
        assert_eq!(payrelay.terminate().code(), Some(0));
        fs::copy(&database, &copy).unwrap();
        payrelay = start();
        client = Client::connect(payrelay.addr());
    }
    proxy.heal();
    pay(&mut client, 1, 21..=25);
    delivered(25);
    payrelay.kill9();

    for suffix in ["", "-wal", "-shm"] {
        fs::remove_file(dir.path().join(format!("payrelay.db{suffix}"))).unwrap();
    }
    fs::copy(&copy, &database).unwrap();
    proxy.cut();
    let mut payrelay = start();
    let mut client = Client::connect(payrelay.addr());
    let mut given = pay(&mut client, 2, [100]);
    assert!(
        if is_backup {
            given[0] > JUMP
        } else {
            given == [21]
        },
        "{given:?}"
    );
    proxy.heal();
    let letters = "SELECT count(*) FROM dead_letter WHERE state = 'OPEN'";
    let found = if is_backup {
        // Each of the five payments that are lost is a dead letter, for a person to see.
        delivered(21);
        wait_until("what was lost to be delivered", LIMIT, || {
            read::<i64>(&database, letters) == 5
        });
        topic::read(&broker.bootstrap(), "payment-event", LIMIT)
    } else {
        // The id was given twice: the event gets another one. The payment keeps its own, which a
        // client has.
        delivered(21);
        wait_until("what was lost to be reported", LIMIT, || {
            read::<i64>(&database, letters) == 5
        });
        payrelay.wait_for_log("the database is an older copy", LIMIT);
        payrelay.wait_for_log("1 unpublished events have new ids", LIMIT);
        given.extend(pay(&mut client, 2, [101]));
        assert!(given[1] > JUMP, "{given:?}");
        delivered(22);
        topic::read(&broker.bootstrap(), "payment-event", LIMIT)
    };
    let ids: Vec<i64> = found
        .iter()
        .map(|record| record.value.parse().unwrap())
        .collect();
    assert_eq!(ids, (1..=25).chain(given).collect::<Vec<_>>());
    assert_eq!(
        read::<i64>(
            &database,
            "SELECT count(*) FROM outbox WHERE status = 'INIT'"
        ),
        0
    );
    assert_eq!(payrelay.terminate().code(), Some(0));
}

#[test]
fn a_node_restored_from_a_backup_sends_nothing_again() {
    a_restored_node_sends_nothing_again(true);
}

#[test]
fn a_node_put_back_by_a_plain_copy_sends_nothing_again_either() {
    a_restored_node_sends_nothing_again(false);
}
