//! The format of a log line: text or JSON. In systemd's journal a line has a priority. Text has no
//! time there, because each entry of the journal has its own.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::os::fd::AsFd as _;
use std::{env, thread};

use log::kv::{self, Key, Value, VisitSource};
use log::{Level, Record};
use payrelay::config::LogFormat;
use payrelay::domain::timestamp::Timestamp;
use serde::ser::SerializeMap as _;
use serde_json::Serializer;

/// The variable that overrides `log.format`. It also counts before the configuration is read.
const VARIABLE: &str = "PAYRELAY_LOG_FORMAT";

/// How lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LineFormat {
    format: LogFormat,
    is_journal: bool,
}

impl LineFormat {
    /// The configured format, for the standard error of this process.
    pub(super) fn new(format: LogFormat) -> Self {
        Self {
            format,
            is_journal: env::var("JOURNAL_STREAM").is_ok_and(|stream| is_standard_error(&stream)),
        }
    }

    /// Until the configuration is read: the one that the environment names.
    pub(super) fn of_environment() -> Self {
        let is_json = env::var(VARIABLE).is_ok_and(|value| value == "json");
        Self::new(if is_json {
            LogFormat::Json
        } else {
            LogFormat::Text
        })
    }

    /// Writes the line of a record.
    pub(super) fn write(self, out: &mut dyn Write, record: &Record<'_>) -> io::Result<()> {
        let message = record.args().to_string();
        let now = Timestamp::now();
        let level = record.level();
        match self.format {
            LogFormat::Json => {
                let line = json_line(now, level, &message, record.key_values());
                writeln!(out, "{}{line}", self.priority(level))
            }
            LogFormat::Text if self.is_journal => {
                self.write_journal_lines(out, level, &visible_text(&message))
            }
            LogFormat::Text => {
                let text = visible_text(&message).replace('\n', "\n    ");
                writeln!(out, "[{} {level:<5}] {text}", now.format_millis())
            }
        }
    }

    /// Writes how many lines could not be written. No log call makes this line.
    pub(super) fn write_dropped(
        self,
        out: &mut dyn Write,
        count: u64,
        message: &str,
    ) -> io::Result<()> {
        let priority = self.priority(Level::Warn);
        match self.format {
            LogFormat::Json => {
                let values = [
                    ("event", Value::from("log_lines_dropped")),
                    ("count", Value::from(count)),
                ];
                let line = json_line(Timestamp::now(), Level::Warn, message, &values);
                writeln!(out, "{priority}{line}")
            }
            LogFormat::Text => writeln!(out, "{priority}{message}"),
        }
    }

    /// Writes an error that ends the start.
    pub(super) fn write_start_error(self, out: &mut dyn Write, error: &str) -> io::Result<()> {
        match self.format {
            LogFormat::Json => {
                let event = [("event", "start_failed")];
                let line = json_line(Timestamp::now(), Level::Error, error, &event);
                writeln!(out, "{}{line}", self.priority(Level::Error))
            }
            LogFormat::Text if self.is_journal => {
                self.write_journal_lines(out, Level::Error, error)
            }
            LogFormat::Text => writeln!(out, "payrelay: {error}"),
        }
    }

    /// In the journal each line is an entry of its own, with its own priority.
    fn write_journal_lines(
        self,
        out: &mut dyn Write,
        level: Level,
        message: &str,
    ) -> io::Result<()> {
        let priority = self.priority(level);
        let text = message.replace('\n', &format!("\n{priority}    "));
        writeln!(out, "{priority}{text}")
    }

    /// The prefix that systemd reads (sd-daemon(3)).
    fn priority(self, level: Level) -> &'static str {
        match level {
            _ if !self.is_journal => "",
            Level::Error => "<3>",
            Level::Warn => "<4>",
            Level::Info => "<6>",
            Level::Debug | Level::Trace => "<7>",
        }
    }
}

