//! `payrelay backup`: a copy of the database.

use std::path::{Path, PathBuf};

use clap::Args;
use payrelay::domain::timestamp::Timestamp;
use payrelay::store::backup::{partial_backup_path, write_backup};
use payrelay::store::operation::{self, Operation, OperationOutcome, OperationRecord};
use payrelay::store::{FileSizes, OfflineStore};

use super::client::load_local;
use super::local_user::local_user_origin;
use super::output::{
    output_line, print_config_error, print_note, print_open_error, print_temporary_error,
};
use super::progress::{Measure, Progress};

#[derive(Args)]
pub(super) struct BackupCommand {
    /// The copy: a file that does not exist yet
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

impl BackupCommand {
    pub(super) fn run(&self, file: Option<&Path>) -> u8 {
        let path = match load_local(file) {
            Ok(config) => config.database,
            Err(code) => return code,
        };
        match OfflineStore::open(&path) {
            Ok(mut database) => self.write(&mut database, &path),
            Err(error) => print_open_error(&error),
        }
    }

    fn write(&self, database: &mut OfflineStore, path: &Path) -> u8 {
        let part = partial_backup_path(&self.file);
        let total = FileSizes::of_database(path).database_bytes;
        let progress = Progress::show("backup", move || Measure::Bytes {
            done: part.metadata().map_or(0, |file| file.len()),
            total,
        });
        let written = write_backup(database, &self.file, Timestamp::now());
        drop(progress);
        let outcome = if written.is_ok() {
            OperationOutcome::Succeeded
        } else {
            OperationOutcome::Failed
        };
        let record = OperationRecord {
            ended_at: Timestamp::now(),
            origin: local_user_origin(),
        };
        let recorded = database
            .write(|tx| operation::record_operation(tx, Operation::Backup, outcome, None, &record));
        if let Err(error) = recorded {
            print_note(&format!(
                "payrelay status will not show this backup: the database could not record it: \
                    {error}"
            ));
        }
        match written {
            Ok(bytes) => output_line(format_args!("{}: {bytes} bytes", self.file.display())),
            Err(error) if error.is_temporary() => print_temporary_error(error),
            Err(error) => print_config_error(error),
        }
    }
}
