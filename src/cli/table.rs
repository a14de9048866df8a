//! Tables, ages and sizes for people, and the colours of states.

use std::fmt::Write as _;
use std::time::Duration;

use anstyle::{AnsiColor, Style};
use payrelay::domain::timestamp::Timestamp;
use serde_json::Value;

use super::output::Output;

/// How a column is aligned. The last column is not padded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Align {
    Left,
    Right,
}

/// A table whose columns are as wide as their longest cell.
#[derive(Debug)]
pub(super) struct Table {
    columns: Vec<(&'static str, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(super) fn new(columns: &[(&'static str, Align)]) -> Self {
        Self {
            columns: columns.to_vec(),
            rows: Vec::new(),
        }
    }

    /// Adds a row. Control characters in a cell may be from outside, so they are escaped.
    pub(super) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let cells = cells.into_iter().map(|cell| escape_controls(&cell));
        self.rows.push(cells.collect());
    }

    /// Writes the heading and the rows, unless there is no row. Returns whether standard output is
    /// still open.
    pub(super) fn print(&self, output: &mut Output) -> bool {
        if self.rows.is_empty() {
            return true;
        }
        let heading: Vec<_> = self
            .columns
            .iter()
            .map(|(name, _)| (*name).to_owned())
            .collect();
        let widths: Vec<_> = (0..self.columns.len())
            .map(|column| {
                let cells = self.rows.iter().chain([&heading]);
                cells
                    .filter_map(|row| row.get(column))
                    .map(|cell| cell.chars().count())
                    .max()
                    .unwrap_or(0)
            })
            .collect();
        let bold = Style::new().bold();
        let mut is_open = output.line(format_args!(
            "{bold}{}{bold:#}",
            self.format_row(&heading, &widths)
        ));
        for row in &self.rows {
            is_open = is_open && output.line(self.format_row(row, &widths));
        }
        is_open
    }

    fn format_row(&self, row: &[String], widths: &[usize]) -> String {
        let mut line = String::new();
        for ((cell, width), (_, align)) in row.iter().zip(widths).zip(&self.columns) {
            // Writing into memory cannot fail.
            let _ = match align {
                Align::Left => write!(line, "{cell:<width$}  "),
                Align::Right => write!(line, "{cell:>width$}  "),
            };
        }
        line.trim_end().to_owned()
    }
}

/// A text from outside, with its control characters escaped: they would control the terminal.
pub(super) fn escape_controls(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for sign in text.chars() {
        if sign.is_control() {
            escaped.extend(sign.escape_default());
        } else {
            escaped.push(sign);
        }
    }
    escaped
}

/// The two largest units of a duration: `4 m 12 s`, `5 d`.
pub(super) fn show_age(age: Duration) -> String {
    let seconds = age.as_secs();
    let parts = [
        ("d", seconds / 86_400),
        ("h", seconds / 3600 % 24),
        ("m", seconds / 60 % 60),
        ("s", seconds % 60),
    ];
    let Some(first) = parts.iter().position(|(_, count)| *count > 0) else {
        return match age.as_millis() {
            0 => "0 s".to_owned(),
            ms => format!("{ms} ms"),
        };
    };
    let shown = parts.iter().skip(first).take(2).filter(|part| part.1 > 0);
    let shown: Vec<_> = shown
        .map(|(unit, count)| format!("{count} {unit}"))
        .collect();
    shown.join(" ")
}

/// A size in its largest unit: `41.2 GiB`.
pub(super) fn show_bytes(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut unit = 0;
    // In tenths, so that nothing is rounded twice.
    let mut tenths = bytes.saturating_mul(10) / 1024;
    while tenths >= 10_240 && unit + 1 < UNITS.len() {
        tenths /= 1024;
        unit += 1;
    }
    format!("{}.{} {}", tenths / 10, tenths % 10, UNITS[unit])
}

/// The age of a time in JSON; a dash if there is none. A time in the future is named as such.
pub(super) fn show_age_of(time: &Value, now: Timestamp) -> String {
    let time = time.as_str().and_then(Timestamp::parse);
    match time {
        None => "-".to_owned(),
        // The clock was set back since, or is another one's.
        Some(time) if time.since(now) >= Duration::from_secs(1) => {
            format!("{} ahead", show_age(time.since(now)))
        }
        Some(time) => show_age(now.since(time)),
    }
}

/// A value of JSON as a cell: a text without its quotes, and a dash for null.
pub(super) fn show_cell(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// A state in its colour.
pub(super) fn color_state(state: &str) -> String {
    let color = match state {
        "up" | "ready" | "ok" => AnsiColor::Green,
        "degraded" | "rate_limited" | "behind" | "clock" => AnsiColor::Yellow,
        _ => AnsiColor::Red,
    };
    let style = Style::new().bold().fg_color(Some(color.into()));
    format!("{style}{}{style:#}", state.to_uppercase().replace('_', " "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_age_has_its_two_largest_units() {
        let age = |ms| show_age(Duration::from_millis(ms));
        assert_eq!(age(0), "0 s");
        assert_eq!(age(15), "15 ms");
        assert_eq!(age(252_999), "4 m 12 s");
        assert_eq!(age(3_600_000), "1 h");
        assert_eq!(age(5 * 86_400_000 + 59_000), "5 d");
    }

    #[test]
    fn a_time_in_the_future_has_no_age_of_zero() {
        let now = Timestamp::parse("2026-11-27T12:00:00Z").unwrap();
        let age = |time: &str| show_age_of(&Value::from(time), now);
        assert_eq!(age("2026-11-27T11:59:00Z"), "1 m");
        assert_eq!(age("2026-11-27T12:00:00.9Z"), "0 s");
        assert_eq!(age("2026-11-27T12:05:00Z"), "5 m ahead");
    }

    #[test]
    fn a_size_has_its_largest_unit() {
        assert_eq!(show_bytes(1023), "1023 B");
        assert_eq!(show_bytes(1536), "1.5 KiB");
        assert_eq!(show_bytes(16 << 20), "16.0 MiB");
        assert_eq!(show_bytes(u64::MAX), "1677721.5 TiB");
    }

    #[test]
    fn control_characters_of_a_cell_are_escaped() {
        assert_eq!(escape_controls("a\u{1b}[2J\nb é"), "a\\u{1b}[2J\\nb é");
    }
}
