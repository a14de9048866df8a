//! Risks of the configuration that an operator should know, and that stop nothing: shown by
//! `/health/ready`.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The risks that are known. Cloning shares them.
#[derive(Debug, Clone, Default)]
pub struct Warnings(Arc<Mutex<Vec<String>>>);

impl Warnings {
    /// Replaces what is known, and logs each risk that is new.
    pub fn set(&self, risks: Vec<String>) {
        let mut known = self.lock();
        for risk in risks.iter().filter(|risk| !known.contains(risk)) {
            log::warn!("{risk}");
        }
        *known = risks;
    }

    /// What is known.
    pub fn get(&self) -> Vec<String> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<String>> {
        // The list is whole whenever the lock is free: a panic elsewhere does not spoil it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
