//! Counts and logs requests that are refused before they reach the store. Each kind has a counter,
//! and at most one line a minute in the log.

use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hyper::StatusCode;

use crate::runtime::metrics::{Metrics, Refusal};

/// How often one kind may have a line in the log.
pub(super) const LOG_INTERVAL: Duration = Duration::from_mins(1);

/// Counts refusals, and logs them.
#[derive(Debug)]
pub(super) struct Refusals {
    metrics: Metrics,
    kinds: Mutex<[RefusalLog; Refusal::ALL.len()]>,
}

#[derive(Debug, Default, Clone, Copy)]
struct RefusalLog {
    logged_at: Option<Instant>,
    since: u64,
    last: Option<IpAddr>,
}

impl Refusals {
    pub(super) fn new(metrics: Metrics) -> Self {
        Self {
            metrics,
            kinds: Mutex::default(),
        }
    }

    /// Counts a request that was refused with this status.
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

    /// Counts a connection that was closed at once: its address has its maximum.
    pub(super) fn connection(&self, address: IpAddr) {
        self.count(Refusal::Connection, address);
    }

    /// Logs the refusals since the last lines: no further refusal follows the end of a burst.
    pub(super) fn log_rest(&self) {
        for (kind, seen) in Refusal::ALL.iter().zip(self.lock().iter_mut()) {
            seen.log(kind.0);
        }
    }

    fn count(&self, kind: Refusal, address: IpAddr) {
        self.metrics.refused(kind);
        let seen = &mut self.lock()[kind as usize];
        seen.since += 1;
        seen.last = Some(address);
        seen.log(kind);
    }

    fn lock(&self) -> MutexGuard<'_, [RefusalLog; Refusal::ALL.len()]> {
        // Each entry is consistent whenever the lock is free, so lock poisoning is ignored.
        self.kinds.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl RefusalLog {
    fn log(&mut self, kind: Refusal) {
        let Some(last) = self
            .last
            .filter(|_| self.logged_at.is_none_or(|at| at.elapsed() >= LOG_INTERVAL))
        else {
            return;
        };
        log::warn!(
            "refused {} ({}), the last from {last}",
            kind.words(),
            self.since
        );
        *self = Self {
            logged_at: Some(Instant::now()),
            since: 0,
            last: None,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_burst_of_refusals_is_logged_a_minute_after_its_first_line() {
        let refusals = Refusals::new(Metrics::default());
        let address = IpAddr::from([192, 0, 2, 1]);
        for _ in 0..3 {
            refusals.connection(address);
        }
        let waiting = |refusals: &Refusals| refusals.lock()[Refusal::Connection as usize].since;
        refusals.log_rest();
        assert_eq!(waiting(&refusals), 2, "the first had a line");
        refusals.lock()[Refusal::Connection as usize].logged_at =
            Instant::now().checked_sub(LOG_INTERVAL);
        refusals.log_rest();
        assert_eq!(waiting(&refusals), 0);
    }
}
