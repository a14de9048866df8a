//! `payrelay channels`: lists the channels, and controls the notifiers of a running payrelay
//! through its database.

use std::time::{Duration, Instant};

use clap::{Args, Subcommand};
use payrelay::domain::timestamp::Timestamp;
use payrelay::store::backlog::BacklogCounter;
use payrelay::store::channel_action::{self, ChannelAction};
use payrelay::store::{OfflineStore, StoreError, channel_sink};
use serde_json::{Value, json};

use super::client::{Client, Target, load_local};
use super::exit_code;
use super::local_user::local_user_origin;
use super::output::{Output, output_line, print_error, print_open_error, print_temporary_error};
use super::payment::show_when;
use super::state::State;
use super::status::show_oldest;
use super::table::{Align, Table, show_cell};
use super::watch::Watch;

#[derive(Subcommand)]
pub(super) enum ChannelsCommand {
    /// Prints each channel: its state and since when, how many payments wait, and why; the default
    List(ChannelsList),
    /// Stops a channel: its payments wait until it is resumed, also after a restart; payrelay must
    /// run
    Pause {
        /// Its name: default, or that of a route
        #[arg(value_name = "NAME")]
        name: String,
        /// Why, for the record
        #[arg(long, value_name = "TEXT")]
        reason: Option<String>,
    },
    /// Lets a channel try now, also while it is paused; payrelay must run
    Resume {
        /// Its name: default, or that of a route
        #[arg(value_name = "NAME")]
        name: String,
        /// Why, for the record
        #[arg(long, value_name = "TEXT")]
        reason: Option<String>,
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

#[derive(Args, Default)]
pub(super) struct ChannelsList {
    #[command(flatten)]
    watch: Watch,
    /// Prints a JSON object a line
    #[arg(long)]
    json: bool,
}

impl ChannelsList {
    pub(super) fn run(&self, target: &Target) -> u8 {
        self.watch
            .repeat(self.json, |output| self.show(target, output))
    }

    fn show(&self, target: &Target, output: &mut Output) -> Result<u8, u8> {
        let state = State::open(target)?;
        let channels = state.list("/admin/channels", "channels", channels_of_file)?;
        let mut table = Table::new(&[
            ("channel", Align::Left),
            ("state", Align::Left),
            ("since", Align::Right),
            ("waiting", Align::Right),
            ("oldest", Align::Right),
            ("why", Align::Left),
        ]);
        for channel in &channels {
            if self.json {
                output.json(channel);
                continue;
            }
            let waits = channel["waiting"].as_i64().is_some_and(|count| count > 0);
            table.row([
                show_cell(&channel["name"]),
                show_cell(&channel["state"]),
                show_when(&channel["since"]),
                show_cell(&channel["waiting"]),
                if waits {
                    show_oldest(channel)
                } else {
                    "-".to_owned()
                },
                channel["error"].as_str().unwrap_or_default().to_owned(),
            ]);
        }
        table.print(output);
        Ok(exit_code::OK)
    }
}

/// The channels of the last start, and those that still have payments. Their states are not in the
/// file; the error is that of the oldest payment.
fn channels_of_file(database: &OfflineStore) -> Result<Vec<Value>, StoreError> {
    let mut names = database.read(channel_sink::channel_names)?;
    for (name, _) in database.read(channel_sink::waiting_by_channel)? {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let mut counter = BacklogCounter::new(&names);
    let backlog = database.read(|connection| counter.count(connection))?;
    let now = Timestamp::now();
    let mut channels = Vec::new();
    for (name, waiting) in names.iter().zip(&backlog.channels) {
        let error = database.read(|tx| channel_sink::last_channel_error(tx, name))?;
        channels.push(json!({
            "name": name,
            "state": null,
            "since": null,
            "error": error,
            "waiting": waiting.count,
            "oldest_waiting_s": waiting.age(now).as_secs(),
        }));
    }
    Ok(channels)
}

/// How long a running payrelay has to see the request.
const OUTCOME_TIMEOUT: Duration = Duration::from_secs(5);

/// The pause between two queries for the outcome of a request.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

impl ChannelsCommand {
    pub(super) fn run(&self, target: &Target) -> u8 {
        let (name, action) = match self {
            Self::List(list) => return list.run(target),
            Self::Pause { name, reason } => (name, ChannelAction::Pause(reason.clone())),
            Self::Resume { name, reason } => (name, ChannelAction::Resume(reason.clone())),
            Self::Skip { name, reason } => (name, ChannelAction::Skip(reason.clone())),
        };
        if let Some(client) = target.remote() {
            return Self::request_from(&client, name, &action).unwrap_or_else(|code| code);
        }
        let path = match load_local(target.file()) {
            Ok(config) => config.database,
            Err(code) => return code,
        };
        let mut database = match OfflineStore::open(&path) {
            Ok(database) => database,
            Err(error) => return print_open_error(&error),
        };
        match database.read(channel_sink::channel_names) {
            Ok(names) if !names.contains(name) => {
                print_error(format_args!("there is no channel {name}"));
                return exit_code::PARTIAL;
            }
            Ok(_) => {}
            Err(error) => return print_temporary_error(error),
        }
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

    /// Requests the action from a payrelay elsewhere. Its list of channels shows the outcome.
    fn request_from(client: &Client, name: &str, action: &ChannelAction) -> Result<u8, u8> {
        let verb = action.kind().as_str();
        let is_name = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        let path = format!("/admin/channels/{name}/{verb}");
        let found = name.bytes().all(is_name) && client.act(&path, action.reason())?.is_some();
        if !found {
            print_error(format_args!("there is no channel {name}"));
            return Ok(exit_code::PARTIAL);
        }
        Ok(output_line(format_args!(
            "requested: {name} acts within a second; payrelay channels shows it"
        )))
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
