//! The metrics of this process: counters and histograms that the threads write, and the text of a
//! scrape. Counters start at zero; durable numbers are in the tables.
//!
//! Every series exists from the start, so that a missing one never means zero. A counter is a few
//! atomics, and no hot path finds one by its labels.

pub mod channel;
pub mod histogram;
mod http;
pub mod labeled;
mod log_lines;
mod process;
mod registrar;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prometheus_client::encoding::{prometheus_text, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use self::channel::ChannelFamilies;
pub use self::channel::ChannelMetrics;
use self::histogram::{BucketCounts, Buckets, Histogram, Latency};
pub use self::http::{ConnectionRefusal, HttpMetrics, RouteMetrics};
use self::log_lines::LogLines;
pub use self::log_lines::count_log_line;
use self::process::ProcessCollector;
use self::registrar::{Registrar, TimeGauge};
use crate::domain::text_enum::text_enum;
use crate::domain::timestamp::Timestamp;

/// The format of a scrape
/// (<https://prometheus.io/docs/instrumenting/exposition_formats/>).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScrapeFormat {
    /// Prometheus' text format, version 0.0.4.
    Text,
    /// `OpenMetrics` 1.0, with exemplars.
    OpenMetrics,
}

text_enum! {
    /// An error of SQLite.
    pub enum DatabaseErrorKind {
        /// The file is locked by another process.
        Busy = "busy",
        /// The disk is full.
        Full = "full",
        /// Reading or writing failed.
        Io = "io",
        /// The file is damaged.
        Corruption = "corruption",
        /// Everything else.
        Other = "other",
    }
}

text_enum! {
    /// Why events could not be published.
    pub enum PublishFailure {
        /// Kafka does not work.
        Unavailable = "unavailable",
        /// Kafka has not answered in time.
        Timeout = "timeout",
        /// The broker rejects a record.
        Rejected = "rejected",
        /// Another process publishes as this node.
        Fenced = "fenced",
        /// Acknowledged events are not visible to consumers yet.
        Hidden = "hidden",
    }
}

text_enum! {
    /// What a dead letter is.
    pub enum DeadLetterKind {
        /// A record of the topic that could not be consumed.
        Record = "record",
        /// An event that could not be published.
        Event = "event",
        /// An event that could not be delivered.
        Delivery = "delivery",
    }
}

/// The process's metrics. Cloning shares them.
#[derive(Debug, Clone)]
pub struct Metrics(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    registry: Mutex<Registry>,
    store: StoreMetrics,
    http: HttpMetrics,
    relay: RelayMetrics,
    consumer: ConsumerMetrics,
    channels: ChannelFamilies,
    dead_letters: Vec<Counter>,
    reload_success: Gauge,
    reload_time: TimeGauge,
}

/// What the writer, the checkpointer and the purge count.
#[derive(Debug)]
pub struct StoreMetrics {
    /// The commits of the writer, each with its sync.
    pub commit_duration: Histogram,
    /// The number of jobs of a commit.
    pub commit_size: Histogram,
    /// By kind.
    database_errors: Vec<Counter>,
    /// Rounds of checkpoints that copied what they could.
    pub checkpoints_ok: Counter,
    /// Rounds of checkpoints that failed.
    pub checkpoints_failed: Counter,
    /// A round of the checkpointer, with its syncs.
    pub checkpoint_duration: Histogram,
    /// The pages of the WAL after the last commit.
    pub wal_pages: Gauge,
    /// Events that the purge deleted.
    pub purged_events: Counter,
    /// Idempotency-Keys that the purge deleted.
    pub purged_keys: Counter,
}

impl StoreMetrics {
    /// SQLite returned an error.
    pub fn failed(&self, kind: DatabaseErrorKind) {
        self.database_errors[kind as usize].inc();
    }
}

