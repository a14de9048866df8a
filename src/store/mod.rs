//! The one place that knows SQL: opening the file, the writer, the readers, and a module for each
//! table's verbs.
//!
//! [`Store::write`] is the one way to write. Functions that take a [`Transaction`] never commit;
//! the writer does, for many jobs at a time. Readers never write: their connections are opened
//! read-only.

pub mod arrival;
pub mod audit;
pub mod backlog;
pub mod backup;
pub mod channel;
pub mod dead_letter;
pub mod delivery;
mod engine;
mod error;
pub mod idempotency;
pub mod outbox;
pub mod payment;
pub mod publication;
#[cfg(test)]
mod query_plans;
pub mod relay_action;
pub mod replay;
pub mod restore;
pub mod route;
mod row;
pub mod timeline;
pub mod topic;
pub mod unconsumed;
pub mod visibility;
pub mod waiting;

use self::engine::corruption::CorruptionFlag;
use self::engine::disk_space::Admission;
use self::engine::{
    Pool, checkpointer, disk_space, files, lock, open, open_error, readers, writer,
};
use self::idempotency::ServiceTime;
use crate::config;
use crate::domain::event::NodeId;
use crate::runtime::health::{Health, HealthHandle};
use crate::runtime::worker::Worker;
use crossbeam_channel::{Receiver, Sender, bounded};
pub use engine::open_error::OpenError;
pub use error::StoreError;
use rusqlite::TransactionBehavior;
pub use rusqlite::{Connection, Result as SqlResult, Transaction};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// A handle to the open database; cloning it is cheap.
#[derive(Clone)]
pub struct Store {
    jobs: Sender<writer::Job>,
    background: Sender<writer::Job>,
    queries: Sender<readers::Query>,
    pool: Pool,
    node: NodeId,
    part: HealthHandle,
    damage: CorruptionFlag,
    admission: Admission,
    queue: Backpressure,
    path: Arc<Path>,
    service_time: ServiceTime,
}

/// How many payments wait: jobs are of very different size, so their number alone bounds neither
/// time nor memory.
#[derive(Clone)]
struct Backpressure {
    waiting: Arc<AtomicUsize>,
    max: usize,
}

/// What a job takes of the queue until it is answered.
struct QueueSlot {
    queue: Backpressure,
    payments: usize,
}

impl Backpressure {
    fn new(max: usize) -> Self {
        Self {
            waiting: Arc::default(),
            max,
        }
    }

    /// While fewer than may wait do, one more job is taken, however large: none is so large that it
    /// never is.
    fn take(&self, payments: usize) -> Result<QueueSlot, StoreError> {
        let add = |waiting| (waiting < self.max).then_some(waiting + payments);
        let taken = self
            .waiting
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
        taken
            .map(|_| QueueSlot {
                queue: self.clone(),
                payments,
            })
            .map_err(|_| StoreError::Busy)
    }
}

impl Drop for QueueSlot {
    fn drop(&mut self) {
        self.queue
            .waiting
            .fetch_sub(self.payments, Ordering::Relaxed);
    }
}

/// A write that is under way.
#[derive(Debug)]
pub struct PendingWrite<T>(Receiver<Result<T, StoreError>>);

impl<T> PendingWrite<T> {
    /// Waits until it is on the disk, or has failed.
    pub fn wait(self) -> Result<T, StoreError> {
        self.0.recv().unwrap_or(Err(StoreError::Closed))
    }
}

/// An opened database whose threads have yet to be started.
pub struct StoppedStore {
    store: Store,
    writer: writer::Writer,
    checkpointer: checkpointer::Checkpointer,
    watch: disk_space::DiskMonitor,
    readers: readers::Readers,
}

/// How long a thread waits before it asks a database again that has refused.
pub const DATABASE_RETRY_DELAY: Duration = Duration::from_secs(5);

/// For the threads besides the readers that read: relay, sampler, and the notifiers, which take
/// turns.
const OTHER_READERS: u32 = 3;

