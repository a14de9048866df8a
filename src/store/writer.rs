//! The one thread that writes: many jobs, one transaction, one fsync.
//!
//! It takes a job, then whatever else waits, runs each in a savepoint of one transaction, commits, and only then
//! answers them all. A job that fails rolls back to its savepoint and takes nothing of the others with it. A commit
//! that fails fails every job of the transaction: none has been answered before.

use std::iter;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, select_biased};
use rusqlite::{Connection, Transaction, TransactionBehavior};

use super::StoreError;
use super::schema::Lock;
use crate::outage::{Backoff, Outage, Part};
use crate::worker::Stop;

/// At most so many jobs share a commit.
const BATCH_MAX: usize = 512;

/// A transaction that has run for so long takes no more jobs, so that the first of it does not wait for the last:
/// jobs are of very different size.
const BATCH_TIME: Duration = Duration::from_millis(4);

/// Nobody waits: jobs come when they come, and each tries anew.
const BACKOFF: Backoff = Backoff { base: Duration::ZERO, cap: Duration::ZERO };

/// Work for the writer, and who is to be told.
pub(super) trait Work: Send {
    fn run(&mut self, tx: &Transaction<'_>) -> rusqlite::Result<()>;
    fn finish(self: Box<Self>, committed: Result<(), StoreError>);
}

pub(super) type Job = Box<dyn Work>;

/// A job out of two closures: one runs in the transaction, one takes the result after the commit.
pub(super) fn job<T: Send + 'static>(
    work: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<T> + Send + 'static,
    done: impl FnOnce(Result<T, StoreError>) + Send + 'static,
) -> Job {
    Box::new(Task { work: Some(work), value: None, done })
}

struct Task<W, T, D> {
    work: Option<W>,
    value: Option<T>,
    done: D,
}

