//! A scrape of `/metrics`, and series that continue as two scrapes of them show.
//!
//! An alert waits for minutes or hours. A test makes the fault, scrapes twice, and has promtool
//! evaluate the rules over series that continue in the same direction for that time.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, SystemTime};

use super::http::Client;
use super::{promtool, wait_for};

/// The labels that Prometheus adds to each series of a scrape.
pub const TARGET: &str = "job=\"payrelay\",instance=\"till-1:8080\"";

/// Between two samples of a series for promtool.
const INTERVAL: Duration = Duration::from_secs(15);

/// A heartbeat of a thread that works is younger: idle threads have one every 30 s.
const HEARTBEAT_MAX_S: f64 = 35.0;

const LIMIT: Duration = Duration::from_mins(1);

/// What one scrape brought.
#[derive(Debug, Clone, Default)]
pub struct Scrape {
    /// Seconds since 1970.
    at: f64,
    /// By name and labels, as they were written: `payrelay_ready` or `payrelay_x{a="b"}`.
    series: BTreeMap<String, f64>,
    /// The series that only grow.
    counters: BTreeSet<String>,
}

impl Scrape {
    /// A scrape now. Without an answer it has no series.
    pub fn of(address: SocketAddr) -> Self {
        let at = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let at = at.expect("the clock is right").as_secs_f64();
        if TcpStream::connect(address).is_err() {
            return Self {
                at,
                ..Self::default()
            };
        }
        let response = Client::connect(address).get("/metrics");
        let text = String::from_utf8_lossy(&response.body).into_owned();
        assert_eq!(response.status, 200, "{text}");
        Self::parse(at, &text)
    }

    /// The first scrape that is as a test needs it. A look at the health brings a new sample, so
    /// that the test need not wait for the next one.
    #[track_caller]
    pub fn until(address: SocketAddr, what: &str, is_so: impl Fn(&Scrape) -> bool) -> Self {
        let mut client = Client::connect(address);
        wait_for(what, LIMIT, || {
            let _ = client.get("/health/ready");
            let scrape = Self::of(address);
            is_so(&scrape).then_some(scrape)
        })
    }

    fn parse(at: f64, text: &str) -> Self {
        let mut scrape = Self {
            at,
            ..Self::default()
        };
        let mut growing = Vec::new();
        for line in text.lines() {
            if let Some(description) = line.strip_prefix("# TYPE ") {
                let (name, kind) = description.split_once(' ').unwrap_or_default();
                match kind {
                    "counter" => growing = vec![name.to_owned()],
                    "histogram" => {
                        growing = ["_bucket", "_sum", "_count"]
                            .map(|part| format!("{name}{part}"))
                            .to_vec();
                    }
                    _ => growing.clear(),
                }
            }
            let Some((series, value)) = line.rsplit_once(' ').filter(|_| !line.starts_with('#'))
            else {
                continue;
            };
            let value: f64 = value
                .parse()
                .unwrap_or_else(|error| panic!("{line}: {error}"));
            assert!(value.is_finite(), "{line}");
            if growing.iter().any(|name| name == name_of(series)) {
                scrape.counters.insert(series.to_owned());
            }
            scrape.series.insert(series.to_owned(), value);
        }
        scrape
    }

    /// Whether payrelay has answered.
    pub fn is_up(&self) -> bool {
        !self.series.is_empty()
    }

    /// The value of a series: its name, and its labels as they are written.
    #[track_caller]
    pub fn value(&self, series: &str) -> f64 {
        let value = self.series.get(series);
        *value.unwrap_or_else(|| panic!("the scrape has no {series}"))
    }

    /// The smallest value of a metric, whatever its labels.
    pub fn smallest(&self, name: &str) -> f64 {
        let of_name = self
            .series
            .iter()
            .filter(|(series, _)| name_of(series) == name);
        let values = of_name.map(|(_, value)| *value);
        values.fold(f64::INFINITY, f64::min)
    }

    /// How old a point in time was.
    #[track_caller]
    pub fn age(&self, series: &str) -> f64 {
        self.at - self.value(series)
    }

    /// Each series: its name and its labels.
    pub fn series(&self) -> impl Iterator<Item = (&str, BTreeMap<String, String>)> {
        self.series
            .keys()
            .map(|series| (name_of(series), labels_of(series)))
    }

    /// Replaces a measured value for the sake of an alert, as docs/reference/alerts.md has to say.
    #[track_caller]
    pub fn simulate(&mut self, _alert: &str, series: &str, value: f64) {
        let measured = self.series.get_mut(series);
        *measured.unwrap_or_else(|| panic!("the scrape has no {series}")) = value;
    }
}