/// What the relay counts.
#[derive(Debug)]
pub struct RelayMetrics {
    published_sent: Counter,
    published_reconciled: Counter,
    failures: Vec<Counter>,
    /// The number of events of a batch.
    pub batch_size: Histogram,
    /// From the commit of an event to its acknowledgement.
    pub latency: Latency,
    attempt: TimeGauge,
    success: TimeGauge,
}

/// What the consumer counts.
#[derive(Debug)]
pub struct ConsumerMetrics {
    /// From the publication of an event to its row in the delivery table.
    pub latency: Histogram,
    /// Records of this node that this database did not write.
    pub unknown_events: Counter,
    /// Records that were dropped.
    pub records_dropped: Counter,
}

/// The totals at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MetricTotals {
    /// Payments that were stored.
    pub payments: u64,
    /// Events that were marked PUBLISHED.
    pub published: u64,
    /// Payments that were marked DELIVERED.
    pub delivered: u64,
    /// Messages without a response: Slack may show them twice.
    pub unknown_outcomes: u64,
}

impl StoreMetrics {
    fn register(add: &mut Registrar<'_>) -> Self {
        let kinds = DatabaseErrorKind::ALL.iter().map(|kind| kind.as_str());
        let [checkpoints_ok, checkpoints_failed] = add.counters(
            "checkpoints",
            "Rounds of the checkpointer, by their result",
            "result",
            ["ok", "failed"],
        );
        Self {
            commit_duration: add.histogram(
                "commit_duration_seconds",
                "Commits of the writer, each with its sync to the disk",
                Buckets::COMMIT,
            ),
            commit_size: add.histogram(
                "commit_size_jobs",
                "Jobs in a commit of the writer",
                Buckets::SIZE,
            ),
            database_errors: add.enum_counters(
                "database_errors",
                "Errors that SQLite returned",
                "kind",
                kinds,
            ),
            checkpoints_ok,
            checkpoints_failed,
            checkpoint_duration: add.histogram(
                "checkpoint_duration_seconds",
                "Rounds of the checkpointer, with their syncs to the disk",
                Buckets::COMMIT,
            ),
            wal_pages: add.gauge("wal_pages", "Pages in the WAL after the last commit"),
            purged_events: add.counter(
                "purged_events",
                "Delivered events that were deleted after their retention",
            ),
            purged_keys: add.counter(
                "purged_keys",
                "Idempotency-Keys that were deleted after their retention, or as too many",
            ),
        }
    }
}

impl RelayMetrics {
    fn register(add: &mut Registrar<'_>) -> Self {
        let [published_sent, published_reconciled] = add.counters(
            "events_published",
            "Events recorded as PUBLISHED: sent, or found on the topic after a crash (reconciled)",
            "source",
            ["sent", "reconciled"],
        );
        let reasons = PublishFailure::ALL.iter().map(|reason| reason.as_str());
        let latency = Latency::new();
        add.add(
            "publish_latency_seconds",
            "From the commit of an event to its acknowledgement by the publisher",
            latency.exported(),
        );
        Self {
            published_sent,
            published_reconciled,
            failures: add.enum_counters(
                "publish_failures",
                "Attempts to publish that failed, and events that were rejected",
                "reason",
                reasons,
            ),
            batch_size: add.histogram(
                "publish_batch_events",
                "Events in a batch that the relay hands to the publisher",
                Buckets::SIZE,
            ),
            latency,
            attempt: add.time(
                "relay_attempt_timestamp_seconds",
                "When the relay last handed events to the publisher; 0 before the first time",
            ),
            success: add.time(
                "relay_success_timestamp_seconds",
                "When the publisher last acknowledged an event; 0 before the first time",
            ),
        }
    }

    /// The publisher reported this failure, for this number of events or attempts.
    pub fn failed(&self, reason: PublishFailure, count: usize) {
        self.failures[reason as usize].inc_by(count as u64);
    }

    /// The publisher acknowledged an event.
    pub fn succeeded(&self, now: Timestamp) {
        self.success.set(now.as_seconds());
    }
}

