//! The file is damaged, foreign, newer, missing or not to be written: a clear refusal or correct
//! work, never a panic.

use std::fs;
use std::path::Path;

use rusqlite::Connection;
use serde_json::json;

use super::{Connecting, LIMIT, load, number, request, verify};
use testkit::hostile::Machine;
use testkit::process::{Payrelay, run_to_exit};
use testkit::store::wait_until_all_is_delivered;

/// As large as it takes for the tables to have pages of their own.
const PAYMENTS: usize = 2000;

const PAGE: usize = 4096;

/// A machine with a database that was closed in peace.
fn with_payments() -> Machine {
    let machine = Machine::new();
    let mut payrelay = Payrelay::start(machine.options(&[]));
    load(&machine, payrelay.addr(), 8, |answers| {
        answers.count() > PAYMENTS
    });
    wait_until_all_is_delivered(&machine.database(), LIMIT);
    assert_eq!(payrelay.terminate().code(), Some(0));
    machine
}

/// A machine with a database whose process was killed, so that its log is there.
fn killed_with_payments() -> Machine {
    let machine = Machine::new();
    let mut payrelay = Payrelay::start(machine.options(&[]));
    load(&machine, payrelay.addr(), 8, |answers| {
        answers.count() > 300
    });
    payrelay.kill9();
    machine
}

#[track_caller]
fn refused(machine: &Machine, words: &[&str]) {
    let output = run_to_exit(machine.options(&[]));
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(78), "{error}");
    for word in words.iter().chain(&["database.path"]) {
        assert!(error.contains(word), "{word:?} is missing from: {error}");
    }
    assert!(!error.contains("panic"), "{error}");
}

fn overwrite(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).unwrap();
    change(&mut bytes);
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_database_that_cannot_be_opened_is_refused_with_advice() {
    let machine = with_payments();
    let path = machine.database();
    let sound = fs::read(machine.database()).unwrap();
    let damaged = "restore a backup";
    // The file's first words, the size of its pages, its first page's kind, and each half of it cut
    // off.
    overwrite(&path, |bytes| bytes[3] ^= 0x20);
    refused(&machine, &[damaged]);
    fs::write(&path, &sound).unwrap();
    overwrite(&path, |bytes| bytes[16..18].copy_from_slice(&[3, 7]));
    refused(&machine, &[damaged]);
    fs::write(&path, &sound).unwrap();
    overwrite(&path, |bytes| bytes[100] = 0x77);
    refused(&machine, &[damaged]);
    fs::write(&path, &sound[..sound.len() / 2]).unwrap();
    refused(&machine, &[damaged]);
    fs::write(&path, &sound[..60]).unwrap();
    refused(&machine, &[damaged]);
    assert_eq!(
        fs::read(&path).unwrap().len(),
        60,
        "what is refused is left as it is"
    );

    fs::remove_file(&path).unwrap();
    Connection::open(&path)
        .unwrap()
        .execute_batch("CREATE TABLE theirs (x)")
        .unwrap();
    refused(&machine, &["did not create this SQLite file"]);
    fs::write(&path, &sound).unwrap();
    Connection::open(&path)
        .unwrap()
        .pragma_update(None, "user_version", 99)
        .unwrap();
    refused(&machine, &["schema is version 99", "use a newer payrelay"]);

    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    refused(&machine, &["must be a file"]);
    fs::remove_dir(&path).unwrap();
    // An empty file is a new database.
    fs::write(&path, "").unwrap();
    let mut payrelay = Payrelay::start(machine.options(&[]));
    assert_eq!(
        Connecting::new(payrelay.addr())
            .post(&request(1, 1))
            .unwrap()
            .0,
        201
    );
    assert_eq!(payrelay.terminate().code(), Some(0));
}

#[test]
fn an_unwritable_database_is_refused() {
    for what in [
        "30 payrelay.db",
        "30 payrelay.db-wal",
        "30",
        "13 payrelay.db",
        "13 payrelay.db-wal",
        "13 payrelay.db.lock",
    ] {
        let machine = killed_with_payments();
        let before = fs::read(machine.database()).unwrap();
        machine.set("readonly", what);
        refused(&machine, &["writable"]);
        assert_eq!(fs::read(machine.database()).unwrap(), before, "{what}");
        machine.clear("readonly");
        drop(Payrelay::start(machine.options(&[])));
    }
}

#[test]
fn a_wal_without_its_database_is_kept() {
    let machine = killed_with_payments();
    let file = machine.database();
    let log = machine.folder().join("payrelay.db-wal");
    let saved = fs::read(&file).unwrap();
    let logged = fs::read(&log).unwrap();
    fs::write(&file, "").unwrap();
    refused(&machine, &["missing or empty", "payrelay.db-wal"]);
    fs::remove_file(&file).unwrap();
    refused(&machine, &["missing or empty", "payrelay.db-wal"]);
    assert_eq!(fs::read(&log).unwrap(), logged);
    fs::write(&file, saved).unwrap();
    drop(Payrelay::start(machine.options(&[])));
    verify(&Connection::open(&file).unwrap(), &[]);
}

#[test]
fn the_wal_of_another_database_is_refused_and_the_file_is_unchanged() {
    let ours = with_payments();
    let theirs = killed_with_payments();
    let before = fs::read(ours.database()).unwrap();
    let log = ours.folder().join("payrelay.db-wal");
    fs::copy(theirs.folder().join("payrelay.db-wal"), &log).unwrap();
    refused(
        &ours,
        &[
            "its WAL belongs to another node's database",
            "restore a backup",
        ],
    );
    assert_eq!(fs::read(ours.database()).unwrap(), before);
    fs::remove_file(log).unwrap();
    drop(Payrelay::start(ours.options(&[])));
    verify(&Connection::open(ours.database()).unwrap(), &[]);
}

