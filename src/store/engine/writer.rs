//! The one thread that writes: many jobs, one transaction, one fsync.
//!
//! It receives a job, then every other waiting job, runs them all in one transaction, commits, and
//! only then replies. A job that fails does not affect the others: the transaction is rolled back
//! and run again, each job in a savepoint of its own. That is rare. A savepoint for each job from
//! the start would copy every page that the job changes (measured: a fifth of the writer's time). A
//! commit that fails fails every job of the transaction: none has got its reply before.

use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, at, never, select_biased, tick};
use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, Transaction, TransactionBehavior};

use super::abort;
use super::checkpointer::CheckpointControl;
use super::corruption::CorruptionFlag;
use super::lock::DatabaseLock;
use super::transaction_clock::TransactionClock;
use crate::domain::timestamp::Timestamp;
use crate::runtime::health::HealthHandle;
use crate::runtime::metrics::Metrics;
use crate::runtime::worker::{HEARTBEAT_INTERVAL, Stop};
use crate::store::error::StoreError;

/// A transaction includes the jobs that wait when it starts, and at least this many. It does not
/// continue while jobs arrive: those form the next transaction, and are prepared while this one is
/// synced.
const BATCH_MIN: usize = 32;

/// The maximum number of jobs of one commit.
const BATCH_MAX: usize = 512;

/// After a background job the next one waits for this many times the duration of that job: payments
/// have three quarters of the writer's time.
const BACKGROUND_PAUSE_FACTOR: u32 = 3;

/// A transaction that has run this long includes no further jobs. Jobs differ in size, and the
/// first one should not wait long for the last. The tests below choose the jobs of a transaction
/// themselves.
const BATCH_TIME: Duration = if cfg!(test) {
    Duration::from_mins(1)
} else {
    Duration::from_millis(4)
};

