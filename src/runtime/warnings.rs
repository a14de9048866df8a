//! Warnings about risks of the configuration, shown by `/health/ready`. They stop nothing.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The current warnings. All clones share one list.
#[derive(Debug, Clone, Default)]
pub struct Warnings(Arc<Mutex<Vec<String>>>);

impl Warnings {
    /// Replaces the warnings, and logs each new one.
    pub fn set(&self, risks: Vec<String>) {
        let mut known = self.lock();
        for risk in risks.iter().filter(|risk| !known.contains(risk)) {
            log::warn!(event = "risk"; "{risk}");
        }
        *known = risks;
    }

    /// The current warnings.
    pub fn get(&self) -> Vec<String> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<String>> {
        // The list is consistent whenever the lock is free, so lock poisoning is ignored.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