/// The page of the file that the last row of a table is on: the one that the next payment is
/// written to.
fn last_leaf(path: &Path, table: &str) -> usize {
    let connection = Connection::open(path).unwrap();
    let root = number(
        &connection,
        &format!("SELECT rootpage FROM sqlite_schema WHERE name = '{table}'"),
    );
    let file = fs::read(path).unwrap();
    let mut page = usize::try_from(root).unwrap();
    // https://sqlite.org/fileformat2.html#b_tree_pages: 5 is an interior page, whose right-most
    // child is at 8.
    while file[(page - 1) * PAGE] == 5 {
        let child = (page - 1) * PAGE + 8;
        page = u32::from_be_bytes(file[child..child + 4].try_into().unwrap())
            .try_into()
            .unwrap();
    }
    page
}

/// Puts garbage over a page, without touching what SQLite looks at when it opens the file.
fn spoil(machine: &Machine, table: &str) {
    let page = last_leaf(&machine.database(), table);
    overwrite(&machine.database(), |bytes| {
        bytes[(page - 1) * PAGE..page * PAGE].fill(0xA5);
    });
}

#[test]
fn corruption_found_while_running_stops_payments_and_is_logged_once() {
    // One that a payment writes to, but that is not read before.
    let machine = with_payments();
    spoil(&machine, "payment_paid");
    let mut payrelay = Payrelay::start(machine.options(&[]));
    let mut client = Connecting::new(payrelay.addr());
    for n in 0..50 {
        let (status, problem) = client.post(&request(1_000_001 + n, 1)).unwrap();
        assert_eq!(status, 503, "{problem}");
        assert!(
            problem["detail"]
                .as_str()
                .unwrap()
                .contains("the database is damaged"),
            "{problem}"
        );
    }
    let (status, ready) = client.get("/health/ready").unwrap();
    assert_eq!(
        (status, &ready["status"]),
        (503, &json!("unavailable")),
        "{ready}"
    );
    assert!(
        ready["components"]["database"]["error"]
            .as_str()
            .unwrap()
            .contains("damaged"),
        "{ready}"
    );
    assert_eq!(client.get("/health/live").unwrap().0, 200);
    assert_eq!(
        client.get("/payments/1").unwrap().0,
        200,
        "what can be read is shown"
    );
    assert!(payrelay.try_exit().is_none());
    assert_eq!(payrelay.terminate().code(), Some(0), "{}", payrelay.log());
    let log = payrelay.log();
    assert_eq!(
        log.lines()
            .filter(|line| line.contains("the database is damaged: "))
            .count(),
        1,
        "{log}"
    );
    assert!(!log.contains("panic") && log.lines().count() < 30, "{log}");
}

#[test]
fn corruption_found_by_a_reader_stops_payments() {
    let machine = with_payments();
    // The first leaf of the payments: nothing but a look at an old payment finds it.
    let connection = Connection::open(machine.database()).unwrap();
    let root = usize::try_from(number(
        &connection,
        "SELECT rootpage FROM sqlite_schema WHERE name = 'payment'",
    ))
    .unwrap();
    drop(connection);
    overwrite(&machine.database(), |bytes| {
        let root = (root - 1) * PAGE;
        assert_eq!(bytes[root], 5, "the table has more than one page");
        let cell = usize::from(u16::from_be_bytes([bytes[root + 12], bytes[root + 13]]));
        let child = u32::from_be_bytes(bytes[root + cell..root + cell + 4].try_into().unwrap());
        let page = usize::try_from(child).unwrap();
        bytes[(page - 1) * PAGE..page * PAGE].fill(0xA5);
    });
    let mut payrelay = Payrelay::start(machine.options(&[]));
    let mut client = Connecting::new(payrelay.addr());
    assert_eq!(client.post(&request(1_000_001, 1)).unwrap().0, 201);
    assert_eq!(client.get("/payments/1").unwrap().0, 503);
    assert_eq!(client.post(&request(1_000_002, 1)).unwrap().0, 503);
    assert_eq!(payrelay.terminate().code(), Some(0), "{}", payrelay.log());
}

#[test]
fn a_database_moved_while_it_is_open_accepts_no_more_payments() {
    let machine = with_payments();
    let mut payrelay = Payrelay::start(machine.options(&[]));
    let mut client = Connecting::new(payrelay.addr());
    assert_eq!(client.post(&request(1_000_001, 1)).unwrap().0, 201);
    fs::rename(machine.database(), machine.folder().join("moved.db")).unwrap();
    payrelay.wait_for_log("is not the file that was opened", LIMIT);
    assert_eq!(client.post(&request(1_000_002, 1)).unwrap().0, 503);
    assert_eq!(payrelay.terminate().code(), Some(0), "{}", payrelay.log());
    // Both are put back by a person: nothing is lost.
    fs::rename(machine.folder().join("moved.db"), machine.database()).unwrap();
    let payrelay = Payrelay::start(machine.options(&[]));
    let found = Connecting::new(payrelay.addr())
        .post(&request(1_000_001, 1))
        .unwrap()
        .1;
    assert_eq!(
        found["payments"][0]["status"], "FAILED",
        "it was paid before: {found}"
    );
}
