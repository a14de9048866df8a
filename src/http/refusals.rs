//! Requests that were refused before they reached the store leave a trace: a counter for each kind, and at most one line
//! a minute and kind in the log.

use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use hyper::StatusCode;

use crate::runtime::metrics::{Metrics, Refusal};

/// How often one kind has a line in the log.
const LOG_INTERVAL: Duration = Duration::from_mins(1);

/// Counts refusals, and logs them.
#[derive(Debug)]
pub(super) struct Refusals {
    metrics: Metrics,
    kinds: Mutex<[Kind; Refusal::ALL.len()]>,
}

#[derive(Debug, Default, Clone, Copy)]
struct Kind {
    logged_at: Option<Instant>,
    since: u64,
}

impl Refusals {
    pub(super) fn new(metrics: Metrics) -> Self {
        Self { metrics, kinds: Mutex::default() }
    }

    /// A request was answered with this status.
    pub(super) fn request(&self, status: StatusCode, address: IpAddr) {
        let kind = match status {
            StatusCode::UNAUTHORIZED => Refusal::Unauthorized,
            StatusCode::FORBIDDEN => Refusal::Forbidden,
            StatusCode::REQUEST_TIMEOUT => Refusal::BodyTimeout,
            StatusCode::PAYLOAD_TOO_LARGE => Refusal::TooLarge,
            StatusCode::MISDIRECTED_REQUEST => Refusal::Misdirected,
            StatusCode::TOO_MANY_REQUESTS => Refusal::TooManyRequests,
            _ => return,
        };
        self.count(kind, address);
    }

    /// A connection was closed at once: its address has as many as it may.
    pub(super) fn connection(&self, address: IpAddr) {
        self.count(Refusal::Connection, address);
    }

    fn count(&self, kind: Refusal, address: IpAddr) {
        self.metrics.refused(kind);
        let mut kinds = self.kinds.lock().unwrap_or_else(PoisonError::into_inner);
        let seen = &mut kinds[kind as usize];
        seen.since += 1;
        if seen.logged_at.is_none_or(|at| at.elapsed() >= LOG_INTERVAL) {
            log::warn!("refused {} ({}), the last from {address}", kind.words(), seen.since);
            *seen = Kind { logged_at: Some(Instant::now()), since: 0 };
        }
    }
}