impl Store {
    /// Takes the lock, opens and migrates the file, makes or checks the node's id.
    pub fn open(
        settings: &config::Database,
        node: Option<&NodeId>,
    ) -> Result<StoppedStore, OpenError> {
        let path = files::resolve(&settings.path)?;
        let lock = lock::lock(&path)?;
        let (connection, node) = open::open(&path, node)?;
        let readers = u32::try_from(settings.readers.get()).unwrap_or(u32::MAX);
        let pool = readers::pool(path.clone(), readers.saturating_add(OTHER_READERS))?;
        let service_time = ServiceTime::resume(&connection)
            .map_err(|source| open_error::open_error(&path, source))?;
        let (jobs, queue) = bounded(settings.queue_max.get());
        let (background, background_queue) = bounded(1);
        let (queries, query_queue) = bounded(settings.queue_max.get());
        let part = HealthHandle::up();
        let damage = CorruptionFlag::none();
        let (checkpoints, checkpointer) = checkpointer::replace_autocheckpoint(&connection, &path)?;
        let writer = writer::Writer::new(writer::WriterOptions {
            connection,
            checkpoints,
            jobs: queue,
            background: background_queue,
            health: writer::WriterHealth::new(part.clone(), damage.clone()),
            lock,
        });
        let readers = readers::Readers::new(settings.readers, query_queue, pool.clone());
        let (watch, admission) =
            disk_space::DiskMonitor::new(&path, settings.min_free_bytes, damage.clone());
        let store = Self {
            jobs,
            background,
            queries,
            pool,
            node,
            part,
            damage,
            admission,
            queue: Backpressure::new(settings.queue_max.get()),
            path: path.into(),
            service_time,
        };
        Ok(StoppedStore {
            store,
            writer,
            checkpointer,
            watch,
            readers,
        })
    }

    /// Who this database belongs to.
    pub fn node(&self) -> &NodeId {
        &self.node
    }

    /// The file, absolute and behind all links.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// For how long this database has been served, by no clock that can be set.
    pub fn service_time(&self) -> Duration {
        self.service_time.now()
    }

    /// The database: whether the file is sound, and the last transaction was committed.
    pub fn database_state(&self) -> Health {
        let damage = self.damage.state();
        if damage.is_failing() {
            damage
        } else {
            self.part.get()
        }
    }

    /// Whether the disk has enough space for payments.
    pub fn disk_state(&self) -> Health {
        self.admission.state()
    }

    /// After a failure, has the writer commit something that changes nothing, to see whether it
    /// can. Never waits.
    pub fn probe(&self) {
        // A queue that is full of work is a probe as well; a disk without room is asked elsewhere.
        if !self.part.get().is_failing() {
            return;
        }
        let _ = self.submit(1, write_probe, drop);
    }

    /// Runs `work` in a transaction and waits until it is on the disk. If `work` fails, nothing of
    /// it is kept. It may be run twice, when a job of the same transaction has failed; what the
    /// first run did was rolled back then.
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
        enqueue(&self.jobs, work)
    }

    /// As [`Store::write`], but gives way to every other job that waits.
    pub fn write_in_background<T: Send + 'static>(
        &self,
        work: impl Fn(&Transaction<'_>) -> SqlResult<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        enqueue(&self.background, work)?.wait()
    }

    /// As [`Store::write`], but never waits: the writer's thread hands the result to `done`, after
    /// the commit. The job counts as the payments that it is said to write; when as many wait as
    /// may, the store is busy.
    pub fn submit<T: Send + 'static>(
        &self,
        payments: usize,
        work: impl Fn(&Transaction<'_>) -> SqlResult<T> + Send + 'static,
        done: impl FnOnce(Result<T, StoreError>) + Send + 'static,
    ) -> Result<(), StoreError> {
        let place = self.queue.take(payments)?;
        let done = move |result| {
            drop(place);
            done(result);
        };
        self.jobs
            .try_send(writer::job(work, done))
            .map_err(|error| refused(&error))
    }

    /// Whether a payment may come. Asked before work is prepared, so that a refusal costs little.
    pub fn admit(&self) -> Result<(), StoreError> {
        self.damage.check()?;
        self.admission.check()?;
        if self.queue.waiting.load(Ordering::Relaxed) < self.queue.max {
            Ok(())
        } else {
            Err(StoreError::Busy)
        }
    }

    /// Runs `query` on a read-only connection, on the caller's thread. It is refused once the file
    /// is known to be damaged: what came of the answer could not be recorded.
    pub fn read<T>(
        &self,
        query: impl FnOnce(&Connection) -> SqlResult<T>,
    ) -> Result<T, StoreError> {
        self.damage.check()?;
        let result = query(&*self.pool.get()?);
        Ok(result.inspect_err(|error| self.damage.observe(error))?)
    }

    /// Runs `query` on a reader's thread, which hands the result to `done`. Never waits. What a
    /// damaged file still has can be looked up.
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
                    // Before the answer: who has read it must not find payments taken after that.
                    damage.observe(&error);
                    (Err(StoreError::from(&error)), Some(error))
                }
                Err(error) => (Err(error), None),
            };
            done(answer);
            failure
        });
        self.queries.try_send(job).map_err(|error| refused(&error))
    }
}

