//! A remote component that fails and recovers: the delay before the next attempt, one log line when
//! it fails and one when it is back, and its state on the health page.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::plural::counted;
use crate::domain::timestamp::Timestamp;

/// Capped exponential backoff with equal jitter: half of the delay is fixed, half is random, so
/// that it never spins and several nodes never retry in step.
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

/// The state of a component.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum HealthLevel {
    /// It works.
    Up,
    /// It fails.
    Unavailable,
    /// The other side requests a pause: no failure.
    RateLimited,
    /// A channel: it rejects everything until an operator acts.
    Paused,
    /// The publisher: another process publishes as this node.
    Fenced,
}

/// What the health page shows of one component.
#[derive(Debug, Clone, Serialize)]
pub struct Health {
    /// Its state.
    pub state: HealthLevel,
    /// Since when it has this state.
    pub since: Timestamp,
    /// Why it does not work.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl Health {
    /// Whether it does not do its work. A rate-limited component does.
    pub fn is_failing(&self) -> bool {
        !matches!(self.state, HealthLevel::Up | HealthLevel::RateLimited)
    }
}

/// The state of one component, shared by the thread that sets it and those that show it.
#[derive(Debug, Clone)]
pub struct HealthHandle(Arc<Mutex<Health>>);

impl HealthHandle {
    /// A component is up until it has failed.
    pub fn up() -> Self {
        Self(Arc::new(Mutex::new(Health {
            state: HealthLevel::Up,
            since: Timestamp::now(),
            error: None,
        })))
    }

    /// The state now.
    pub fn get(&self) -> Health {
        self.lock().clone()
    }

    /// Sets it to unavailable.
    pub fn fail(&self, error: impl Into<String>) {
        self.set(HealthLevel::Unavailable, Some(error.into()));
    }

    /// Sets it to up.
    pub fn recover(&self) {
        self.set(HealthLevel::Up, None);
    }

    /// Sets it to fenced: another process publishes as this node.
    pub fn fence(&self, error: impl Into<String>) {
        self.set(HealthLevel::Fenced, Some(error.into()));
    }

    fn set(&self, state: HealthLevel, error: Option<String>) {
        let mut part = self.lock();
        if part.state != state {
            part.since = Timestamp::now();
        }
        part.state = state;
        part.error = error;
    }

    fn lock(&self) -> MutexGuard<'_, Health> {
        // The value is consistent whenever the lock is free, so lock poisoning is ignored.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The consecutive failures of one remote component, as its own thread sees them.
#[derive(Debug)]
pub struct OutageTracker {
    what: String,
    backoff: Backoff,
    part: HealthHandle,
    failures: u32,
    since: Option<Instant>,
    shown: HealthLevel,
    /// The reasons of this outage so far, without their numbers.
    reasons: BTreeSet<String>,
}

/// The maximum number of reasons of one outage that are logged.
const REASONS_MAX: usize = 20;

impl OutageTracker {
    /// Nothing has failed yet.
    pub fn new(what: impl Into<String>, backoff: Backoff, part: HealthHandle) -> Self {
        Self {
            what: what.into(),
            backoff,
            part,
            failures: 0,
            since: None,
            shown: HealthLevel::Up,
            reasons: BTreeSet::new(),
        }
    }

    /// Records a failure, and returns the delay. The first failure is logged, and each one with a
    /// new reason.
    pub fn failed(&mut self, error: &dyn Display) -> Duration {
        self.failures = self.failures.saturating_add(1);
        let error = error.to_string();
        self.show(HealthLevel::Unavailable, Some(error.clone()));
        // Delays and counts differ with each attempt.
        let reason = error.replace(|c: char| c.is_ascii_digit(), "");
        let is_new = self.reasons.len() < REASONS_MAX && self.reasons.insert(reason);
        if self.since.is_none() {
            self.since = Some(Instant::now());
            log::warn!(
                "{} unavailable: {error}; retrying with backoff, nothing is lost",
                self.what
            );
        } else if is_new {
            log::warn!(
                "{} still unavailable after {} tries, now: {error}",
                self.what,
                self.failures
            );
        } else {
            log::debug!(
                "{} still unavailable after {} tries: {error}",
                self.what,
                self.failures
            );
        }
        self.backoff.equal_jitter(self.failures, fastrand::f64())
    }

    /// Records that it rejects everything until an operator acts: logged once at error level, and
    /// again after each failed probe. The log names the command that resumes it.
    pub fn paused(&mut self, error: &dyn Display, resume_command: &str) {
        self.failures = self.failures.saturating_add(1);
        self.since.get_or_insert_with(Instant::now);
        let error = error.to_string();
        self.show(HealthLevel::Paused, Some(error.clone()));
        log::error!(
            "{} is paused: {error}; set it right, then run `{resume_command}`; nothing is lost \
                meanwhile",
            self.what
        );
    }

    /// Records that another process fenced this component. The state stays until an operator acts.
    pub fn fenced(&mut self, error: &dyn Display) {
        self.failures = self.failures.saturating_add(1);
        self.since.get_or_insert_with(Instant::now);
        self.show(HealthLevel::Fenced, Some(error.to_string()));
        log::error!("{} fenced: {error}", self.what);
    }

    /// Records that the other side requests a pause: no failure.
    pub fn limited(&mut self, reason: &str) {
        self.show(HealthLevel::RateLimited, Some(reason.to_owned()));
        log::info!("{} is limited: {reason}", self.what);
    }

    /// Whether it refuses until an operator acts.
    pub fn is_paused(&self) -> bool {
        self.shown == HealthLevel::Paused
    }

    /// Before the log line, so that its reader finds the same state on the health page.
    fn show(&mut self, state: HealthLevel, error: Option<String>) {
        self.shown = state;
        self.part.set(state, error);
    }

    /// Records a success, and logs the end of an outage.
    pub fn recovered(&mut self) {
        if self.shown != HealthLevel::Up {
            self.show(HealthLevel::Up, None);
        }
        if let Some(since) = self.since.take() {
            log::info!(
                "{} available again after {:.1} s and {}",
                self.what,
                since.elapsed().as_secs_f64(),
                counted(self.failures, "failed try")
            );
        }
        self.failures = 0;
        self.reasons.clear();
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
    fn doubles_up_to_the_cap() {
        let full_jitter = |failures| BACKOFF.equal_jitter(failures, 1.0).as_millis();
        assert_eq!([1, 2, 3, 4].map(full_jitter), [100, 200, 400, 800]);
        assert_eq!([7, 8, u32::MAX].map(full_jitter), [5000, 5000, 5000]);
    }

    #[test]
    fn jitter_is_at_most_half() {
        assert_eq!(BACKOFF.equal_jitter(1, 0.0), Duration::from_millis(50));
        assert_eq!(BACKOFF.equal_jitter(1, 0.5), Duration::from_millis(75));
    }

    #[test]
    fn an_outage_shows_until_it_ends() {
        let part = HealthHandle::up();
        let mut outage = OutageTracker::new("a test part", BACKOFF, part.clone());
        outage.failed(&"first reason");
        outage.failed(&"second reason");
        assert_eq!(part.get().state, HealthLevel::Unavailable);
        assert_eq!(part.get().error.as_deref(), Some("second reason"));
        outage.recovered();
        assert_eq!(
            (part.get().state, part.get().error),
            (HealthLevel::Up, None)
        );
    }
}
