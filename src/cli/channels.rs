//! `payrelay channels`: lists the channels, and controls the notifiers of a running payrelay, both
//! through the database.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use clap::Subcommand;
use payrelay::config::{Config, DEFAULT_CHANNEL, Sink};
use payrelay::domain::timestamp::Timestamp;
use payrelay::runtime::plural::counted;
use payrelay::slack::channel::channel_webhooks;
use payrelay::store::backlog::BacklogCounter;
use payrelay::store::channel_action::{self, ChannelAction};
use payrelay::store::{OfflineStore, StoreError, channel_sink};

use super::local_user::local_user_origin;
use super::output::{Output, print_error, print_open_error, print_temporary_error};
use super::{exit_code, run_command_with_database};

#[derive(Subcommand)]
pub(super) enum ChannelsCommand {
    /// Prints each channel: where it posts, how many payments wait, and the error of the oldest.
    /// Also while payrelay does not run. Whether a channel is paused is not in the database: GET
    /// /admin/channels of a running payrelay shows it
    List,
    /// Lets a channel try now, also while it is paused; payrelay must run
    Resume {
        /// Its name: default, or that of a route
        #[arg(value_name = "NAME")]
        name: String,
    },
    /// Dead-letters the oldest payment that waits for a paused channel, and tries the next one;
    /// payrelay must run
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
            Self::List => {
                return run_command_with_database(config, |database| {
                    Self::list(config, &database).unwrap_or_else(print_temporary_error)
                });
            }
            Self::Resume { name } => (name, ChannelAction::Resume),
            Self::Skip { name, reason } => (name, ChannelAction::Skip(reason.clone())),
        };
        if name != DEFAULT_CHANNEL && !config.slack.routes.iter().any(|route| route.name == *name) {
            print_error(format_args!("there is no channel {name}"));
            return exit_code::PARTIAL;
        }
        let mut database = match OfflineStore::open(&config.database.path) {
            Ok(database) => database,
            Err(error) => return print_open_error(&error),
        };
        match Self::request(&mut database, name, &action) {
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

    fn list(config: &Config, database: &OfflineStore) -> Result<u8, StoreError> {
        let channels: Vec<_> = channel_webhooks(&config.slack).collect();
        let names: Vec<_> = channels
            .iter()
            .map(|(name, _)| (*name).to_owned())
            .collect();
        let mut counter = BacklogCounter::new(&names);
        let backlog = database.read(|connection| counter.count(connection))?;
        let now = Timestamp::now();
        let mut output = Output::default();
        for ((name, webhook), waiting) in channels.into_iter().zip(backlog.channels) {
            let is_webhook = config.slack.sink == Sink::Auto && webhook.is_some();
            let sink = if is_webhook { "webhook" } else { "log" };
            let mut line = format!(
                "{name}: {sink}, {} waiting",
                counted(waiting.count, "payment")
            );
            if waiting.count > 0 {
                let _ = write!(line, ", the oldest for {} s", waiting.age(now).as_secs());
            }
            if let Some(error) =
                database.read(|connection| channel_sink::last_channel_error(connection, name))?
            {
                let _ = write!(line, "; its last error: {error}");
            }
            output.line(line);
        }
        for (name, count) in database.read(channel_sink::waiting_by_channel)? {
            if !names.contains(&name) {
                output.line(format_args!(
                    "{name}: no longer configured, {} waiting; the next start moves them to other \
                        channels",
                    counted(count, "payment")
                ));
            }
        }
        Ok(output.exit_code(exit_code::OK))
    }

    /// Stores the request, and waits for its outcome.
    fn request(
        database: &mut OfflineStore,
        name: &str,
        action: &ChannelAction,
    ) -> Result<Option<String>, StoreError> {
        let origin = local_user_origin();
        let id = database.write(|tx| {
            channel_action::request_channel_action(tx, name, action, &origin, Timestamp::now())
        })?;
        let deadline = Instant::now() + OUTCOME_TIMEOUT;
        while Instant::now() < deadline {
            if let Some(outcome) = database
                .read(|connection| channel_action::channel_action_outcome(connection, id))?
            {
                return Ok(Some(outcome));
            }
            let _ = crossbeam_channel::after(POLL_INTERVAL).recv();
        }
        if database.write(|tx| channel_action::withdraw_channel_action(tx, id))? {
            return Ok(None);
        }
        database.read(|connection| channel_action::channel_action_outcome(connection, id))
    }
}
