//! `payrelay selftest`: pays a scratch payrelay, kills it, starts it again, and looks for each
//! payment that was answered. So an operator sees whether this disk keeps what it has synced.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};
use std::{env, io};

use clap::Args;
use payrelay::audit::{AuditOptions, AuditProgress, run_audit};
use payrelay::config::Config;
use payrelay::runtime::plural::counted;
use payrelay::store::{OfflineStore, timeline};
use serde::Serialize;

use super::exit_code;
use super::output::{Output, print_error, print_temporary_error};
use super::progress::{Measure, Progress};
use super::scratch::{ScratchFolder, ScratchPayrelay, pay_reservation};
use super::table::show_age;

#[derive(Args)]
pub(super) struct SelftestCommand {
    /// How many times it is killed
    #[arg(long, value_name = "N", default_value_t = 20)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=10_000))]
    rounds: u32,
    /// A folder on the disk to test; the scratch database in it is removed [default: the current
    /// folder]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Prints one JSON object
    #[arg(long)]
    json: bool,
}

/// How many clients pay at a time.
const CLIENTS: usize = 4;

/// Each round is killed after a part of this.
const ROUND_MS: u64 = 400;

/// The result.
#[derive(Debug, Serialize)]
struct SelftestReport {
    kills: u32,
    seconds: f64,
    answered: usize,
    /// Answered payments that the database does not have.
    lost: usize,
    audit_is_clean: bool,
}

/// The reservation of each answered payment, by the payment's id.
type Answered = BTreeMap<i64, i64>;

impl SelftestCommand {
    pub(super) fn run(&self) -> u8 {
        let folder = self.dir.clone().map_or_else(env::current_dir, Ok);
        let scratch = folder.and_then(|folder| ScratchFolder::create(&folder, "off"));
        let mut scratch = match scratch {
            Ok(scratch) => scratch,
            Err(error) => return print_temporary_error(format_args!("--dir: {error}")),
        };
        let begun = Instant::now();
        let checked = self
            .kill_repeatedly(&scratch)
            .and_then(|answered| check_answered(&scratch, &answered));
        let (answered, lost, audit_is_clean) = match checked {
            Ok(checked) => checked,
            Err(error) => return print_temporary_error(error),
        };
        let report = SelftestReport {
            kills: self.rounds,
            seconds: begun.elapsed().as_secs_f64(),
            answered,
            lost,
            audit_is_clean,
        };
        self.print(&report, &mut scratch)
    }

    fn print(&self, report: &SelftestReport, scratch: &mut ScratchFolder) -> u8 {
        let mut output = Output::default();
        if self.json {
            output.json(report);
        } else {
            output.line(format_args!(
                "{} in {}: {} answered, {} there; audit: {}",
                counted(report.kills, "kill"),
                show_age(Duration::from_secs_f64(report.seconds)),
                counted(report.answered, "payment"),
                report.answered - report.lost,
                if report.audit_is_clean {
                    "nothing found"
                } else {
                    "findings"
                }
            ));
        }
        let is_good = report.lost == 0 && report.audit_is_clean;
        if !is_good {
            scratch.keep();
            print_error(format_args!(
                "payments were lost or inconsistent; the database is kept in {}",
                scratch.path().display()
            ));
        }
        output.exit_code(if is_good {
            exit_code::OK
        } else {
            exit_code::PARTIAL
        })
    }

    /// Returns the answered payments of all rounds.
    fn kill_repeatedly(&self, scratch: &ScratchFolder) -> io::Result<Answered> {
        let next = AtomicI64::new(1);
        let mut answered = Answered::new();
        let rounds = Arc::new(AtomicU64::new(0));
        let done = Arc::clone(&rounds);
        let total = u64::from(self.rounds);
        let _progress = (!self.json).then(|| {
            Progress::show("selftest", move || Measure::Count {
                done: done.load(Relaxed),
                total,
            })
        });
        for _ in 0..self.rounds {
            let payrelay = ScratchPayrelay::start(scratch)?;
            let address = payrelay.address();
            let stop = AtomicBool::new(false);
            let killed = thread::scope(|scope| {
                let clients: Vec<_> = (0..CLIENTS)
                    .map(|_| scope.spawn(|| pay_until_stopped(address, &next, &stop)))
                    .collect();
                let time = Duration::from_millis(fastrand::u64(ROUND_MS / 4..=ROUND_MS));
                let _ = crossbeam_channel::after(time).recv();
                let killed = payrelay.kill();
                stop.store(true, Relaxed);
                for client in clients {
                    answered.extend(client.join().unwrap_or_default());
                }
                killed
            });
            killed?;
            rounds.fetch_add(1, Relaxed);
        }
        Ok(answered)
    }
}

/// Pays one reservation after the other. A request without an answer may have been stored or not.
fn pay_until_stopped(address: SocketAddr, next: &AtomicI64, stop: &AtomicBool) -> Answered {
    let mut answered = Answered::new();
    while !stop.load(Relaxed) {
        let reservation = next.fetch_add(1, Relaxed);
        let Ok(response) = pay_reservation(address, 1, reservation, 5) else {
            continue;
        };
        if response.status == 201
            && let Some(id) = response.body["payments"][0]["id"].as_i64()
        {
            answered.insert(id, reservation);
        }
    }
    answered
}

/// Starts payrelay a last time, as after a crash, and looks for each payment. Returns how many were
/// answered, how many are lost, and whether the audit found nothing.
fn check_answered(
    scratch: &ScratchFolder,
    answered: &Answered,
) -> io::Result<(usize, usize, bool)> {
    ScratchPayrelay::start(scratch)?.kill()?;
    let path = scratch.database();
    let database = OfflineStore::open_to_read(&path).map_err(io::Error::other)?;
    let mut lost = 0;
    for (id, reservation) in answered {
        let found = database
            .read(|connection| timeline::find_payment_timeline(connection, *id))
            .map_err(io::Error::other)?;
        let is_there = found.is_some_and(|it| it.payment.reservation_id == *reservation);
        lost += usize::from(!is_there);
    }
    Ok((answered.len(), lost, audit_is_clean(&path)?))
}

fn audit_is_clean(database: &Path) -> io::Result<bool> {
    let variables = BTreeMap::from([(
        "PAYRELAY_DATABASE_PATH".to_owned(),
        database.to_string_lossy().into_owned(),
    )]);
    let loaded = Config::load("", &variables).map_err(io::Error::other)?;
    let options = AuditOptions {
        file_only: true,
        limit: 10,
    };
    let report =
        run_audit(&loaded.config, options, &AuditProgress::default()).map_err(io::Error::other)?;
    Ok(report.is_clean())
}
