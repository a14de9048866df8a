//! Checkpoints of the WAL, on a thread of their own, so that no commit waits for them.
//!
//! SQLite's automatic checkpoint belongs to the commit that fills the WAL: every job waits while
//! thousands of pages are copied and the file is synced. Here the checkpointer copies while the
//! writer continues to commit. The writer itself then copies only the few pages that were added
//! meanwhile, and the WAL starts over (<https://sqlite.org/wal.html>, 2.1).

use std::cell::Cell;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TryRecvError, bounded, select_biased, tick};
use rusqlite::Connection;

use super::BUSY_TIMEOUT;
use super::abort::{abort_on_failed_sync, abort_process};
use super::open_error::{OpenError, open_error};
use crate::runtime::backoff::Backoff;
use crate::runtime::metrics::Metrics;
use crate::runtime::worker::{HEARTBEAT_INTERVAL, Stop, Waker};
use crate::store::error::StoreError;

/// Pages of WAL (16 MiB) after which a checkpoint begins. A page that changes with every commit is
/// copied once for each checkpoint.
const CHECKPOINT_PAGES: i32 = 4000;

/// How long the writer waits for readers of old pages before it continues with a longer WAL. It
/// does not wait at first, and waits longer after each checkpoint that they blocked.
const READER_WAIT: Backoff = Backoff {
    base: Duration::from_millis(10),
    cap: Duration::from_millis(80),
};

thread_local! {
    /// The length of the WAL after this thread's last commit.
    static WAL_PAGES: Cell<i32> = const { Cell::new(0) };
    /// Whether this thread has committed a change since the last call.
    static HAS_COMMITTED: Cell<bool> = const { Cell::new(false) };
}

/// The writer's side.
pub(in crate::store) struct CheckpointControl {
    wake: Waker,
    copied: Receiver<()>,
    requested: bool,
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
        HAS_COMMITTED.set(true);
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
        requested: false,
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
    /// Whether the writer has committed a change since the last call. A transaction that changes
    /// nothing succeeds also where nothing can be stored.
    #[expect(
        clippy::unused_self,
        reason = "the hook of SQLite counts for its thread, which is the owner's"
    )]
    pub(in crate::store) fn has_committed(&self) -> bool {
        HAS_COMMITTED.take()
    }

    /// The length of the WAL after the last commit.
    #[expect(
        clippy::unused_self,
        reason = "the hook of SQLite counts for its thread, which is the owner's"
    )]
    pub(in crate::store) fn wal_pages(&self) -> i32 {
        WAL_PAGES.get()
    }

    /// Called between two transactions: starts a checkpoint when the WAL is long, and lets the WAL
    /// start over after one.
    pub(in crate::store) fn step(&mut self, connection: &Connection) -> rusqlite::Result<()> {
        let pages = WAL_PAGES.get();
        if pages < CHECKPOINT_PAGES {
            self.next = CHECKPOINT_PAGES;
        }
        if !self.requested && pages >= self.next {
            self.requested = true;
            self.wake.wake();
        } else if self.requested {
            match self.copied.try_recv() {
                Err(TryRecvError::Empty) => {}
                Ok(()) | Err(TryRecvError::Disconnected) => {
                    self.requested = false;
                    // The next transaction starts the WAL over, unless a reader holds old pages at
                    // that moment.
                    self.next = pages.saturating_add(CHECKPOINT_PAGES);
                    let rounds = u32::try_from(pages / CHECKPOINT_PAGES).unwrap_or(0);
                    return abort_on_failed_sync(finish_checkpoint(
                        connection,
                        rounds.saturating_sub(1),
                    ));
                }
            }
        }
        Ok(())
    }
}

fn finish_checkpoint(connection: &Connection, missed: u32) -> rusqlite::Result<()> {
    if missed == 0 {
        return run_checkpoint(connection, "PRAGMA wal_checkpoint(PASSIVE)");
    }
    connection.busy_timeout(READER_WAIT.equal_jitter(missed, 1.0))?;
    let result = run_checkpoint(connection, "PRAGMA wal_checkpoint(RESTART)");
    connection.busy_timeout(BUSY_TIMEOUT)?;
    result
}

/// A checkpoint that readers blocked has copied fewer pages: the next one copies the rest.
fn run_checkpoint(connection: &Connection, pragma: &str) -> rusqlite::Result<()> {
    connection.prepare_cached(pragma)?.query_row([], |_| Ok(()))
}

impl Checkpointer {
    /// Runs until a stop is requested.
    pub(in crate::store) fn run(self, metrics: &Metrics, stop: &Stop) {
        let heartbeat = tick(HEARTBEAT_INTERVAL);
        let metrics = metrics.store();
        loop {
            stop.beat();
            select_biased! {
                recv(stop.signal()) -> _ => return,
                recv(self.woken) -> woken => if woken.is_err() { return },
                recv(heartbeat) -> _ => continue,
            }
            let started = Instant::now();
            // The second checkpoint is short: it copies the pages that were added during the first.
            if let Err(error) = abort_on_failed_sync(
                self.checkpoint_and_sync()
                    .and_then(|()| self.checkpoint_and_sync()),
            ) {
                metrics.checkpoints_failed.inc();
                metrics.failed(StoreError::kind(&error));
                log::warn!(
                    event = "checkpoint_failed";
                    "the WAL checkpoint failed, the next round will try again: {error}"
                );
            } else {
                metrics.checkpoints_ok.inc();
            }
            metrics.checkpoint_duration.observe(started.elapsed());
            let _ = self.copied.try_send(());
        }
    }

    /// SQLite syncs the file only after it has copied the whole WAL, which happens on the writer's
    /// thread. Then little is left to be synced.
    fn checkpoint_and_sync(&self) -> rusqlite::Result<()> {
        run_checkpoint(&self.connection, "PRAGMA wal_checkpoint(PASSIVE)")?;
        if let Err(error) = self.file.sync_data() {
            abort_process(&error);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::{fs, thread};

    use super::*;
    use crate::config;
    use crate::runtime::worker::WorkerGroup;
    use crate::store::{SqlResult, Store};

    const PAGE_BYTES: u64 = 4096 + 24;

    /// A short read in one snapshot: the writer waits 10 to 80 ms for a moment without readers,
    /// also on a slow machine.
    fn read_during_checkpoints(connection: &Connection) -> SqlResult<i64> {
        let numbers =
            "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 300)";
        connection.query_row(
            &format!("{numbers} SELECT (SELECT count(*) FROM t) + count(*) FROM n"),
            [],
            |r| r.get(0),
        )
    }

    #[test]
    fn checkpoints_keep_the_wal_short_while_readers_never_stop() {
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
            .start(&WorkerGroup::default())
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
                        store.read(read_during_checkpoints).unwrap();
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
