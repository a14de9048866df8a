//! `payrelay status`: whether payrelay is healthy, what waits and for how long, and what an
//! operator has to do.

use std::time::Duration;

use clap::Args;
use payrelay::domain::timestamp::Timestamp;
use payrelay::runtime::plural::counted;
use payrelay::sampler::disk_forecast::FORECAST_MAX;
use payrelay::store::backlog::BacklogCounter;
use payrelay::store::waiting::Waiting;
use payrelay::store::{OfflineStore, StoreError, channel_sink, node_role, operation};
use serde_json::{Value, json};

use super::client::Target;
use super::exit_code;
use super::output::Output;
use super::state::{State, to_json};
use super::table::{
    Align, Table, color_state, escape_controls, show_age, show_age_of, show_bytes, show_cell,
};
use super::watch::Watch;

#[derive(Args)]
pub(super) struct StatusCommand {
    #[command(flatten)]
    watch: Watch,
    /// Prints one JSON object
    #[arg(long)]
    json: bool,
}

/// What `status` is while no payrelay runs.
const NOT_RUNNING: &str = "not running";

impl StatusCommand {
    pub(super) fn run(&self, target: &Target) -> u8 {
        self.watch
            .repeat(self.json, |output| self.show(target, output))
    }

    fn show(&self, target: &Target, output: &mut Output) -> Result<u8, u8> {
        let overview = read_overview(target)?;
        if self.json {
            output.json(&overview);
        } else {
            StatusScreen::new(&overview).print(output);
        }
        Ok(status_exit_code(&overview))
    }
}

/// The overview of a running payrelay, or the same of the file.
pub(super) fn read_overview(target: &Target) -> Result<Value, u8> {
    let state = State::open(target)?;
    let overview = state.get("/overview", |database| overview_of_file(database).map(Some))?;
    Ok(overview.unwrap_or_default())
}

/// What the file knows: what waits, but not why.
fn overview_of_file(database: &OfflineStore) -> Result<Value, StoreError> {
    let waiting = database.read(channel_sink::waiting_by_channel)?;
    let names: Vec<_> = waiting.into_iter().map(|(name, _)| name).collect();
    let mut counter = BacklogCounter::new(&names);
    let backlog = database.read(|connection| counter.count(connection))?;
    let now = Timestamp::now();
    let age = |waiting: Waiting| {
        json!({
            "count": waiting.count,
            "oldest_at": waiting.oldest_at,
            "oldest_age_s": waiting.age(now).as_secs(),
        })
    };
    let channel = |(name, waiting): (&String, &Waiting)| {
        json!({
            "name": name,
            "waiting": waiting.count,
            "oldest_waiting_s": waiting.age(now).as_secs(),
        })
    };
    Ok(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "started_at": null,
        "status": NOT_RUNNING,
        "node": database.node().as_str(),
        "role": to_json(&database.read(node_role::node_role)?),
        "components": {},
        "pending": {
            "sampled_at": now,
            "unpublished": age(backlog.unpublished),
            "unconsumed": age(backlog.unconsumed),
            "undelivered": age(backlog.undelivered()),
            "dead_letters": age(backlog.dead_letters),
        },
        "warnings": [],
        "last_minute": null,
        "channels": names.iter().zip(&backlog.channels).map(channel).collect::<Vec<_>>(),
        "files": to_json(&database.file_sizes()),
        "disk_full_in_s": null,
        "last_backup": to_json(&database.read(operation::last_backup)?),
        "last_audit": to_json(&database.read(operation::last_audit)?),
    }))
}

/// 0: ready. 1: degraded, or something waits for a person. 75: payments are not accepted.
fn status_exit_code(overview: &Value) -> u8 {
    let letters = overview["pending"]["dead_letters"]["count"].as_i64();
    match overview["status"].as_str() {
        Some("ready") if letters.unwrap_or(0) == 0 => exit_code::OK,
        Some("ready" | "degraded") => exit_code::PARTIAL,
        _ => exit_code::TEMPORARY,
    }
}

