//! What the benchmarks share: runs, the table, the load generator, the baselines, the real binary.
//!
//! Every figure has its baseline, measured in the same run of the program, and is the
//! median of at least three runs with their spread. The machine is noisy; ratios are what to trust.

#![expect(
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    reason = "figures are small"
)]

pub mod ack;
pub mod baseline;
pub mod cost;
pub mod grown;
pub mod load;

use std::fmt::Write as _;
use std::fs;
use std::num::NonZeroUsize;
use std::path::Path;
use std::time::Duration;

use payrelay::config::{self, DeliveryGuarantee};
use payrelay::domain::event::RecordKey;
use payrelay::domain::node_role::NodeRole;
use payrelay::domain::payment_record::RecordFormat;
use payrelay::relay::publisher::Publisher;
use payrelay::relay::{self, Relay};
use payrelay::runtime::health::HealthHandle;
use payrelay::runtime::worker::Waker;
use serde_json::json;

use crate::kafka::Broker;
use crate::process::{Options, Payrelay};
use crate::store::Database;

/// Load before anything is measured: connections are open, caches are warm.
pub const WARM_UP: Duration = Duration::from_millis(500);

/// Prints a line of progress.
pub fn print_line(line: &str) {
    println!("{line}");
}

/// How long and how often.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// A minute's run instead of a thorough one.
    pub quick: bool,
    pub runs: usize,
    /// One measured run.
    pub span: Duration,
    /// Only this number of connections, where a benchmark has several.
    pub connections: Option<usize>,
}

impl Plan {
    /// `cargo bench -- --quick`, `-- --connections 64`; other arguments of cargo's are ignored.
    pub fn from_args() -> Self {
        let args: Vec<String> = std::env::args().collect();
        let quick = args.iter().any(|arg| arg == "--quick");
        let connections = args.iter().skip_while(|arg| *arg != "--connections").nth(1);
        let connections =
            connections.map(|number| number.parse().expect("--connections takes a number"));
        if quick {
            Self {
                quick,
                runs: 3,
                span: Duration::from_secs(2),
                connections,
            }
        } else {
            Self {
                quick,
                runs: 5,
                span: Duration::from_secs(4),
                connections,
            }
        }
    }
}

/// What is measured of `kafka.delivery`: exactly-once, or what `cargo bench -- --delivery
/// at-least-once` says.
pub fn delivery() -> &'static str {
    let at_least_once = std::env::args().any(|arg| arg == "at-least-once");
    if at_least_once {
        "at-least-once"
    } else {
        "exactly-once"
    }
}

/// The same, as the publisher takes it.
pub fn guarantee() -> DeliveryGuarantee {
    if delivery() == "exactly-once" {
        DeliveryGuarantee::ExactlyOnce
    } else {
        DeliveryGuarantee::AtLeastOnce
    }
}

/// The settings of a publisher in this process: one partition, no security.
pub fn kafka_settings(broker: &Broker, topic: &str) -> config::Kafka {
    config::Kafka {
        bootstrap_servers: vec![broker.bootstrap()],
        topic: topic.into(),
        group: "none".into(),
        partitions: 1,
        delivery: guarantee(),
        format: RecordFormat::Id,
        compression: config::Compression::None,
        key: RecordKey::User,
        role: NodeRole::Single,
        reconnect_max: Duration::from_secs(5),
        dead_records_max: NonZeroUsize::MAX,
        security: config::KafkaSecurity::default(),
    }
}

/// The real binary while Kafka is unavailable: only the intake works, unless `env` says otherwise.
pub fn start_without_kafka(dir: &Path, env: &[(&str, &str)]) -> Payrelay {
    let unavailable = [
        ("PAYRELAY_PUBLISHER_KIND", "kafka"),
        ("PAYRELAY_KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:1"),
    ];
    Payrelay::start(Options::new(dir, &[&unavailable, env].concat()))
}

/// A relay in this process, and what wakes it.
pub fn relay(database: &Database, publisher: impl Publisher + 'static) -> (Relay, Waker) {
    let (waker, woken) = Waker::new();
    let (notifiers, _) = Waker::new();
    let relay = Relay::new(
        database.store().clone(),
        Box::new(publisher),
        relay::Options {
            batch_max: 1000,
            format: RecordFormat::Id,
            wake: woken,
            notifiers,
            health: HealthHandle::up(),
            reconnect_max: Duration::from_secs(5),
        },
    );
    (relay, waker)
}

/// A goal that transactions, which wait for the broker's coordinator, are not measured by.
pub fn unless_transactions(goal: Goal) -> Goal {
    if delivery() == "exactly-once" {
        Goal::None
    } else {
        goal
    }
}

/// The values of one figure, a run each.
#[derive(Debug, Clone, Default)]
pub struct Figure(pub Vec<f64>);

impl Figure {
    pub fn median(&self) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        if sorted.len().is_multiple_of(2) {
            f64::midpoint(sorted[middle - 1], sorted[middle])
        } else {
            sorted[middle]
        }
    }

    fn spread(&self) -> (f64, f64) {
        let fold = |pick: fn(f64, f64) -> f64, start| self.0.iter().copied().fold(start, pick);
        (
            fold(f64::min, f64::INFINITY),
            fold(f64::max, f64::NEG_INFINITY),
        )
    }

    /// Run by run, since both were measured side by side.
    fn ratio(&self, baseline: &Figure) -> Figure {
        Figure(
            self.0
                .iter()
                .zip(&baseline.0)
                .map(|(value, base)| value / base)
                .collect(),
        )
    }
}