/// A job for the writer, and its reply.
pub(in crate::store) trait WriterJob: Send {
    fn run(&mut self, tx: &Transaction<'_>) -> rusqlite::Result<()>;
    fn finish(self: Box<Self>, committed: Result<(), StoreError>);
}

pub(in crate::store) type BoxedWriterJob = Box<dyn WriterJob>;

/// A job of two closures: one runs in the transaction, perhaps twice; the other receives the result
/// after the commit.
pub(in crate::store) fn writer_job<T: Send + 'static>(
    work: impl Fn(&Transaction<'_>) -> rusqlite::Result<T> + Send + 'static,
    done: impl FnOnce(Result<T, StoreError>) + Send + 'static,
) -> BoxedWriterJob {
    Box::new(WriterTask {
        work,
        value: None,
        done,
    })
}

struct WriterTask<W, T, D> {
    work: W,
    value: Option<T>,
    done: D,
}

impl<W, T, D> WriterJob for WriterTask<W, T, D>
where
    W: Fn(&Transaction<'_>) -> rusqlite::Result<T> + Send,
    T: Send,
    D: FnOnce(Result<T, StoreError>) + Send,
{
    fn run(&mut self, tx: &Transaction<'_>) -> rusqlite::Result<()> {
        self.value = None;
        self.value = Some((self.work)(tx)?);
        Ok(())
    }

    fn finish(self: Box<Self>, committed: Result<(), StoreError>) {
        let Self { value, done, .. } = *self;
        done(committed.and_then(|()| value.ok_or(StoreError::Closed)));
    }
}

/// The writer's side of the store.
pub(in crate::store) struct Writer {
    connection: Connection,
    checkpoints: CheckpointControl,
    jobs: Receiver<BoxedWriterJob>,
    background: Receiver<BoxedWriterJob>,
    /// When the next background job may run.
    background_due: Instant,
    /// When the background job began that runs in a transaction of its own.
    background_began: Option<Instant>,
    health: WriterHealth,
    clock: TransactionClock,
    metrics: Metrics,
    /// Turns the loop while nothing is to be written.
    heartbeat: Receiver<Instant>,
    _lock: DatabaseLock,
}

/// The writer's health, for the health page. It also logs a line when commits begin to fail. It
/// logs another when they work again, with the number of refused jobs.
pub(in crate::store) struct WriterHealth {
    part: HealthHandle,
    damage: CorruptionFlag,
    failing_since: Option<Instant>,
    transactions: u64,
    jobs: u64,
}

impl WriterHealth {
    pub(in crate::store) fn new(part: HealthHandle, damage: CorruptionFlag) -> Self {
        Self {
            part,
            damage,
            failing_since: None,
            transactions: 0,
            jobs: 0,
        }
    }

    fn failed(&mut self, error: &rusqlite::Error, jobs: usize) {
        // Corruption has its own line.
        self.damage.observe(error);
        self.part.fail(error.to_string());
        self.transactions += 1;
        self.jobs += jobs as u64;
        if self.failing_since.is_none() && !self.damage.is_set() {
            self.failing_since = Some(Instant::now());
            log::error!(
                event = "writer_failing", jobs = jobs;
                "writer: database error: {error}; {jobs} jobs were not stored, and later ones are \
                    tried until it works again"
            );
        }
    }

    fn recovered(&mut self) {
        if let Some(since) = self.failing_since.take() {
            let seconds = since.elapsed().as_secs_f64();
            let transactions = std::mem::take(&mut self.transactions);
            let jobs = std::mem::take(&mut self.jobs);
            self.part.recover();
            log::info!(
                event = "writer_works_again", seconds = seconds, transactions = transactions,
                jobs = jobs;
                "writer: the database works again after {seconds:.1} s; {transactions} \
                    transactions with {jobs} jobs were not stored"
            );
        }
    }
}

/// All that a writer needs.
pub(in crate::store) struct WriterOptions {
    pub connection: Connection,
    pub checkpoints: CheckpointControl,
    pub jobs: Receiver<BoxedWriterJob>,
    /// Jobs that yield to all others.
    pub background: Receiver<BoxedWriterJob>,
    pub health: WriterHealth,
    /// Runs while a transaction does.
    pub clock: TransactionClock,
    pub metrics: Metrics,
    /// Held until the writer has closed the database.
    pub lock: DatabaseLock,
}

impl Writer {
    pub(in crate::store) fn new(options: WriterOptions) -> Self {
        Self {
            connection: options.connection,
            checkpoints: options.checkpoints,
            jobs: options.jobs,
            background: options.background,
            background_due: Instant::now(),
            background_began: None,
            health: options.health,
            clock: options.clock,
            metrics: options.metrics,
            heartbeat: tick(HEARTBEAT_INTERVAL),
            _lock: options.lock,
        }
    }

    /// Runs until a stop is requested, then runs the waiting jobs, then closes the database.
    pub(in crate::store) fn run(mut self, stop: &Stop) {
        while let Some(first) = self.next_job(stop) {
            self.run_transaction(first);
        }
        while let Ok(first) = self.jobs.try_recv() {
            self.run_transaction(first);
        }
        if self.health.damage.is_set() {
            // The WAL stays as it is, separate from the damaged file, for the repair.
            let _ = self
                .connection
                .set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true);
        }
        if let Err((_, error)) = self.connection.close() {
            log::error!(event = "close_failed"; "the database did not close: {error}");
        }
    }

    /// A background job begins a transaction when no other waits. `None`: stop.
    fn next_job(&mut self, stop: &Stop) -> Option<BoxedWriterJob> {
        let job = loop {
            stop.beat();
            let (background, due) = if Instant::now() < self.background_due {
                (never(), at(self.background_due))
            } else {
                (self.background.clone(), never())
            };
            select_biased! {
                recv(stop.signal()) -> _ => break None,
                recv(self.jobs) -> job => break job.ok(),
                recv(background) -> job => {
                    self.background_began = Some(Instant::now());
                    break job.ok();
                }
                recv(due) -> _ => {}
                recv(self.heartbeat) -> _ => {}
            }
        };
        if job.is_none() {
            // Without a handle there are no more jobs. The last connection to close checkpoints the
            // WAL, and that has to be this one: it waits until the readers are gone.
            let _ = stop.signal().recv();
        }
        job
    }

    /// One transaction, from its first job to the replies.
    fn run_transaction(&mut self, first: BoxedWriterJob) {
        self.clock.start(Timestamp::now());
        match self.health.damage.check() {
            Ok(()) => self.run_with_waiting_jobs(first),
            Err(error) => first.finish(Err(error)),
        }
        self.clock.stop();
        // Also after an error: what follows an outage does not pause for as long as it lasted.
        if let Some(began) = self.background_began.take() {
            self.background_due = background_due_after(began);
        }
    }

    fn run_with_waiting_jobs(&mut self, first: BoxedWriterJob) {
        let mut jobs = Vec::with_capacity(64);
        jobs.push(first);
        let started = Instant::now();
        match abort::abort_on_failed_sync(self.commit(&mut jobs)) {
            Ok(outcomes) => {
                if self.checkpoints.has_committed() {
                    self.health.recovered();
                    self.count_commit(jobs.len(), started.elapsed());
                }
                for (job, outcome) in jobs.into_iter().zip(outcomes) {
                    job.finish(outcome);
                }
                if let Err(error) = self.checkpoints.step(&self.connection) {
                    self.metrics.store().failed(StoreError::kind(&error));
                    self.health.damage.observe(&error);
                    log::warn!(
                        event = "checkpoint_failed";
                        "the WAL checkpoint failed, the next round will try again: {error}"
                    );
                }
            }
            Err(error) => {
                if error.sqlite_error_code() == Some(ErrorCode::DatabaseBusy) {
                    // Other waiting jobs would only wait for the same lock, one after the other.
                    jobs.extend(self.jobs.try_iter());
                }
                self.metrics.store().failed(StoreError::kind(&error));
                self.health.failed(&error, jobs.len());
                let error = StoreError::from(error);
                for job in jobs {
                    job.finish(Err(error.clone()));
                }
            }
        }
    }

    fn count_commit(&self, jobs: usize, duration: Duration) {
        let metrics = self.metrics.store();
        metrics.commit_duration.observe(duration);
        metrics.commit_size.observe_size(jobs);
        metrics.wal_pages.set(self.checkpoints.wal_pages().into());
    }

    /// Replies to each job after the commit. An error is the transaction's: all of it is rolled
    /// back.
    fn commit(
        &mut self,
        jobs: &mut Vec<BoxedWriterJob>,
    ) -> rusqlite::Result<Vec<Result<(), StoreError>>> {
        let tx = Transaction::new(&mut self.connection, TransactionBehavior::Immediate)?;
        let mut is_filled = fill_writer_transaction(&tx, jobs, &self.jobs).is_ok();
        let began = Instant::now();
        let may_join = is_filled && self.background_began.is_none() && began >= self.background_due;
        // It shares the sync of this transaction.
        let joined = may_join.then(|| self.background.try_recv().ok()).flatten();
        if let Some(mut job) = joined {
            is_filled = job.run(&tx).is_ok() && !tx.is_autocommit();
            jobs.push(job);
            self.background_due = background_due_after(began);
        }
        if is_filled {
            abort::abort_on_ambiguous_commit(tx.commit())?;
            return Ok(jobs.iter().map(|_| Ok(())).collect());
        }
        // Dropping it rolls back.
        drop(tx);
        self.commit_one_by_one(jobs)
    }

    fn commit_one_by_one(
        &mut self,
        jobs: &mut [BoxedWriterJob],
    ) -> rusqlite::Result<Vec<Result<(), StoreError>>> {
        let tx = Transaction::new(&mut self.connection, TransactionBehavior::Immediate)?;
        let outcomes: rusqlite::Result<Vec<_>> = jobs
            .iter_mut()
            .map(|job| run_writer_job_in_savepoint(&tx, job))
            .collect();
        let outcomes = outcomes?;
        abort::abort_on_ambiguous_commit(tx.commit())?;
        let metrics = self.metrics.clone();
        let refused = |error: rusqlite::Error| {
            metrics.store().failed(StoreError::kind(&error));
            log::warn!(event = "job_failed"; "a job failed, and nothing of it was stored: {error}");
            StoreError::from(error)
        };
        Ok(outcomes
            .into_iter()
            .map(|outcome| outcome.map_err(refused))
            .collect())
    }
}

/// When the next background job may run, after one that began then.
fn background_due_after(began: Instant) -> Instant {
    Instant::now() + began.elapsed() * BACKGROUND_PAUSE_FACTOR
}

/// Runs the waiting jobs until the transaction is full. If a job failed, it is the last one.
fn fill_writer_transaction(
    tx: &Transaction<'_>,
    jobs: &mut Vec<BoxedWriterJob>,
    waiting: &Receiver<BoxedWriterJob>,
) -> rusqlite::Result<()> {
    let started = Instant::now();
    let mut next = 0;
    let limit = (1 + waiting.len()).clamp(BATCH_MIN, BATCH_MAX);
    while next < jobs.len() {
        jobs[next].run(tx)?;
        if tx.is_autocommit() {
            return Err(rusqlite::Error::ExecuteReturnedResults);
        }
        next += 1;
        if next < limit && started.elapsed() < BATCH_TIME {
            jobs.extend(waiting.try_recv());
        }
    }
    Ok(())
}

/// The inner result is the job's own. The outer one is the transaction's, which cannot continue in
/// three cases. SQLite may have ended it by itself, as on a full disk
/// (<https://sqlite.org/lang_transaction.html>, 3). The environment may fail. Or a savepoint may
/// fail, so that half a job might be committed.
fn run_writer_job_in_savepoint(
    tx: &Transaction<'_>,
    job: &mut BoxedWriterJob,
) -> rusqlite::Result<rusqlite::Result<()>> {
    let run = |sql| tx.prepare_cached(sql)?.execute(()).map(drop);
    run("SAVEPOINT job")?;
    let outcome = job.run(tx);
    if tx.is_autocommit() {
        return Err(outcome
            .err()
            .unwrap_or(rusqlite::Error::ExecuteReturnedResults));
    }
    match outcome {
        Err(error) if StoreError::is_environment_failure(&error) => return Err(error),
        Err(_) => run("ROLLBACK TO job")?,
        Ok(()) => {}
    }
    run("RELEASE job")?;
    Ok(outcome)
}

/// Writes a page, and changes nothing. It needs two updates, because SQLite does not write a page
/// that stays the same.
pub(in crate::store) fn write_writer_probe(tx: &Transaction<'_>) -> rusqlite::Result<()> {
    tx.execute_batch(
        "UPDATE node SET created_at = created_at + 1; UPDATE node SET created_at = created_at - 1",
    )
}

#[cfg(test)]
mod tests {
    use super::super::{checkpointer, lock, open};
    use super::*;
    use crossbeam_channel::{Sender, bounded, unbounded};