/// An overview for people.
struct StatusScreen<'a> {
    overview: &'a Value,
    now: Timestamp,
}

impl<'a> StatusScreen<'a> {
    fn new(overview: &'a Value) -> Self {
        Self {
            overview,
            now: Timestamp::now(),
        }
    }

    fn print(&self, output: &mut Output) {
        output.line(self.headline());
        for line in self.causes() {
            output.line(format_args!("  {line}"));
        }
        self.stages().print(output);
        output.line(self.footer());
        for warning in self.overview["warnings"].as_array().into_iter().flatten() {
            output.line(format_args!(
                "warning: {}",
                escape_controls(&show_cell(warning))
            ));
        }
    }

    fn headline(&self) -> String {
        let overview = self.overview;
        let up = match overview["started_at"].as_str() {
            Some(_) => format!("  up {}", show_age_of(&overview["started_at"], self.now)),
            None => String::new(),
        };
        format!(
            "payrelay {}  node {}{up}  {}",
            show_cell(&overview["version"]),
            show_cell(&overview["node"]),
            color_state(overview["status"].as_str().unwrap_or("unavailable"))
        )
    }

    /// Each component that does not work, since when and why, and what to do.
    fn causes(&self) -> Vec<String> {
        let components = self.overview["components"].as_object();
        let mut causes = Vec::new();
        for (name, health) in components.into_iter().flatten() {
            let state = health["state"].as_str().unwrap_or_default();
            if state == "up" {
                continue;
            }
            let channel = name.strip_prefix("slack:").unwrap_or("default");
            let advice = match state {
                "paused" => format!("; then: payrelay channels resume {channel}"),
                "fenced" => "; then: payrelay outbox resume".to_owned(),
                _ => String::new(),
            };
            causes.push(format!(
                "{name}: {} for {}: {}{advice}",
                color_state(state),
                show_age_of(&health["since"], self.now),
                escape_controls(&show_cell(&health["error"]))
            ));
        }
        causes
    }

    fn stages(&self) -> Table {
        let pending = &self.overview["pending"];
        let minute = &self.overview["last_minute"];
        let mut table = Table::new(&[
            ("", Align::Left),
            ("last min", Align::Right),
            ("waiting", Align::Right),
            ("oldest", Align::Right),
            ("p50", Align::Right),
            ("p99", Align::Right),
        ]);
        let dash = || "-".to_owned();
        let latency = &self.overview["latency"];
        let [p50, p99] = show_quantiles(&latency["answer"]);
        table.row([
            "payments".to_owned(),
            show_cell(&minute["payments"]),
            dash(),
            dash(),
            p50,
            p99,
        ]);
        for (stage, count, waiting, key) in [
            (
                "publish",
                &minute["published"],
                &pending["unpublished"],
                "publish",
            ),
            ("consume", &Value::Null, &pending["unconsumed"], "consume"),
            ("notify", &minute["delivered"], &pending["undelivered"], ""),
        ] {
            if self.overview["role"] == "edge" && stage != "publish" {
                continue;
            }
            let oldest = show_age_of(&waiting["oldest_at"], self.now);
            let waiting = show_cell(&waiting["count"]);
            let [p50, p99] = show_quantiles(&latency[key]);
            table.row([
                stage.to_owned(),
                show_cell(count),
                waiting,
                oldest,
                p50,
                p99,
            ]);
        }
        let channels = self.overview["channels"].as_array();
        for channel in channels.into_iter().flatten() {
            let oldest = match channel["waiting"].as_i64() {
                Some(1..) => show_oldest(channel),
                _ => dash(),
            };
            let name = format!("  {}", show_cell(&channel["name"]));
            let waiting = show_cell(&channel["waiting"]);
            let [p50, p99] = show_quantiles(&channel["latency"]);
            table.row([name, String::new(), waiting, oldest, p50, p99]);
        }
        table
    }

