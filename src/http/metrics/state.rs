//! The state of payrelay at the moment of a scrape, as metrics.

use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;

use super::writer::{ScrapeWriter, Written, scraped_flag, scraped_number};
use crate::domain::timestamp::Timestamp;
use crate::runtime::health::{Health, HealthLevel};
use crate::sampler::Sample;
use crate::store::action_watch::ActionCounts;
use crate::store::operation::{Operation, OperationOutcome};
use crate::store::topic::Partition;

/// A sample that is older than this shows that the database does not answer.
const SAMPLE_AGE_MAX_S: f64 = 30.0;

/// Partitions from this number on share the label `other`.
const PARTITIONS_MAX: i32 = 64;

/// A metric of each partition: its name, its help, its value.
type PartitionMetric<'a> = (&'a str, &'a str, &'a dyn Fn(&Partition) -> i64);

/// The state of payrelay at the moment of a scrape.
#[derive(Debug)]
pub(super) struct ScrapedState {
    pub(super) now: Timestamp,
    pub(super) node: String,
    pub(super) publisher: &'static str,
    pub(super) components: Vec<(String, Health)>,
    pub(super) channels: Vec<(String, HealthLevel)>,
    pub(super) threads: Vec<(String, Timestamp)>,
    pub(super) queued_payments: usize,
    pub(super) queue_max: usize,
    pub(super) queued_reads: usize,
    pub(super) body_bytes: usize,
    pub(super) disk_min_free_bytes: u64,
    pub(super) keys_max: usize,
    /// `None` before the first one.
    pub(super) sample: Option<Arc<Sample>>,
}

impl Collector for ScrapedState {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Written {
        let mut to = ScrapeWriter(encoder);
        self.write_process(&mut to)?;
        self.write_components(&mut to)?;
        self.write_queues(&mut to)?;
        self.write_pipeline(&mut to)?;
        self.write_channels(&mut to)?;
        self.write_dead_letters(&mut to)?;
        self.write_topic(&mut to)?;
        self.write_files(&mut to)
    }
}

impl ScrapedState {
    /// Whether payments are accepted, as far as it is known without asking the database.
    fn is_ready(&self) -> bool {
        let works = ["database", "disk"].iter().all(|name| {
            let mut components = self.components.iter();
            components.any(|(known, health)| known == name && !health.is_failing())
        });
        let is_recent = self
            .sample
            .as_ref()
            .is_some_and(|sample| self.now.since(sample.at).as_secs_f64() < SAMPLE_AGE_MAX_S);
        works && is_recent
    }

    fn write_process(&self, to: &mut ScrapeWriter<'_>) -> Written {
        let version = env!("CARGO_PKG_VERSION");
        to.info(
            "build_info",
            "The version of payrelay",
            &[("version", version)],
        )?;
        to.info(
            "node_info",
            "The node, and where it publishes",
            &[("node", &self.node), ("publisher", self.publisher)],
        )?;
        to.gauge(
            "ready",
            "Whether payments are accepted",
            scraped_flag(self.is_ready()),
        )?;
        let sampled_at = self
            .sample
            .as_ref()
            .map_or(0.0, |sample| sample.at.as_seconds());
        to.gauge(
            "sample_timestamp_seconds",
            "When the waiting rows were last counted",
            sampled_at,
        )?;
        let threads = self.threads.iter();
        to.gauges(
            "thread_heartbeat_timestamp_seconds",
            "When a thread last turned its loop; an idle one does so every 30 s",
            ["thread"],
            threads.map(|(name, at)| ([name.as_str()], at.as_seconds())),
        )
    }

    fn write_components(&self, to: &mut ScrapeWriter<'_>) -> Written {
        let components = || self.components.iter();
        to.gauges(
            "component_up",
            "Whether a component works",
            ["component"],
            components()
                .map(|(name, health)| ([name.as_str()], scraped_flag(!health.is_failing()))),
        )?;
        to.gauges(
            "component_changed_timestamp_seconds",
            "Since when a component has its state",
            ["component"],
            components().map(|(name, health)| ([name.as_str()], health.since.as_seconds())),
        )?;
        let is_fenced = components().any(|(_, health)| health.state == HealthLevel::Fenced);
        to.gauge(
            "publisher_fenced",
            "Whether publishing is paused, because another process publishes as this node",
            scraped_flag(is_fenced),
        )
    }