impl ConsumerMetrics {
    fn register(add: &mut Registrar<'_>) -> Self {
        Self {
            latency: add.histogram(
                "consume_latency_seconds",
                "From the publication of an event to its row in the delivery table",
                Buckets::LATENCY,
            ),
            unknown_events: add.counter(
                "unknown_events",
                "Records of this node on the topic that this database did not write",
            ),
            records_dropped: add.counter(
                "records_dropped",
                "Records of the topic that were dropped: kafka.dead_records_max were open",
            ),
        }
    }
}

impl Default for Metrics {
    fn default() -> Self {
        let mut root = Registry::default();
        root.register_collector(Box::new(ProcessCollector));
        let mut add = Registrar(root.sub_registry_with_prefix("payrelay"));
        let kinds = DeadLetterKind::ALL.iter().map(|kind| kind.as_str());
        let dead_letters = add.enum_counters(
            "dead_letters",
            "Records and events that could not be consumed, published or delivered",
            "kind",
            kinds,
        );
        let reload_success = add.gauge(
            "config_reload_success",
            "Whether the last SIGHUP, or else the start, could use the configuration",
        );
        reload_success.set(1);
        let reload_time = add.time(
            "config_reload_timestamp_seconds",
            "When the configuration was last read and used",
        );
        reload_time.set(Timestamp::now().as_seconds());
        add.add("log_messages", "Lines in the log, by their level", LogLines);
        let store = StoreMetrics::register(&mut add);
        let http = HttpMetrics::register(&mut add);
        let relay = RelayMetrics::register(&mut add);
        let consumer = ConsumerMetrics::register(&mut add);
        let dead_deliveries = dead_letters[DeadLetterKind::Delivery as usize].clone();
        let channels = ChannelFamilies::register(&mut add, dead_deliveries);
        Self(Arc::new(Inner {
            store,
            http,
            relay,
            consumer,
            channels,
            dead_letters,
            reload_success,
            reload_time,
            registry: Mutex::new(root),
        }))
    }
}

impl Metrics {
    /// What the writer, the checkpointer and the purge count.
    pub fn store(&self) -> &StoreMetrics {
        &self.0.store
    }

    /// What the HTTP server counts.
    pub fn http(&self) -> &HttpMetrics {
        &self.0.http
    }

    /// What the relay counts.
    pub fn relay(&self) -> &RelayMetrics {
        &self.0.relay
    }

    /// What the consumer counts.
    pub fn consumer(&self) -> &ConsumerMetrics {
        &self.0.consumer
    }

    /// The relay marked `count` events as published.
    pub fn published(&self, count: usize) {
        self.0.relay.published_sent.inc_by(count as u64);
    }

    /// The publisher found `count` unrecorded events on the topic.
    pub fn reconciled(&self, count: usize) {
        self.0.relay.published_reconciled.inc_by(count as u64);
    }

    /// `count` records or events became dead letters.
    pub fn dead_lettered(&self, kind: DeadLetterKind, count: usize) {
        self.0.dead_letters[kind as usize].inc_by(count as u64);
    }

    /// The relay hands the oldest events to the publisher now.
    pub fn relay_attempted(&self, now: Timestamp) {
        self.0.relay.attempt.set(now.as_seconds());
    }

    /// When the relay last did; the start of 1970 if never.
    pub fn last_relay_attempt(&self) -> Timestamp {
        Timestamp::from_seconds(self.0.relay.attempt.get())
    }

    /// A SIGHUP had the configuration read again.
    pub fn reloaded(&self, is_used: bool) {
        self.0.reload_success.set(i64::from(is_used));
        if is_used {
            self.0.reload_time.set(Timestamp::now().as_seconds());
        }
    }

    /// The counters of a channel. Called once for each channel, at the start.
    pub fn channel(&self, name: &str) -> ChannelMetrics {
        self.0.channels.add(name)
    }

    /// The latencies of the channels until now, in their order.
    pub fn channel_latencies(&self) -> Vec<BucketCounts> {
        self.0.channels.latencies()
    }

