//! `payrelay outbox`: the events that wait to be published, and the relay of a running payrelay.

use clap::{Args, Subcommand, ValueEnum};
use payrelay::domain::timestamp::Timestamp;
use payrelay::store::outbox_view::{self, OutboxFilter};
use payrelay::store::relay_action::{self, RelayAction};
use payrelay::store::{OfflineStore, StoreError};
use serde_json::Value;

use super::client::{Target, load_local};
use super::exit_code;
use super::local_user::local_user_origin;
use super::output::{Output, output_line, print_note, print_open_error, print_temporary_error};
use super::payment::show_when;
use super::state::{State, to_json};
use super::table::{Align, Table, show_cell};
use super::watch::Watch;

#[derive(Subcommand)]
pub(super) enum OutboxCommand {
    /// Prints the events that wait to be published, oldest first; the default
    List(OutboxList),
    /// Lets the relay try now; payrelay must run
    Wake(RelayReason),
    /// Lets a fenced relay take over from the other process, and publish the waiting events
    Resume(RelayReason),
}

#[derive(Args)]
pub(super) struct RelayReason {
    /// Why, for the record
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
}

#[derive(Args)]
pub(super) struct OutboxList {
    /// init: those that wait; rejected: those that the broker rejects
    #[arg(long, value_name = "STATE", default_value = "init")]
    state: OutboxState,
    /// How many are printed
    #[arg(long, value_name = "N", default_value_t = 50)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=500))]
    limit: u16,
    /// Begins after the event with this number
    #[arg(long, value_name = "ID", default_value_t = 0)]
    #[arg(value_parser = clap::value_parser!(i64).range(0..))]
    after: i64,
    #[command(flatten)]
    watch: Watch,
    /// Prints a JSON object a line
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum OutboxState {
    Init,
    Rejected,
}

impl Default for OutboxList {
    fn default() -> Self {
        Self {
            state: OutboxState::Init,
            limit: 50,
            after: 0,
            watch: Watch::default(),
            json: false,
        }
    }
}

impl OutboxCommand {
    pub(super) fn run(&self, target: &Target) -> u8 {
        match self {
            Self::List(list) => list.run(target),
            Self::Wake(why) => {
                wake_relay(target, why.reason.as_deref()).unwrap_or_else(|code| code)
            }
            Self::Resume(why) => {
                resume_relay(target, why.reason.as_deref()).unwrap_or_else(|code| code)
            }
        }
    }
}

impl OutboxList {
    pub(super) fn run(&self, target: &Target) -> u8 {
        self.watch
            .repeat(self.json, |output| self.show(target, output))
    }

    fn show(&self, target: &Target, output: &mut Output) -> Result<u8, u8> {
        let state = State::open(target)?;
        let name = match self.state {
            OutboxState::Init => "init",
            OutboxState::Rejected => "rejected",
        };
        let path = format!(
            "/admin/outbox?state={name}&after={}&limit={}",
            self.after, self.limit
        );
        let page = state
            .get(&path, |database| self.read(database).map(Some))?
            .unwrap_or_default();
        let mut table = Table::new(&[
            ("event", Align::Left),
            ("payment", Align::Right),
            ("user", Align::Right),
            ("state", Align::Left),
            ("age", Align::Right),
            ("why", Align::Left),
        ]);
        let why = self.why(&state)?;
        let events = page["events"].as_array();
        for event in events.into_iter().flatten() {
            if self.json {
                output.json(event);
                continue;
            }
            table.row([
                show_cell(&event["event"]),
                show_cell(&event["payment_id"]),
                show_cell(&event["user_id"]),
                show_cell(&event["status"]),
                show_when(&event["created_at"]),
                event["rejection"].as_str().unwrap_or(&why).to_owned(),
            ]);
        }
        table.print(output);
        let last = events.and_then(|events| events.last());
        match last.map(|last| &last["outbox_id"]) {
            None => print_note("no events"),
            Some(last) if !page["next"].is_null() => {
                print_note(&format!("there are more: --after {last}"));
            }
            Some(_) => {}
        }
        Ok(exit_code::OK)
    }

    /// A page as the API has it.
    fn read(&self, database: &OfflineStore) -> Result<Value, StoreError> {
        let filter = match self.state {
            OutboxState::Init => OutboxFilter::Init,
            OutboxState::Rejected => OutboxFilter::Rejected,
        };
        let limit = usize::from(self.limit);
        let mut events = database.read(|connection| {
            let node = database.node();
            outbox_view::list_outbox_events(connection, node, filter, self.after, limit + 1)
        })?;
        let next = (events.len() > limit).then_some("more");
        events.truncate(limit);
        Ok(serde_json::json!({ "events": to_json(&events), "next": next }))
    }

    /// Why events wait: the state of the publisher.
    fn why(&self, state: &State) -> Result<String, u8> {
        if self.json {
            return Ok(String::new());
        }
        let ready = match state {
            State::Running(client) => client.find("/overview")?,
            State::Stopped(_) => return Ok("payrelay does not run".to_owned()),
        };
        let health = &ready.unwrap_or_default()["components"]["publisher"];
        Ok(match health["error"].as_str() {
            Some(error) => format!("publisher {}: {error}", show_cell(&health["state"])),
            None => "the publisher is up".to_owned(),
        })
    }
}

fn wake_relay(target: &Target, reason: Option<&str>) -> Result<u8, u8> {
    let Some(client) = target.connect()? else {
        return Err(print_temporary_error(
            "no running payrelay serves the local socket (http.socket)",
        ));
    };
    client.act("/admin/relay/wake", reason)?;
    Ok(output_line("requested: the relay tries now"))
}

const RESUME_REQUESTED: &str =
    "requested: a running payrelay whose relay is fenced resumes within a second";

fn resume_relay(target: &Target, reason: Option<&str>) -> Result<u8, u8> {
    if let Some(client) = target.remote() {
        client.act("/admin/relay/resume", reason)?;
        return Ok(output_line(RESUME_REQUESTED));
    }
    let path = load_local(target.file())?.database;
    let mut database = OfflineStore::open(&path).map_err(|error| print_open_error(&error))?;
    let origin = local_user_origin();
    database
        .write(|tx| {
            let now = Timestamp::now();
            relay_action::record_relay_action(tx, RelayAction::Resume, &origin, reason, now)
        })
        .map_err(print_temporary_error)?;
    Ok(output_line(RESUME_REQUESTED))
}
