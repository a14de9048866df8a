//! The one place that knows SQL: the engine that owns the file, and a module for each table.
//!
//! Functions that get a [`Transaction`] never commit: the writer does, for many jobs at a time.
//! Readers never write: their connections are read-only. Which way to use:
//!
//! | caller | method |
//! |---|---|
//! | a thread that waits for the commit | [`Store::write`] |
//! | a thread that continues meanwhile | [`Store::begin_write`] |
//! | the purge, which yields to payments | [`Store::write_in_background`] |
//! | the HTTP thread, which never waits | [`Store::submit`], [`Store::query`] |
//! | a thread that waits for a read | [`Store::read`] |
//! | a command, also while payrelay is running | [`OfflineStore`] |

pub mod action_watch;
pub mod arrival;
pub mod audit;
pub mod backlog;
mod backpressure;
pub mod backup;
pub mod channel_action;
pub mod channel_sink;
pub mod consume_batch;
pub mod dead_letter;
pub mod dead_letter_action;
pub mod delivery;
mod engine;
mod error;
pub mod gauges;
mod id_runs;
pub mod idempotency;
pub mod local_socket;
pub mod node_role;
mod offline;
pub mod operation;
pub mod outbox;
pub mod outbox_view;
pub mod payment;
pub mod payment_view;
pub mod publication;
#[cfg(test)]
mod query_plans;
pub mod rebuild;
pub mod relay_action;
pub mod restore;
pub mod route;
mod row;
mod stored_text;
pub mod takings;
pub mod timeline;
pub mod topic;
pub mod trace;
pub mod unconsumed;
pub mod unseen;
pub mod waiting;

use self::backpressure::Backpressure;
use self::engine::corruption::CorruptionFlag;
use self::engine::disk_space::DiskAdmission;
use self::engine::transaction_clock::TransactionClock;
use self::engine::{
    Pool, checkpointer, disk_space, files, lock, open, open_error, readers, writer,
};
use self::idempotency::IdempotencyClock;
use crate::config;
use crate::domain::node_id::NodeId;
use crate::domain::timestamp::Timestamp;
use crate::runtime::health::{Health, HealthHandle};
use crate::runtime::metrics::Metrics;
use crate::runtime::worker::{Worker, WorkerGroup};
use crossbeam_channel::{Receiver, Sender, bounded};
pub use engine::disk_space::FileSizes;
pub use engine::open_error::OpenError;
pub use error::StoreError;
pub use offline::OfflineStore;
pub use rusqlite::{Connection, Result as SqlResult, Transaction};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// A handle to the open database; cloning it is cheap.
#[derive(Clone)]
pub struct Store {
    jobs: Sender<writer::BoxedWriterJob>,
    background: Sender<writer::BoxedWriterJob>,
    queries: Sender<readers::Query>,
    pool: Pool,
    node: NodeId,
    health: HealthHandle,
    clock: TransactionClock,
    damage: CorruptionFlag,
    admission: DiskAdmission,
    queue: Backpressure,
    path: Arc<Path>,
    service_time: IdempotencyClock,
    metrics: Metrics,
}

/// A write in progress.
#[derive(Debug)]
pub struct PendingWrite<T>(Receiver<Result<T, StoreError>>);

impl<T> PendingWrite<T> {
    /// Waits until it is committed to the disk, or has failed.
    pub fn wait(self) -> Result<T, StoreError> {
        self.0.recv().unwrap_or(Err(StoreError::Closed))
    }
}

/// An open database whose threads are not started yet.
pub struct StoppedStore {
    store: Store,
    writer: writer::Writer,
    checkpointer: checkpointer::Checkpointer,
    monitor: disk_space::DiskMonitor,
    readers: readers::Readers,
}

/// How long a thread waits after a database error before it tries again.
pub const DATABASE_RETRY_DELAY: Duration = Duration::from_secs(5);

/// Threads that read, in addition to the readers: the relay, the sampler, and the notifiers, one at
/// a time.
const OTHER_READERS: u32 = 3;

