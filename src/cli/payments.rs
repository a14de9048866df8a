//! `payrelay payments`: what was paid in a time, such as today, and its sums.

use std::collections::BTreeMap;

use clap::{Args, ValueEnum};
use payrelay::domain::payment::Status;
use payrelay::domain::timestamp::{TimeZone, Timestamp};
use payrelay::slack::message::message_amount;
use payrelay::store::takings::{self, TakingsFilter};
use payrelay::store::{OfflineStore, StoreError};
use serde::Serialize;
use serde_json::Value;

use super::client::Target;
use super::exit_code;
use super::output::{Output, print_error, print_note};
use super::payment::payment_line;
use super::state::{State, to_json};
use super::table::{Align, Table, show_cell};

#[derive(Args)]
pub(super) struct PaymentsCommand {
    /// The first moment: today, yesterday, a day such as 2026-11-27 (in this machine's time zone),
    /// or a time of RFC 3339
    #[arg(long, value_name = "TIME", default_value = "today")]
    since: String,
    /// The first moment that is not included; without it: now, or for yesterday today
    #[arg(long, value_name = "TIME")]
    until: Option<String>,
    /// Only payments with this status
    #[arg(long, value_name = "STATUS", ignore_case = true)]
    status: Option<StatusArgument>,
    /// Prints the count and the sum alone, for each status and currency
    #[arg(long)]
    totals: bool,
    /// Prints comma-separated values
    #[arg(long, conflicts_with = "json")]
    csv: bool,
    /// Prints a JSON object a line
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum StatusArgument {
    Completed,
    Failed,
}

/// How many payments are read at a time.
const PAGE: usize = 500;

/// The columns of a list.
const COLUMNS: [&str; 8] = [
    "id",
    "executed_at",
    "status",
    "user_id",
    "reservation_id",
    "amount",
    "currency",
    "failure",
];

impl PaymentsCommand {
    pub(super) fn run(&self, target: &Target) -> u8 {
        let zone = TimeZone::system();
        let Some(filter) = self.filter(Timestamp::now(), &zone) else {
            print_error(
                "--since and --until are today, yesterday, a day such as 2026-11-27, or a time \
                    such as 2026-11-27T14:00:00Z",
            );
            return exit_code::USAGE;
        };
        self.show(target, filter, &zone).unwrap_or_else(|code| code)
    }

    fn filter(&self, now: Timestamp, zone: &TimeZone) -> Option<TakingsFilter> {
        let until = match (self.until.as_deref(), self.since.as_str()) {
            (Some(until), _) => parse_time(until, now, zone)?,
            (None, "yesterday") => zone.start_of_day(now, 0)?,
            (None, _) => now,
        };
        Some(TakingsFilter {
            since: parse_time(&self.since, now, zone)?,
            until,
            status: self.status.map(|status| match status {
                StatusArgument::Completed => Status::Completed,
                StatusArgument::Failed => Status::Failed,
            }),
        })
    }

    fn show(&self, target: &Target, filter: TakingsFilter, zone: &TimeZone) -> Result<u8, u8> {
        let state = State::open(target)?;
        let mut output = Output::default();
        let mut totals = Totals::default();
        let mut after = Some(0);
        if !self.totals {
            self.print_heading(&mut output);
        }
        while let Some(last) = after {
            let page = read_page(&state, filter, last)?;
            for payment in &page {
                totals.add(payment);
                if !self.totals {
                    self.print_payment(payment, zone, &mut output);
                }
            }
            after = page
                .last()
                .filter(|_| page.len() == PAGE)
                .and_then(|last| last["id"].as_i64());
        }
        if totals.0.is_empty() {
            print_note("there are no payments in this time");
        }
        self.print_totals(&totals, &mut output);
        Ok(output.exit_code(exit_code::OK))
    }

    fn print_heading(&self, output: &mut Output) {
        if self.csv {
            output.line(COLUMNS.join(","));
        }
    }

    fn print_payment(&self, payment: &Value, zone: &TimeZone, output: &mut Output) {
        if self.json {
            output.json(payment);
        } else if self.csv {
            let cells = COLUMNS.iter().map(|name| csv_cell(&payment[*name]));
            output.line(cells.collect::<Vec<_>>().join(","));
        } else {
            output.line(payment_line(payment, zone));
        }
    }

