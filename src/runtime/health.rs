//! The state of a component on the health page.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;

use crate::domain::timestamp::Timestamp;

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

    pub(super) fn set(&self, state: HealthLevel, error: Option<String>) {
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
