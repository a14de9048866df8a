//! `payrelay payment`: the timeline of one payment.

use std::fmt::Write as _;
use std::path::Path;

use clap::Args;
use payrelay::domain::timestamp::{TimeZone, Timestamp};
use payrelay::runtime::plural::counted;
use payrelay::slack::message::message_amount;
use payrelay::store::payment_view::PaymentView;
use payrelay::store::{OfflineStore, StoreError, timeline};
use serde_json::Value;

use super::exit_code;
use super::output::{Output, print_error};
use super::state::{State, to_json};
use super::table::{Align, Table, escape_controls, show_age, show_age_of, show_cell};

#[derive(Args)]
pub(super) struct PaymentCommand {
    /// The payment's id
    #[arg(value_name = "ID", value_parser = clap::value_parser!(i64).range(0..))]
    id: i64,
    /// Prints one JSON object
    #[arg(long)]
    json: bool,
}

impl PaymentCommand {
    pub(super) fn run(&self, file: Option<&Path>) -> u8 {
        self.show(file).unwrap_or_else(|code| code)
    }

    fn show(&self, file: Option<&Path>) -> Result<u8, u8> {
        let state = State::open(file)?;
        let found = state.get(&format!("/payments/{}", self.id), |database| {
            payment_of_file(database, self.id)
        })?;
        let Some(payment) = found else {
            print_error(format_args!("there is no payment {}", self.id));
            return Ok(exit_code::PARTIAL);
        };
        let mut output = Output::default();
        if self.json {
            output.json(&payment);
        } else {
            print_timeline(&payment, &mut output);
        }
        Ok(output.exit_code(exit_code::OK))
    }
}

fn payment_of_file(database: &OfflineStore, id: i64) -> Result<Option<Value>, StoreError> {
    let found = database.read(|connection| timeline::find_payment_timeline(connection, id))?;
    Ok(found.map(|timeline| to_json(&PaymentView::new(&timeline, database.node()))))
}

/// An amount with its currency: `150,000 KRW`.
pub(super) fn show_amount(payment: &Value) -> String {
    let currency = show_cell(&payment["currency"]);
    let amount = payment["amount"].as_i64().unwrap_or(0);
    format!("{} {currency}", message_amount(amount.into(), &currency))
}

fn print_timeline(payment: &Value, output: &mut Output) {
    let zone = TimeZone::system();
    let time = |value: &Value| value.as_str().and_then(Timestamp::parse);
    let executed = time(&payment["executed_at"]);
    let trace = match payment["event"]["trace_id"].as_str() {
        Some(trace) => format!("  trace {}", escape_controls(trace)),
        None => String::new(),
    };
    output.line(format_args!(
        "payment {}  {}  user {}, reservation {}, {}{trace}",
        payment["id"],
        show_cell(&payment["status"]),
        payment["user_id"],
        payment["reservation_id"],
        show_amount(payment)
    ));
    if let Some(failure) = payment["failure"].as_str() {
        let by = match &payment["paid_by"] {
            Value::Null => String::new(),
            paid_by => format!(" by payment {paid_by}"),
        };
        output.line(format_args!("  {failure}{by}"));
    }
    if let Some(executed) = executed {
        output.line(format_args!("  {}", zone.format_time(executed)));
    }
    let mut table = Table::new(&[
        ("time", Align::Left),
        ("stage", Align::Left),
        ("after", Align::Right),
        ("", Align::Left),
    ]);
    let mut before = executed;
    for stage in stages(payment) {
        let at = time(&stage.at);
        let after = match (before, at) {
            (Some(before), Some(at)) if stage.name != "stored" => show_age(at.since(before)),
            (Some(before), None) => show_age(Timestamp::now().since(before)),
            _ => String::new(),
        };
        let clock = at.map_or_else(|| "waits".to_owned(), |at| zone.format_clock(at));
        table.row([clock, stage.name.to_owned(), after, stage.detail]);
        before = at.or(before);
    }
    table.print(output);
}

/// A step of a payment. Without a time it is still open.
struct Stage {
    name: &'static str,
    at: Value,
    detail: String,
}

/// The steps until the first that is still open.
fn stages(payment: &Value) -> Vec<Stage> {
    let event = &payment["event"];
    let notification = &payment["notification"];
    let mut stages = vec![Stage {
        name: "stored",
        at: payment["executed_at"].clone(),
        detail: match event["id"].as_str() {
            Some(id) => format!("with its event {id}"),
            None => "its event and its delivery were purged, long after the delivery".to_owned(),
        },
    }];
    if event.is_null() {
        return stages;
    }
    stages.push(published_stage(event));
    if event["published_at"].is_null() {
        return stages;
    }
    stages.push(Stage {
        name: "consumed",
        at: notification["consumed_at"].clone(),
        detail: String::new(),
    });
    if !notification["consumed_at"].is_null() {
        stages.push(delivered_stage(notification));
    }
    stages
}

fn published_stage(event: &Value) -> Stage {
    let detail = match (&event["offset"], event["rejection"].as_str()) {
        (_, Some(rejection)) => format!("the broker rejects it, a dead letter: {rejection}"),
        (Value::Null, None) if event["published_at"].is_null() => {
            "for the publisher; payrelay status says why".to_owned()
        }
        (Value::Null, None) => "in this process".to_owned(),
        (offset, None) => format!("partition {}, offset {offset}", event["partition"]),
    };
    Stage {
        name: "published",
        at: event["published_at"].clone(),
        detail,
    }
}

fn delivered_stage(notification: &Value) -> Stage {
    let attempts = notification["attempts"].as_i64().unwrap_or(0);
    let status = notification["status"].as_str().unwrap_or_default();
    let mut detail = format!("channel {}", show_cell(&notification["channel"]));
    // Writing into memory cannot fail.
    if attempts > 0 {
        let _ = write!(detail, ", {}", counted(attempts, "attempt"));
    }
    match status {
        "DEAD" => detail += ", a dead letter",
        "DISCARDED" => detail += ", discarded by an operator",
        _ => {}
    }
    if status != "DELIVERED"
        && let Some(error) = notification["last_error"].as_str()
    {
        let _ = write!(detail, ": {error}");
    }
    Stage {
        name: "delivered",
        at: notification["delivered_at"].clone(),
        detail,
    }
}

/// How long ago something was, for a table.
pub(super) fn show_when(time: &Value) -> String {
    show_age_of(time, Timestamp::now())
}