/// The name of a series.
fn name_of(series: &str) -> &str {
    series.split('{').next().unwrap_or(series)
}

/// The labels of a series.
fn labels_of(series: &str) -> BTreeMap<String, String> {
    let mut labels = BTreeMap::new();
    let mut rest = series.split_once('{').map_or("", |(_, rest)| rest);
    while let Some((name, value)) = rest.split_once("=\"") {
        let Some((value, after)) = value.split_once('"') else {
            break;
        };
        labels.insert(name.trim_start_matches(',').to_owned(), value.to_owned());
        rest = after;
    }
    labels
}

/// Two scrapes of one state, and how long the state lasts.
#[derive(Debug, Clone)]
struct State {
    first: Scrape,
    last: Scrape,
    lasts: Duration,
}

/// The series of one payrelay: what was before, and what follows.
#[derive(Debug, Clone, Default)]
pub struct History {
    states: Vec<State>,
    expected: Vec<(Duration, Vec<String>)>,
}

impl History {
    pub fn new() -> Self {
        Self::default()
    }

    /// A state begins, which two scrapes show. It lasts for this time, unless another one follows.
    #[must_use]
    pub fn then(mut self, lasts: Duration, first: Scrape, last: Scrape) -> Self {
        self.states.push(State { first, last, lasts });
        self
    }

    /// So long after the beginning of the last state exactly these alerts fire: each by its name
    /// and its labels, as `PayrelayX{channel="default"}`.
    #[must_use]
    pub fn fires(mut self, after: Duration, alerts: &[&str]) -> Self {
        let before: Duration = self
            .states
            .iter()
            .rev()
            .skip(1)
            .map(|part| part.lasts)
            .sum();
        let alerts = alerts.iter().map(|alert| (*alert).to_owned()).collect();
        self.expected.push((before + after, alerts));
        self
    }

    /// Has promtool evaluate the rules. `severities` has each alert with its severity.
    #[track_caller]
    pub fn check(&self, rules: &str, severities: &BTreeMap<String, String>) {
        let mut text = format!(
            "rule_files: [{rules}]\nevaluation_interval: 15s\ntests:\n  - interval: 15s\n    \
             input_series:\n"
        );
        for (series, values) in self.input_series() {
            let _ = writeln!(text, "      - {{series: '{series}', values: '{values}'}}");
        }
        text.push_str("    promql_expr_test:\n");
        assert!(!self.expected.is_empty());
        for (after, alerts) in &self.expected {
            let _ = write!(
                text,
                "      - expr: ALERTS{{alertstate=\"firing\"}}\n        eval_time: {}s\n        \
                 exp_samples:\n",
                after.as_secs()
            );
            for alert in alerts {
                let (name, labels) = alert.split_once('{').unwrap_or((alert, "}"));
                let severity = &severities[name];
                let comma = if labels == "}" { "" } else { "," };
                let _ = write!(
                    text,
                    "          - labels: 'ALERTS{{alertname=\"{name}\",alertstate=\"firing\",\
                     severity=\"{severity}\",{TARGET}{comma}{labels}'\n            value: 1\n"
                );
            }
        }
        promtool::run_with_file(&["test", "rules"], &text);
    }

    /// Each series with its values, in promtool's notation
    /// (<https://prometheus.io/docs/prometheus/latest/configuration/unit_testing_rules/#series>).
    fn input_series(&self) -> Vec<(String, String)> {
        let names: BTreeSet<&String> = self
            .states
            .iter()
            .flat_map(|state| state.last.series.keys())
            .collect();
        let mut found = vec![(format!("up{{{TARGET}}}"), self.values_of_up())];
        for series in names {
            let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
            let comma = if labels == "}" { "" } else { "," };
            let key = format!("{name}{{{TARGET}{comma}{labels}");
            found.push((key, self.values(series)));
        }
        found
    }

    fn values_of_up(&self) -> String {
        let part = |state: &State| {
            let value = u8::from(state.last.is_up());
            format!("{value}+0x{}", samples(state.lasts) - 1)
        };
        self.states.iter().map(part).collect::<Vec<_>>().join(" ")
    }