/// The percentile of the values.
pub fn percentile(values: &mut [f64], percent: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let last = values.len().saturating_sub(1);
    let index = (percent / 100.0 * last as f64).round() as usize;
    values.get(index).copied().unwrap_or(f64::NAN)
}

/// What a figure should be.
#[derive(Debug, Clone, Copy)]
pub enum Goal {
    AtLeast(f64),
    AtMost(f64),
    /// Of the ratio to the baseline.
    RatioAtLeast(f64),
    RatioAtMost(f64),
    None,
}

struct Row {
    figure: String,
    unit: &'static str,
    value: Figure,
    baseline: Option<(String, Figure)>,
    goal: Goal,
}

/// The table of one benchmark.
pub struct Table {
    name: &'static str,
    rows: Vec<Row>,
}

impl Table {
    pub fn new(name: &'static str) -> Self {
        Self {
            name,
            rows: Vec::new(),
        }
    }

    pub fn row(
        &mut self,
        figure: impl Into<String>,
        unit: &'static str,
        value: Figure,
        goal: Goal,
    ) {
        self.rows.push(Row {
            figure: figure.into(),
            unit,
            value,
            baseline: None,
            goal,
        });
    }

    pub fn against(
        &mut self,
        figure: impl Into<String>,
        unit: &'static str,
        value: Figure,
        baseline: (impl Into<String>, Figure),
        goal: Goal,
    ) {
        let baseline = Some((baseline.0.into(), baseline.1));
        self.rows.push(Row {
            figure: figure.into(),
            unit,
            value,
            baseline,
            goal,
        });
    }

    /// Prints the table, and writes it as JSON below target/figures.
    pub fn finish(self) {
        println!("\n{}\n{}", self.name, self.markdown());
        let folder = crate::paths::target().join("figures");
        fs::create_dir_all(&folder).expect("the target directory is writable");
        let rows: Vec<_> = self
            .rows
            .iter()
            .map(|row| {
                let baseline = row.baseline.as_ref();
                json!({
                    "figure": row.figure,
                    "unit": row.unit,
                    "runs": row.value.0,
                    "median": row.value.median(),
                    "baseline": baseline.map(|(name, runs)| json!({"name": name, "runs": runs.0})),
                    "ratio": baseline.map(|(_, runs)| row.value.ratio(runs).median()),
                    "goal": goal(row.goal),
                    "reached": reached(row),
                })
            })
            .collect();
        let text = serde_json::to_string_pretty(&rows).expect("numbers are JSON");
        fs::write(folder.join(format!("{}.json", self.name)), text)
            .expect("the target directory is writable");
    }

    fn markdown(&self) -> String {
        let mut text =
            String::from("| figure | median | spread | baseline | its median | ratio | goal | |\n");
        text += "|---|---|---|---|---|---|---|---|\n";
        for row in &self.rows {
            let (low, high) = row.value.spread();
            let spread = format!("{} to {}", number(low), number(high));
            let (name, base, ratio) = match &row.baseline {
                Some((name, figure)) => (
                    name.as_str(),
                    number(figure.median()),
                    format!("{:.2}", row.value.ratio(figure).median()),
                ),
                None => ("", String::new(), String::new()),
            };
            let verdict = match reached(row) {
                Some(true) => "reached",
                Some(false) => "**missed**",
                None => "",
            };
            let median = number(row.value.median());
            let figure = &row.figure;
            let unit = row.unit;
            let goal = goal(row.goal);
            let _ = writeln!(
                text,
                "| {figure} | {median} {unit} | {spread} | {name} | {base} | {ratio} | {goal} | \
                    {verdict} |"
            );
        }
        text
    }
}

fn goal(goal: Goal) -> String {
    match goal {
        Goal::AtLeast(limit) => format!("at least {}", number(limit)),
        Goal::AtMost(limit) => format!("at most {}", number(limit)),
        Goal::RatioAtLeast(limit) => format!("ratio at least {limit}"),
        Goal::RatioAtMost(limit) => format!("ratio at most {limit}"),
        Goal::None => String::new(),
    }
}

fn reached(row: &Row) -> Option<bool> {
    let ratio = || {
        row.baseline
            .as_ref()
            .map(|(_, figure)| row.value.ratio(figure).median())
    };
    match row.goal {
        Goal::AtLeast(limit) => Some(row.value.median() >= limit),
        Goal::AtMost(limit) => Some(row.value.median() <= limit),
        Goal::RatioAtLeast(limit) => ratio().map(|ratio| ratio >= limit),
        Goal::RatioAtMost(limit) => ratio().map(|ratio| ratio <= limit),
        Goal::None => None,
    }
}

fn number(value: f64) -> String {
    if value.abs() >= 1000.0 {
        let digits = format!("{value:.0}");
        let mut grouped = String::new();
        for (index, digit) in digits.chars().enumerate() {
            if index > 0 && (digits.len() - index).is_multiple_of(3) {
                grouped.push(',');
            }
            grouped.push(digit);
        }
        grouped
    } else if value.abs() >= 10.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.2}")
    }
}

/// A folder on that disk, gone with its owner. Not in /tmp, which may be memory: an fsync there
/// costs nothing.
pub fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(crate::paths::temporary()).expect("the target directory is writable")
}
