//! The metrics of the channels.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::exemplar::HistogramWithExemplars;

use super::histogram::{BucketCounts, Buckets, Histogram, Latency, TraceLabel};
use super::labeled::LabeledMetrics;
use super::registrar::Registrar;
use crate::domain::text_enum::text_enum;

text_enum! {
    /// The result of a POST to Slack.
    pub enum PostResult {
        /// The channel accepted the message.
        Accepted = "accepted",
        /// Slack asks for a pause.
        RateLimited = "rate_limited",
        /// Slack does not work, or cannot be reached.
        Unavailable = "unavailable",
        /// No response: the message may appear or not.
        Unknown = "unknown",
        /// Slack rejects this message.
        PayloadRejected = "payload_rejected",
        /// The channel rejects everything until an operator acts.
        ChannelDisabled = "channel_disabled",
    }
}

/// The metrics of all channels.
#[derive(Debug)]
pub(super) struct ChannelFamilies {
    deliveries: LabeledMetrics<Counter>,
    latency: LabeledMetrics<HistogramWithExemplars<TraceLabel>>,
    posts: LabeledMetrics<Counter>,
    post_duration: LabeledMetrics<Histogram>,
    message_payments: LabeledMetrics<Histogram>,
    channels: Mutex<Vec<Latency>>,
    /// Of all channels.
    pub(super) delivered: Counter,
    /// Of all channels.
    pub(super) unknown_outcomes: Counter,
    dead: Counter,
}

impl ChannelFamilies {
    pub(super) fn register(add: &mut Registrar<'_>, dead: Counter) -> Self {
        Self {
            deliveries: add.add(
                "deliveries",
                "Payments that a channel accepted, with an unknown outcome, or dead-lettered",
                LabeledMetrics::default(),
            ),
            latency: add.add(
                "delivery_latency_seconds",
                "From the commit of an event to the channel's acceptance",
                LabeledMetrics::default(),
            ),
            posts: add.add(
                "slack_posts",
                "Messages posted to Slack, by their result",
                LabeledMetrics::default(),
            ),
            post_duration: add.add(
                "slack_post_duration_seconds",
                "Posts to Slack, from the first byte to the end of the response",
                LabeledMetrics::default(),
            ),
            message_payments: add.add(
                "slack_message_payments",
                "Payments in an accepted message",
                LabeledMetrics::default(),
            ),
            channels: Mutex::default(),
            delivered: Counter::default(),
            unknown_outcomes: Counter::default(),
            dead,
        }
    }

    /// The latencies of each channel until now, in the order in which they were added.
    pub(super) fn latencies(&self) -> Vec<BucketCounts> {
        let channels = self.channels();
        channels.iter().map(Latency::counts).collect()
    }

    fn channels(&self) -> MutexGuard<'_, Vec<Latency>> {
        self.channels.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn add(&self, name: &str) -> ChannelMetrics {
        let outcome = |outcome| {
            let labels = [("channel", name), ("outcome", outcome)];
            self.deliveries.add(&labels, Counter::default())
        };
        let result = |result: &PostResult| {
            let labels = [("channel", name), ("result", result.as_str())];
            self.posts.add(&labels, Counter::default())
        };
        let channel = [("channel", name)];
        let latency = Latency::new();
        self.latency.add(&channel, latency.exported());
        self.channels().push(latency.clone());
        let post_duration = Histogram::new(Buckets::REQUEST);
        let message_payments = Histogram::new(Buckets::SIZE);
        ChannelMetrics {
            delivered: outcome("delivered"),
            unknown: outcome("unknown"),
            dead: outcome("dead"),
            latency,
            posts: PostResult::ALL.iter().map(result).collect(),
            post_duration: self.post_duration.add(&channel, post_duration),
            message_payments: self.message_payments.add(&channel, message_payments),
            all_delivered: self.delivered.clone(),
            all_unknown: self.unknown_outcomes.clone(),
            all_dead: self.dead.clone(),
        }
    }
}

/// The metrics of one channel. Cloning shares them.
#[derive(Debug, Clone)]
pub struct ChannelMetrics {
    delivered: Counter,
    unknown: Counter,
    dead: Counter,
    /// From the commit of an event to the channel's acceptance.
    pub latency: Latency,
    posts: Vec<Counter>,
    post_duration: Histogram,
    /// The payments of an accepted message.
    pub message_payments: Histogram,
    all_delivered: Counter,
    all_unknown: Counter,
    all_dead: Counter,
}

impl ChannelMetrics {
    /// The channel accepted `count` payments, and that is recorded.
    pub fn delivered(&self, count: usize) {
        self.delivered.inc_by(count as u64);
        self.all_delivered.inc_by(count as u64);
    }

    /// Counts a Slack message without a response.
    pub fn unknown_outcome(&self) {
        self.unknown.inc();
        self.all_unknown.inc();
    }

    /// `count` payments became dead letters.
    pub fn dead(&self, count: usize) {
        self.dead.inc_by(count as u64);
        self.all_dead.inc_by(count as u64);
    }

    /// A message was posted.
    pub fn posted(&self, result: PostResult, duration: Duration) {
        self.posts[result as usize].inc();
        self.post_duration.observe(duration);
    }
}
