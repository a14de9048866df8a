//! The errors of the store, by what a caller can do about them.

use rusqlite::ErrorCode;
use rusqlite::ffi::SQLITE_IOERR_SHMSIZE;
use std::sync::Arc;

use crate::runtime::metrics::DatabaseErrorKind;

/// Why the store could not do its work.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// Too many jobs wait: try again soon.
    #[error("too many jobs wait for the database")]
    Busy,
    /// The disk is full, or nearly full: try again when space has been freed.
    #[error("the disk has no free space")]
    Full,
    /// The file is damaged: an operator has to restore it.
    #[error("the database is damaged")]
    Damaged,
    /// The store is stopping.
    #[error("the database is being closed")]
    Closed,
    /// SQLite returned an error, and nothing of the job was stored.
    #[error("database error: {0}")]
    Failed(Arc<str>),
}

impl StoreError {
    /// Whether SQLite reports a damaged file (<https://sqlite.org/rescode.html#corrupt>).
    pub(super) fn is_corruption(error: &rusqlite::Error) -> bool {
        matches!(
            error.sqlite_error_code(),
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase)
        )
    }

    /// Whether SQLite reports a full disk. The index of the WAL, which grows with it, has an error
    /// code of its own for that.
    pub(super) fn is_full_disk(error: &rusqlite::Error) -> bool {
        let extended = error.sqlite_error().map(|error| error.extended_code);
        error.sqlite_error_code() == Some(ErrorCode::DiskFull)
            || extended == Some(SQLITE_IOERR_SHMSIZE)
    }

    /// The kind of an error of SQLite.
    pub(super) fn kind(error: &rusqlite::Error) -> DatabaseErrorKind {
        if Self::is_corruption(error) {
            return DatabaseErrorKind::Corruption;
        }
        if Self::is_full_disk(error) {
            return DatabaseErrorKind::Full;
        }
        match error.sqlite_error_code() {
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => DatabaseErrorKind::Busy,
            Some(ErrorCode::SystemIoFailure | ErrorCode::CannotOpen) => DatabaseErrorKind::Io,
            _ => DatabaseErrorKind::Other,
        }
    }

    /// Whether every other job would fail in the same way.
    pub(super) fn is_environment_failure(error: &rusqlite::Error) -> bool {
        Self::is_corruption(error)
            || Self::is_full_disk(error)
            || matches!(
                error.sqlite_error_code(),
                Some(ErrorCode::SystemIoFailure | ErrorCode::OutOfMemory)
            )
    }
}

impl From<&rusqlite::Error> for StoreError {
    fn from(error: &rusqlite::Error) -> Self {
        if Self::is_corruption(error) {
            Self::Damaged
        } else if Self::is_full_disk(error) {
            Self::Full
        } else {
            Self::Failed(error.to_string().into())
        }
    }
}

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> Self {
        Self::from(&error)
    }
}

impl From<r2d2::Error> for StoreError {
    fn from(error: r2d2::Error) -> Self {
        Self::Failed(error.to_string().into())
    }
}