    fn footer(&self) -> String {
        let size = |key: &str| {
            let bytes = self.overview["files"][key].as_u64();
            bytes.map_or_else(|| "unknown".to_owned(), show_bytes)
        };
        let letters = &self.overview["pending"]["dead_letters"];
        let letters = match letters["count"].as_i64().unwrap_or(0) {
            0 => "no dead letters".to_owned(),
            count => format!(
                "{} (oldest {}): payrelay dead-letters list",
                counted(count, "dead letter"),
                show_age_of(&letters["oldest_at"], self.now)
            ),
        };
        let backup = match self.overview.get("last_backup") {
            None => "backup unknown".to_owned(),
            Some(Value::Null) => "no backup yet".to_owned(),
            Some(backup) => format!("backup {} ago", show_age_of(&backup["ended_at"], self.now)),
        };
        format!(
            "disk {} free{} · file {}, WAL {} · {letters} · {backup}, {}",
            size("disk_free_bytes"),
            show_forecast(&self.overview["disk_full_in_s"]),
            size("database_bytes"),
            size("wal_bytes"),
            self.show_audit()
        )
    }

    fn show_audit(&self) -> String {
        let audit = match self.overview.get("last_audit") {
            None => return "audit unknown".to_owned(),
            Some(Value::Null) => return "no audit yet".to_owned(),
            Some(audit) => audit,
        };
        let scope = if audit["file_only"] == true {
            " of the file"
        } else {
            ""
        };
        let result = match audit["findings"].as_u64().unwrap_or(0) {
            0 => "clean".to_owned(),
            count => format!("found {}", counted(count, "problem")),
        };
        let age = show_age_of(&audit["ended_at"], self.now);
        format!("audit{scope} {result} {age} ago")
    }
}

/// When the disk is full, at the pace of the last hour.
fn show_forecast(seconds: &Value) -> String {
    match seconds.as_u64().map(Duration::from_secs) {
        None => String::new(),
        Some(time) if time >= FORECAST_MAX => ", full in more than 30 d".to_owned(),
        Some(time) => format!(", full in {}", show_age(time)),
    }
}

/// The median and the 99th percentile of a latency in the last minute.
fn show_quantiles(latency: &Value) -> [String; 2] {
    ["p50_ms", "p99_ms"].map(|key| match latency[key].as_f64() {
        None => "-".to_owned(),
        Some(ms) if ms < 1_000.0 => format!("{ms:.1} ms"),
        Some(ms) if ms < 60_000.0 => format!("{:.1} s", ms / 1_000.0),
        Some(ms) => show_age(Duration::from_secs_f64(ms / 1_000.0)),
    })
}

/// The age of the oldest payment that waits for a channel.
pub(super) fn show_oldest(channel: &Value) -> String {
    let seconds = channel["oldest_waiting_s"].as_u64();
    seconds.map_or_else(
        || "-".to_owned(),
        |seconds| show_age(Duration::from_secs(seconds)),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forecast_is_shown_once_it_is_known() {
        assert_eq!(show_forecast(&Value::Null), "");
        assert_eq!(show_forecast(&json!(7200)), ", full in 2 h");
        assert_eq!(show_forecast(&json!(2_592_000)), ", full in more than 30 d");
    }

    #[test]
    fn the_exit_code_of_a_status_is_for_monitoring() {
        let code = |status: &str, letters: i64| {
            let pending = json!({"dead_letters": {"count": letters}});
            status_exit_code(&json!({"status": status, "pending": pending}))
        };
        assert_eq!(code("ready", 0), 0);
        assert_eq!((code("ready", 1), code("degraded", 0)), (1, 1));
        assert_eq!((code("unavailable", 0), code(NOT_RUNNING, 0)), (75, 75));
        assert_eq!(status_exit_code(&Value::Null), 75);
    }
}
