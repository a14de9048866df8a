//! The outages of a remote component. Each is logged when it begins and when it ends, and shown on
//! the health page, and decides the delay before the next attempt.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::time::{Duration, Instant};

use super::backoff::Backoff;
use super::health::{HealthHandle, HealthLevel};
use super::plural::counted;

/// The consecutive failures of one remote component, as its own thread sees them.
#[derive(Debug)]
pub struct OutageTracker {
    what: String,
    backoff: Backoff,
    health: HealthHandle,
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
    pub fn new(what: impl Into<String>, backoff: Backoff, health: HealthHandle) -> Self {
        Self {
            what: what.into(),
            backoff,
            health,
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
        self.set_health(HealthLevel::Unavailable, Some(error.clone()));
        // Delays and counts differ with each attempt.
        let reason = error.replace(|c: char| c.is_ascii_digit(), "");
        let is_new = self.reasons.len() < REASONS_MAX && self.reasons.insert(reason);
        if self.since.is_none() {
            self.since = Some(Instant::now());
            log::warn!(
                event = "unavailable", component = self.what.as_str();
                "{} unavailable: {error}; retrying with backoff, nothing is lost",
                self.what
            );
        } else if is_new {
            log::warn!(
                event = "still_unavailable", component = self.what.as_str(), tries = self.failures;
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
        self.set_health(HealthLevel::Paused, Some(error.clone()));
        log::error!(
            event = "paused", component = self.what.as_str();
            "{} is paused: {error}; set it right, then run `{resume_command}`; nothing is lost \
                meanwhile",
            self.what
        );
    }

    /// Records that an operator paused it: no failure, but nothing is sent.
    pub fn held(&mut self, reason: &str) {
        self.set_health(HealthLevel::Paused, Some(reason.to_owned()));
    }

    /// Records that the operator's pause has ended. Whether it works is known after the next try.
    pub fn released(&mut self) {
        if self.failures == 0 {
            self.set_health(HealthLevel::Up, None);
        } else {
            let reason = "resumed, and not tried yet".to_owned();
            self.set_health(HealthLevel::Unavailable, Some(reason));
        }
    }

    /// Sets the health to fenced: another process publishes as this node. It stays so until an
    /// operator resumes the relay.
    pub fn fenced(&mut self, error: &dyn Display) {
        self.failures = self.failures.saturating_add(1);
        self.since.get_or_insert_with(Instant::now);
        self.set_health(HealthLevel::Fenced, Some(error.to_string()));
        log::error!(
            event = "fenced", component = self.what.as_str();
            "{} fenced: {error}", self.what
        );
    }

    /// Records that the other side requests a pause: no failure.
    pub fn limited(&mut self, reason: &str) {
        self.set_health(HealthLevel::RateLimited, Some(reason.to_owned()));
        log::info!(
            event = "rate_limited", component = self.what.as_str();
            "{} is limited: {reason}", self.what
        );
    }

    /// Whether it refuses until an operator acts.
    pub fn is_paused(&self) -> bool {
        self.shown == HealthLevel::Paused
    }

    /// Before the log line, so that its reader finds the same state on the health page.
    fn set_health(&mut self, state: HealthLevel, error: Option<String>) {
        self.shown = state;
        self.health.set(state, error);
    }

    /// Records a success, and logs the end of an outage.
    pub fn recovered(&mut self) {
        if self.shown != HealthLevel::Up {
            self.set_health(HealthLevel::Up, None);
        }
        if let Some(since) = self.since.take() {
            log::info!(
                event = "available_again", component = self.what.as_str(),
                seconds = since.elapsed().as_secs_f64(), tries = self.failures;
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
    fn an_outage_shows_until_it_ends() {
        let health = HealthHandle::up();
        let mut outage = OutageTracker::new("a test part", BACKOFF, health.clone());
        outage.failed(&"first reason");
        outage.failed(&"second reason");
        assert_eq!(health.get().state, HealthLevel::Unavailable);
        assert_eq!(health.get().error.as_deref(), Some("second reason"));
        outage.recovered();
        assert_eq!(
            (health.get().state, health.get().error),
            (HealthLevel::Up, None)
        );
    }
}