    fn values(&self, series: &str) -> String {
        let mut parts = Vec::new();
        let mut start = 0.0;
        // Of a counter: where its last state ended, and what the scrape before had.
        let mut end: Option<(f64, f64)> = None;
        for state in &self.states {
            let count = samples(state.lasts);
            match state.last.series.get(series) {
                // As Prometheus does when a series is gone.
                None if state.last.is_up() || parts.is_empty() => {
                    parts.push(format!("_x{count}"));
                }
                None => parts.push(format!("stale _x{}", count - 1)),
                Some(_) => {
                    let (mut value, slope) = state.continued(series, start);
                    if let Some((reached, measured)) = end.filter(|_| state.is_counter(series)) {
                        // A process that was started again counts from 0.
                        value = reached + (value - measured).max(0.0);
                    }
                    let step = slope * INTERVAL.as_secs_f64();
                    let steps = count - 1;
                    parts.push(format!("{value:.6}{step:+.6}x{steps}"));
                    let last = state.last.series[series];
                    end = Some((value + step * f64::from(steps), last));
                }
            }
            start += state.lasts.as_secs_f64();
        }
        parts.join(" ")
    }
}

impl State {
    fn is_counter(&self, series: &str) -> bool {
        self.last.counters.contains(series)
    }

    /// The value of a series at the beginning of the state, and its change in a second. Counters
    /// and ages continue as they were measured. A point in time that was renewed keeps its age.
    /// Everything else keeps its last value.
    fn continued(&self, series: &str, start: f64) -> (f64, f64) {
        let last = self.last.series[series];
        let first = self.first.series.get(series).copied().unwrap_or(last);
        let seconds = (self.last.at - self.first.at).max(0.001);
        let rate = ((last - first) / seconds).max(0.0);
        let name = name_of(series);
        if name.ends_with("_timestamp_seconds") {
            let age = self.last.at - last;
            let is_alive = name.ends_with("_heartbeat_timestamp_seconds") && age < HEARTBEAT_MAX_S;
            let is_renewed = is_alive || last > first;
            (start - age, f64::from(u8::from(is_renewed)))
        } else if self.is_counter(series) {
            (first, rate)
        } else if name.ends_with("_age_seconds") {
            (last, rate.round().min(1.0))
        } else {
            (last, 0.0)
        }
    }
}

fn samples(time: Duration) -> u32 {
    u32::try_from(time.as_secs() / INTERVAL.as_secs()).expect("it is a few hours")
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: &str = "# TYPE x_total counter\nx_total{a=\"b c\"} 10\n\
        # TYPE y_age_seconds gauge\ny_age_seconds 5\n# TYPE z gauge\nz 3\n\
        # TYPE t_timestamp_seconds gauge\nt_timestamp_seconds{n=\"old\"} 900\n\
        t_timestamp_seconds{n=\"new\"} 998\n";
    const LAST: &str = "# TYPE x_total counter\nx_total{a=\"b c\"} 30\n\
        # TYPE y_age_seconds gauge\ny_age_seconds 15.02\n# TYPE z gauge\nz 4\n\
        # TYPE t_timestamp_seconds gauge\nt_timestamp_seconds{n=\"old\"} 900\n\
        t_timestamp_seconds{n=\"new\"} 1008\n";

    #[test]
    fn series_of_a_scrape_continue_as_they_were_measured() {
        let first = Scrape::parse(1000.0, FIRST);
        let last = Scrape::parse(1010.0, LAST);
        let age = last.age("t_timestamp_seconds{n=\"old\"}");
        assert!((age - 110.0).abs() < 0.001, "{age}");
        let minute = Duration::from_mins(1);
        let gone = Scrape {
            at: 1020.0,
            ..Scrape::default()
        };
        let history = History::new().then(minute, first, last.clone());
        let history = history
            .then(minute, last.clone(), last)
            .then(minute, gone.clone(), gone);
        let found: BTreeMap<String, String> = history.input_series().into_iter().collect();
        let expected = [
            ("up{", "1+0x3 1+0x3 0+0x3"),
            (
                "x_total{",
                "10.000000+30.000000x3 100.000000+0.000000x3 stale _x3",
            ),
            (
                "y_age_seconds{",
                "15.020000+15.000000x3 15.020000+0.000000x3 stale _x3",
            ),
            ("z{", "4.000000+0.000000x3 4.000000+0.000000x3 stale _x3"),
        ];
        for (name, values) in expected {
            let series = found.iter().find(|(series, _)| series.starts_with(name));
            assert_eq!(series.unwrap().1, values, "{found:#?}");
        }
        let times: Vec<_> = found
            .iter()
            .filter(|(series, _)| series.starts_with("t_"))
            .collect();
        assert!(times[0].0.contains("n=\"new\""), "{times:?}");
        assert!(times[0].1.starts_with("-2.000000+15.000000x3"), "{times:?}");
        assert!(
            times[1].1.starts_with("-110.000000+0.000000x3"),
            "{times:?}"
        );
    }
}
