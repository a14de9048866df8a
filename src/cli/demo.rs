//! `payrelay demo`: a scratch payrelay that gets payments, to look at. It never pays another one.

use std::env;
use std::time::{Duration, Instant};

use clap::Args;
use payrelay::runtime::plural::counted;

use super::exit_code;
use super::output::{Output, print_note, print_temporary_error};
use super::scratch::{ScratchFolder, ScratchPayrelay, pay_reservation};

#[derive(Args)]
pub(super) struct DemoCommand {
    /// Payments a second
    #[arg(long, value_name = "N", default_value_t = 20)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=1000))]
    rate: u32,
    /// For how long it pays
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=86_400))]
    seconds: u64,
    /// How many payments of a hundred are for a reservation that is paid already
    #[arg(long, value_name = "PERCENT", default_value_t = 10)]
    #[arg(value_parser = clap::value_parser!(u8).range(0..=100))]
    duplicates: u8,
}

impl DemoCommand {
    pub(super) fn run(&self) -> u8 {
        // The folder for temporary files: its path is short enough for a socket.
        let scratch = match ScratchFolder::create(&env::temp_dir(), "") {
            Ok(scratch) => scratch,
            Err(error) => return print_temporary_error(format_args!("a scratch folder: {error}")),
        };
        let payrelay = match ScratchPayrelay::start(&scratch) {
            Ok(payrelay) => payrelay,
            Err(error) => return print_temporary_error(error),
        };
        let mut output = Output::default();
        output.line(format_args!(
            "demo on http://{} with a scratch database; {} a second for {} s; Ctrl-C ends it",
            payrelay.address(),
            counted(self.rate, "payment"),
            self.seconds
        ));
        print_note(&format!(
            "look at it: payrelay --config {} status --watch",
            scratch.config().display()
        ));
        let counts = self.pay(&payrelay);
        output.line(format_args!(
            "{} COMPLETED, {} FAILED, {} without an answer",
            counts.completed, counts.failed, counts.unanswered
        ));
        output.exit_code(exit_code::OK)
    }

    fn pay(&self, payrelay: &ScratchPayrelay) -> DemoCounts {
        let mut counts = DemoCounts::default();
        let interval = Duration::from_secs(1) / self.rate;
        let begun = Instant::now();
        let end = begun + Duration::from_secs(self.seconds);
        let mut due = begun;
        let mut last = 0;
        while due < end {
            let _ = crossbeam_channel::at(due).recv();
            due += interval;
            let again = last > 0 && fastrand::u8(0..100) < self.duplicates;
            let reservation = if again {
                fastrand::i64(1..=last)
            } else {
                last + 1
            };
            last = last.max(reservation);
            let price = 1000 * fastrand::i64(10..200);
            let user = fastrand::i64(1..=20);
            match pay_reservation(payrelay.address(), user, reservation, price) {
                Ok(response) => match response.body["payments"][0]["status"].as_str() {
                    Some("COMPLETED") => counts.completed += 1,
                    Some(_) => counts.failed += 1,
                    None => counts.unanswered += 1,
                },
                Err(_) => counts.unanswered += 1,
            }
        }
        counts
    }
}

/// The outcomes of the payments.
#[derive(Debug, Default)]
struct DemoCounts {
    completed: u64,
    failed: u64,
    unanswered: u64,
}
