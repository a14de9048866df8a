//! The counters of this process; they start at zero. Durable numbers are in the tables.
//!
//! Every series exists from the start, so that a missing one never means zero. A counter is one
//! atomic, and no hot path finds one by its labels.

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prometheus_client::encoding::prometheus_text;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::domain::timestamp::Timestamp;

/// The process's metrics. Cloning shares them.
#[derive(Debug, Clone)]
pub struct Metrics(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    registry: Mutex<Registry>,
    published_sent: Counter,
    published_reconciled: Counter,
    relay_attempt: Gauge<f64, AtomicU64>,
    deliveries: Family<Labels<2>, Counter>,
    unknown_outcomes: Counter,
    delivered: Counter,
    refusals: [Counter; Refusal::ALL.len()],
    unknown_events: Counter,
    records_dropped: Counter,
}

/// Why a request or a connection was refused before it reached the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// 401.
    Unauthorized,
    /// 403.
    Forbidden,
    /// 408.
    BodyTimeout,
    /// 413.
    TooLarge,
    /// 421.
    Misdirected,
    /// 429.
    TooManyRequests,
    /// The address had its maximum of connections.
    Connection,
}

impl Refusal {
    /// All of them, in the order of their numbers, with their labels and their names in the log.
    pub const ALL: [(Self, &str, &str); 7] = [
        (
            Self::Unauthorized,
            "unauthorized",
            "requests without a valid token: 401",
        ),
        (
            Self::Forbidden,
            "forbidden",
            "requests that are not allowed: 403",
        ),
        (
            Self::BodyTimeout,
            "body_timeout",
            "requests whose body came too slowly: 408",
        ),
        (
            Self::TooLarge,
            "too_large",
            "requests with too large a body: 413",
        ),
        (
            Self::Misdirected,
            "misdirected",
            "requests for another host: 421",
        ),
        (
            Self::TooManyRequests,
            "too_many_requests",
            "requests beyond a client's limit: 429",
        ),
        (
            Self::Connection,
            "connection",
            "connections beyond http.client_connections_max",
        ),
    ];

    /// Its name in the log.
    pub fn words(self) -> &'static str {
        Self::ALL[self as usize].2
    }
}

/// Label names and values, in the order in which they are written.
type Labels<const N: usize> = [(&'static str, String); N];

/// The counters of one channel.
#[derive(Debug, Clone)]
pub struct ChannelMetrics {
    delivered: Counter,
    unknown: Counter,
    dead: Counter,
    all: Metrics,
}

/// The totals at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MetricTotals {
    /// Events that were marked PUBLISHED.
    pub published: u64,
    /// Payments that were marked DELIVERED.
    pub delivered: u64,
    /// Messages without a response: Slack may show them twice.
    pub unknown_outcomes: u64,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("payrelay");
        let published: Family<Labels<1>, Counter> = Family::default();
        let deliveries: Family<Labels<2>, Counter> = Family::default();
        let relay_attempt = Gauge::default();
        registry.register(
            "events_published",
            "Events recorded as PUBLISHED",
            published.clone(),
        );
        registry.register(
            "deliveries",
            "Outcomes of deliveries to a channel",
            deliveries.clone(),
        );
        let help = "When the relay last handed a batch to the publisher";
        registry.register(
            "relay_attempt_timestamp_seconds",
            help,
            relay_attempt.clone(),
        );
        let refusals: Family<Labels<1>, Counter> = Family::default();
        let help = "Requests and connections that were refused before they reached the store";
        registry.register("http_refusals", help, refusals.clone());
        let refused = |(_, reason, _): (Refusal, &str, &str)| {
            refusals.get_or_create_owned(&[("reason", reason.to_owned())])
        };
        let unknown_events: Counter = Counter::default();
        let help =
            "Records of this node on the topic whose event or payment this database did not write";
        registry.register("unknown_events", help, unknown_events.clone());
        let records_dropped: Counter = Counter::default();
        let help = "Records of the topic that were dropped: kafka.dead_records_max were open";
        registry.register("records_dropped", help, records_dropped.clone());
        let published_by =
            |source: &str| published.get_or_create_owned(&[("source", source.to_owned())]);
        Self(Arc::new(Inner {
            published_sent: published_by("sent"),
            published_reconciled: published_by("reconciled"),
            relay_attempt,
            deliveries,
            unknown_outcomes: Counter::default(),
            delivered: Counter::default(),
            refusals: Refusal::ALL.map(refused),
            unknown_events,
            records_dropped,
            registry: Mutex::new(registry),
        }))
    }
}

impl Metrics {
    /// The relay marked `count` events as published.
    pub fn published(&self, count: usize) {
        self.0.published_sent.inc_by(count as u64);
    }

