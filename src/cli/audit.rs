//! `payrelay audit`: a report of everything that is inconsistent.

use clap::Args;
use payrelay::audit::{self, AuditError, AuditOptions};
use payrelay::config::LoadedConfig;

use super::exit_code;
use super::output::{Output, print_config_error, print_error, print_open_error};
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
        let progress = (!self.json).then(|| Progress::show("audit", || Measure::Time));
        let report = audit::run_audit(&loaded.config, options);
        drop(progress);
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
}
