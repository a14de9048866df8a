//! What an edge reports about itself on the topic `<kafka.topic>.status`: one record a node, and
//! Kafka keeps the last one (`cleanup.policy=compact`). Pure.

use serde::{Deserialize, Serialize};

use crate::domain::timestamp::Timestamp;

/// The topic of the reports.
pub fn status_topic(events: &str) -> String {
    format!("{events}.status")
}

/// A report. Fields may be added: a reader ignores those that it does not know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// The version of this format: 1.
    pub v: u32,
    /// The version of payrelay.
    pub version: String,
    /// `edge`.
    pub role: String,
    /// When it was made, by the node's clock.
    pub at: Timestamp,
    /// When the node has started.
    pub started_at: Timestamp,
    /// How far it has come.
    pub events: ReportedEvents,
    /// The events that wait to be published.
    pub pending: ReportedPending,
    /// Rejected events that wait for an operator.
    pub rejected: i64,
    /// The largest id of its payments.
    pub last_payment: i64,
    /// The free space of its disk in bytes; `None`: unknown.
    pub disk_free: Option<u64>,
    /// Whether its disk is full, so that payments are refused.
    pub is_full: bool,
    /// The size of its database in bytes.
    pub database_bytes: u64,
}

/// How far a node has come.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReportedEvents {
    /// The largest id of its events.
    pub stored: i64,
    /// The largest id on the topic.
    pub published: i64,
}

/// The events that wait to be published.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReportedPending {
    /// How many.
    pub count: i64,
    /// When the oldest was committed.
    pub oldest_at: Option<Timestamp>,
}
