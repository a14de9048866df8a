//! Checkpoints of the WAL, on a thread of their own, so that no commit waits for them.
//!
//! SQLite's automatic checkpoint belongs to the commit that fills the WAL: every job waits while
//! thousands of pages are copied and the file is synced. Here the checkpointer copies while the
//! writer continues to commit. The writer itself then copies only the few pages that were added
//! meanwhile, and the WAL starts over (<https://sqlite.org/wal.html>, 2.1).

use std::cell::Cell;
use std::fmt::Display;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, TryRecvError, bounded, select_biased};
use rusqlite::Connection;
use rusqlite::ffi::{
    SQLITE_BUSY, SQLITE_CONSTRAINT, SQLITE_CORRUPT, SQLITE_FULL, SQLITE_INTERRUPT,
    SQLITE_IOERR_DIR_FSYNC, SQLITE_IOERR_FSYNC, SQLITE_IOERR_READ, SQLITE_IOERR_SHORT_READ,
    SQLITE_IOERR_WRITE, SQLITE_LOCKED, SQLITE_NOTADB, SQLITE_READONLY,
};

use super::BUSY_TIMEOUT;
use super::open_error::{OpenError, open_error};
use crate::runtime::health::Backoff;
use crate::runtime::worker::{Stop, Waker};

/// Pages of WAL (16 MiB) after which a checkpoint begins. A page that changes with every commit is
/// copied once for each checkpoint.
const CHECKPOINT_PAGES: i32 = 4000;

/// How long the writer waits for readers of old pages before it continues with a longer WAL: not at
/// all at first, and longer with each checkpoint that they blocked.
const READER_WAIT: Backoff = Backoff {
    base: Duration::from_millis(10),
    cap: Duration::from_millis(80),
};

