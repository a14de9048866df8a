//! When a channel may get its next message: the pace, a pause that Slack requests, the backoff, and
//! the pause after a rejection. Pure: time is a parameter, counted from any start.

use std::time::Duration;

use crate::runtime::backoff::Backoff;

/// A token bucket: a burst of messages after a quiet time, and a steady pace in the long run.
#[derive(Debug, Clone)]
struct TokenBucket {
    per_second: f64,
    burst: f64,
    tokens: f64,
    filled_at: Duration,
}

impl TokenBucket {
    fn fill(&mut self, now: Duration) {
        let gained = now.saturating_sub(self.filled_at).as_secs_f64() * self.per_second;
        self.tokens = (self.tokens + gained).min(self.burst);
        self.filled_at = self.filled_at.max(now);
    }

    /// How long until there is a token.
    fn wait(&mut self, now: Duration) -> Duration {
        self.fill(now);
        if self.tokens >= 1.0 {
            return Duration::ZERO;
        }
        // Rounded up: a wait that is a nanosecond short would be repeated.
        let until_filled = Duration::from_secs_f64((1.0 - self.tokens) / self.per_second)
            + Duration::from_nanos(1);
        self.filled_at.saturating_sub(now) + until_filled
    }

    fn take(&mut self) {
        self.tokens = (self.tokens - 1.0).max(0.0);
    }

    /// At `at` there is one token at most: saved tokens are not spent in a burst afterwards.
    fn cap_at(&mut self, at: Duration) {
        self.fill(at);
        self.tokens = self.tokens.min(1.0);
    }
}

/// Decides when the next message may go.
#[derive(Debug, Clone)]
pub struct RateLimiter {
    bucket: TokenBucket,
    backoff: Backoff,
    probe_interval: Duration,
    failures: u32,
    blocked_until: Duration,
    /// Slack requested the pause.
    limited: bool,
    /// When an operator last ended such a pause.
    overridden_at: Option<Duration>,
}

impl RateLimiter {
    /// Starts with one token: a process that restarts again and again must not send a burst each
    /// time.
    pub fn new(per_second: f64, burst: usize, backoff: Backoff, probe_interval: Duration) -> Self {
        #[expect(clippy::cast_precision_loss, reason = "a burst is small")]
        let burst = burst.max(1) as f64;
        let bucket = TokenBucket {
            per_second,
            burst,
            tokens: 1.0,
            filled_at: Duration::ZERO,
        };
        Self {
            bucket,
            backoff,
            probe_interval,
            failures: 0,
            blocked_until: Duration::ZERO,
            limited: false,
            overridden_at: None,
        }
    }

    /// How long until the next message may go; zero: now.
    pub fn wait(&mut self, now: Duration) -> Duration {
        self.blocked_until
            .saturating_sub(now)
            .max(self.bucket.wait(now))
    }

    /// Counts a message.
    pub fn sent(&mut self, now: Duration) {
        self.bucket.fill(now);
        self.bucket.take();
    }

    /// Records an accepted message.
    pub fn succeeded(&mut self) {
        self.failures = 0;
    }

    /// Slack requests a pause, perhaps without a duration.
    pub fn limited(
        &mut self,
        now: Duration,
        retry_after: Option<Duration>,
        jitter: f64,
    ) -> Duration {
        let wait = retry_after.unwrap_or_else(|| {
            self.failures = self.failures.saturating_add(1);
            LIMITED_MIN + self.backoff.full_jitter(self.failures, jitter)
        });
        let wait = self.block(now, wait.clamp(LIMITED_MIN, LIMITED_MAX));
        self.limited = true;
        wait
    }

    /// Records a failure that may pass, perhaps with the time of the next attempt.
    pub fn failed(
        &mut self,
        now: Duration,
        retry_after: Option<Duration>,
        jitter: f64,
    ) -> Duration {
        self.failures = self.failures.saturating_add(1);
        let backoff = self.backoff.full_jitter(self.failures, jitter);
        let wait = retry_after.map_or(backoff, |asked| asked.min(LIMITED_MAX).max(backoff));
        self.block(now, wait)
    }

    /// Records a rejection for good.
    pub fn pause(&mut self, now: Duration) -> Duration {
        self.block(now, self.probe_interval)
    }

