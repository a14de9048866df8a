//! What a caller of the store can do about an error.

use rusqlite::ErrorCode;
use rusqlite::ffi::SQLITE_IOERR_SHMSIZE;
use std::sync::Arc;

/// Why the store could not do what it was asked.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// As many jobs wait as may: try again soon.
    #[error("too much work waits for the database")]
    Busy,
    /// The disk is full, or nearly: try again when somebody has made room.
    #[error("the disk has no room")]
    Full,
    /// The file is damaged: nobody can do anything before a person has put it right.
    #[error("the database is damaged")]
    Damaged,
    /// The store is stopping.
    #[error("the database is being closed")]
    Closed,
    /// SQLite refused, and nothing of the job was stored.
    #[error("the database refused: {0}")]
    Failed(Arc<str>),
}

impl From<&rusqlite::Error> for StoreError {
    fn from(error: &rusqlite::Error) -> Self {
        if is_corruption(error) {
            Self::Damaged
        } else if is_full(error) {
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

/// The index of the log, which grows with it, has a code of its own for a disk without room.
pub(super) fn is_full(error: &rusqlite::Error) -> bool {
    let extended = error.sqlite_error().map(|error| error.extended_code);
    error.sqlite_error_code() == Some(ErrorCode::DiskFull) || extended == Some(SQLITE_IOERR_SHMSIZE)
}

impl From<r2d2::Error> for StoreError {
    fn from(error: r2d2::Error) -> Self {
        Self::Failed(error.to_string().into())
    }
}

/// What SQLite says of a file that cannot be (<https://sqlite.org/rescode.html#corrupt>).
pub(super) fn is_corruption(error: &rusqlite::Error) -> bool {
    matches!(
        error.sqlite_error_code(),
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase)
    )
}
