//! The delay before the next attempt.

use std::time::Duration;

/// Capped exponential backoff with jitter. Of equal jitter, half of the delay is fixed, so that
/// it never spins. The other half is random, so that several nodes never retry in step.
#[derive(Debug, Clone, Copy)]
pub struct Backoff {
    /// The longest first delay.
    pub base: Duration,
    /// The longest delay of all.
    pub cap: Duration,
}

/// The delays between attempts to reach Kafka. The cap is short because an attempt costs nothing:
/// no row counts it.
pub const RECONNECT_BACKOFF: Backoff = Backoff {
    base: Duration::from_millis(100),
    cap: Duration::from_secs(5),
};

impl Backoff {
    /// The delay after `failures` consecutive failures; `jitter` is random, from 0.0 to 1.0.
    pub fn equal_jitter(self, failures: u32, jitter: f64) -> Duration {
        let ceiling = self.ceiling(failures);
        ceiling / 2 + (ceiling / 2).mul_f64(jitter.clamp(0.0, 1.0))
    }

    /// The same with full jitter: the whole delay is random
    /// (<https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/>).
    pub fn full_jitter(self, failures: u32, jitter: f64) -> Duration {
        self.ceiling(failures).mul_f64(jitter.clamp(0.0, 1.0))
    }

    fn ceiling(self, failures: u32) -> Duration {
        let doublings = failures.saturating_sub(1).min(31);
        self.base.saturating_mul(1 << doublings).min(self.cap)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BACKOFF: Backoff = Backoff {
        base: Duration::from_millis(100),
        cap: Duration::from_secs(5),
    };

    #[test]
    fn the_backoff_doubles_up_to_the_cap() {
        let full_jitter = |failures| BACKOFF.equal_jitter(failures, 1.0).as_millis();
        assert_eq!([1, 2, 3, 4].map(full_jitter), [100, 200, 400, 800]);
        assert_eq!([7, 8, u32::MAX].map(full_jitter), [5000, 5000, 5000]);
    }

    #[test]
    fn the_jitter_of_a_backoff_is_at_most_half() {
        assert_eq!(BACKOFF.equal_jitter(1, 0.0), Duration::from_millis(50));
        assert_eq!(BACKOFF.equal_jitter(1, 0.5), Duration::from_millis(75));
    }
}