/// Whether this `DEVICE:INODE` is the standard error of this process. A child of a service inherits
/// the variable, but may have another standard error (systemd.exec(5)).
fn is_standard_error(stream: &str) -> bool {
    rustix::fs::fstat(io::stderr().as_fd())
        .is_ok_and(|file| stream == format!("{}:{}", file.st_dev, file.st_ino))
}

/// Control characters would let a text that came from outside look like another line, or change the
/// colours of a terminal.
fn visible_text(message: &str) -> String {
    let mut visible = String::with_capacity(message.len());
    for character in message.chars() {
        if character.is_control() && character != '\n' && character != '\t' {
            // Writing into memory cannot fail.
            let _ = write!(visible, "{}", character.escape_default());
        } else {
            visible.push(character);
        }
    }
    visible
}

/// One object on one line. Lines of libraries and those of
/// the level debug have no event of their own.
fn json_line(now: Timestamp, level: Level, message: &str, values: &dyn kv::Source) -> String {
    let thread = thread::current();
    let mut line = Vec::with_capacity(256);
    let mut serializer = Serializer::new(&mut line);
    let mut write = || -> serde_json::Result<()> {
        let mut object = serde::Serializer::serialize_map(&mut serializer, None)?;
        object.serialize_entry("time", &now.format_millis())?;
        object.serialize_entry("level", &level.as_str().to_ascii_lowercase())?;
        object.serialize_entry("thread", thread.name().unwrap_or("without a name"))?;
        let event = values.get(Key::from_str("event"));
        let event = match event {
            Some(event) => event.to_string(),
            None if level >= Level::Debug => "debug".to_owned(),
            None => "other".to_owned(),
        };
        object.serialize_entry("event", &event)?;
        object.serialize_entry("message", message)?;
        let mut fields = JsonFields(Vec::new());
        // The visitor does not fail.
        let _ = values.visit(&mut fields);
        for (key, value) in fields.0 {
            object.serialize_entry(&key, &value)?;
        }
        object.end()
    };
    // Writing into memory cannot fail.
    let _ = write();
    String::from_utf8(line).unwrap_or_default()
}

/// The key-values of a line, except its event.
struct JsonFields(Vec<(String, serde_json::Value)>);

impl<'kvs> VisitSource<'kvs> for JsonFields {
    fn visit_pair(&mut self, key: Key<'kvs>, value: Value<'kvs>) -> Result<(), kv::Error> {
        let value = json_value(&value);
        // A line without a trace has no empty trace.
        if key.as_str() != "event" && value != "" {
            self.0.push((key.as_str().to_owned(), value));
        }
        Ok(())
    }
}

fn json_value(value: &Value<'_>) -> serde_json::Value {
    if let Some(number) = value.to_i64() {
        number.into()
    } else if let Some(number) = value.to_u64() {
        number.into()
    } else if let Some(number) = value.to_f64() {
        number.into()
    } else {
        value.to_string().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write_dropped(format: LogFormat, is_journal: bool) -> String {
        let format = LineFormat { format, is_journal };
        let mut line = Vec::new();
        format
            .write_dropped(&mut line, 3, "dropped 3 lines")
            .unwrap();
        String::from_utf8(line).unwrap()
    }

    #[test]
    fn the_count_of_dropped_lines_has_the_format_of_the_other_lines() {
        let line = write_dropped(LogFormat::Json, true);
        let object = line.strip_prefix("<4>").unwrap();
        let object: serde_json::Value = serde_json::from_str(object).unwrap();
        assert_eq!(object["event"], "log_lines_dropped");
        assert_eq!(object["level"], "warn");
        assert_eq!(object["count"], 3);
        assert!(object["time"].is_string() && object["thread"].is_string());
        assert_eq!(write_dropped(LogFormat::Text, true), "<4>dropped 3 lines\n");
        assert_eq!(write_dropped(LogFormat::Text, false), "dropped 3 lines\n");
    }
}
