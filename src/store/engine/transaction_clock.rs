//! Since when the writer's transaction has run. One that does not end shows a disk that hangs:
//! SQLite returns no error then.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering::Relaxed};
use std::time::Duration;

use crate::domain::timestamp::Timestamp;
use crate::runtime::health::{Health, HealthLevel};

/// A transaction takes milliseconds, on a slow disk perhaps a second. After this time the disk does
/// not respond, and no payment is accepted.
const STALL_MIN: Duration = Duration::from_secs(10);

/// While no transaction runs.
const NONE: i64 = i64::MIN;

/// The begin of the running transaction. Cloning shares it.
#[derive(Debug, Clone)]
pub(in crate::store) struct TransactionClock(Arc<AtomicI64>);

impl TransactionClock {
    pub(in crate::store) fn stopped() -> Self {
        Self(Arc::new(AtomicI64::new(NONE)))
    }

    pub(super) fn start(&self, now: Timestamp) {
        self.0.store(now.as_micros(), Relaxed);
    }

    pub(super) fn stop(&self) {
        self.0.store(NONE, Relaxed);
    }

    /// The health of a database whose transaction does not end; `None` while all is well.
    pub(in crate::store) fn stall(&self, now: Timestamp) -> Option<Health> {
        let began = self.0.load(Relaxed);
        if began == NONE {
            return None;
        }
        let since = Timestamp::from_micros(began);
        let duration = now.since(since);
        (duration >= STALL_MIN).then(|| Health {
            state: HealthLevel::Unavailable,
            since,
            error: Some(format!(
                "the disk does not respond: a transaction has run for {} s",
                duration.as_secs()
            )),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transaction_that_does_not_end_makes_the_database_unavailable() {
        let clock = TransactionClock::stopped();
        let at = |seconds: i64| Timestamp::from_micros(seconds * 1_000_000);
        assert!(clock.stall(at(1000)).is_none());
        clock.start(at(1000));
        assert!(clock.stall(at(1009)).is_none());
        let stall = clock.stall(at(1012)).unwrap();
        assert!(stall.is_failing() && stall.since == at(1000));
        let error = stall.error.unwrap();
        assert!(error.ends_with("a transaction has run for 12 s"), "{error}");
        clock.stop();
        assert!(clock.stall(at(2000)).is_none());
    }
}
