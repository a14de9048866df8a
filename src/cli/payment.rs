//! `payrelay payment`: the timeline of one payment.

use std::fmt::Write as _;

use clap::Args;
use payrelay::domain::timestamp::{TimeZone, Timestamp};
use payrelay::domain::trace_context::TraceId;
use payrelay::runtime::plural::counted;
use payrelay::slack::message::message_amount;
use payrelay::store::payment_view::PaymentView;
use payrelay::store::{OfflineStore, StoreError, timeline, trace};
use serde_json::Value;

use super::client::Target;
use super::exit_code;
use super::output::{Output, print_error};
use super::progress::{Measure, Progress};
use super::state::{State, to_json};
use super::table::{Align, Table, escape_controls, show_age, show_age_of, show_cell};

#[derive(Args)]
pub(super) struct PaymentCommand {
    /// The payment's id
    #[arg(value_name = "ID", value_parser = clap::value_parser!(i64).range(0..))]
    #[arg(required_unless_present = "trace", conflicts_with = "trace")]
    id: Option<i64>,
    /// Finds payments by the trace of their request, as long as the outbox keeps their events. It
    /// reads the whole outbox
    #[arg(long, value_name = "TRACE_ID", value_parser = parse_trace_id)]
    trace: Option<TraceId>,
    /// Prints one JSON object; with --trace one a line
    #[arg(long)]
    json: bool,
}

impl PaymentCommand {
    pub(super) fn run(&self, target: &Target) -> u8 {
        self.show(target).unwrap_or_else(|code| code)
    }

    fn show(&self, target: &Target) -> Result<u8, u8> {
        let state = State::open(target)?;
        match (self.id, &self.trace) {
            (_, Some(trace)) => self.show_trace(&state, trace),
            (id, None) => self.show_payment(&state, id.unwrap_or_default()),
        }
    }

    /// The timeline of the only payment of a trace, or a list of all of them.
    fn show_trace(&self, state: &State, trace: &TraceId) -> Result<u8, u8> {
        let payments = find_trace(state, trace)?;
        if let [payment] = payments.as_slice()
            && let Some(id) = payment["id"].as_i64()
        {
            return self.show_payment(state, id);
        }
        if payments.is_empty() {
            print_error(format_args!(
                "no payment in the outbox has the trace {}",
                trace.as_str()
            ));
            return Ok(exit_code::PARTIAL);
        }
        let zone = TimeZone::system();
        let mut output = Output::default();
        for payment in &payments {
            if self.json {
                output.json(payment);
            } else {
                output.line(payment_line(payment, &zone));
            }
        }
        Ok(output.exit_code(exit_code::OK))
    }

    fn show_payment(&self, state: &State, id: i64) -> Result<u8, u8> {
        let found = state.get(&format!("/payments/{id}"), |database| {
            payment_of_file(database, id)
        })?;
        let Some(payment) = found else {
            print_error(format_args!("there is no payment {id}"));
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

fn parse_trace_id(text: &str) -> Result<TraceId, &'static str> {
    TraceId::parse(text).ok_or("a trace id has 32 hexadecimal digits, not all of them zero")
}

/// Every payment of a trace, newest first.
fn find_trace(state: &State, trace: &TraceId) -> Result<Vec<Value>, u8> {
    let _progress = Progress::show("outbox", || Measure::Time);
    let path = format!("/payments?trace_id={}", trace.as_str());
    state.list(&path, "payments", |database| {
        let mut found = Vec::new();
        let mut before = Some(i64::MAX);
        while let Some(id) = before {
            let page = database.read(|connection| {
                trace::payments_of_trace(connection, trace, id, trace::EVENTS_READ)
            })?;
            found.extend(page.payments.iter().map(to_json));
            before = page.next_before;
        }
        Ok(found)
    })
}

/// A payment as a line of a list.
pub(super) fn payment_line(payment: &Value, zone: &TimeZone) -> String {
    let time = payment["executed_at"].as_str().and_then(Timestamp::parse);
    let line = format!(
        "{:>10}  {}  {:<9}  user {}, reservation {}  {}  {}",
        show_cell(&payment["id"]),
        time.map_or_else(String::new, |time| zone.format_time(time)),
        show_cell(&payment["status"]),
        payment["user_id"],
        payment["reservation_id"],
        show_amount(payment),
        escape_controls(payment["failure"].as_str().unwrap_or_default())
    );
    line.trim_end().to_owned()
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
            None => "its event was purged, long after the end of its way".to_owned(),
        },
    }];
    if event.is_null() {
        return stages;
    }
    stages.push(published_stage(event));
    // Others deliver the event of an edge.
    if event["published_at"].is_null() || notification.is_null() {
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
