//! `payrelay restore`: puts a copy in the place of the database, or marks the database as a copy.

use std::io::{self, IsTerminal as _};
use std::path::PathBuf;

use clap::Args;
use payrelay::config::Config;
use payrelay::domain::timestamp::Timestamp;
use payrelay::store::restore::{Request, RestoreError, Restored, restore};

use super::user;
use crate::{CONFIG, LEFT, OK, Output, TEMPORARY, USAGE, complain};

#[derive(Args)]
pub(crate) struct Restore {
    /// The copy: a backup, or the file of rsync, a snapshot or litestream, with its -wal alongside
    /// if it has one
    #[arg(
        value_name = "COPY",
        required_unless_present = "adopt",
        conflicts_with = "adopt"
    )]
    copy: Option<PathBuf>,
    /// The database at database.path is itself such a copy: marks it in its place
    #[arg(long)]
    adopt: bool,
    /// Needed unless standard input and standard error are terminals
    #[arg(long)]
    yes: bool,
}

impl Restore {
    pub(crate) fn run(&self, config: &Config) -> u8 {
        let terminals = io::stdin().is_terminal() && io::stderr().is_terminal();
        if !self.yes && !terminals {
            complain("restore replaces the database: add --yes");
            return USAGE;
        }
        let by = user();
        let request = Request {
            copy: self.copy.as_deref(),
            database: &config.database.path,
            node: config.node.id.as_ref(),
            by: &by,
            now: Timestamp::now(),
        };
        match restore(&request) {
            Ok(restored) => {
                let mut output = Output::default();
                output.say(describe(&restored));
                output.code(OK)
            }
            Err(error) => {
                complain(&error);
                match error {
                    RestoreError::Unsound(_) | RestoreError::Damaged { .. } => LEFT,
                    RestoreError::Open(error) if error.is_temporary() => TEMPORARY,
                    RestoreError::Store(_) => TEMPORARY,
                    _ => CONFIG,
                }
            }
        }
    }
}

fn describe(restored: &Restored) -> String {
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