thread_local! {
    /// The length of the WAL after this thread's last commit.
    static WAL_PAGES: Cell<i32> = const { Cell::new(0) };
    /// Whether this thread has committed a change since the last call.
    static HAS_WRITTEN: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread has committed a change since the last call: a transaction that changes
/// nothing succeeds also where nothing can be stored.
pub(in crate::store) fn has_written() -> bool {
    HAS_WRITTEN.take()
}

/// The writer's side.
pub(in crate::store) struct CheckpointControl {
    wake: Waker,
    copied: Receiver<()>,
    asked: bool,
    /// The length of the WAL at which the next checkpoint begins.
    next: i32,
    /// Closing it would drop SQLite's locks on the file (<https://sqlite.org/howtocorrupt.html>,
    /// 2.2), so it stays open as long as the writer's connection.
    _file: Arc<File>,
}

/// The checkpointer's side.
pub(in crate::store) struct Checkpointer {
    connection: Connection,
    file: Arc<File>,
    woken: Receiver<()>,
    copied: Sender<()>,
}

/// Replaces SQLite's automatic checkpoints, for the writer's `connection` to the database at
/// `path`.
pub(in crate::store) fn replace_autocheckpoint(
    connection: &Connection,
    path: &Path,
) -> Result<(CheckpointControl, Checkpointer), OpenError> {
    let failed = |source| open_error(path, source);
    // This also replaces the automatic checkpoint, which is such a hook.
    connection.wal_hook(Some(|_, pages| {
        WAL_PAGES.set(pages);
        HAS_WRITTEN.set(true);
        Ok(())
    }));
    let other = Connection::open(path).map_err(failed)?;
    other.busy_timeout(BUSY_TIMEOUT).map_err(failed)?;
    other
        .pragma_update(None, "synchronous", "FULL")
        .map_err(failed)?;
    let file = File::open(path).map_err(|source| OpenError::Io {
        path: path.into(),
        source,
    })?;
    let file = Arc::new(file);
    let (wake, woken) = Waker::new();
    let (copied_to, copied) = bounded(1);
    let checkpoints = CheckpointControl {
        wake,
        copied,
        asked: false,
        next: CHECKPOINT_PAGES,
        _file: Arc::clone(&file),
    };
    Ok((
        checkpoints,
        Checkpointer {
            connection: other,
            file,
            woken,
            copied: copied_to,
        },
    ))
}

impl CheckpointControl {
    /// Called between two transactions: starts a checkpoint when the WAL is long, and lets the WAL
    /// start over after one.
    pub(in crate::store) fn step(&mut self, connection: &Connection) -> rusqlite::Result<()> {
        let pages = WAL_PAGES.get();
        if pages < CHECKPOINT_PAGES {
            self.next = CHECKPOINT_PAGES;
        }
        if !self.asked && pages >= self.next {
            self.asked = true;
            self.wake.wake();
        } else if self.asked {
            match self.copied.try_recv() {
                Err(TryRecvError::Empty) => {}
                Ok(()) | Err(TryRecvError::Disconnected) => {
                    self.asked = false;
                    // The next transaction starts the WAL over, unless a reader holds old pages at
                    // that moment.
                    self.next = pages.saturating_add(CHECKPOINT_PAGES);
                    let rounds = u32::try_from(pages / CHECKPOINT_PAGES).unwrap_or(0);
                    return abort_on_failed_sync(finish(connection, rounds.saturating_sub(1)));
                }
            }
        }
        Ok(())
    }
}

fn finish(connection: &Connection, missed: u32) -> rusqlite::Result<()> {
    if missed == 0 {
        return copy(connection, "PRAGMA wal_checkpoint(PASSIVE)");
    }
    connection.busy_timeout(READER_WAIT.equal_jitter(missed, 1.0))?;
    let result = copy(connection, "PRAGMA wal_checkpoint(RESTART)");
    connection.busy_timeout(BUSY_TIMEOUT)?;
    result
}

/// A checkpoint that readers blocked has copied fewer pages: the next one copies the rest.
fn copy(connection: &Connection, pragma: &str) -> rusqlite::Result<()> {
    connection.prepare_cached(pragma)?.query_row([], |_| Ok(()))
}

impl Checkpointer {
    /// Runs until a stop is requested.
    pub(in crate::store) fn run(self, stop: &Stop) {
        loop {
            select_biased! {
                recv(stop.signal()) -> _ => return,
                recv(self.woken) -> woken => if woken.is_err() { return },
            }
            // The second checkpoint is short: it copies the pages that were added during the first.
            if let Err(error) =
                abort_on_failed_sync(self.copy_and_sync().and_then(|()| self.copy_and_sync()))
            {
                log::warn!(
                    "the database's log could not be copied back, the next round will try again: \
                        {error}"
                );
            }
            let _ = self.copied.try_send(());
        }
    }

    /// SQLite syncs the file only after it has copied the whole WAL, which happens on the writer's
    /// thread. Then little is left to be synced.
    fn copy_and_sync(&self) -> rusqlite::Result<()> {
        copy(&self.connection, "PRAGMA wal_checkpoint(PASSIVE)")?;
        if let Err(error) = self.file.sync_data() {
            abort_process(&error);
        }
        Ok(())
    }
}

/// Ends the process when a sync of the database has failed.
///
/// Copied pages count as copied. If the disk then loses them, a later sync may succeed all the
/// same, because Linux reports such a page once (<https://lwn.net/Articles/752063/>), and SQLite
/// would overwrite the WAL, the only copy. So the process ends at once, without closing the
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
/// synced the WAL. If that fails, or no memory is left for it, SQLite reports an error although the
/// payments are on the disk, and the next start finds them. So no client may get the response that
/// they are not stored.
pub(in crate::store) fn abort_on_ambiguous_commit(
    result: rusqlite::Result<()>,
) -> rusqlite::Result<()> {
    if let Err(error) = &result
        && error
            .sqlite_error()
            .is_none_or(|error| !comes_before_the_sync(error.extended_code))
    {
        abort_process(error);
    }
    result
}

/// Errors that COMMIT reports before it has written the frame that makes the transaction durable: a
/// lock, a constraint, an interruption, an unreadable page, a disk that rejects the frame
/// (sqlite3PagerCommitPhaseOne and walFrames in SQLite's source). Any other error may follow the
/// sync.
fn comes_before_the_sync(extended_code: i32) -> bool {
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

fn abort_process(error: &dyn Display) -> ! {
    log::error!(
        "the disk could not sync the database, and may have lost a part of what was written: \
            ending at once, nothing that was acknowledged is lost: {error}"
    );
    // A thread of its own writes the line.
    log::logger().flush();
    std::process::abort()
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Instant;
    use std::{fs, thread};

    use super::*;
    use crate::config;
    use rusqlite::ffi::{
        SQLITE_CONSTRAINT_FOREIGNKEY, SQLITE_IOERR, SQLITE_IOERR_NOMEM, SQLITE_IOERR_SHMMAP,
        SQLITE_IOERR_SHMOPEN, SQLITE_IOERR_SHMSIZE, SQLITE_NOMEM, SQLITE_PROTOCOL,
    };

    #[test]
    fn an_error_of_a_commit_that_may_follow_the_sync_ends_the_process() {
        for code in [
            SQLITE_BUSY,
            SQLITE_FULL,
            SQLITE_CONSTRAINT_FOREIGNKEY,
            SQLITE_IOERR_WRITE,
            SQLITE_CORRUPT,
        ] {
            assert!(comes_before_the_sync(code), "{code}");
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
            assert!(!comes_before_the_sync(code), "{code}");
        }
    }
    use crate::store::{SqlResult, Store};
    use crossbeam_channel::unbounded;

    const PAGE_BYTES: u64 = 4096 + 24;

    /// A short read in one snapshot: the writer waits 10 to 80 ms for a moment without readers,
    /// also on a slow machine.
    fn read_for_a_while(connection: &Connection) -> SqlResult<i64> {
        let numbers =
            "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 300)";
        connection.query_row(
            &format!("{numbers} SELECT (SELECT count(*) FROM t) + count(*) FROM n"),
            [],
            |r| r.get(0),
        )
    }

    #[test]
    fn the_wal_stays_short_while_readers_never_stop() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let size = |number| NonZeroUsize::new(number).unwrap();
        let settings = config::Database {
            path: path.clone(),
            queue_max: size(16),
            readers: size(2),
            min_free_bytes: 0,
        };
        let (store, workers) = Store::open(&settings, None)
            .unwrap()
            .start(&unbounded().0)
            .unwrap();
        store
            .write(|tx| tx.execute_batch("CREATE TABLE t (x BLOB)"))
            .unwrap();
        let done = AtomicBool::new(false);
        let rounds = 8;
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while !done.load(Ordering::Relaxed) {
                        store.read(read_for_a_while).unwrap();
                    }
                });
            }
            for _ in 0..rounds * CHECKPOINT_PAGES / 100 {
                store
                    .write(|tx| tx.execute("INSERT INTO t VALUES (zeroblob(100 * 4096))", []))
                    .unwrap();
            }
            done.store(true, Ordering::Relaxed);
        });
        let longest = fs::metadata(dir.path().join("a.db-wal")).unwrap().len() / PAGE_BYTES;
        // Without starting over it would be eight checkpoints long; the file does not shrink below
        // its former size.
        assert!(
            longest < 5 * u64::from(CHECKPOINT_PAGES.unsigned_abs()),
            "the WAL was {longest} pages long"
        );
        drop(store);
        for worker in workers {
            worker
                .stop(Instant::now() + Duration::from_secs(10))
                .unwrap();
        }
        let connection = Connection::open(&path).unwrap();
        let rows: i64 = connection
            .query_row("SELECT count(*) FROM t", [], |row| row.get(0))
            .unwrap();
        assert_eq!(rows, i64::from(rounds * CHECKPOINT_PAGES / 100));
        assert_eq!(
            connection
                .query_row("PRAGMA integrity_check", [], |row| row.get::<_, String>(0))
                .unwrap(),
            "ok"
        );
    }
}
