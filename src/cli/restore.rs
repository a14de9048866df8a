//! `payrelay restore`: replaces the database by a copy, or marks the database as a copy.

use std::io::{self, BufRead, IsTerminal as _};
use std::path::{Path, PathBuf};

use clap::Args;
use payrelay::config::Config;
use payrelay::domain::timestamp::Timestamp;
use payrelay::runtime::plural::counted;
use payrelay::store::restore::{
    RestoreError, RestoreRequest, Restored, partial_restore_path, restore_database,
};

use super::exit_code;
use super::local_user::local_user_origin;
use super::output::{output_line, print_error, print_note};
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
    /// Restores without a question. Needed where no terminal can ask: otherwise the command asks,
    /// and anything but "yes" changes nothing
    #[arg(long)]
    yes: bool,
}

impl RestoreCommand {
    pub(super) fn run(&self, config: &Config) -> u8 {
        let terminals = io::stdin().is_terminal() && io::stderr().is_terminal();
        if !self.yes && !terminals {
            print_error("restore replaces the database: add --yes");
            return exit_code::USAGE;
        }
        if !self.yes
            && !confirm_restore(&self.consequence(&config.database.path), io::stdin().lock())
        {
            print_error("not confirmed: nothing was changed");
            return exit_code::USAGE;
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

    fn consequence(&self, database: &Path) -> String {
        let database = database.display();
        if self.adopt {
            format!("This marks {database} as a restored copy: its next start gives new ids.")
        } else {
            format!("This replaces {database}; the files that are there are moved, not deleted.")
        }
    }
}

/// Asks on standard error, and reads the answer.
fn confirm_restore(consequence: &str, mut answers: impl BufRead) -> bool {
    print_note(&format!("{consequence}\nType yes to continue:"));
    let mut answer = String::new();
    answers.read_line(&mut answer).is_ok() && answer.trim() == "yes"
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restore_is_confirmed_by_yes_and_by_nothing_else() {
        let confirm = |answer: &str| confirm_restore("This is a test.", answer.as_bytes());
        assert!(confirm("yes\n") && confirm(" yes \n"));
        for answer in ["", "\n", "y\n", "no\n", "yes please\n"] {
            assert!(!confirm(answer), "{answer:?}");
        }
    }
}
