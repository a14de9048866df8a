//! What this process has done since it started, for the summary line. Not durable: the tables are.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use crate::clock::Timestamp;

/// Shared counters; cloning shares them.
#[derive(Debug, Clone, Default)]
pub struct Counters(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    published: AtomicU64,
    delivered: AtomicU64,
    unknown_outcomes: AtomicU64,
    relay_attempt: AtomicI64,
}

/// What had been done at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Events recorded as PUBLISHED.
    pub published: u64,
    /// Payments recorded as DELIVERED.
    pub delivered: u64,
    /// Messages whose answer was lost: they may show twice.
    pub unknown_outcomes: u64,
}

// Each number stands alone, and the summary may be a moment behind: relaxed order is enough.
impl Counters {
    /// So many events were recorded as published.
    pub fn published(&self, count: usize) {
        self.0.published.fetch_add(count as u64, Ordering::Relaxed);
    }

    /// So many payments were recorded as delivered.
    pub fn delivered(&self, count: usize) {
        self.0.delivered.fetch_add(count as u64, Ordering::Relaxed);
    }

    /// The answer to a message was lost.
    pub fn unknown_outcome(&self) {
        self.0.unknown_outcomes.fetch_add(1, Ordering::Relaxed);
    }

    /// The relay is trying the oldest events now.
    pub fn relay_attempted(&self, now: Timestamp) {
        self.0.relay_attempt.store(now.as_micros(), Ordering::Relaxed);
    }

    /// When the relay last tried the oldest events; the beginning of time if it never did.
    pub fn last_relay_attempt(&self) -> Timestamp {
        Timestamp::from_micros(self.0.relay_attempt.load(Ordering::Relaxed))
    }

    /// What has been done until now.
    pub fn totals(&self) -> Totals {
        Totals {
            published: self.0.published.load(Ordering::Relaxed),
            delivered: self.0.delivered.load(Ordering::Relaxed),
            unknown_outcomes: self.0.unknown_outcomes.load(Ordering::Relaxed),
        }
    }
}
