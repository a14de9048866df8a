//! `payrelay dead-letters`: lists, replays or discards dead letters in the database.
//!
//! It also works while payrelay does not run. A running payrelay notices a replayed payment within
//! a second: each waiting notifier looks for payments that often. It notices a replayed event when
//! it next checks its connection to Kafka, within seconds.

mod list;
mod remote;
mod selection;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use clap::Subcommand;
use payrelay::domain::timestamp::Timestamp;
use payrelay::store::dead_letter_action::{
    self, DeadLetterAction, DeadLetterOutcome, DeadLetterRequest,
};
use payrelay::store::{OfflineStore, StoreError, dead_letter};

pub(super) use self::list::{DeadLetterShow, DeadLettersList};
use self::remote::RemoteResolution;
use self::selection::DeadLetterSelection;
use super::client::{Target, load_local};
use super::confirmation::Confirmation;
use super::exit_code;
use super::local_user::local_user_origin;
use super::output::{Output, print_error, print_open_error, print_temporary_error};
use super::progress::{Measure, Progress};

#[derive(Subcommand)]
pub(super) enum DeadLettersCommand {
    /// Prints the open ones, oldest first; the default
    List(DeadLettersList),
    /// Prints one with its record and its actions, as JSON
    Show(DeadLetterShow),
    /// Tries again: a payment goes to Slack, a record is consumed as if it arrived now
    Replay {
        #[command(flatten)]
        selection: DeadLetterSelection,
        /// Why, for the record
        #[arg(long, value_name = "TEXT")]
        reason: Option<String>,
    },
    /// Closes them: they are never delivered, and no longer listed
    Discard {
        #[command(flatten)]
        selection: DeadLetterSelection,
        /// Why, for the record; needed unless it is a dry run
        #[arg(long, value_name = "TEXT", required_unless_present = "dry_run")]
        reason: Option<String>,
        #[command(flatten)]
        confirmation: Confirmation,
    },
}

/// How many dead letters are resolved in one transaction.
const BATCH: usize = 100;

/// Between two batches the writer of a running payrelay gets its turn. Longer than SQLite waits
/// between two tries for a lock, for most of its tries.
const BATCH_PAUSE: Duration = Duration::from_millis(30);

impl DeadLettersCommand {
    pub(super) fn run(&self, target: &Target) -> u8 {
        let (action, selection, reason) = match self {
            Self::List(list) => return list.run(target),
            Self::Show(show) => return show.run(target),
            Self::Replay { selection, reason } => {
                (DeadLetterAction::Replay, selection, reason.as_deref())
            }
            Self::Discard {
                selection,
                reason,
                confirmation,
            } => {
                if !selection.dry_run
                    && let Err(code) = confirmation.check("discard closes dead letters for good")
                {
                    return code;
                }
                (DeadLetterAction::Discard, selection, reason.as_deref())
            }
        };
        if let Some(client) = target.remote() {
            return RemoteResolution::new(&client, action, selection, reason).run();
        }
        let path = match load_local(target.file()) {
            Ok(config) => config.database,
            Err(code) => return code,
        };
        let database = match OfflineStore::open(&path) {
            Ok(database) => database,
            Err(error) => return print_open_error(&error),
        };
        ResolveDeadLettersCommand::new(database, action, selection, reason)
            .run()
            .unwrap_or_else(print_temporary_error)
    }
}

/// Replays or discards the selected letters, and prints each outcome.
struct ResolveDeadLettersCommand<'a> {
    database: OfflineStore,
    action: DeadLetterAction,
    selection: &'a DeadLetterSelection,
    reason: Option<&'a str>,
    output: Output,
    code: u8,
}

impl<'a> ResolveDeadLettersCommand<'a> {
    fn new(
        database: OfflineStore,
        action: DeadLetterAction,
        selection: &'a DeadLetterSelection,
        reason: Option<&'a str>,
    ) -> Self {
        Self {
            database,
            action,
            selection,
            reason,
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
        let total = self.database.read(dead_letter::open_dead_letters)?.count;
        let total = total.unsigned_abs();
        let counter = Arc::new(AtomicU64::new(0));
        let resolved = Arc::clone(&counter);
        let _progress = Progress::show("dead letters", move || Measure::Count {
            done: resolved.load(Relaxed),
            total,
        });
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
            counter.fetch_add(outcomes.len() as u64, Relaxed);
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
                reason: self.reason,
                now: Timestamp::now(),
            };
            dead_letter_action::act_on_dead_letters(tx, request)
        })
    }

    fn print(&mut self, outcomes: &[DeadLetterOutcome]) {
        let prefix = self.selection.outcome_prefix();
        for outcome in outcomes {
            self.output
                .line(format_args!("{prefix}{}: {}", outcome.id, outcome.outcome));
            if !outcome.resolved {
                self.code = exit_code::PARTIAL;
            }
        }
    }
}
