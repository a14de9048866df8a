//! The disk cannot sync: the process ends before it acknowledges what may be lost, and the next one
//! trusts nothing of it.

use std::os::unix::process::ExitStatusExt as _;
use std::time::Duration;

use super::power::fail_everywhere;
use super::{Acknowledged, LIMIT, exit, for_at_least, kill, load};
use testkit::hostile::Machine;
use testkit::process::{Payrelay, run_to_exit};

const SIGABRT: i32 = 6;

/// Under load until the process has ended because a sync of such a file failed.
fn load_until_a_sync_fails(machine: &Machine, file: &str) -> Vec<Acknowledged> {
    let mut payrelay = Payrelay::start(machine.options(&[]));
    let mut acknowledged = load(
        machine,
        payrelay.addr(),
        16,
        for_at_least(Duration::from_millis(500)),
    )
    .acknowledged;
    machine.set("eio", file);
    let answers = load(machine, payrelay.addr(), 16, for_at_least(LIMIT * 4));
    assert_eq!(
        exit(&mut payrelay).signal(),
        Some(SIGABRT),
        "{}",
        payrelay.log()
    );
    assert!(
        payrelay
            .log()
            .contains("the disk could not sync the database"),
        "{}",
        payrelay.log()
    );
    assert!(
        answers.refused.is_empty(),
        "no response may say that nothing was stored: {:?}",
        answers.refused
    );
    acknowledged.extend(answers.acknowledged);
    machine.clear("eio");
    acknowledged
}

#[test]
fn a_failed_sync_of_a_commit_ends_the_process_and_loses_no_acknowledged_payment() {
    let machine = Machine::recorded();
    let mut acknowledged = Vec::new();
    for _ in 0..2 {
        acknowledged.extend(load_until_a_sync_fails(&machine, "payrelay.db-wal"));
    }
    // What comes now is written behind what the disk has lost.
    let payrelay = Payrelay::start(machine.options(&[]));
    acknowledged.extend(
        load(
            &machine,
            payrelay.addr(),
            16,
            for_at_least(Duration::from_secs(1)),
        )
        .acknowledged,
    );
    kill(&machine, payrelay);
    fail_everywhere(&machine, &acknowledged);
}

#[test]
fn a_failed_sync_of_a_checkpoint_ends_the_process_and_loses_no_acknowledged_payment() {
    let machine = Machine::recorded();
    let mut acknowledged = load_until_a_sync_fails(&machine, "payrelay.db");
    let payrelay = Payrelay::start(machine.options(&[]));
    acknowledged.extend(
        load(
            &machine,
            payrelay.addr(),
            16,
            for_at_least(Duration::from_secs(1)),
        )
        .acknowledged,
    );
    kill(&machine, payrelay);
    fail_everywhere(&machine, &acknowledged);
}

#[test]
fn the_start_is_refused_if_the_wal_or_its_folder_cannot_be_synced() {
    let machine = Machine::new();
    let refused = |file: &str| {
        machine.set("eio", file);
        let output = run_to_exit(machine.options(&[]));
        machine.clear("eio");
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(78), "{error}");
        assert!(
            error.contains("database.path") && error.contains("the disk or its file system fails"),
            "{error}"
        );
    };
    refused(".");
    let mut payrelay = Payrelay::start(machine.options(&[]));
    load(&machine, payrelay.addr(), 1, |answers| {
        answers.count() >= 10
    });
    payrelay.kill9();
    refused("payrelay.db-wal");
    drop(Payrelay::start(machine.options(&[])));
}
