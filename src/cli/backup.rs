//! `payrelay backup`: a copy of the database.

use std::path::PathBuf;

use clap::Args;
use payrelay::config::Config;
use payrelay::domain::timestamp::Timestamp;
use payrelay::store::backup::write_backup;

use super::output::{config_error, print_line, temporary_error};
use super::with_database;

#[derive(Args)]
pub(super) struct Backup {
    /// The copy: a file that does not exist yet
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

impl Backup {
    pub(super) fn run(&self, config: &Config) -> u8 {
        with_database(config, |database| {
            match write_backup(&database, &self.file, Timestamp::now()) {
                Ok(bytes) => print_line(format_args!("{}: {bytes} bytes", self.file.display())),
                Err(error) if error.is_temporary() => temporary_error(error),
                Err(error) => config_error(error),
            }
        })
    }
}