impl Store {
    /// Locks and opens the file, creates its schema, and checks or creates the node's id.
    pub fn open(
        settings: &config::Database,
        node: Option<&NodeId>,
    ) -> Result<StoppedStore, OpenError> {
        let path = files::resolve_database_file(&settings.path)?;
        let lock = lock::lock_database(&path)?;
        let (connection, node) = open::open_database(&path, node)?;
        let readers = u32::try_from(settings.readers.get()).unwrap_or(u32::MAX);
        let pool = readers::open_reader_pool(path.clone(), readers.saturating_add(OTHER_READERS))?;
        let service_time = IdempotencyClock::resume(&connection)
            .map_err(|source| open_error::open_error(&path, source))?;
        let (jobs, queue) = bounded(settings.queue_max.get());
        let (background, background_queue) = bounded(1);
        let (queries, query_queue) = bounded(settings.queue_max.get());
        let health = HealthHandle::up();
        let metrics = Metrics::default();
        let damage = CorruptionFlag::none();
        let clock = TransactionClock::stopped();
        let (checkpoints, checkpointer) = checkpointer::replace_autocheckpoint(&connection, &path)?;
        let writer = writer::Writer::new(writer::WriterOptions {
            connection,
            checkpoints,
            jobs: queue,
            background: background_queue,
            health: writer::WriterHealth::new(health.clone(), damage.clone()),
            clock: clock.clone(),
            metrics: metrics.clone(),
            lock,
        });
        let readers =
            readers::Readers::new(settings.readers, query_queue, pool.clone(), metrics.clone());
        let (monitor, admission) =
            disk_space::DiskMonitor::new(&path, settings.min_free_bytes, damage.clone());
        let store = Self {
            jobs,
            background,
            queries,
            pool,
            node,
            health,
            clock,
            damage,
            admission,
            queue: Backpressure::new(settings.queue_max.get()),
            path: path.into(),
            service_time,
            metrics,
        };
        Ok(StoppedStore {
            store,
            writer,
            checkpointer,
            monitor,
            readers,
        })
    }

    /// The node that this database belongs to.
    pub fn node(&self) -> &NodeId {
        &self.node
    }

    /// The metrics of the process, which the threads of the store count in.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// The payments that wait for the writer.
    pub fn queued_payments(&self) -> usize {
        self.queue.waiting()
    }

    /// The reads that wait for a reader.
    pub fn queued_reads(&self) -> usize {
        self.queries.len()
    }

    /// The absolute path of the file, after all links.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How long this database has been served, independent of the system clock.
    pub fn service_time(&self) -> Duration {
        self.service_time.now()
    }

    /// Whether the file is sound, the last transaction was committed, and the present one ends.
    pub fn database_state(&self) -> Health {
        let damage = self.damage.state();
        if damage.is_failing() {
            damage
        } else {
            let stall = self.clock.stall(Timestamp::now());
            stall.unwrap_or_else(|| self.health.get())
        }
    }

    /// Whether the disk has enough space for payments.
    pub fn disk_state(&self) -> Health {
        self.admission.state()
    }

    /// After a failure, lets the writer commit a transaction that changes nothing, to see whether
    /// it can. Never waits.
    pub fn probe(&self) {
        // A full queue of jobs probes as well. A full disk is watched elsewhere.
        if !self.health.get().is_failing() {
            return;
        }
        let _ = self.submit(1, writer::write_writer_probe, drop);
    }

    /// Runs `work` in a transaction, and waits until it is committed to the disk. If `work` fails,
    /// its changes are rolled back. It may run twice, when another job of the transaction has
    /// failed; the first run is rolled back then.
    pub fn write<T: Send + 'static>(
        &self,
        work: impl Fn(&Transaction<'_>) -> SqlResult<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.begin_write(work)?.wait()
    }

    /// As [`Store::write`], but waits only for a place in the queue.
    pub fn begin_write<T: Send + 'static>(
        &self,
        work: impl Fn(&Transaction<'_>) -> SqlResult<T> + Send + 'static,
    ) -> Result<PendingWrite<T>, StoreError> {
        enqueue_store_write(&self.jobs, work)
    }

