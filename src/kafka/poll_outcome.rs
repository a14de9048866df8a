//! The outcome of one poll of the consumer, and why a member may get no records.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use krafka::consumer::{ConsumerRebalanceListener, ConsumerRecord, TopicPartition};
use krafka::error::KrafkaError;

use super::undecodable::Undecodable;

/// The result of one poll.
pub(super) struct Polled {
    pub(super) records: Vec<ConsumerRecord>,
    pub(super) fetch: FetchOutcome,
    /// A batch that failed often enough, and has to be skipped.
    pub(super) undecodable: Option<Undecodable>,
}

impl Polled {
    pub(super) fn new(records: Vec<ConsumerRecord>, fetch: FetchOutcome) -> Self {
        Self {
            records,
            fetch,
            undecodable: None,
        }
    }
}

/// The outcome of the fetches of one poll. krafka does not report an error of a fetch, but counts
/// it.
#[derive(Debug)]
pub(super) enum FetchOutcome {
    /// A broker has answered.
    Answered,
    /// No fetch was sent, or one failed and the broker answers again.
    Unknown,
    /// The broker does not answer.
    Failed(KrafkaError),
}

/// Fetches, and fetch errors, since the member joined.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Fetches {
    pub(super) begun: u64,
    pub(super) failed: u64,
}

/// Why no records arrive although the brokers answer.
#[derive(Debug, Clone, thiserror::Error)]
pub(super) enum Stall {
    #[error(
        "kafka.group gives it {0} of {1} partitions: other members are in it, or its coordinator \
            is unavailable"
    )]
    PartitionsNotAssigned(usize, usize),
    #[error("not allowed to read the topic {0}: grant READ on it")]
    ReadDenied(Arc<str>),
}

/// How many times partitions were assigned.
#[derive(Clone, Default)]
pub(super) struct AssignmentGeneration(Arc<AtomicU64>);

impl AssignmentGeneration {
    pub(super) fn get(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
}

impl ConsumerRebalanceListener for AssignmentGeneration {
    async fn on_partitions_assigned(&self, _: &[TopicPartition]) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }

    async fn on_partitions_revoked(&self, _: &[TopicPartition]) {}
}