    /// Ends the wait for an operator. A pause that Slack requested is ended once a minute at most:
    /// an app that posts in spite of 429 may lose the webhook.
    pub fn resume(&mut self, now: Duration) {
        if self.limited && self.blocked_until > now {
            if self
                .overridden_at
                .is_some_and(|at| now.saturating_sub(at) < OVERRIDE_INTERVAL)
            {
                return;
            }
            self.overridden_at = Some(now);
        }
        self.limited = false;
        self.failures = 0;
        self.blocked_until = now;
        self.bucket.filled_at = now;
        self.bucket.tokens = 1.0;
    }

    fn block(&mut self, now: Duration, wait: Duration) -> Duration {
        self.limited = false;
        self.blocked_until = now.saturating_add(wait);
        self.bucket.cap_at(self.blocked_until);
        wait
    }
}

/// The shortest pause after a 429: the date may have passed for a clock that is ahead.
const LIMITED_MIN: Duration = Duration::from_secs(1);

/// How often an operator may end a pause that Slack requested.
const OVERRIDE_INTERVAL: Duration = Duration::from_mins(1);

/// A longer pause is treated as an error.
const LIMITED_MAX: Duration = Duration::from_hours(24);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BACKOFF: Backoff = Backoff {
        base: Duration::from_millis(500),
        cap: Duration::from_mins(1),
    };
    const PROBE: Duration = Duration::from_mins(5);

    fn limiter_ms(number: u64) -> Duration {
        Duration::from_millis(number)
    }

    #[test]
    fn the_rate_limit_allows_a_burst_after_a_quiet_time_then_the_pace() {
        let mut limiter = RateLimiter::new(1.0, 3, BACKOFF, PROBE);
        limiter.sent(limiter_ms(0));
        assert!(
            limiter.wait(limiter_ms(0)) > limiter_ms(999),
            "a start is no quiet time"
        );
        for _ in 0..3 {
            assert_eq!(limiter.wait(limiter_ms(60_000)), limiter_ms(0));
            limiter.sent(limiter_ms(60_000));
        }
        assert!(limiter.wait(limiter_ms(60_000)) > limiter_ms(999));
        assert_eq!(limiter.wait(limiter_ms(61_001)), limiter_ms(0));
    }

    #[test]
    fn retry_after_blocks_the_rate_limiter_and_saves_no_tokens() {
        let mut limiter = RateLimiter::new(10.0, 5, BACKOFF, PROBE);
        assert_eq!(
            limiter.limited(limiter_ms(0), Some(limiter_ms(30_000)), 0.5),
            limiter_ms(30_000)
        );
        assert_eq!(limiter.wait(limiter_ms(10_000)), limiter_ms(20_000));
        assert_eq!(limiter.wait(limiter_ms(30_000)), limiter_ms(0));
        limiter.sent(limiter_ms(30_000));
        limiter.succeeded();
        assert!(
            limiter.wait(limiter_ms(30_000)) > limiter_ms(90),
            "no burst after the pause"
        );
        assert_eq!(
            limiter.limited(limiter_ms(0), Some(Duration::MAX), 0.5),
            LIMITED_MAX
        );
        assert!(limiter.limited(limiter_ms(0), None, 0.0) >= LIMITED_MIN);
    }

    #[test]
    fn the_rate_limit_backs_off_with_full_jitter_up_to_the_cap() {
        let mut limiter = RateLimiter::new(1000.0, 1, BACKOFF, PROBE);
        let waits: Vec<_> = (0..9)
            .map(|_| limiter.failed(limiter_ms(0), None, 1.0).as_millis())
            .collect();
        assert_eq!(
            waits,
            [500, 1000, 2000, 4000, 8000, 16_000, 32_000, 60_000, 60_000]
        );
        assert_eq!(
            limiter.failed(limiter_ms(0), None, 0.0),
            limiter_ms(0),
            "full jitter begins at zero"
        );
        limiter.succeeded();
        assert_eq!(limiter.failed(limiter_ms(0), None, 1.0), limiter_ms(500));
    }

    #[test]
    fn a_pause_of_the_rate_limiter_is_probed_slowly_or_ended_by_an_operator() {
        let mut limiter = RateLimiter::new(1.0, 3, BACKOFF, PROBE);
        limiter.pause(limiter_ms(0));
        assert_eq!(limiter.wait(limiter_ms(1000)) + limiter_ms(1000), PROBE);
        limiter.resume(limiter_ms(1000));
        assert_eq!(limiter.wait(limiter_ms(1000)), limiter_ms(0));
    }

    #[test]
    fn the_rate_limit_of_a_503_with_retry_after_ends_then_and_not_before() {
        let mut limiter = RateLimiter::new(1000.0, 1, BACKOFF, PROBE);
        assert_eq!(
            limiter.failed(limiter_ms(0), Some(limiter_ms(30_000)), 0.0),
            limiter_ms(30_000)
        );
        assert_eq!(limiter.wait(limiter_ms(10_000)), limiter_ms(20_000));
        assert_eq!(
            limiter.failed(limiter_ms(0), Some(limiter_ms(0)), 1.0),
            limiter_ms(1000),
            "not faster than the backoff"
        );
    }

    #[test]
    fn an_operator_overrides_the_rate_limit_of_a_429_once_a_minute_at_most() {
        let mut limiter = RateLimiter::new(1000.0, 1, BACKOFF, PROBE);
        limiter.limited(limiter_ms(0), Some(limiter_ms(300_000)), 0.5);
        limiter.resume(limiter_ms(1000));
        assert_eq!(limiter.wait(limiter_ms(1000)), limiter_ms(0));
        limiter.limited(limiter_ms(1000), Some(limiter_ms(300_000)), 0.5);
        limiter.resume(limiter_ms(2000));
        assert!(
            limiter.wait(limiter_ms(2000)) > limiter_ms(200_000),
            "again within a minute"
        );
        limiter.resume(limiter_ms(62_000));
        assert_eq!(limiter.wait(limiter_ms(62_000)), limiter_ms(0));
    }

    #[derive(Debug, Clone)]
    enum Step {
        Idle(u64),
        Ok,
        Fail(f64),
        Limit(u64),
        Pause,
    }

    fn any_limiter_step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => (0_u64..5000).prop_map(Step::Idle),
            6 => Just(Step::Ok),
            2 => (0.0..=1.0).prop_map(Step::Fail),
            1 => (0_u64..20_000).prop_map(Step::Limit),
            1 => Just(Step::Pause),
        ]
    }

    proptest! {
        #[test]
        fn the_rate_limit_is_never_faster_than_the_pace_or_within_a_pause(
            steps in proptest::collection::vec(any_limiter_step(), 1..200),
            per_second in 0.5..50.0_f64,
            burst in 1_usize..6,
        ) {
            let mut limiter = RateLimiter::new(per_second, burst, BACKOFF, PROBE);
            let mut now = limiter_ms(0);
            let mut sent = Vec::new();
            let mut not_before = limiter_ms(0);
            for step in steps {
                if let Step::Idle(idle) = step {
                    now += limiter_ms(idle);
                    continue;
                }
                let wait = limiter.wait(now);
                now += wait;
                prop_assert_eq!(limiter.wait(now), limiter_ms(0), "a wait is waited once");
                prop_assert!(now >= not_before);
                limiter.sent(now);
                sent.push(now);
                match step {
                    Step::Fail(jitter) => drop(limiter.failed(now, None, jitter)),
                    Step::Limit(pause) => {
                        limiter.limited(now, Some(limiter_ms(pause)), 0.5);
                        not_before = now + limiter_ms(pause.max(1000));
                    }
                    Step::Pause => {
                        limiter.pause(now);
                        not_before = now + PROBE;
                    }
                    _ => limiter.succeeded(),
                }
            }
            for first in 0..sent.len() {
                let mut allowed = f64::from(u8::try_from(burst).unwrap());
                for last in first..sent.len() {
                    let span = sent[last].saturating_sub(sent[first]);
                    // Each message within the window spends one token.
                    allowed -= 1.0;
                    prop_assert!(allowed + span.as_secs_f64() * per_second >= -1e-6, "{} in \
                        {span:?}", last - first + 1);
                }
            }
        }
    }
}
