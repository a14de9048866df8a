//! The file is damaged: SQLite has met a page that cannot be, or the file is gone from under it.
//!
//! From then on nothing is written and nothing is sent: more writes could spread the damage, and
//! what is sent could not be recorded. Payments can still be looked up. The process stays: started
//! again, it would take payments until it meets the same page, and again; only a person can put the
//! file right.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::runtime::health::{Health, HealthHandle};
use crate::store::error::{StoreError, is_corruption};

/// Whether the file is damaged, for all who work with it. Cloning it is cheap.
#[derive(Debug, Clone)]
pub(in crate::store) struct CorruptionFlag {
    part: HealthHandle,
    known: Arc<AtomicBool>,
}

impl CorruptionFlag {
    /// None is known of.
    pub(in crate::store) fn none() -> Self {
        Self {
            part: HealthHandle::up(),
            known: Arc::default(),
        }
    }

    /// Whether an error tells of it; it does for good.
    pub(in crate::store) fn observe(&self, error: &rusqlite::Error) {
        if is_corruption(error) {
            self.set(&error.to_string());
        }
    }

    /// Says so once.
    pub(in crate::store) fn set(&self, what: &str) {
        if !self.known.swap(true, Ordering::Relaxed) {
            self.part.fail(format!("the database is damaged: {what}"));
            log::error!(
                "the database is damaged: {what}; no more payments are taken, and nothing is \
                    published or told: stop payrelay, put the file right or restore a backup \
                    (docs/machine.md), and start it again"
            );
        }
    }

    pub(in crate::store) fn is_set(&self) -> bool {
        self.known.load(Ordering::Relaxed)
    }

    /// Refuses for as long as this process lives.
    pub(in crate::store) fn check(&self) -> Result<(), StoreError> {
        if self.is_set() {
            Err(StoreError::Damaged)
        } else {
            Ok(())
        }
    }

    pub(in crate::store) fn state(&self) -> Health {
        self.part.get()
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
    fn only_damage_is_damage_and_it_stays() {
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
