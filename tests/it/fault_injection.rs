//! The machine fails: the power, the disk, the file, the clock, threads and memory. What is
//! promised then is in docs/explanation/failure-modes.md.

mod clock;
mod damage;
mod full;
mod memory;
mod power;
mod sync;

use std::process::ExitStatus;

use testkit::hostile::Machine;
use testkit::hostile::load::{
    Acknowledged, Answers, Connecting, LIMIT, NO_RESERVE, for_at_least, load, number, request,
    verify,
};
use testkit::process::Payrelay;
use testkit::wait_for;

/// Has the process killed in the midst of its work, with the journal and the files in exact
/// agreement.
fn kill(machine: &Machine, mut payrelay: Payrelay) {
    machine.set("die", "");
    // Where everything is delivered already, nothing but this is written any more.
    let answer = Connecting::new(payrelay.addr()).post(&request(1, 1));
    assert!(
        answer.is_err(),
        "it was to be killed before it wrote this: {answer:?}"
    );
    exit(&mut payrelay);
    machine.clear("die");
}

/// Waits for an exit that comes by itself.
fn exit(payrelay: &mut Payrelay) -> ExitStatus {
    wait_for("the end of the process", LIMIT, || payrelay.try_exit())
}
