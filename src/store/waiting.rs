//! A number of waiting rows, and the age of the oldest.

use std::time::Duration;

use crate::domain::timestamp::Timestamp;

/// How many rows wait, and the age of the oldest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Waiting {
    /// The number of rows.
    pub count: i64,
    /// When the event of the oldest row was committed.
    pub oldest_at: Option<Timestamp>,
}

impl Waiting {
    /// How long the oldest has waited; zero if none waits.
    pub fn age(self, now: Timestamp) -> Duration {
        self.oldest_at
            .map_or(Duration::ZERO, |oldest| now.since(oldest))
    }
}
