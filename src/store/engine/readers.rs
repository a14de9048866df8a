//! The threads that run reads for callers that must not wait, each with a read-only connection
//! meanwhile.

use std::io;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, bounded, select_biased, tick};
use r2d2_sqlite::SqliteConnectionManager;
use rusqlite::{Connection, OpenFlags};
use scheduled_thread_pool::ScheduledThreadPool;

use super::open_error::OpenError;
use super::{BUSY_TIMEOUT, Pool, prepare_statements_once};
use crate::runtime::metrics::Metrics;
use crate::runtime::worker::{HEARTBEAT_INTERVAL, Stop, Worker, WorkerGroup};
use crate::store::error::StoreError;

/// A query together with its reply; it also replies when there is no connection. Returns the error
/// of SQLite, if there was one.
pub(in crate::store) type Query =
    Box<dyn FnOnce(Result<&Connection, StoreError>) -> Option<rusqlite::Error> + Send>;

/// Many reads can fail in a row: one line summarizes those of this time.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// Opens `size` read-only connections at once: later there may be no descriptor left for one.
pub(in crate::store) fn open_reader_pool(path: PathBuf, size: u32) -> Result<Pool, OpenError> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let manager = SqliteConnectionManager::file(path)
        .with_flags(flags)
        .with_init(|connection| {
            connection.busy_timeout(BUSY_TIMEOUT)?;
            prepare_statements_once(connection)?;
            // 2 MiB of pages each (https://sqlite.org/pragma.html#pragma_cache_size): most reads
            // are of recent rows.
            connection.pragma_update(None, "cache_size", -2048)
        });
    // A single thread, which runs its tasks in order.
    let opener = ScheduledThreadPool::builder()
        .num_threads(1)
        .thread_name_pattern("sqlite-opener");
    let opener = Arc::new(opener.build());
    let pool = r2d2::Pool::builder()
        .max_size(size)
        .idle_timeout(None)
        .max_lifetime(None)
        .test_on_check_out(false)
        // A longer wait means that a read hangs.
        .connection_timeout(BUSY_TIMEOUT)
        .error_handler(Box::new(r2d2::LoggingErrorHandler))
        .thread_pool(Arc::clone(&opener))
        .build(manager)
        .map_err(|error| OpenError::Pool(error.to_string()))?;
    // r2d2's thread owns the pool for a moment longer than the opening takes. If it owned it longer
    // than the store does, it would close the connections after the writer, which then could not
    // checkpoint the whole WAL. So wait until that thread has ended its last task.
    let (idle, is_idle) = bounded(1);
    opener.execute(move || {
        let _ = idle.send(());
    });
    let _ = is_idle.recv();
    Ok(pool)
}

pub(in crate::store) struct Readers {
    count: NonZeroUsize,
    queries: Receiver<Query>,
    pool: Pool,
    metrics: Metrics,
}

impl Readers {
    pub(in crate::store) fn new(
        count: NonZeroUsize,
        queries: Receiver<Query>,
        pool: Pool,
        metrics: Metrics,
    ) -> Self {
        Self {
            count,
            queries,
            pool,
            metrics,
        }
    }

    pub(in crate::store) fn spawn(self, group: &WorkerGroup) -> io::Result<Vec<Worker>> {
        let spawn = |_| {
            let queries = self.queries.clone();
            let pool = self.pool.clone();
            let metrics = self.metrics.clone();
            Worker::spawn("reader", group, move |stop| {
                run_reader(&queries, &pool, &metrics, &stop);
            })
        };
        (0..self.count.get()).map(spawn).collect()
    }
}

fn run_reader(queries: &Receiver<Query>, pool: &Pool, metrics: &Metrics, stop: &Stop) {
    let heartbeat = tick(HEARTBEAT_INTERVAL);
    let mut failures = 0_u64;
    let mut logged_at = None::<Instant>;
    loop {
        stop.beat();
        let query = select_biased! {
            recv(stop.signal()) -> _ => return,
            recv(queries) -> query => query,
            recv(heartbeat) -> _ => continue,
        };
        let Ok(query) = query else { return };
        let failure = match pool.get() {
            Ok(connection) => query(Ok(&connection)),
            Err(error) => query(Err(error.into())),
        };
        let Some(error) = failure else { continue };
        metrics.store().failed(StoreError::kind(&error));
        failures += 1;
        if logged_at.is_none_or(|at| at.elapsed() > LOG_INTERVAL) {
            log::warn!(
                event = "reads_failed", count = failures;
                "{failures} reads failed since the last such line; the last error: {error}"
            );
            failures = 0;
            logged_at = Some(Instant::now());
        }
    }
}