/// The database of a payrelay that may be running, for a command beside it.
pub struct OfflineStore {
    connection: Connection,
    node: NodeId,
}

impl OfflineStore {
    /// Opens what is there.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let (connection, node) = open::open_existing(&files::resolve(path)?)?;
        Ok(Self { connection, node })
    }

    /// Who the database belongs to.
    pub fn node(&self) -> &NodeId {
        &self.node
    }

    /// Runs `query`.
    pub fn read<T>(
        &self,
        query: impl FnOnce(&Connection) -> SqlResult<T>,
    ) -> Result<T, StoreError> {
        Ok(query(&self.connection)?)
    }

    /// Runs `work` in a transaction of its own. The writer of a running payrelay waits for it: it
    /// is to be short.
    pub fn write<T>(
        &mut self,
        work: impl FnOnce(&Transaction<'_>) -> SqlResult<T>,
    ) -> Result<T, StoreError> {
        let tx = Transaction::new(&mut self.connection, TransactionBehavior::Immediate)?;
        let value = work(&tx)?;
        tx.commit()?;
        Ok(value)
    }
}

/// Writes a page, and changes nothing. There and back: SQLite does not write what is there already.
fn write_probe(tx: &Transaction<'_>) -> SqlResult<()> {
    tx.execute_batch(
        "UPDATE node SET created_at = created_at + 1; UPDATE node SET created_at = created_at - 1",
    )
}

fn enqueue<T: Send + 'static>(
    queue: &Sender<writer::Job>,
    work: impl Fn(&Transaction<'_>) -> SqlResult<T> + Send + 'static,
) -> Result<PendingWrite<T>, StoreError> {
    let (answer, answered) = bounded(1);
    let job = writer::job(work, move |result| drop(answer.send(result)));
    queue.send(job).map_err(|_| StoreError::Closed)?;
    Ok(PendingWrite(answered))
}

fn refused<T>(error: &crossbeam_channel::TrySendError<T>) -> StoreError {
    match error {
        crossbeam_channel::TrySendError::Full(_) => StoreError::Busy,
        crossbeam_channel::TrySendError::Disconnected(_) => StoreError::Closed,
    }
}

impl StoppedStore {
    /// Starts the writer, the checkpointer and the readers. They are returned in the order in which
    /// they are to be stopped.
    pub fn start(self, exits: &Sender<&'static str>) -> io::Result<(Store, Vec<Worker>)> {
        let mut workers = self.readers.spawn(exits)?;
        workers.push(Worker::spawn("disk", exits, |stop| self.watch.run(&stop))?);
        workers.push(Worker::spawn("checkpointer", exits, |stop| {
            self.checkpointer.run(&stop);
        })?);
        workers.push(Worker::spawn("writer", exits, |stop| {
            self.writer.run(&stop);
        })?);
        Ok((self.store, workers))
    }
}

/// Whether the database answers at all.
pub fn ping(connection: &Connection) -> SqlResult<()> {
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

    fn settings(path: PathBuf, queue_max: usize) -> config::Database {
        let size = |number| NonZeroUsize::new(number).unwrap();
        config::Database {
            path,
            queue_max: size(queue_max),
            readers: size(1),
            min_free_bytes: 0,
        }
    }

    #[test]
    fn what_waits_is_counted_in_payments() {
        let dir = tempfile::tempdir().unwrap();
        let opened = Store::open(&settings(dir.path().join("a.db"), 4), None).unwrap();
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
        let (started, workers) = opened.start(&unbounded().0).unwrap();
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
    fn damage_that_a_read_meets_is_known_before_the_read_is_answered() {
        let dir = tempfile::tempdir().unwrap();
        let (store, workers) = Store::open(&settings(dir.path().join("a.db"), 4), None)
            .unwrap()
            .start(&unbounded().0)
            .unwrap();
        let (answer, answered) = unbounded();
        let beside = store.clone();
        let damaged = |_: &Connection| {
            Err::<(), _>(rusqlite::Error::SqliteFailure(
                Failure::new(SQLITE_CORRUPT),
                None,
            ))
        };
        store
            .query(damaged, move |read| {
                answer.send((read, beside.admit())).unwrap();
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
    fn a_stop_works_off_what_waits_and_leaves_one_whole_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let (exits, _exited) = unbounded();
        let (store, workers) = Store::open(&settings(path, 2), None)
            .unwrap()
            .start(&exits)
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
            "the log was not folded into the file"
        );
    }
}
