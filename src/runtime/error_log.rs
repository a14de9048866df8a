//! A loop that meets an error at every turn says so once when that begins, and once when it is
//! over.

use std::fmt::Display;
use std::time::Instant;

/// The errors in a row of one loop.
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

    /// A turn failed.
    pub fn failed(&mut self, error: &dyn Display) {
        self.count += 1;
        if self.since.is_none() {
            self.since = Some(Instant::now());
            log::error!(
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

    /// A turn succeeded.
    pub fn succeeded(&mut self) {
        if let Some(since) = self.since.take() {
            let seconds = since.elapsed().as_secs_f64();
            log::info!(
                "{}: the database works again after {seconds:.1} s and {} errors",
                self.name,
                self.count
            );
            self.count = 0;
        }
    }
}
