//! `payrelay restore`: any copy of the file takes the place of the database, or is marked where it
//! is, and no id is given twice.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::Connection;
use serde_json::{Value, json};

use testkit::http::Client;
use testkit::process::{Options, Payrelay, run_to_exit};
use testkit::wait_until;

const LIMIT: Duration = Duration::from_secs(20);

struct Node {
    dir: tempfile::TempDir,
    given: BTreeSet<i64>,
}

impl Node {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            given: BTreeSet::new(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn start(&self) -> Payrelay {
        Payrelay::start(Options::new(self.dir.path(), &[]))
    }

    /// Pays reservations; no id is ever given twice.
    fn pay(&mut self, payrelay: &Payrelay, reservations: impl IntoIterator<Item = i64>) {
        let list: Vec<Value> = reservations
            .into_iter()
            .map(|id| json!({"reservation_id": id, "seat_price": 5}))
            .collect();
        let body = json!({"user_id": 1, "reservations": list});
        let answer = Client::connect(payrelay.addr())
            .post_json("/payments", &body)
            .json();
        for payment in answer["payments"].as_array().unwrap() {
            let id = payment["id"].as_i64().unwrap();
            assert!(self.given.insert(id), "{id} was given twice");
        }
    }

    /// Exit code, standard output, standard error.
    fn run(&self, args: &[&str]) -> (Option<i32>, String, String) {
        let args = args.iter().map(|arg| (*arg).into()).collect();
        let output = run_to_exit(Options {
            args,
            ..Options::new(self.dir.path(), &[])
        });
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (
            output.status.code(),
            text(output.stdout),
            text(output.stderr),
        )
    }

    fn number(&self, sql: &str) -> i64 {
        Connection::open(self.path("payrelay.db"))
            .unwrap()
            .query_row(sql, [], |row| row.get(0))
            .unwrap()
    }

    fn wait_until_delivered(&self) {
        let waiting = "SELECT count(*) FROM outbox o LEFT JOIN delivery d ON d.outbox_id = o.id \
                       WHERE d.status IS NOT 'DELIVERED'";
        wait_until("every payment to be delivered", LIMIT, || {
            self.number(waiting) == 0
        });
    }
}

/// The files of a database that is in use, as rsync or a snapshot of the machine has them.
fn copy_files(from: &Path, to: &Path) {
    for suffix in ["", "-wal"] {
        let with = |path: &Path| PathBuf::from(format!("{}{suffix}", path.display()));
        if with(from).exists() {
            fs::copy(with(from), with(to)).unwrap();
        }
    }
}

#[test]
fn any_copy_can_be_restored_and_issues_no_id_twice() {
    for kind in [
        "backup",
        "files of a killed process",
        "the file alone, after a stop",
    ] {
        let mut node = Node::new();
        let mut payrelay = node.start();
        node.pay(&payrelay, 1..=3);
        node.wait_until_delivered();
        match kind {
            "backup" => assert_eq!(node.run(&["backup", "copy.db"]).0, Some(0)),
            "files of a killed process" => {
                payrelay.kill9();
                copy_files(&node.path("payrelay.db"), &node.path("copy.db"));
                payrelay = node.start();
            }
            _ => {
                assert_eq!(payrelay.terminate().code(), Some(0));
                copy_files(&node.path("payrelay.db"), &node.path("copy.db"));
                payrelay = node.start();
            }
        }
        // Answered, and lost with the file.
        node.pay(&payrelay, 4..=6);
        let (code, _, error) = node.run(&["restore", "copy.db", "--yes"]);
        assert!(
            code == Some(75) && error.contains("in use by another payrelay"),
            "{kind}: {error}"
        );
        payrelay.kill9();
        let (code, _, error) = node.run(&["restore", "copy.db"]);
        assert!(
            code == Some(64) && error.contains("--yes"),
            "{kind}: {error}"
        );

        let (code, said, error) = node.run(&["restore", "copy.db", "--yes"]);
        assert!(
            code == Some(0) && said.contains("restored 3 payments"),
            "{kind}: {said}{error}"
        );
        let moved = fs::read_dir(node.dir.path()).unwrap().filter_map(|entry| {
            let name = entry.unwrap().file_name().into_string().unwrap();
            name.starts_with("payrelay.db.before-").then_some(name)
        });
        let moved: Vec<_> = moved.collect();
        assert!(
            moved.len() == 1 && node.path(&moved[0]).join("payrelay.db").exists(),
            "{kind}: {moved:?}"
        );

        let payrelay = node.start();
        assert!(
            payrelay.log().contains("New ids begin at"),
            "{kind}: {}",
            payrelay.log()
        );
        node.pay(&payrelay, 4..=6);
        node.wait_until_delivered();
        assert_eq!(node.number("SELECT count(*) FROM payment"), 6, "{kind}");
        assert_eq!(
            node.number("SELECT count(*) FROM restored_copy WHERE restored_by IS NOT NULL"),
            1,
            "{kind}"
        );
        let (code, report, _) = node.run(&["audit"]);
        assert_eq!(code, Some(0), "{kind}: {report}");
    }
}

#[test]
fn a_copy_restored_twice_issues_no_id_twice() {
    let mut node = Node::new();
    let mut payrelay = node.start();
    node.pay(&payrelay, 1..=3);
    assert_eq!(node.run(&["backup", "copy.db"]).0, Some(0));
    for round in 0..3 {
        node.pay(&payrelay, 10 * round + 11..=10 * round + 13);
        payrelay.kill9();
        assert_eq!(node.run(&["restore", "copy.db", "--yes"]).0, Some(0));
        payrelay = node.start();
    }
    node.pay(&payrelay, 50..=52);
    assert_eq!(node.number("SELECT count(*) FROM payment"), 6);
}

#[test]
fn a_restored_database_is_adopted() {
    let mut node = Node::new();
    let mut payrelay = node.start();
    node.pay(&payrelay, 1..=3);
    payrelay.kill9();
    copy_files(&node.path("payrelay.db"), &node.path("copy.db"));
    payrelay = node.start();
    node.pay(&payrelay, 4..=6);
    payrelay.kill9();
    for suffix in ["", "-wal", "-shm"] {
        let _ = fs::remove_file(node.path(&format!("payrelay.db{suffix}")));
    }
    copy_files(&node.path("copy.db"), &node.path("payrelay.db"));
    assert_eq!(node.run(&["restore", "--adopt", "--yes"]).0, Some(0));
    let recorded = "SELECT count(*) FROM operation WHERE operation = 'restore' AND outcome = 'ok'";
    assert_eq!(node.number(recorded), 1);
    let payrelay = node.start();
    node.pay(&payrelay, 4..=6);
    assert_eq!(node.number("SELECT count(*) FROM payment"), 6);
}

/// The files are as litestream leaves them: two tables in the database, a folder next to it.
#[test]
fn a_copy_of_litestream_that_was_not_adopted_is_named() {
    const WARNING: &str = "litestream has replicated this database, but its folder";
    let node = Node::new();
    let mut payrelay = node.start();
    assert!(!payrelay.log().contains(WARNING), "{}", payrelay.log());
    assert_eq!(payrelay.terminate().code(), Some(0));
    let replicated = Connection::open(node.path("payrelay.db")).unwrap();
    let tables = "CREATE TABLE _litestream_seq (id INTEGER PRIMARY KEY, seq INTEGER); \
        CREATE TABLE _litestream_lock (id INTEGER);";
    replicated.execute_batch(tables).unwrap();
    drop(replicated);
    let warns = || {
        let mut payrelay = node.start();
        assert_eq!(payrelay.terminate().code(), Some(0));
        payrelay.log().contains(WARNING)
    };
    assert!(warns());
    assert_eq!(node.run(&["restore", "--adopt", "--yes"]).0, Some(0));
    assert!(!warns(), "it was adopted");
    fs::create_dir(node.path(".payrelay.db-litestream")).unwrap();
    assert!(!warns(), "it is the original");
}

#[test]
fn an_invalid_copy_is_refused_and_changes_nothing() {
    let mut node = Node::new();
    let mut payrelay = node.start();
    node.pay(&payrelay, 1..=3);
    assert_eq!(node.run(&["backup", "copy.db"]).0, Some(0));
    assert_eq!(payrelay.terminate().code(), Some(0));
    let before = fs::read(node.path("payrelay.db")).unwrap();

    fs::write(node.path("text"), "x".repeat(5000)).unwrap();
    let other = Node::new();
    drop(other.start());
    copy_files(&other.path("payrelay.db"), &node.path("other.db"));
    fs::copy(node.path("copy.db"), node.path("unsound.db")).unwrap();
    let doctor = Connection::open(node.path("unsound.db")).unwrap();
    doctor
        .execute_batch("UPDATE payment SET previous_id = NULL WHERE id = 2")
        .unwrap();
    drop(doctor);
    let mut damaged = fs::read(node.path("copy.db")).unwrap();
    damaged[4096 + 100..4096 * 3].fill(7);
    fs::write(node.path("damaged.db"), damaged).unwrap();
    let whole = fs::read(node.path("copy.db")).unwrap();
    fs::write(node.path("cut.db"), &whole[..20_000]).unwrap();
    for (copy, code, reason) in [
        ("cut.db", 1, "cut.db is damaged"),
        ("nowhere.db", 78, "nowhere.db"),
        ("text", 1, "text is damaged, or no database"),
        ("other.db", 78, "belongs to node"),
        ("payrelay.db", 78, "--adopt"),
        ("unsound.db", 1, "is inconsistent"),
        ("damaged.db", 1, ""),
    ] {
        let (exit, _, error) = node.run(&["restore", copy, "--yes"]);
        assert!(
            exit == Some(code) && error.contains(reason),
            "{copy}: {exit:?} {error}"
        );
        assert_eq!(
            fs::read(node.path("payrelay.db")).unwrap(),
            before,
            "{copy}"
        );
    }
    let refused = "SELECT count(*) FROM operation WHERE operation = 'restore' \
        AND outcome = 'findings' AND origin LIKE 'local user %'";
    assert_eq!(node.number(refused), 4);
    assert!(!node.path("payrelay.db.restore-part").exists());
    let mode = fs::metadata(node.path("payrelay.db"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
}
