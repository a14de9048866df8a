//! `payrelay channels`: controls the notifiers of a running payrelay, through the database.

use std::time::{Duration, Instant};

use clap::Subcommand;
use payrelay::config::{Config, DEFAULT_CHANNEL};
use payrelay::domain::timestamp::Timestamp;
use payrelay::store::channel::{self, Action};
use payrelay::store::{OfflineStore, StoreError};

use super::output::{Output, print_error, print_open_error, print_temporary_error};
use super::{exit_code, local_user};

#[derive(Subcommand)]
pub(super) enum ChannelsCommand {
    /// Lets a channel try now, also while it is paused
    Resume {
        /// Its name: default, or that of a route
        #[arg(value_name = "NAME")]
        name: String,
    },
    /// Dead-letters the oldest payment that waits for a paused channel, and tries the next one
    Skip {
        /// Its name: default, or that of a route
        #[arg(value_name = "NAME")]
        name: String,
        /// Why, for the record
        #[arg(long, value_name = "TEXT")]
        reason: String,
    },
}

/// How long a running payrelay has to see the request.
const OUTCOME_TIMEOUT: Duration = Duration::from_secs(5);

/// The pause between two queries for the outcome of a request.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

impl ChannelsCommand {
    pub(super) fn run(&self, config: &Config) -> u8 {
        let (name, action) = match self {
            Self::Resume { name } => (name, Action::Resume),
            Self::Skip { name, reason } => (name, Action::Skip(reason.clone())),
        };
        if name != DEFAULT_CHANNEL && !config.slack.routes.iter().any(|route| route.name == *name) {
            print_error(format_args!("there is no channel {name}"));
            return exit_code::PARTIAL;
        }
        let mut database = match OfflineStore::open(&config.database.path) {
            Ok(database) => database,
            Err(error) => return print_open_error(&error),
        };
        match request_channel_action(&mut database, name, &action) {
            Ok(Some(outcome)) => {
                let mut output = Output::default();
                output.line(&outcome);
                output.exit_code(if outcome.starts_with("nothing") {
                    exit_code::PARTIAL
                } else {
                    exit_code::OK
                })
            }
            Ok(None) => {
                print_error("no running payrelay has seen the request within 5 s: it is withdrawn");
                exit_code::TEMPORARY
            }
            Err(error) => print_temporary_error(error),
        }
    }
}

/// Stores the request, and waits for its outcome.
fn request_channel_action(
    database: &mut OfflineStore,
    name: &str,
    action: &Action,
) -> Result<Option<String>, StoreError> {
    let origin = format!("local user {}", local_user());
    let id = database.write(|tx| channel::request(tx, name, action, &origin, Timestamp::now()))?;
    let deadline = Instant::now() + OUTCOME_TIMEOUT;
    while Instant::now() < deadline {
        if let Some(outcome) = database.read(|connection| channel::outcome(connection, id))? {
            return Ok(Some(outcome));
        }
        let _ = crossbeam_channel::after(POLL_INTERVAL).recv();
    }
    if database.write(|tx| channel::withdraw(tx, id))? {
        return Ok(None);
    }
    database.read(|connection| channel::outcome(connection, id))
}
