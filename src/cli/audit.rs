//! `payrelay audit`: a report of everything that is inconsistent.

use std::error::Error;
use std::path::Path;
use std::sync::Arc;

use clap::Args;
use payrelay::audit::{self, AuditError, AuditOptions, AuditProgress, AuditReport};
use payrelay::config::LoadedConfig;
use payrelay::domain::timestamp::Timestamp;
use payrelay::store::OfflineStore;
use payrelay::store::operation::{
    self, AuditSummary, Operation, OperationOutcome, OperationRecord,
};

use super::exit_code;
use super::local_user::local_user_origin;
use super::output::{Output, print_config_error, print_error, print_note, print_open_error};
use super::progress::{Measure, Progress};

#[derive(Args)]
pub(super) struct AuditCommand {
    /// Reads the database alone, and does not connect to Kafka
    #[arg(long)]
    file_only: bool,
    /// How many examples of each finding are shown
    #[arg(long, value_name = "N", default_value_t = 10)]
    limit: usize,
    /// Prints one JSON object
    #[arg(long)]
    json: bool,
}

impl AuditCommand {
    pub(super) fn run(&self, loaded: &LoadedConfig) -> u8 {
        let options = AuditOptions {
            file_only: self.file_only,
            limit: self.limit,
        };
        let progress = Arc::new(AuditProgress::default());
        let shared = Arc::clone(&progress);
        let shown = (!self.json).then(|| Progress::show("audit", move || measure_audit(&shared)));
        let report = audit::run_audit(&loaded.config, options, &progress);
        drop(shown);
        self.record(&loaded.config.database.path, report.as_ref());
        let report = match report {
            Ok(report) => report,
            Err(AuditError::Open(error)) => return print_open_error(&error),
            Err(AuditError::Config(problems)) => {
                return print_config_error(problems.in_file(loaded.file.as_deref()));
            }
            Err(error) => {
                print_error(error);
                return exit_code::TEMPORARY;
            }
        };
        let mut output = Output::default();
        if self.json {
            // Serializing our own types cannot fail.
            output.line(serde_json::to_string(&report).unwrap_or_default());
        } else {
            output.line(&report);
        }
        output.exit_code(if report.is_clean() {
            exit_code::OK
        } else {
            exit_code::PARTIAL
        })
    }

    /// Records that it ended, for `status`. A copy stays as it is, and so does a damaged file.
    fn record(&self, path: &Path, report: Result<&AuditReport, &AuditError>) {
        let (outcome, summary) = match report {
            Err(AuditError::Open(_) | AuditError::Config(_)) => return,
            Err(_) => (OperationOutcome::Failed, None),
            Ok(report) if report.is_of_copy() || report.is_damaged() => return,
            Ok(report) => {
                let summary = AuditSummary {
                    findings: u32::try_from(report.findings.len()).unwrap_or(u32::MAX),
                    file_only: self.file_only,
                };
                let outcome = if report.is_clean() {
                    OperationOutcome::Succeeded
                } else {
                    OperationOutcome::Findings
                };
                (outcome, Some(summary))
            }
        };
        if let Err(error) = record_audit(path, outcome, summary) {
            print_note(&format!(
                "payrelay status will not show this audit: the database could not record it: \
                    {error}"
            ));
        }
    }
}

/// First the topic is read, then the database is checked.
fn measure_audit(progress: &AuditProgress) -> Measure {
    let (done, total) = progress.checks();
    if total > 0 {
        return Measure::Checks { done, total };
    }
    match progress.offsets() {
        (_, 0) => Measure::Time,
        (done, total) => Measure::Offsets { done, total },
    }
}

/// Records an audit as `backup` does: in a short transaction, also while payrelay runs.
fn record_audit(
    path: &Path,
    outcome: OperationOutcome,
    summary: Option<AuditSummary>,
) -> Result<(), Box<dyn Error>> {
    let record = OperationRecord {
        ended_at: Timestamp::now(),
        origin: local_user_origin(),
    };
    let mut database = OfflineStore::open(path)?;
    database
        .write(|tx| operation::record_operation(tx, Operation::Audit, outcome, summary, &record))?;
    Ok(())
}