    struct WriterFixture {
        writer: Writer,
        jobs: Sender<BoxedWriterJob>,
        background: Sender<BoxedWriterJob>,
        part: HealthHandle,
        _dir: tempfile::TempDir,
    }

    fn writer_fixture() -> WriterFixture {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let lock = lock::lock_database(&path).unwrap();
        let (connection, _) = open::open_database(&path, None).unwrap();
        connection
            .execute_batch("CREATE TABLE t (x INTEGER UNIQUE)")
            .unwrap();
        let (jobs, queue) = bounded(64);
        let (background, background_queue) = bounded(1);
        let part = HealthHandle::up();
        let (checkpoints, _) = checkpointer::replace_autocheckpoint(&connection, &path).unwrap();
        let health = WriterHealth::new(part.clone(), CorruptionFlag::none());
        let writer = Writer::new(WriterOptions {
            connection,
            checkpoints,
            jobs: queue,
            background: background_queue,
            health,
            clock: TransactionClock::stopped(),
            metrics: Metrics::default(),
            lock,
        });
        WriterFixture {
            writer,
            jobs,
            background,
            part,
            _dir: dir,
        }
    }

    fn inserting_writer_job(
        x: i64,
        answers: &Sender<(i64, Result<usize, String>)>,
    ) -> BoxedWriterJob {
        let answers = answers.clone();
        writer_job(
            move |tx| {
                tx.execute("INSERT INTO t VALUES (?1 + 1000)", [x])?;
                tx.execute("INSERT INTO t VALUES (?1)", [x])
            },
            move |result| {
                answers
                    .send((x, result.map_err(|error| error.to_string())))
                    .unwrap();
            },
        )
    }

