//! Risks of the configuration that an operator should know, shown by `/health/ready`. They stop
//! nothing.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The known risks. Cloning shares them.
#[derive(Debug, Clone, Default)]
pub struct Warnings(Arc<Mutex<Vec<String>>>);

impl Warnings {
    /// Replaces the risks, and logs each new one.
    pub fn set(&self, risks: Vec<String>) {
        let mut known = self.lock();
        for risk in risks.iter().filter(|risk| !known.contains(risk)) {
            log::warn!("{risk}");
        }
        *known = risks;
    }

    /// The known risks.
    pub fn get(&self) -> Vec<String> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<String>> {
        // The list is consistent whenever the lock is free: a panic elsewhere does not spoil it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