    /// As [`Store::write`], but yields to every other waiting job.
    pub fn write_in_background<T: Send + 'static>(
        &self,
        work: impl Fn(&Transaction<'_>) -> SqlResult<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        enqueue_store_write(&self.background, work)?.wait()
    }

    /// As [`Store::write`], but never waits: the writer's thread passes the result to `done`, after
    /// the commit. The job counts as that many payments. When too many wait, the store is busy.
    pub fn submit<T: Send + 'static>(
        &self,
        payments: usize,
        work: impl Fn(&Transaction<'_>) -> SqlResult<T> + Send + 'static,
        done: impl FnOnce(Result<T, StoreError>) + Send + 'static,
    ) -> Result<(), StoreError> {
        let slot = self.queue.try_acquire(payments)?;
        let done = move |result| {
            drop(slot);
            done(result);
        };
        self.jobs
            .try_send(writer::writer_job(work, done))
            .map_err(|error| store_queue_error(&error))
    }

    /// Whether a payment can be accepted. Called before work is prepared, so that a refusal costs
    /// little.
    pub fn admit(&self) -> Result<(), StoreError> {
        self.damage.check()?;
        self.admission.check()?;
        if self.queue.has_capacity() {
            Ok(())
        } else {
            Err(StoreError::Busy)
        }
    }

    /// Runs `query` on a read-only connection, on the caller's thread. Refused once the file is
    /// known to be damaged: the caller could not save the outcome.
    pub fn read<T>(
        &self,
        query: impl FnOnce(&Connection) -> SqlResult<T>,
    ) -> Result<T, StoreError> {
        self.damage.check()?;
        let result = query(&*self.pool.get()?);
        Ok(result.inspect_err(|error| self.damage.observe(error))?)
    }

    /// Runs `query` on a reader's thread, which passes the result to `done`. Never waits. It also
    /// works on a damaged file, as far as that can be read.
    pub fn query<T: Send + 'static>(
        &self,
        query: impl FnOnce(&Connection) -> SqlResult<T> + Send + 'static,
        done: impl FnOnce(Result<T, StoreError>) + Send + 'static,
    ) -> Result<(), StoreError> {
        let damage = self.damage.clone();
        let job: readers::Query = Box::new(move |connection| {
            let (answer, failure) = match connection.map(query) {
                Ok(Ok(value)) => (Ok(value), None),
                Ok(Err(error)) => {
                    // Set the flag before replying, so that a client that saw the error cannot see
                    // a later payment accepted.
                    damage.observe(&error);
                    (Err(StoreError::from(&error)), Some(error))
                }
                Err(error) => (Err(error), None),
            };
            done(answer);
            failure
        });
        self.queries
            .try_send(job)
            .map_err(|error| store_queue_error(&error))
    }
}

fn enqueue_store_write<T: Send + 'static>(
    queue: &Sender<writer::BoxedWriterJob>,
    work: impl Fn(&Transaction<'_>) -> SqlResult<T> + Send + 'static,
) -> Result<PendingWrite<T>, StoreError> {
    let (answer, answered) = bounded(1);
    let job = writer::writer_job(work, move |result| drop(answer.send(result)));
    queue.send(job).map_err(|_| StoreError::Closed)?;
    Ok(PendingWrite(answered))
}

fn store_queue_error<T>(error: &crossbeam_channel::TrySendError<T>) -> StoreError {
    match error {
        crossbeam_channel::TrySendError::Full(_) => StoreError::Busy,
        crossbeam_channel::TrySendError::Disconnected(_) => StoreError::Closed,
    }
}

impl StoppedStore {
    /// Starts the threads, and returns them in the order in which they are to be stopped.
    pub fn start(self, group: &WorkerGroup) -> io::Result<(Store, Vec<Worker>)> {
        let mut workers = self.readers.spawn(group)?;
        let metrics = self.store.metrics.clone();
        workers.push(Worker::spawn("disk", group, |stop| {
            self.monitor.run(&stop);
        })?);
        workers.push(Worker::spawn("checkpointer", group, move |stop| {
            self.checkpointer.run(&metrics, &stop);
        })?);
        workers.push(Worker::spawn("writer", group, |stop| {
            self.writer.run(&stop);
        })?);
        Ok((self.store, workers))
    }
}

