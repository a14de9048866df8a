//! `payrelay restore`: replaces the database by a copy, or marks the database as a copy.

use std::io::{self, IsTerminal as _};
use std::path::PathBuf;

use clap::Args;
use payrelay::config::Config;
use payrelay::domain::timestamp::Timestamp;
use payrelay::store::restore::{Request, RestoreError, Restored, restore};

use super::output::{output_line, print_error};
use super::{exit_code, local_user};

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
    /// Needed unless standard input and standard error are terminals
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
        let by = local_user();
        let request = Request {
            copy: self.copy.as_deref(),
            database: &config.database.path,
            node: config.node.id.as_ref(),
            by: &by,
            now: Timestamp::now(),
        };
        match restore(&request) {
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
        "restored {payments} payments of node {node}{moved}. The next start gives new ids, beyond \
            all that were given"
    )
}