    fn write_queues(&self, to: &mut ScrapeWriter<'_>) -> Written {
        to.gauge(
            "writer_queue_payments",
            "Payments that wait for the writer",
            scraped_number(self.queued_payments as u64),
        )?;
        to.gauge(
            "writer_queue_max_payments",
            "The limit of them: then requests are answered 503 (database.queue_max)",
            scraped_number(self.queue_max as u64),
        )?;
        to.gauge(
            "reader_queue_reads",
            "Reads that wait for a reader",
            scraped_number(self.queued_reads as u64),
        )?;
        to.gauge(
            "http_body_held_bytes",
            "Bytes of request bodies in memory",
            scraped_number(self.body_bytes as u64),
        )
    }

    fn write_pipeline(&self, to: &mut ScrapeWriter<'_>) -> Written {
        let backlog = self.sample.as_ref().map(|sample| &sample.backlog);
        let unpublished = backlog
            .map(|backlog| backlog.unpublished)
            .unwrap_or_default();
        let unconsumed = backlog
            .map(|backlog| backlog.unconsumed)
            .unwrap_or_default();
        let rejected = self
            .sample
            .as_ref()
            .map_or(0, |sample| sample.gauges.rejected_events);
        to.gauge(
            "outbox_pending_events",
            "Events that are not published",
            scraped_number(unpublished.count),
        )?;
        to.gauge(
            "outbox_rejected_events",
            "Events that the broker rejects, and that wait for an operator",
            scraped_number(rejected),
        )?;
        to.gauge(
            "outbox_oldest_pending_age_seconds",
            "Age of the oldest event that is not published; 0: none waits",
            unpublished.age(self.now).as_secs_f64(),
        )?;
        to.gauge(
            "unconsumed_events",
            "Published events without a row in the delivery table; an estimate if there are many",
            scraped_number(unconsumed.count),
        )?;
        to.gauge(
            "unconsumed_oldest_age_seconds",
            "Time since the publication of the oldest of them; 0: none waits",
            unconsumed.age(self.now).as_secs_f64(),
        )
    }

    fn write_channels(&self, to: &mut ScrapeWriter<'_>) -> Written {
        const STATES: [(&str, HealthLevel); 4] = [
            ("up", HealthLevel::Up),
            ("unavailable", HealthLevel::Unavailable),
            ("rate_limited", HealthLevel::RateLimited),
            ("paused", HealthLevel::Paused),
        ];
        let states = self.channels.iter().flat_map(|(name, level)| {
            STATES.map(|(state, known)| ([name.as_str(), state], scraped_flag(known == *level)))
        });
        to.gauges(
            "channel_state",
            "The state of a channel: one of its series is 1",
            ["channel", "state"],
            states,
        )?;
        let waiting = |index: usize| {
            let sample = self.sample.as_ref();
            let waiting = sample.and_then(|sample| sample.backlog.channels.get(index).copied());
            waiting.unwrap_or_default()
        };
        let names = || {
            self.channels
                .iter()
                .map(|(name, _)| [name.as_str()])
                .enumerate()
        };
        to.gauges(
            "delivery_pending_payments",
            "Payments that a channel has not accepted yet",
            ["channel"],
            names().map(|(index, name)| (name, scraped_number(waiting(index).count))),
        )?;
        to.gauges(
            "delivery_oldest_pending_age_seconds",
            "Time since the commit of the oldest of them; 0: none waits",
            ["channel"],
            names().map(|(index, name)| (name, waiting(index).age(self.now).as_secs_f64())),
        )
    }

    fn write_dead_letters(&self, to: &mut ScrapeWriter<'_>) -> Written {
        let open = self
            .sample
            .as_ref()
            .map(|sample| sample.backlog.dead_letters);
        let open = open.unwrap_or_default();
        let gauges = self.sample.as_ref().map(|sample| &sample.gauges);
        let (records, events) = gauges.map_or((0, 0), |gauges| {
            (gauges.dead_records, gauges.rejected_events)
        });
        let deliveries = open.count.saturating_sub(records).saturating_sub(events);
        to.gauges(
            "dead_letters_open",
            "Dead letters that wait for an operator",
            ["kind"],
            [
                (["record"], scraped_number(records)),
                (["event"], scraped_number(events)),
                (["delivery"], scraped_number(deliveries)),
            ],
        )?;
        to.gauge(
            "dead_letters_oldest_age_seconds",
            "Age of the oldest of them; 0: there is none",
            open.age(self.now).as_secs_f64(),
        )?;
        let actions = self
            .sample
            .as_ref()
            .map_or(ActionCounts::default(), |sample| sample.actions);
        to.counters(
            "dead_letter_actions",
            "What operators did with dead letters",
            "action",
            [("replay", actions.replays), ("discard", actions.discards)],
        )
    }

