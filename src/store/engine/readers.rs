//! The threads that answer reads for those who must not wait, each with a read-only connection
//! while it works.

use std::io;
use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, select_biased};
use rusqlite::Connection;

use super::Pool;
use crate::runtime::worker::{Stop, Worker};
use crate::store::error::StoreError;

/// A query together with who is to be told; it is told also when there is no connection for it. It
/// returns what SQLite said, if that refused.
pub(in crate::store) type Query =
    Box<dyn FnOnce(Result<&Connection, StoreError>) -> Option<rusqlite::Error> + Send>;

/// Many reads can fail in a row: a line tells of those of so long.
const QUIET: Duration = Duration::from_secs(10);

pub(in crate::store) struct Readers {
    count: NonZeroUsize,
    queries: Receiver<Query>,
    pool: Pool,
}

impl Readers {
    pub(in crate::store) fn new(count: NonZeroUsize, queries: Receiver<Query>, pool: Pool) -> Self {
        Self {
            count,
            queries,
            pool,
        }
    }

    pub(in crate::store) fn spawn(self, exits: &Sender<&'static str>) -> io::Result<Vec<Worker>> {
        let spawn = |_| {
            let (queries, pool) = (self.queries.clone(), self.pool.clone());
            Worker::spawn("reader", exits, move |stop| run(&queries, &pool, &stop))
        };
        (0..self.count.get()).map(spawn).collect()
    }
}

fn run(queries: &Receiver<Query>, pool: &Pool, stop: &Stop) {
    let (mut failures, mut told_at) = (0_u64, None::<Instant>);
    loop {
        let query = select_biased! {
            recv(stop.signal()) -> _ => return,
            recv(queries) -> query => query,
        };
        let Ok(query) = query else { return };
        let failure = match pool.get() {
            Ok(connection) => query(Ok(&connection)),
            Err(error) => query(Err(error.into())),
        };
        let Some(error) = failure else { continue };
        failures += 1;
        if told_at.is_none_or(|at| at.elapsed() > QUIET) {
            log::warn!(
                "{failures} reads failed since the last such line, the last one because: {error}"
            );
            (failures, told_at) = (0, Some(Instant::now()));
        }
    }
}
