//! `payrelay channels`: orders to the notifier of a running payrelay, by way of the database.

use std::time::{Duration, Instant};

use clap::Subcommand;
use payrelay::config::{Config, DEFAULT_CHANNEL};
use payrelay::domain::timestamp::Timestamp;
use payrelay::store::channel::{self, Action};
use payrelay::store::{OfflineStore, StoreError};

use super::user;
use crate::{LEFT, OK, Output, TEMPORARY, cannot_open, complain};

#[derive(Subcommand)]
pub(crate) enum Channels {
    /// Has a channel try now, also while it is paused
    Resume {
        /// Its name: default, or that of a route
        #[arg(value_name = "NAME")]
        name: String,
    },
    /// Makes a dead letter of the oldest payment that waits for a paused channel, and tries the
    /// next one
    Skip {
        /// Its name: default, or that of a route
        #[arg(value_name = "NAME")]
        name: String,
        /// Why, for the record
        #[arg(long, value_name = "TEXT")]
        reason: String,
    },
}

/// How long a running payrelay may take to see the order.
const ANSWER_TIME: Duration = Duration::from_secs(5);

/// Between two looks for the outcome.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

impl Channels {
    pub(crate) fn run(&self, config: &Config) -> u8 {
        let (name, action) = match self {
            Self::Resume { name } => (name, Action::Resume),
            Self::Skip { name, reason } => (name, Action::Skip(reason.clone())),
        };
        if name != DEFAULT_CHANNEL && !config.slack.routes.iter().any(|route| route.name == *name) {
            complain(format_args!("there is no channel {name}"));
            return LEFT;
        }
        let mut database = match OfflineStore::open(&config.database.path) {
            Ok(database) => database,
            Err(problem) => return cannot_open(&problem),
        };
        match order(&mut database, name, &action) {
            Ok(Some(outcome)) => {
                let mut output = Output::default();
                output.say(&outcome);
                output.code(if outcome.starts_with("nothing") {
                    LEFT
                } else {
                    OK
                })
            }
            Ok(None) => {
                complain(
                    "no payrelay that runs on this database has seen the order: it is withdrawn",
                );
                TEMPORARY
            }
            Err(error) => {
                complain(format_args!("{error}; try again"));
                TEMPORARY
            }
        }
    }
}

/// Gives the order, and waits for its outcome.
fn order(
    database: &mut OfflineStore,
    name: &str,
    action: &Action,
) -> Result<Option<String>, StoreError> {
    let origin = format!("local user {}", user());
    let id = database.write(|tx| channel::ask(tx, name, action, &origin, Timestamp::now()))?;
    let deadline = Instant::now() + ANSWER_TIME;
    while Instant::now() < deadline {
        if let Some(outcome) = database.read(|connection| channel::outcome(connection, id))? {
            return Ok(Some(outcome));
        }
        let _ = crossbeam_channel::after(LOOK_INTERVAL).recv();
    }
    if database.write(|tx| channel::withdraw(tx, id))? {
        return Ok(None);
    }
    database.read(|connection| channel::outcome(connection, id))
}
