//! What the sampler keeps of an hour.

use crate::domain::timestamp::Timestamp;
use crate::runtime::metrics::MetricTotals;

/// The numbers of a sample that are kept for an hour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Point {
    /// The moment.
    pub at: Timestamp,
    /// The totals of the process.
    pub totals: MetricTotals,
    /// INIT events.
    pub unpublished: i64,
    /// PUBLISHED events without a delivery.
    pub unconsumed: i64,
    /// Waiting deliveries.
    pub undelivered: i64,
    /// Open dead letters.
    pub dead_letters: i64,
    /// Free for payrelay's user; `None`: unknown.
    pub disk_free_bytes: Option<u64>,
}