/// Whether the database answers.
pub fn ping_store(connection: &Connection) -> SqlResult<()> {
    connection.query_row("SELECT 1", [], |_| Ok(()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam_channel::unbounded;
    use rusqlite::ffi::{Error as Failure, SQLITE_CORRUPT};
    use std::num::NonZeroUsize;
    use std::path::PathBuf;
    use std::time::Instant;

    fn store_settings(path: PathBuf, queue_max: usize) -> config::Database {
        let size = |number| NonZeroUsize::new(number).unwrap();
        config::Database {
            path,
            queue_max: size(queue_max),
            readers: size(1),
            min_free_bytes: 0,
        }
    }

    #[test]
    fn the_queue_of_the_store_is_bounded_in_payments() {
        let dir = tempfile::tempdir().unwrap();
        let opened = Store::open(&store_settings(dir.path().join("a.db"), 4), None).unwrap();
        let store = opened.store.clone();
        let (answer, answered) = unbounded();
        let submit = |payments| {
            let answer = answer.clone();
            store.submit(
                payments,
                |_| Ok(()),
                move |result| answer.send(result).unwrap(),
            )
        };
        submit(3).unwrap();
        submit(1000).unwrap();
        assert!(
            matches!(submit(1), Err(StoreError::Busy))
                && matches!(store.admit(), Err(StoreError::Busy))
        );
        let (started, workers) = opened.start(&WorkerGroup::default()).unwrap();
        answered.recv().unwrap().unwrap();
        answered.recv().unwrap().unwrap();
        submit(1).unwrap();
        answered.recv().unwrap().unwrap();
        drop((store, started));
        for worker in workers {
            worker
                .stop(Instant::now() + Duration::from_secs(10))
                .unwrap();
        }
    }

    #[test]
    fn corruption_found_by_a_read_of_the_store_is_known_before_the_reply() {
        let dir = tempfile::tempdir().unwrap();
        let (store, workers) = Store::open(&store_settings(dir.path().join("a.db"), 4), None)
            .unwrap()
            .start(&WorkerGroup::default())
            .unwrap();
        let (answer, answered) = unbounded();
        let other = store.clone();
        let damaged = |_: &Connection| {
            Err::<(), _>(rusqlite::Error::SqliteFailure(
                Failure::new(SQLITE_CORRUPT),
                None,
            ))
        };
        store
            .query(damaged, move |read| {
                answer.send((read, other.admit())).unwrap();
            })
            .unwrap();
        let answer = answered.recv().unwrap();
        assert!(
            matches!(answer, (Err(StoreError::Damaged), Err(StoreError::Damaged))),
            "{answer:?}"
        );
        drop(store);
        for worker in workers {
            worker
                .stop(Instant::now() + Duration::from_secs(10))
                .unwrap();
        }
    }

    #[test]
    fn stopping_the_store_runs_all_waiting_jobs_and_leaves_one_whole_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let group = WorkerGroup::default();
        let (store, workers) = Store::open(&store_settings(path, 2), None)
            .unwrap()
            .start(&group)
            .unwrap();
        let (answer, answered) = unbounded();
        store
            .submit(
                1,
                |tx| tx.execute("DELETE FROM node", []),
                move |result| answer.send(result).unwrap(),
            )
            .unwrap();
        store
            .read(|connection| connection.query_row("SELECT count(*) FROM payment", [], |_| Ok(())))
            .unwrap();
        drop(store);
        for worker in workers {
            worker
                .stop(Instant::now() + Duration::from_secs(10))
                .unwrap();
        }
        assert_eq!(answered.try_recv().unwrap().unwrap(), 1);
        assert!(
            !dir.path().join("a.db-wal").exists(),
            "the WAL was not checkpointed into the file"
        );
    }
}