    fn rows_of_writer(writer: &Writer) -> Vec<i64> {
        let mut statement = writer
            .connection
            .prepare("SELECT x FROM t ORDER BY x")
            .unwrap();
        statement
            .query_map([], |row| row.get(0))
            .unwrap()
            .map(Result::unwrap)
            .collect()
    }

    #[test]
    fn the_writer_answers_all_jobs_of_a_commit_and_a_failure_stays_alone() {
        let mut f = writer_fixture();
        let (answers, answered) = unbounded();
        f.writer
            .connection
            .execute("INSERT INTO t VALUES (2)", [])
            .unwrap();
        for x in [2, 3] {
            f.jobs.send(inserting_writer_job(x, &answers)).unwrap();
        }
        f.writer.run_transaction(inserting_writer_job(1, &answers));
        let third = f.writer.jobs.try_recv().unwrap();
        f.writer.run_transaction(third);
        let results: Vec<_> = answered.try_iter().collect();
        assert_eq!((results[0].0, &results[0].1), (1, &Ok(1)));
        assert!(
            results[1].1.as_ref().unwrap_err().contains("UNIQUE"),
            "{results:?}"
        );
        assert_eq!((results[2].0, &results[2].1), (3, &Ok(1)));
        assert_eq!(
            rows_of_writer(&f.writer),
            [1, 2, 3, 1001, 1003],
            "the failed job left nothing"
        );
    }

