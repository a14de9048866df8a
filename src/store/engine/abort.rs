//! Ends the process where only the next start can find out what is on the disk.

use std::fmt::Display;

use rusqlite::ffi::{
    SQLITE_BUSY, SQLITE_CONSTRAINT, SQLITE_CORRUPT, SQLITE_FULL, SQLITE_INTERRUPT,
    SQLITE_IOERR_DIR_FSYNC, SQLITE_IOERR_FSYNC, SQLITE_IOERR_READ, SQLITE_IOERR_SHORT_READ,
    SQLITE_IOERR_WRITE, SQLITE_LOCKED, SQLITE_NOTADB, SQLITE_READONLY,
};

/// Ends the process when a sync of the database has failed.
///
/// SQLite does not copy a page of the WAL twice. If the disk loses a copied page, a later sync may
/// succeed all the same: Linux reports such a page once (<https://lwn.net/Articles/752063/>). Then
/// SQLite would overwrite the WAL, the only copy. So the process ends at once, without closing the
/// database: the next start checkpoints the whole WAL again.
///
/// A commit whose sync failed leaves the WAL in the same doubt: only the next start can find out
/// whether its payments are there. It writes the WAL once more before it relies on it
/// (`wal::rewrite_and_sync_wal`).
pub(in crate::store) fn abort_on_failed_sync<T>(
    result: rusqlite::Result<T>,
) -> rusqlite::Result<T> {
    let code = |error: &rusqlite::Error| error.sqlite_error().map(|error| error.extended_code);
    if let Err(error) = &result
        && matches!(
            code(error),
            Some(SQLITE_IOERR_FSYNC | SQLITE_IOERR_DIR_FSYNC)
        )
    {
        abort_process(error);
    }
    result
}

/// Ends the process after a COMMIT with unknown outcome. SQLite grows the WAL's index after it has
/// synced the WAL. If it cannot, it reports an error although the payments are on the disk, where
/// the next start finds them. So no client may get the response that they are not stored.
pub(in crate::store) fn abort_on_ambiguous_commit(
    result: rusqlite::Result<()>,
) -> rusqlite::Result<()> {
    if let Err(error) = &result
        && error
            .sqlite_error()
            .is_none_or(|error| !is_safe_without_abort(error.extended_code))
    {
        abort_process(error);
    }
    result
}

/// Whether COMMIT reports an error before it has written the frame that makes the transaction
/// durable (sqlite3PagerCommitPhaseOne and walFrames in SQLite's source). Such errors are a lock, a
/// constraint, an interruption, an unreadable page, or a disk that rejects the frame. Any other
/// error may follow the sync.
fn is_safe_without_abort(extended_code: i32) -> bool {
    let before = [
        SQLITE_BUSY,
        SQLITE_LOCKED,
        SQLITE_FULL,
        SQLITE_CONSTRAINT,
        SQLITE_INTERRUPT,
        SQLITE_CORRUPT,
        SQLITE_NOTADB,
        SQLITE_READONLY,
    ];
    let io = [
        SQLITE_IOERR_READ,
        SQLITE_IOERR_SHORT_READ,
        SQLITE_IOERR_WRITE,
    ];
    before.contains(&(extended_code & 0xff)) || io.contains(&extended_code)
}

pub(super) fn abort_process(error: &dyn Display) -> ! {
    log::error!(
        event = "sync_failed";
        "the disk could not sync the database, and may have lost a part of what was written: \
            ending at once, nothing that was acknowledged is lost: {error}"
    );
    // A thread of its own writes the line.
    log::logger().flush();
    std::process::abort()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rusqlite::ffi::{
        SQLITE_CONSTRAINT_FOREIGNKEY, SQLITE_IOERR, SQLITE_IOERR_NOMEM, SQLITE_IOERR_SHMMAP,
        SQLITE_IOERR_SHMOPEN, SQLITE_IOERR_SHMSIZE, SQLITE_NOMEM, SQLITE_PROTOCOL,
    };

    #[test]
    fn a_commit_error_that_may_follow_the_sync_aborts_the_process() {
        for code in [
            SQLITE_BUSY,
            SQLITE_FULL,
            SQLITE_CONSTRAINT_FOREIGNKEY,
            SQLITE_IOERR_WRITE,
            SQLITE_CORRUPT,
        ] {
            assert!(is_safe_without_abort(code), "{code}");
        }
        let after = [
            SQLITE_NOMEM,
            SQLITE_IOERR_NOMEM,
            SQLITE_IOERR_SHMSIZE,
            SQLITE_IOERR_SHMMAP,
            SQLITE_IOERR_SHMOPEN,
            SQLITE_IOERR_FSYNC,
            SQLITE_IOERR,
            SQLITE_PROTOCOL,
        ];
        for code in after {
            assert!(!is_safe_without_abort(code), "{code}");
        }
    }
}
