//! How much waits, and since when.

use std::time::Duration;

use crate::domain::timestamp::Timestamp;

/// How many rows wait, and since when.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Waiting {
    /// How many.
    pub count: i64,
    /// When the event of the oldest was committed.
    pub oldest_at: Option<Timestamp>,
}

impl Waiting {
    /// How long the oldest has waited; zero if none waits.
    pub fn age(self, now: Timestamp) -> Duration {
        self.oldest_at
            .map_or(Duration::ZERO, |oldest| now.since(oldest))
    }
}
