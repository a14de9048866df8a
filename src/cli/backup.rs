//! `payrelay backup`: a copy of the database.

use std::path::PathBuf;

use clap::Args;
use payrelay::config::Config;
use payrelay::domain::timestamp::Timestamp;
use payrelay::store::backup::write_backup;

use super::output::{output_line, print_config_error, print_temporary_error};
use super::run_command_with_database;

#[derive(Args)]
pub(super) struct BackupCommand {
    /// The copy: a file that does not exist yet
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

impl BackupCommand {
    pub(super) fn run(&self, config: &Config) -> u8 {
        run_command_with_database(config, |database| {
            match write_backup(&database, &self.file, Timestamp::now()) {
                Ok(bytes) => output_line(format_args!("{}: {bytes} bytes", self.file.display())),
                Err(error) if error.is_temporary() => print_temporary_error(error),
                Err(error) => print_config_error(error),
            }
        })
    }
}
