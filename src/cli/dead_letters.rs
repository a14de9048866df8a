//! `payrelay dead-letters`: lists, replays or discards dead letters in the database.
//!
//! It also works while payrelay does not run. A running payrelay notices a replayed payment within
//! a second: each waiting notifier looks for payments that often. It notices a replayed event when
//! it next checks its connection to Kafka, within seconds.

use std::time::Duration;

use clap::{Args, Subcommand};
use payrelay::config::Config;
use payrelay::domain::timestamp::Timestamp;
use payrelay::store::dead_letter::{self, DeadLetterFilter};
use payrelay::store::dead_letter_action::{
    self, DeadLetterAction, DeadLetterOutcome, DeadLetterRequest,
};
use payrelay::store::{OfflineStore, StoreError};

use super::local_user::local_user_origin;
use super::output::{Output, print_error, print_note, print_temporary_error};
use super::{exit_code, run_command_with_database};

#[derive(Subcommand)]
pub(super) enum DeadLettersCommand {
    /// Prints the open ones, oldest first
    List {
        /// Also those that were replayed or discarded
        #[arg(long)]
        all: bool,
    },
    /// Tries again: a payment goes to Slack, a record is consumed as if it arrived now
    Replay(DeadLetterSelection),
    /// Closes them: they are never delivered, and no longer listed
    Discard(DeadLetterSelection),
}

#[derive(Args)]
pub(super) struct DeadLetterSelection {
    /// Their ids, as listed
    #[arg(
        value_name = "ID",
        required_unless_present = "all",
        conflicts_with = "all"
    )]
    ids: Vec<i64>,
    /// All open ones
    #[arg(long)]
    all: bool,
    /// Prints the outcome that it would have, and changes nothing
    #[arg(long)]
    dry_run: bool,
}

/// How many dead letters are read, or resolved in one transaction, at a time.
const BATCH: usize = 100;

/// Between two batches the writer of a running payrelay gets its turn. Longer than SQLite waits
/// between two tries for a lock, for most of its tries.
const BATCH_PAUSE: Duration = Duration::from_millis(30);

impl DeadLettersCommand {
    pub(super) fn run(&self, config: &Config) -> u8 {
        run_command_with_database(config, |database| {
            let result = match self {
                Self::List { .. } => self.list(&database),
                Self::Replay(selection) => {
                    ResolveDeadLettersCommand::new(database, DeadLetterAction::Replay, selection)
                        .run()
                }
                Self::Discard(selection) => {
                    ResolveDeadLettersCommand::new(database, DeadLetterAction::Discard, selection)
                        .run()
                }
            };
            result.unwrap_or_else(print_temporary_error)
        })
    }

    fn list(&self, database: &OfflineStore) -> Result<u8, StoreError> {
        let filter = if matches!(self, Self::List { all: true }) {
            DeadLetterFilter::All
        } else {
            DeadLetterFilter::Open
        };
        let mut output = Output::default();
        let mut after = Some(0);
        while let Some(id) = after {
            let letters = database
                .read(|connection| dead_letter::list_dead_letters(connection, filter, id, BATCH))?;
            // Serializing our own types cannot fail.
            let is_open = letters
                .iter()
                .all(|letter| output.line(serde_json::to_string(letter).unwrap_or_default()));
            if letters.is_empty() && id == 0 {
                print_note(match filter {
                    DeadLetterFilter::All => "there are no dead letters",
                    DeadLetterFilter::Open => "there are no open dead letters",
                });
            }
            after = letters.last().map(|last| last.id).filter(|_| is_open);
        }
        Ok(output.exit_code(exit_code::OK))
    }
}

/// Replays or discards the selected letters, and prints each outcome.
struct ResolveDeadLettersCommand<'a> {
    database: OfflineStore,
    action: DeadLetterAction,
    selection: &'a DeadLetterSelection,
    output: Output,
    code: u8,
}

impl<'a> ResolveDeadLettersCommand<'a> {
    fn new(
        database: OfflineStore,
        action: DeadLetterAction,
        selection: &'a DeadLetterSelection,
    ) -> Self {
        Self {
            database,
            action,
            selection,
            output: Output::default(),
            code: exit_code::OK,
        }
    }

    fn run(mut self) -> Result<u8, StoreError> {
        for id in &self.selection.ids {
            let outcomes = self.resolve(dead_letter_action::Selection::Id(*id))?;
            if outcomes.is_empty() {
                print_error(format_args!("there is no dead letter {id}"));
                self.code = exit_code::PARTIAL;
            }
            self.print(&outcomes);
        }
        if self.selection.all {
            self.resolve_all()?;
        }
        Ok(self.output.exit_code(self.code))
    }

    fn resolve_all(&mut self) -> Result<(), StoreError> {
        let mut after = 0;
        loop {
            let selection = dead_letter_action::Selection::Open {
                after,
                limit: BATCH,
            };
            let outcomes = self.resolve(selection)?;
            self.print(&outcomes);
            let Some(last) = outcomes.last() else {
                return Ok(());
            };
            after = last.id;
            let _ = crossbeam_channel::after(BATCH_PAUSE).recv();
        }
    }

    fn resolve(
        &mut self,
        which: dead_letter_action::Selection,
    ) -> Result<Vec<DeadLetterOutcome>, StoreError> {
        let node = self.database.node().clone();
        let origin = local_user_origin();
        self.database.write(|tx| {
            let request = DeadLetterRequest {
                action: self.action,
                which,
                dry_run: self.selection.dry_run,
                node: &node,
                origin: &origin,
                now: Timestamp::now(),
            };
            dead_letter_action::act_on_dead_letters(tx, request)
        })
    }

    fn print(&mut self, outcomes: &[DeadLetterOutcome]) {
        let prefix = if self.selection.dry_run {
            "would be: "
        } else {
            ""
        };
        for outcome in outcomes {
            self.output
                .line(format_args!("{prefix}{}: {}", outcome.id, outcome.outcome));
            if !outcome.resolved {
                self.code = exit_code::PARTIAL;
            }
        }
    }
}
