//! Logs requests that are refused before they reach the store. Each kind has at most one line a
//! minute.

use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hyper::StatusCode;

/// How often one kind may have a line in the log.
pub(super) const LOG_INTERVAL: Duration = Duration::from_mins(1);

/// Why a request or a connection was refused before it reached the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refusal {
    Unauthorized,
    Forbidden,
    BodyTimeout,
    TooLarge,
    Misdirected,
    TooManyRequests,
    Connection,
}

impl Refusal {
    /// All of them, in the order of their numbers, with their names in the log.
    const ALL: [(Self, &str); 7] = [
        (Self::Unauthorized, "requests without a valid token: 401"),
        (Self::Forbidden, "requests that are not allowed: 403"),
        (
            Self::BodyTimeout,
            "requests whose body came too slowly: 408",
        ),
        (Self::TooLarge, "requests with too large a body: 413"),
        (Self::Misdirected, "requests for another host: 421"),
        (
            Self::TooManyRequests,
            "requests beyond a client's limit: 429",
        ),
        (
            Self::Connection,
            "connections beyond http.client_connections_max",
        ),
    ];

    /// Its name in the log.
    fn words(self) -> &'static str {
        Self::ALL[self as usize].1
    }
}

/// Counts refusals, and logs them.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    kinds: Mutex<[RefusalLog; Refusal::ALL.len()]>,
}

#[derive(Debug, Default, Clone, Copy)]
struct RefusalLog {
    logged_at: Option<Instant>,
    since: u64,
    last: Option<IpAddr>,
}

impl Refusals {
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
            event = "requests_refused", count = self.since;
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
        let refusals = Refusals::default();
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