impl<W, T, D> Work for Task<W, T, D>
where
    W: FnOnce(&Transaction<'_>) -> rusqlite::Result<T> + Send,
    T: Send,
    D: FnOnce(Result<T, StoreError>) + Send,
{
    fn run(&mut self, tx: &Transaction<'_>) -> rusqlite::Result<()> {
        if let Some(work) = self.work.take() {
            self.value = Some(work(tx)?);
        }
        Ok(())
    }

    fn finish(self: Box<Self>, committed: Result<(), StoreError>) {
        let Self { value, done, .. } = *self;
        done(committed.and_then(|()| value.ok_or(StoreError::Closed)));
    }
}

/// The writer's side of the store.
pub(super) struct Writer {
    connection: Connection,
    jobs: Receiver<Job>,
    background: Receiver<Job>,
    outage: Outage,
    _lock: Lock,
}

impl Writer {
    pub(super) fn new(
        connection: Connection,
        jobs: Receiver<Job>,
        background: Receiver<Job>,
        part: Part,
        lock: Lock,
    ) -> Self {
        let outage = Outage::new("the database", BACKOFF, part);
        Self { connection, jobs, background, outage, _lock: lock }
    }

    /// Works until the stop, then works off what still waits, then closes the database.
    pub(super) fn run(mut self, stop: &Stop) {
        while let Some(first) = self.next(stop) {
            self.step(first);
        }
        while let Ok(first) = self.jobs.try_recv() {
            self.step(first);
        }
        if let Err((_, error)) = self.connection.close() {
            log::error!("the database did not close: {error}");
        }
    }

    /// Background jobs are taken only when no other waits. `None`: stop.
    fn next(&self, stop: &Stop) -> Option<Job> {
        let job = select_biased! {
            recv(stop.signal()) -> _ => None,
            recv(self.jobs) -> job => job.ok(),
            recv(self.background) -> job => job.ok(),
        };
        if job.is_none() {
            // Without a handle there is no more work. But the last connection to close folds the log into the file,
            // and that is to be this one: it waits until the readers are gone.
            let _ = stop.signal().recv();
        }
        job
    }

    /// One transaction, from its first job to the answers.
    fn step(&mut self, first: Job) {
        let mut taken = Vec::with_capacity(16);
        let committed = match Transaction::new(&mut self.connection, TransactionBehavior::Immediate) {
            Ok(tx) => fill(&tx, first, &self.jobs, &mut taken).and_then(|()| tx.commit()),
            Err(error) => {
                // Who waits now would only wait for the same refusal, one after the other.
                taken.extend(iter::once(first).chain(self.jobs.try_iter()).map(|job| (job, Ok(()))));
                Err(error)
            }
        };
        match committed {
            Ok(()) => {
                self.outage.recovered();
                for (job, outcome) in taken {
                    job.finish(outcome);
                }
            }
            Err(error) => {
                let _ = self.outage.failed(&error);
                log::error!("a transaction of {} jobs failed, none of them was stored: {error}", taken.len());
                let error = StoreError::from(error);
                for (job, outcome) in taken {
                    job.finish(outcome.and(Err(error.clone())));
                }
            }
        }
    }
}

type Taken = Vec<(Job, Result<(), StoreError>)>;

/// Runs jobs until none waits or the transaction is full. Fails if the transaction cannot go on: SQLite has ended it by
/// itself, as it does when the disk is full (<https://sqlite.org/lang_transaction.html>, 3), or a savepoint does not
/// obey, so that half a job might be committed with it.
fn fill(tx: &Transaction<'_>, first: Job, jobs: &Receiver<Job>, taken: &mut Taken) -> rusqlite::Result<()> {
    let started = Instant::now();
    let mut next = Some(first);
    while let Some(mut job) = next {
        match in_savepoint(tx, &mut job) {
            Ok(outcome) => taken.push((job, outcome.map_err(StoreError::from))),
            Err(error) => {
                taken.push((job, Ok(())));
                return Err(error);
            }
        }
        let room = taken.len() < BATCH_MAX && started.elapsed() < BATCH_TIME;
        next = if room { jobs.try_recv().ok() } else { None };
    }
    Ok(())
}

/// The inner result is the job's own; the outer one is the transaction's.
fn in_savepoint(tx: &Transaction<'_>, job: &mut Job) -> rusqlite::Result<rusqlite::Result<()>> {
    let run = |sql| tx.prepare_cached(sql)?.execute(()).map(drop);
    run("SAVEPOINT job")?;
    let outcome = job.run(tx);
    if tx.is_autocommit() {
        return Err(outcome.err().unwrap_or(rusqlite::Error::ExecuteReturnedResults));
    }
    if outcome.is_err() {
        run("ROLLBACK TO job")?;
    }
    run("RELEASE job")?;
    Ok(outcome)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::schema;
    use crossbeam_channel::{Sender, bounded, unbounded};

    struct Fixture {
        writer: Writer,
        jobs: Sender<Job>,
        background: Sender<Job>,
        part: Part,
        _dir: tempfile::TempDir,
    }

    fn fixture() -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let lock = schema::lock(&path).unwrap();
        let (connection, _) = schema::open(&path, None).unwrap();
        connection.execute_batch("CREATE TABLE t (x INTEGER UNIQUE)").unwrap();
        let (jobs, queue) = bounded(64);
        let (background, background_queue) = bounded(1);
        let part = Part::up();
        let writer = Writer::new(connection, queue, background_queue, part.clone(), lock);
        Fixture { writer, jobs, background, part, _dir: dir }
    }

    fn insert(x: i64, answers: &Sender<(i64, Result<usize, String>)>) -> Job {
        let answers = answers.clone();
        job(
            move |tx| {
                tx.execute("INSERT INTO t VALUES (?1 + 1000)", [x])?;
                tx.execute("INSERT INTO t VALUES (?1)", [x])
            },
            move |result| answers.send((x, result.map_err(|error| error.to_string()))).unwrap(),
        )
    }

    fn rows(writer: &Writer) -> Vec<i64> {
        let mut statement = writer.connection.prepare("SELECT x FROM t ORDER BY x").unwrap();
        statement.query_map([], |row| row.get(0)).unwrap().map(Result::unwrap).collect()
    }

    #[test]
    fn one_commit_answers_all_and_a_failure_stays_alone() {
        let mut f = fixture();
        let (answers, answered) = unbounded();
        f.writer.connection.execute("INSERT INTO t VALUES (2)", []).unwrap();
        for x in [2, 3] {
            f.jobs.send(insert(x, &answers)).unwrap();
        }
        f.writer.step(insert(1, &answers));
        let results: Vec<_> = answered.try_iter().collect();
        assert_eq!((results[0].0, &results[0].1), (1, &Ok(1)));
        assert!(results[1].1.as_ref().unwrap_err().contains("UNIQUE"), "{results:?}");
        assert_eq!((results[2].0, &results[2].1), (3, &Ok(1)));
        assert_eq!(rows(&f.writer), [1, 2, 3, 1001, 1003], "nothing of the failed job is left");
    }

    #[test]
    fn a_transaction_that_sqlite_ends_fails_all_its_jobs_and_the_next_one_works() {
        let mut f = fixture();
        let (answers, answered) = unbounded();
        let killer = job(|tx| tx.execute_batch("ROLLBACK; SELECT no_such_function()"), |_: Result<(), _>| {});
        f.jobs.send(killer).unwrap();
        f.jobs.send(insert(2, &answers)).unwrap();
        f.writer.step(insert(1, &answers));
        assert!(answered.try_recv().unwrap().1.is_err(), "job 1 was rolled back: it must not be told as stored");
        assert_eq!(rows(&f.writer), [0; 0]);
        assert!(f.part.get().is_away());
        let second = f.writer.jobs.try_recv().unwrap();
        f.writer.step(second);
        assert_eq!(answered.try_recv().unwrap(), (2, Ok(1)));
        assert!(!f.part.get().is_away());
    }

    #[test]
    fn background_work_gives_way() {
        let f = fixture();
        let (stopper, stop) = Stop::new();
        let (answers, answered) = unbounded();
        f.background.send(insert(9, &answers)).unwrap();
        f.jobs.send(insert(1, &answers)).unwrap();
        let first = f.writer.next(&stop).unwrap();
        let mut writer = f.writer;
        writer.step(first);
        assert_eq!(answered.try_iter().map(|(x, _)| x).collect::<Vec<_>>(), [1]);
        let second = writer.next(&stop).unwrap();
        writer.step(second);
        assert_eq!(answered.try_iter().map(|(x, _)| x).collect::<Vec<_>>(), [9]);
        drop(stopper);
        assert!(writer.next(&stop).is_none());
    }
}
