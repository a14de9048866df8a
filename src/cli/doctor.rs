//! `payrelay doctor`: whether this machine, its configuration and its network are good enough. It
//! changes nothing, and posts nothing.

mod disk;
mod machine;
mod network;

use std::path::Path;

use clap::Args;
use payrelay::config::{Config, LocalConfig};
use payrelay::domain::node_id::NodeId;
use payrelay::domain::timestamp::Timestamp;
use payrelay::runtime::plural::counted;
use payrelay::service;
use payrelay::store::local_socket::database_lock_holder;
use payrelay::store::{OfflineStore, OpenError, payment};
use serde::Serialize;

use super::client::{connect_local, load_local};
use super::output::Output;
use super::table::{Align, Table, show_bytes};
use super::{configuration, exit_code};

#[derive(Args)]
pub(super) struct DoctorCommand {
    /// For how long it measures the disk; 0: not at all
    #[arg(long, value_name = "SECONDS", default_value_t = 3)]
    #[arg(value_parser = clap::value_parser!(u64).range(0..=3600))]
    disk_seconds: u64,
    /// Sends one message to each channel
    #[arg(long)]
    post_to_slack: bool,
    /// Prints one JSON object
    #[arg(long)]
    json: bool,
}

/// Whether each channel gets one message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PostToSlack {
    Yes,
    No,
}

/// How good something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Ok,
    /// Worth knowing.
    Note,
    /// It works, and not well.
    Slow,
    /// It does not work.
    Fail,
}

impl Verdict {
    fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Note => "note",
            Self::Slow => "slow",
            Self::Fail => "FAIL",
        }
    }
}

/// One line of the result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Check {
    verdict: Verdict,
    #[serde(rename = "check")]
    name: String,
    detail: String,
}

/// The lines so far.
#[derive(Debug, Default, Serialize)]
pub(super) struct Checks {
    checks: Vec<Check>,
}

impl Checks {
    fn add(&mut self, verdict: Verdict, name: impl Into<String>, detail: impl Into<String>) {
        self.checks.push(Check {
            verdict,
            name: name.into(),
            detail: detail.into(),
        });
    }

    fn is_well(&self) -> bool {
        let bad = [Verdict::Slow, Verdict::Fail];
        !self.checks.iter().any(|check| bad.contains(&check.verdict))
    }
}

impl DoctorCommand {
    pub(super) fn run(&self, file: Option<&Path>) -> u8 {
        let post = if self.post_to_slack {
            PostToSlack::Yes
        } else {
            PostToSlack::No
        };
        let checks = match run_checks(file, self.disk_seconds, post) {
            Ok(checks) => checks,
            Err(code) => return code,
        };
        let mut output = Output::default();
        if self.json {
            output.json(&checks);
        } else {
            print_checks(&checks, &mut output);
        }
        output.exit_code(if checks.is_well() {
            exit_code::OK
        } else {
            exit_code::PARTIAL
        })
    }
}

/// Checks everything.
pub(super) fn run_checks(
    file: Option<&Path>,
    disk_seconds: u64,
    post: PostToSlack,
) -> Result<Checks, u8> {
    let local = load_local(file)?;
    let mut checks = Checks::default();
    let config = check_configuration(&mut checks, file);
    let node = check_database(&mut checks, &local);
    check_socket(&mut checks, &local);
    let folder = match local.database.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    machine::check_file_system(&mut checks, folder);
    if disk_seconds > 0 {
        disk::check_sync(&mut checks, folder, disk_seconds);
    }
    machine::check_other_processes(&mut checks, &local.database);
    if let Some(config) = config {
        network::check_kafka(&mut checks, &config, node.as_ref());
        network::check_slack(&mut checks, &config.slack, post);
    }
    Ok(checks)
}

fn print_checks(checks: &Checks, output: &mut Output) {
    let mut table = Table::new(&[
        ("", Align::Left),
        ("check", Align::Left),
        ("result", Align::Left),
    ]);
    for check in &checks.checks {
        table.row([
            check.verdict.word().to_owned(),
            check.name.clone(),
            check.detail.clone(),
        ]);
    }
    table.print(output);
}

