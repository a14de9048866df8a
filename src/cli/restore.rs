//! `payrelay restore`: replaces the database by a copy, or marks the database as a copy.

use std::path::{Path, PathBuf};

use clap::Args;
use payrelay::config::Config;
use payrelay::domain::timestamp::Timestamp;
use payrelay::runtime::plural::counted;
use payrelay::store::restore::{
    RestoreError, RestoreRequest, Restored, partial_restore_path, restore_database,
};

use super::confirmation::Confirmation;
use super::exit_code;
use super::local_user::local_user_origin;
use super::output::{output_line, print_error};
use super::progress::{Measure, Progress};

#[derive(Args)]
pub(super) struct RestoreCommand {
    /// The copy: a backup, or a file of rsync, a snapshot or litestream, with its -wal file if it
    /// has one
    #[arg(
        value_name = "COPY",
        required_unless_present = "adopt",
        conflicts_with = "adopt"
    )]
    copy: Option<PathBuf>,
    /// Marks the file at database.path as a restored copy, without replacing it
    #[arg(long)]
    adopt: bool,
    #[command(flatten)]
    confirmation: Confirmation,
}

impl RestoreCommand {
    pub(super) fn run(&self, config: &Config) -> u8 {
        let consequence = if self.adopt {
            "restore marks the database as a restored copy"
        } else {
            "restore replaces the database"
        };
        if let Err(code) = self.confirmation.check(consequence) {
            return code;
        }
        let by = local_user_origin();
        let request = RestoreRequest {
            copy: self.copy.as_deref(),
            database: &config.database.path,
            node: config.node.id.as_ref(),
            by: &by,
            now: Timestamp::now(),
        };
        let progress = self.show_progress(&config.database.path);
        let restored = restore_database(&request);
        drop(progress);
        match restored {
            Ok(restored) => output_line(describe_restored(&restored)),
            Err(error) => {
                print_error(&error);
                match error {
                    RestoreError::Unsound(_) | RestoreError::Damaged { .. } => exit_code::PARTIAL,
                    RestoreError::Open(error) if error.is_temporary() => exit_code::TEMPORARY,
                    RestoreError::Store(_) => exit_code::TEMPORARY,
                    _ => exit_code::CONFIG,
                }
            }
        }
    }

    /// The copy is checked after it was read, for as long again.
    fn show_progress(&self, database: &Path) -> Progress {
        let copy = self.copy.as_deref();
        let total = copy.and_then(|copy| copy.metadata().ok());
        let total = total.map(|file| file.len());
        let part = partial_restore_path(database).ok();
        Progress::show("restore", move || {
            let done = part.as_ref().and_then(|part| part.metadata().ok());
            match (done, total) {
                (Some(done), Some(total)) if done.len() < total => Measure::Bytes {
                    done: done.len(),
                    total,
                },
                _ => Measure::Time,
            }
        })
    }
}

fn describe_restored(restored: &Restored) -> String {
    let Restored {
        node,
        payments,
        before,
    } = restored;
    let moved = match before {
        Some(folder) => format!("; the files before it are in {}", folder.display()),
        None => String::new(),
    };
    format!(
        "restored {} of node {node}{moved}. The next start gives new ids, beyond \
            all that were given",
        counted(*payments, "payment")
    )
}