    /// The totals until now.
    pub fn totals(&self) -> MetricTotals {
        let http = &self.0.http;
        MetricTotals {
            payments: http.completed.get() + http.failed.get(),
            published: self.0.relay.published_sent.get() + self.0.relay.published_reconciled.get(),
            delivered: self.0.channels.delivered.get(),
            unknown_outcomes: self.0.channels.unknown_outcomes.get(),
        }
    }

    /// Every series of the process, and those of `state`, which belong to this scrape alone.
    pub fn encode(&self, format: ScrapeFormat, state: &Registry) -> String {
        let mut scrape = String::with_capacity(64 * 1024);
        let registry = self.registry();
        // Writing into memory cannot fail.
        let _ = match format {
            ScrapeFormat::Text => prometheus_text::encode(&mut scrape, &registry)
                .and_then(|()| prometheus_text::encode(&mut scrape, state)),
            ScrapeFormat::OpenMetrics => text::encode_registry(&mut scrape, &registry)
                .and_then(|()| text::encode_registry(&mut scrape, state))
                .and_then(|()| text::encode_eof(&mut scrape)),
        };
        scrape
    }

    fn registry(&self) -> MutexGuard<'_, Registry> {
        self.0
            .registry
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scrape_text(metrics: &Metrics) -> String {
        metrics.encode(ScrapeFormat::Text, &Registry::default())
    }

    #[test]
    fn every_metric_exists_from_the_start_and_counts() {
        let metrics = Metrics::default();
        let channel = metrics.channel("default");
        let zero = scrape_text(&metrics);
        for series in [
            "payrelay_events_published_total{source=\"sent\"} 0",
            "payrelay_events_published_total{source=\"reconciled\"} 0",
            "payrelay_deliveries_total{channel=\"default\",outcome=\"unknown\"} 0",
            "payrelay_deliveries_total{channel=\"default\",outcome=\"dead\"} 0",
            "payrelay_slack_posts_total{channel=\"default\",result=\"rate_limited\"} 0",
            "payrelay_http_connections_refused_total{reason=\"client_limit\"} 0",
            "payrelay_publish_failures_total{reason=\"fenced\"} 0",
            "payrelay_publish_latency_seconds_bucket{le=\"7200\"} 0",
            "payrelay_dead_letters_total{kind=\"event\"} 0",
            "payrelay_records_dropped_total 0",
        ] {
            assert!(zero.contains(series), "{series}\n{zero}");
        }
        metrics.published(3);
        metrics.reconciled(1);
        channel.delivered(2);
        channel.dead(7);
        metrics.consumer().records_dropped.inc_by(5);
        channel.unknown_outcome();
        metrics.http().completed.inc_by(6);
        metrics.http().failed.inc();
        let totals = MetricTotals {
            payments: 7,
            published: 4,
            delivered: 2,
            unknown_outcomes: 1,
        };
        assert_eq!(metrics.totals(), totals);
        let counted = scrape_text(&metrics);
        for series in [
            "payrelay_deliveries_total{channel=\"default\",outcome=\"delivered\"} 2",
            "payrelay_dead_letters_total{kind=\"delivery\"} 7",
            "payrelay_records_dropped_total 5",
        ] {
            assert!(counted.contains(series), "{series}\n{counted}");
        }
    }

    #[test]
    fn an_open_metrics_scrape_ends_with_its_mark_and_shows_a_trace() {
        let metrics = Metrics::default();
        let latency = &metrics.relay().latency;
        latency.observe(std::time::Duration::from_millis(3), Some("4bf92f35"));
        latency.observe(std::time::Duration::from_millis(3), None);
        let scrape = metrics.encode(ScrapeFormat::OpenMetrics, &Registry::default());
        assert!(scrape.ends_with("# EOF\n"), "{scrape}");
        let bucket = "payrelay_publish_latency_seconds_bucket{le=\"0.005\"} 2 # \
            {trace_id=\"4bf92f35\"} 0.003";
        assert!(scrape.contains(bucket), "{scrape}");
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