    /// Partitions beyond the first ones are added up.
    fn partitions(&self, value: impl Fn(&Partition) -> i64) -> Vec<(String, i64)> {
        let partitions = self
            .sample
            .iter()
            .flat_map(|sample| &sample.gauges.partitions);
        let mut series: Vec<(String, i64)> = Vec::new();
        for partition in partitions {
            let value = value(partition);
            if partition.partition < PARTITIONS_MAX {
                series.push((partition.partition.to_string(), value));
            } else if let Some((_, sum)) = series.iter_mut().find(|(name, _)| name == "other") {
                *sum += value;
            } else {
                series.push(("other".to_owned(), value));
            }
        }
        series
    }

    fn write_topic(&self, to: &mut ScrapeWriter<'_>) -> Written {
        let lag = |partition: &Partition| {
            let consumed = partition.consumed_to.unwrap_or(partition.published_to);
            (partition.published_to - consumed).max(0)
        };
        let gauges: [PartitionMetric<'_>; 3] = [
            (
                "topic_published_offset",
                "Every event before this offset is recorded as published",
                &|partition| partition.published_to,
            ),
            (
                "topic_consumed_offset",
                "The next offset that is consumed",
                &|partition| partition.consumed_to.unwrap_or(0),
            ),
            (
                "topic_lag_records",
                "Records that were published and not consumed",
                &lag,
            ),
        ];
        for (name, help, value) in gauges {
            let partitions = self.partitions(value);
            let series = partitions
                .iter()
                .map(|(partition, value)| ([partition.as_str()], scraped_number(*value)));
            to.gauges(name, help, ["partition"], series)?;
        }
        let counters: [PartitionMetric<'_>; 3] = [
            (
                "topic_duplicates",
                "Records of events that had a delivery",
                &|partition| partition.duplicates,
            ),
            (
                "topic_gaps",
                "Events that the topic did not bring, or brought after a later one",
                &|partition| partition.gaps,
            ),
            (
                "topic_inversions",
                "Events that came after a later one",
                &|partition| partition.inversions,
            ),
        ];
        for (name, help, value) in counters {
            let partitions = self.partitions(value);
            let series = partitions
                .iter()
                .map(|(partition, value)| (partition.as_str(), value.unsigned_abs()));
            to.counters(name, help, "partition", series)?;
        }
        Ok(())
    }

    fn write_files(&self, to: &mut ScrapeWriter<'_>) -> Written {
        let files = self
            .sample
            .as_ref()
            .map(|sample| sample.files)
            .unwrap_or_default();
        let keys = self
            .sample
            .as_ref()
            .map_or(0, |sample| sample.gauges.idempotency_keys);
        let gauges = [
            (
                "database_size_bytes",
                "Size of the database",
                scraped_number(files.database_bytes),
            ),
            (
                "wal_size_bytes",
                "Size of the WAL",
                scraped_number(files.wal_bytes),
            ),
            (
                "disk_free_bytes",
                "Free space of the disk; 0 if it is unknown",
                scraped_number(files.disk_free_bytes.unwrap_or(0)),
            ),
            (
                "disk_min_free_bytes",
                "With less free space payments are answered 507 (database.min_free_bytes)",
                scraped_number(self.disk_min_free_bytes),
            ),
            (
                "idempotency_keys",
                "Stored Idempotency-Keys",
                scraped_number(keys),
            ),
            (
                "idempotency_max_keys",
                "The most Idempotency-Keys that are kept (idempotency.keys_max)",
                scraped_number(self.keys_max as u64),
            ),
        ];
        for (name, help, value) in gauges {
            to.gauge(name, help, value)?;
        }
        let operations = Operation::ALL.iter().flat_map(|operation| {
            let outcomes = OperationOutcome::ALL.iter();
            outcomes.map(|outcome| {
                let ended = self.operation_ended(*operation, *outcome);
                ([operation.as_str(), outcome.as_str()], ended)
            })
        });
        to.gauges(
            "operation_timestamp_seconds",
            "When a command last ended so; 0: never. A backup counts from the database's creation",
            ["operation", "outcome"],
            operations,
        )
    }

    /// Without a backup, the first one is due a day after the database was created.
    fn operation_ended(&self, operation: Operation, outcome: OperationOutcome) -> f64 {
        let Some(sample) = &self.sample else {
            return 0.0;
        };
        let mut operations = sample.gauges.operations.iter();
        let last = operations.find(|last| last.operation == operation && last.outcome == outcome);
        let created_at = (operation == Operation::Backup && outcome == OperationOutcome::Succeeded)
            .then_some(sample.gauges.created_at)
            .flatten();
        let ended_at = last.map(|last| last.ended_at).max(created_at);
        ended_at.map_or(0.0, Timestamp::as_seconds)
    }
}
