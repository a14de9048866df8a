//! Logs a loop's consecutive errors once when they begin, and once when they are over.

use std::fmt::Display;
use std::time::Instant;

use super::plural::counted;

/// The consecutive errors of one loop.
#[derive(Debug)]
pub struct ErrorLog {
    name: String,
    since: Option<Instant>,
    count: u64,
}

impl ErrorLog {
    /// Nothing has failed yet.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            since: None,
            count: 0,
        }
    }

    /// Records a failed turn.
    pub fn failed(&mut self, error: &dyn Display) {
        self.count += 1;
        if self.since.is_none() {
            self.since = Some(Instant::now());
            log::error!(
                event = "database_failing", component = self.name.as_str();
                "{}: database error, retrying until it is over: {error}",
                self.name
            );
        } else {
            log::debug!(
                "{}: database error number {}: {error}",
                self.name,
                self.count
            );
        }
    }

    /// Records a successful turn.
    pub fn succeeded(&mut self) {
        if let Some(since) = self.since.take() {
            let seconds = since.elapsed().as_secs_f64();
            log::info!(
                event = "database_works_again", component = self.name.as_str(), seconds = seconds,
                errors = self.count;
                "{}: the database works again after {seconds:.1} s and {}",
                self.name,
                counted(self.count, "error")
            );
            self.count = 0;
        }
    }
}