    #[test]
    fn a_writer_transaction_that_sqlite_ends_fails_all_its_jobs_and_the_next_one_works() {
        let mut f = writer_fixture();
        let (answers, answered) = unbounded();
        let killer = writer_job(
            |tx| tx.execute_batch("ROLLBACK; SELECT no_such_function()"),
            |_: Result<(), _>| {},
        );
        f.jobs.send(killer).unwrap();
        f.jobs.send(inserting_writer_job(2, &answers)).unwrap();
        f.writer.run_transaction(inserting_writer_job(1, &answers));
        assert!(
            answered.try_recv().unwrap().1.is_err(),
            "job 1 was rolled back: its reply must not say stored"
        );
        assert_eq!(rows_of_writer(&f.writer), [0; 0]);
        assert!(f.part.get().is_failing());
        let second = f.writer.jobs.try_recv().unwrap();
        f.writer.run_transaction(second);
        assert_eq!(answered.try_recv().unwrap(), (2, Ok(1)));
        assert!(!f.part.get().is_failing());
    }

    #[test]
    fn a_background_job_that_fails_does_not_make_the_next_one_wait_for_the_whole_outage() {
        let f = writer_fixture();
        let (_stopper, stop) = Stop::new();
        let mut writer = f.writer;
        let killer = writer_job(
            |tx| tx.execute_batch("ROLLBACK; SELECT no_such_function()"),
            |_: Result<(), _>| {},
        );
        f.background.send(killer).unwrap();
        let first = writer.next_job(&stop).unwrap();
        writer.run_transaction(first);
        assert!(f.part.get().is_failing());
        assert_eq!(writer.background_began, None);
    }

    #[test]
    fn only_a_write_ends_an_outage_of_the_writer() {
        let mut f = writer_fixture();
        f.writer.run_transaction(writer_job(
            |tx| tx.execute_batch("ROLLBACK; SELECT no_such_function()"),
            |_: Result<(), _>| {},
        ));
        assert!(f.part.get().is_failing());
        let (answer, answered) = unbounded();
        let nothing = |tx: &Transaction<'_>| tx.execute("DELETE FROM t WHERE x = 1", []);
        f.writer.run_transaction(writer_job(nothing, move |result| {
            answer.send(result.unwrap()).unwrap();
        }));
        assert_eq!(answered.try_recv(), Ok(0));
        assert!(
            f.part.get().is_failing(),
            "a transaction that changed nothing proves nothing"
        );
        let made = |writer: &Writer| -> i64 {
            writer
                .connection
                .query_row("SELECT created_at FROM node", [], |row| row.get(0))
                .unwrap()
        };
        let before = made(&f.writer);
        f.writer
            .run_transaction(writer_job(write_writer_probe, |result| result.unwrap()));
        assert!(!f.part.get().is_failing(), "the probe writes");
        assert_eq!(made(&f.writer), before, "and changes nothing");
    }

    #[test]
    fn a_background_job_joins_a_transaction_of_the_writer_and_the_next_one_waits() {
        let f = writer_fixture();
        let (stopper, stop) = Stop::new();
        let (answers, answered) = unbounded();
        let mut writer = f.writer;
        let run = |writer: &mut Writer, background: Option<i64>, job: Option<i64>| {
            let send = |sender: &Sender<BoxedWriterJob>, number: Option<i64>| {
                if let Some(number) = number {
                    sender.send(inserting_writer_job(number, &answers)).unwrap();
                }
            };
            send(&f.background, background);
            send(&f.jobs, job);
            let first = writer.next_job(&stop).unwrap();
            writer.run_transaction(first);
            answered.try_iter().map(|(x, _)| x).collect::<Vec<_>>()
        };
        assert_eq!(run(&mut writer, Some(9), Some(1)), [1, 9]);
        writer.background_due = Instant::now() + Duration::from_hours(1);
        assert_eq!(run(&mut writer, Some(8), Some(2)), [2]);
        writer.background_due = Instant::now();
        assert_eq!(run(&mut writer, None, None), [8]);
        // A transaction that fails leaves the background job in its queue.
        writer.background_due = Instant::now();
        assert_eq!(run(&mut writer, Some(7), Some(1)), [1]);
        assert_eq!(run(&mut writer, None, None), [7]);
        drop(stopper);
        assert!(writer.next_job(&stop).is_none());
    }
}