    /// The publisher found `count` unrecorded events on the topic.
    pub fn reconciled(&self, count: usize) {
        self.0.published_reconciled.inc_by(count as u64);
    }

    /// The topic has `count` records of this node whose event or payment this database did not
    /// write.
    pub fn unknown_events(&self, count: usize) {
        self.0.unknown_events.inc_by(count as u64);
    }

    /// The consumer dropped `count` records, because too many dead letters are open.
    pub fn records_dropped(&self, count: usize) {
        self.0.records_dropped.inc_by(count as u64);
    }

    /// The relay hands the oldest events to the publisher now.
    pub fn relay_attempted(&self, now: Timestamp) {
        self.0.relay_attempt.set(now.as_seconds());
    }

    /// When the relay last did; the start of 1970 if never.
    pub fn last_relay_attempt(&self) -> Timestamp {
        Timestamp::from_seconds(self.0.relay_attempt.get())
    }

    /// A request or a connection was refused.
    pub fn refused(&self, refusal: Refusal) {
        self.0.refusals[refusal as usize].inc();
    }

    /// The counters of a channel. Called once for each channel, at the start.
    pub fn channel(&self, name: &str) -> ChannelMetrics {
        let counter = |outcome: &str| {
            let labels = [
                ("channel", name.to_owned()),
                ("outcome", outcome.to_owned()),
            ];
            self.0.deliveries.get_or_create_owned(&labels)
        };
        ChannelMetrics {
            delivered: counter("delivered"),
            unknown: counter("unknown"),
            dead: counter("dead"),
            all: self.clone(),
        }
    }

    /// The totals until now.
    pub fn totals(&self) -> MetricTotals {
        MetricTotals {
            published: self.0.published_sent.get() + self.0.published_reconciled.get(),
            delivered: self.0.delivered.get(),
            unknown_outcomes: self.0.unknown_outcomes.get(),
        }
    }

    /// Every series, in Prometheus' text format
    /// (<https://prometheus.io/docs/instrumenting/exposition_formats/>).
    pub fn encode(&self) -> String {
        let mut text = String::new();
        // Writing into memory cannot fail.
        let _ = prometheus_text::encode(&mut text, &self.registry());
        text
    }

    fn registry(&self) -> MutexGuard<'_, Registry> {
        self.0
            .registry
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl ChannelMetrics {
    /// The channel accepted `count` payments, and that is recorded.
    pub fn delivered(&self, count: usize) {
        self.delivered.inc_by(count as u64);
        self.all.0.delivered.inc_by(count as u64);
    }

    /// Counts a Slack message without a response.
    pub fn unknown_outcome(&self) {
        self.unknown.inc();
        self.all.0.unknown_outcomes.inc();
    }

    /// `count` payments became dead letters.
    pub fn dead(&self, count: usize) {
        self.dead.inc_by(count as u64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_exists_from_the_start_and_counts() {
        let metrics = Metrics::default();
        let channel = metrics.channel("default");
        let zero = metrics.encode();
        for series in [
            "payrelay_events_published_total{source=\"sent\"} 0",
            "payrelay_events_published_total{source=\"reconciled\"} 0",
            "payrelay_deliveries_total{channel=\"default\",outcome=\"unknown\"} 0",
            "payrelay_deliveries_total{channel=\"default\",outcome=\"dead\"} 0",
            "payrelay_http_refusals_total{reason=\"unauthorized\"} 0",
            "payrelay_http_refusals_total{reason=\"connection\"} 0",
            "payrelay_records_dropped_total 0",
        ] {
            assert!(zero.contains(series), "{series}\n{zero}");
        }
        metrics.published(3);
        metrics.reconciled(1);
        channel.delivered(2);
        metrics.records_dropped(5);
        channel.unknown_outcome();
        let totals = MetricTotals {
            published: 4,
            delivered: 2,
            unknown_outcomes: 1,
        };
        assert_eq!(metrics.totals(), totals);
        let counted = metrics.encode();
        for series in [
            "payrelay_deliveries_total{channel=\"default\",outcome=\"delivered\"} 2",
            "payrelay_records_dropped_total 5",
        ] {
            assert!(counted.contains(series), "{series}\n{counted}");
        }
    }

    #[test]
    fn the_metric_of_the_last_relay_attempt_is_a_point_in_time() {
        let metrics = Metrics::default();
        assert_eq!(metrics.last_relay_attempt(), Timestamp::from_micros(0));
        let now = Timestamp::from_micros(1_795_341_600_123_456);
        metrics.relay_attempted(now);
        let back = metrics.last_relay_attempt();
        assert!(
            back.since(now).max(now.since(back)).as_micros() < 2,
            "{back:?}"
        );
    }
}