/// The whole configuration, if it can be used.
fn check_configuration(checks: &mut Checks, file: Option<&Path>) -> Option<Config> {
    let loaded = match configuration::load_configuration(file) {
        Ok(loaded) => loaded,
        Err(problems) => {
            checks.add(Verdict::Fail, "configuration", one_line(&problems));
            return None;
        }
    };
    let name = match &loaded.file {
        Some(file) => file.display().to_string(),
        None => "built-in defaults".to_owned(),
    };
    match service::check_service_config(&loaded.config) {
        Ok(()) => checks.add(Verdict::Ok, "configuration", name),
        Err(error) => checks.add(Verdict::Fail, "configuration", one_line(&error)),
    }
    for warning in loaded.warnings() {
        checks.add(Verdict::Note, "configuration", warning);
    }
    Some(loaded.config)
}

/// A report of several lines as one.
fn one_line(error: &impl ToString) -> String {
    let text = error.to_string();
    let lines: Vec<_> = text.lines().map(str::trim).collect();
    lines.join(" ")
}

/// Returns the node of the database.
fn check_database(checks: &mut Checks, local: &LocalConfig) -> Option<NodeId> {
    let database = match OfflineStore::open_to_read(&local.database) {
        Ok(database) => database,
        Err(OpenError::NoDatabase(path)) => {
            let detail = format!("{path} does not exist yet: a start creates it");
            checks.add(Verdict::Note, "database", detail);
            return None;
        }
        Err(error) => {
            checks.add(Verdict::Fail, "database", one_line(&error));
            return None;
        }
    };
    let sizes = database.file_sizes();
    let holder = match database_lock_holder(&local.database) {
        Ok(Some(holder)) => format!("process {holder} serves it"),
        Ok(None) => "no process serves it".to_owned(),
        Err(error) => format!("its lock is unknown: {error}"),
    };
    let detail = format!(
        "node {}, {}, WAL {}; {holder}",
        database.node(),
        show_bytes(sizes.database_bytes),
        show_bytes(sizes.wal_bytes)
    );
    checks.add(Verdict::Ok, "database", detail);
    check_clock(checks, &database);
    Some(database.node().clone())
}

/// A clock that was set back shows by a payment from the future. Kafka's clock cannot be asked
/// without publishing, so the clock is compared with that of Slack's host.
fn check_clock(checks: &mut Checks, database: &OfflineStore) {
    let now = Timestamp::now();
    match database.read(payment::last_payment_time) {
        Ok(Some(last)) if last > now => {
            let ahead = last.since(now).as_secs();
            let detail = format!(
                "the last payment is {} in the future: the clock was set back",
                counted(ahead, "second")
            );
            checks.add(Verdict::Fail, "clock", detail);
        }
        Ok(_) => {
            let (verdict, synchronised) = machine::judge_synchronisation();
            let detail = format!("{now}; no payment is later; {synchronised}");
            checks.add(verdict, "clock", detail);
        }
        Err(error) => checks.add(Verdict::Fail, "clock", one_line(&error)),
    }
}

fn check_socket(checks: &mut Checks, local: &LocalConfig) {
    let runs = matches!(database_lock_holder(&local.database), Ok(Some(_)));
    match connect_local(local) {
        Ok(Some(client)) => match client.get("/health/ready") {
            Ok(response) => {
                let status = response.body["status"].as_str().unwrap_or("no status");
                checks.add(Verdict::Ok, "payrelay", format!("it runs, and is {status}"));
            }
            Err(error) => {
                checks.add(Verdict::Fail, "payrelay", error.reason);
            }
        },
        Ok(None) if runs => {
            let detail = "it runs, and serves no socket that is configured here (http.socket)";
            checks.add(Verdict::Note, "payrelay", detail);
        }
        Ok(None) => checks.add(Verdict::Note, "payrelay", "it does not run"),
        Err(_) => checks.add(Verdict::Fail, "payrelay", "its socket cannot be opened"),
    }
}
