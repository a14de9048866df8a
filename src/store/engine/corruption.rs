//! The file is damaged: SQLite has read an impossible page, or the file was removed while it was
//! open.
//!
//! From then on nothing is written and nothing is sent: more writes could spread the damage, and
//! outcomes could not be saved. Payments can still be read. The process keeps running: a restarted
//! one would accept payments until it reads the same page, again and again. Only an operator can
//! restore the file.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::runtime::health::{Health, HealthHandle};
use crate::store::error::StoreError;

/// Whether the file is damaged, shared by all threads that use it. Cloning it is cheap.
#[derive(Debug, Clone)]
pub(in crate::store) struct CorruptionFlag {
    health: HealthHandle,
    known: Arc<AtomicBool>,
}

impl CorruptionFlag {
    /// No damage is known.
    pub(in crate::store) fn none() -> Self {
        Self {
            health: HealthHandle::up(),
            known: Arc::default(),
        }
    }

    /// Sets the flag if an error reports damage. It stays set.
    pub(in crate::store) fn observe(&self, error: &rusqlite::Error) {
        if StoreError::is_corruption(error) {
            self.set(&error.to_string());
        }
    }

    /// Logs the damage once.
    pub(in crate::store) fn set(&self, what: &str) {
        if !self.known.swap(true, Ordering::Relaxed) {
            self.health.fail(format!("the database is damaged: {what}"));
            log::error!(
                event = "database_damaged";
                "the database is damaged: {what}; no more payments are accepted, and nothing is \
                    published or delivered: stop payrelay, repair the file or restore a backup \
                    (docs/explanation/failure-modes.md), and start it again"
            );
        }
    }

    pub(in crate::store) fn is_set(&self) -> bool {
        self.known.load(Ordering::Relaxed)
    }

    /// Refuses until the process ends.
    pub(in crate::store) fn check(&self) -> Result<(), StoreError> {
        if self.is_set() {
            Err(StoreError::Damaged)
        } else {
            Ok(())
        }
    }

    pub(in crate::store) fn state(&self) -> Health {
        self.health.get()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rusqlite::Error;
    use rusqlite::ffi::{
        self, SQLITE_BUSY, SQLITE_CORRUPT, SQLITE_FULL, SQLITE_IOERR, SQLITE_NOTADB,
    };

    #[test]
    fn only_errors_of_corruption_set_the_flag_for_good() {
        let error = |code| Error::SqliteFailure(ffi::Error::new(code), None);
        for code in [SQLITE_BUSY, SQLITE_FULL, SQLITE_IOERR] {
            let damage = CorruptionFlag::none();
            damage.observe(&error(code));
            damage.check().unwrap();
        }
        for code in [SQLITE_CORRUPT, SQLITE_NOTADB] {
            let damage = CorruptionFlag::none();
            damage.clone().observe(&error(code));
            assert!(
                matches!(damage.check(), Err(StoreError::Damaged)) && damage.state().is_failing()
            );
        }
    }
}