    fn print_totals(&self, totals: &Totals, output: &mut Output) {
        if self.totals && self.csv {
            output.line("status,currency,count,sum");
        }
        let mut table = Table::new(&[
            ("status", Align::Left),
            ("count", Align::Right),
            ("sum", Align::Right),
        ]);
        for ((status, currency), (count, sum)) in &totals.0 {
            if self.totals && self.json {
                output.json(&TotalView {
                    status,
                    currency,
                    count: *count,
                    sum: *sum,
                });
            } else if self.totals && self.csv {
                output.line(format_args!("{status},{currency},{count},{sum}"));
            } else if !self.json && !self.csv {
                let sum = format!("{} {currency}", message_amount(*sum, currency));
                table.row([status.clone(), count.to_string(), sum]);
            }
        }
        table.print(output);
    }
}

/// A cell of RFC 4180.
fn csv_cell(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) if text.contains(['"', ',', '\n', '\r']) => {
            format!("\"{}\"", text.replace('"', "\"\""))
        }
        other => show_cell(other),
    }
}

fn parse_time(text: &str, now: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
    match text {
        "now" => Some(now),
        "today" => zone.start_of_day(now, 0),
        "yesterday" => zone.start_of_day(now, 1),
        _ => Timestamp::parse(text).or_else(|| zone.start_of_date(text)),
    }
}

fn read_page(state: &State, filter: TakingsFilter, after: i64) -> Result<Vec<Value>, u8> {
    match state {
        State::Running(client) => {
            let TakingsFilter {
                since,
                until,
                status,
            } = filter;
            let status =
                status.map_or_else(String::new, |status| format!("&status={}", status.as_str()));
            let path =
                format!("/payments?since={since}&until={until}{status}&after={after}&limit={PAGE}");
            let page = client.find(&path)?.unwrap_or_default();
            Ok(page["payments"].as_array().cloned().unwrap_or_default())
        }
        State::Stopped(database) => {
            page_of_file(database, filter, after).map_err(super::output::print_temporary_error)
        }
    }
}

fn page_of_file(
    database: &OfflineStore,
    filter: TakingsFilter,
    after: i64,
) -> Result<Vec<Value>, StoreError> {
    let page =
        database.read(|connection| takings::payments_of_time(connection, filter, after, PAGE))?;
    Ok(page.iter().map(to_json).collect())
}

/// A sum as JSON.
#[derive(Serialize)]
struct TotalView<'a> {
    status: &'a str,
    currency: &'a str,
    count: u64,
    sum: i128,
}

/// Count and sum for each status and currency. A sum of many amounts may need more than 64 bits.
#[derive(Debug, Default)]
struct Totals(BTreeMap<(String, String), (u64, i128)>);

impl Totals {
    fn add(&mut self, payment: &Value) {
        let key = (
            show_cell(&payment["status"]),
            show_cell(&payment["currency"]),
        );
        let total = self.0.entry(key).or_default();
        total.0 += 1;
        total.1 += i128::from(payment["amount"].as_i64().unwrap_or(0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_time_is_a_day_of_a_zone_or_a_moment() {
        let zone = TimeZone::parse("Asia/Seoul").unwrap();
        let now = Timestamp::parse("2026-11-27T16:30:00Z").unwrap();
        let time = |text| parse_time(text, now, &zone).map(|time| time.to_string());
        let is = |text: &str| Some(text.to_owned());
        assert_eq!(time("today"), is("2026-11-27T15:00:00.000000Z"));
        assert_eq!(time("yesterday"), is("2026-11-26T15:00:00.000000Z"));
        assert_eq!(time("2026-01-02"), is("2026-01-01T15:00:00.000000Z"));
        assert_eq!(
            time("2026-01-02T03:04:05+09:00"),
            is("2026-01-01T18:04:05.000000Z")
        );
        assert_eq!(time("soon"), None);
    }

    #[test]
    fn totals_do_not_overflow_and_cells_of_csv_are_quoted() {
        let mut totals = Totals::default();
        for _ in 0..3 {
            totals.add(&json!({"status": "COMPLETED", "currency": "KRW", "amount": i64::MAX}));
        }
        let total = totals.0.values().next().copied();
        assert_eq!(total, Some((3, 3 * i128::from(i64::MAX))));
        assert_eq!(csv_cell(&json!("a \"b\", c")), "\"a \"\"b\"\", c\"");
        assert_eq!(csv_cell(&Value::Null), "");
    }
}
