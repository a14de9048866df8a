//! Counts the waiting rows without reading all of them each time.
//!
//! Rows arrive at one end of an index of waiting rows and leave at the other. So the index is
//! counted once, in segments of a bounded number of rows. Each later count repeats the segments at
//! both ends, and one between them in turn. A count costs the same however long the backlog is. A
//! row that returns between the ends shows after at most one round.

use super::waiting::Waiting;
use super::{dead_letter, unconsumed};
use crate::domain::timestamp::Timestamp;
use rusqlite::{Connection, OptionalExtension, Row, ToSql};

/// The maximum number of rows of a closed segment: some 8 ms to count.
const SEGMENT_ROWS: i64 = 100_000;

/// Everything that waits in the database.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Backlog {
    /// Events that are INIT.
    pub unpublished: Waiting,
    /// Events that are PUBLISHED and have no delivery, and when the first of them was published.
    pub unconsumed: Waiting,
    /// Deliveries, by channel, in the order of the channels.
    pub channels: Vec<Waiting>,
    /// Dead letters that are open.
    pub dead_letters: Waiting,
}

impl Backlog {
    /// The deliveries of all channels.
    pub fn undelivered(&self) -> Waiting {
        Waiting {
            count: self.channels.iter().map(|channel| channel.count).sum(),
            oldest_at: self
                .channels
                .iter()
                .filter_map(|channel| channel.oldest_at)
                .min(),
        }
    }
}

/// Counts waiting rows, repeatedly.
#[derive(Debug)]
pub struct BacklogCounter {
    unpublished: BacklogSegments,
    channels: Vec<BacklogSegments>,
}

impl BacklogCounter {
    /// Counts the deliveries of these channels.
    pub fn new(channels: &[String]) -> Self {
        let deliveries = |name: &String| {
            BacklogSegments::new(BacklogRows::Deliveries(name.clone()), SEGMENT_ROWS)
        };
        Self {
            unpublished: BacklogSegments::new(BacklogRows::Unpublished, SEGMENT_ROWS),
            channels: channels.iter().map(deliveries).collect(),
        }
    }

    /// Counts once. The first time it reads the whole index of waiting rows.
    pub fn count(&mut self, connection: &Connection) -> rusqlite::Result<Backlog> {
        let channels = self
            .channels
            .iter_mut()
            .map(|channel| channel.count(connection));
        Ok(Backlog {
            unpublished: self.unpublished.count(connection)?,
            unconsumed: unconsumed::count_unconsumed(connection)?,
            channels: channels.collect::<rusqlite::Result<_>>()?,
            dead_letters: dead_letter::open_dead_letters(connection)?,
        })
    }
}

/// A kind of counted rows. Each has an index that holds nothing else, in the order of event ids.
#[derive(Debug)]
enum BacklogRows {
    Unpublished,
    Deliveries(String),
}

impl BacklogRows {
    fn oldest(&self, connection: &Connection) -> rusqlite::Result<Option<(i64, Timestamp)>> {
        let read = |row: &Row<'_>| Ok((row.get(0)?, Timestamp::from_micros(row.get(1)?)));
        let (sql, parameters): (_, &[&dyn ToSql]) = match self {
            Self::Unpublished => (
                "SELECT id, created_at FROM outbox WHERE status = 'INIT' ORDER BY id LIMIT 1",
                &[],
            ),
            Self::Deliveries(channel) => (
                "SELECT d.outbox_id, ifnull(o.created_at, d.created_at) FROM delivery d LEFT \
                    JOIN outbox o ON o.id = d.outbox_id WHERE d.channel = ?1 \
                    AND d.status IN ('PENDING', 'SENDING') ORDER BY d.outbox_id LIMIT 1",
                &[channel],
            ),
        };
        connection
            .prepare_cached(sql)?
            .query_row(parameters, read)
            .optional()
    }

    /// The number of rows from one id to before another, up to a limit, and the last of them.
    fn count_range(
        &self,
        connection: &Connection,
        from: i64,
        before: i64,
        limit: i64,
    ) -> rusqlite::Result<(i64, Option<i64>)> {
        let (sql, parameters): (_, &[&dyn ToSql]) = match self {
            Self::Unpublished => (
                "SELECT count(*), max(id) FROM (SELECT id FROM outbox \
                 WHERE status = 'INIT' AND id >= ?1 AND id < ?2 ORDER BY id LIMIT ?3)",
                &[&from, &before, &limit],
            ),
            Self::Deliveries(channel) => (
                "SELECT count(*), max(outbox_id) FROM (SELECT outbox_id FROM delivery \
                 WHERE channel = ?4 AND status IN ('PENDING', 'SENDING') \
                 AND outbox_id >= ?1 AND outbox_id < ?2 ORDER BY outbox_id LIMIT ?3)",
                &[&from, &before, &limit, channel],
            ),
        };
        connection
            .prepare_cached(sql)?
            .query_row(parameters, |row| Ok((row.get(0)?, row.get(1)?)))
    }
}

/// A range of the table's rows: from its first id up to the next segment's first id.
#[derive(Debug, Clone, Copy)]
struct BacklogSegment {
    first: i64,
    count: i64,
}

const EVERYTHING: BacklogSegment = BacklogSegment {
    first: i64::MIN,
    count: 0,
};

#[derive(Debug)]
struct BacklogSegments {
    rows: BacklogRows,
    segment_rows: i64,
    segments: Vec<BacklogSegment>,
    /// The segment between both ends that the last count repeated.
    rechecked: usize,
}

impl BacklogSegments {
    fn new(rows: BacklogRows, segment_rows: i64) -> Self {
        Self {
            rows,
            segment_rows,
            segments: vec![EVERYTHING],
            rechecked: 0,
        }
    }

    fn count(&mut self, connection: &Connection) -> rusqlite::Result<Waiting> {
        let Some((oldest, oldest_at)) = self.rows.oldest(connection)? else {
            self.segments = vec![EVERYTHING];
            return Ok(Waiting::default());
        };
        let emptied = self
            .segments
            .iter()
            .skip(1)
            .take_while(|next| next.first <= oldest)
            .count();
        self.segments.drain(..emptied);
        // The segment keeps its place in the round, though its index is a smaller one now.
        self.rechecked = self.rechecked.saturating_sub(emptied);
        // An older row may return, as a replayed dead letter does.
        self.segments[0].first = i64::MIN;
        self.recount_segment(connection, 0)?;
        self.rechecked = if self.rechecked + 1 < self.segments.len() {
            self.rechecked + 1
        } else {
            0
        };
        self.recount_segment(connection, self.rechecked)?;
        self.count_open_segment(connection)?;
        let count = self.segments.iter().map(|segment| segment.count).sum();
        Ok(Waiting {
            count,
            oldest_at: Some(oldest_at),
        })
    }

    fn recount_segment(&mut self, connection: &Connection, index: usize) -> rusqlite::Result<()> {
        // The last segment is open: it is counted as it grows.
        if let Some(next) = self.segments.get(index + 1).copied() {
            let segment = &mut self.segments[index];
            segment.count = self
                .rows
                .count_range(connection, segment.first, next.first, i64::MAX)?
                .0;
        }
        Ok(())
    }

    /// Counts the last segment, and closes it when it is full.
    fn count_open_segment(&mut self, connection: &Connection) -> rusqlite::Result<()> {
        let Some(mut open) = self.segments.pop() else {
            return Ok(());
        };
        loop {
            let (count, last) =
                self.rows
                    .count_range(connection, open.first, i64::MAX, self.segment_rows)?;
            self.segments.push(BacklogSegment { count, ..open });
            match last {
                Some(last) if count == self.segment_rows => {
                    open = BacklogSegment {
                        first: last + 1,
                        count: 0,
                    }
                }
                _ => return Ok(()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::row::row_limit;
    use proptest::prelude::*;
    use proptest::test_runner::TestCaseError;

    const OUTBOX: &str =
        "CREATE TABLE outbox (id INTEGER PRIMARY KEY, status TEXT, created_at INTEGER);
        CREATE INDEX outbox_init ON outbox (id) WHERE status = 'INIT';";

    #[derive(Debug, Clone)]
    enum BacklogChange {
        Commit(usize),
        Publish(usize),
        Replay(i64),
        Count,
    }

    fn any_backlog_change() -> impl Strategy<Value = BacklogChange> {
        prop_oneof![
            3 => (1_usize..20).prop_map(BacklogChange::Commit),
            2 => (1_usize..20).prop_map(BacklogChange::Publish),
            1 => (1_i64..100).prop_map(BacklogChange::Replay),
            4 => Just(BacklogChange::Count),
        ]
    }

    impl BacklogChange {
        fn apply(&self, connection: &Connection) {
            let insert = "INSERT INTO outbox (status, created_at) \
                VALUES ('INIT', (SELECT ifnull(max(id), 0) + 1 FROM outbox))";
            let publish = "UPDATE outbox SET status = 'PUBLISHED' WHERE id IN \
                (SELECT id FROM outbox WHERE status = 'INIT' ORDER BY id LIMIT ?1)";
            let replay = "UPDATE outbox SET status = 'INIT' WHERE id = ?1";
            let changed = match self {
                Self::Commit(count) => {
                    (0..*count).try_for_each(|_| connection.execute(insert, []).map(drop))
                }
                Self::Publish(count) => connection.execute(publish, [row_limit(*count)]).map(drop),
                Self::Replay(id) => connection.execute(replay, [id]).map(drop),
                Self::Count => Ok(()),
            };
            changed.unwrap();
        }
    }

    /// The backlog, counted by reading every row.
    fn whole_backlog(connection: &Connection) -> Waiting {
        let sql = "SELECT count(*), min(created_at) FROM outbox WHERE status = 'INIT'";
        let read = |row: &Row<'_>| {
            let oldest: Option<i64> = row.get(1)?;
            Ok(Waiting {
                count: row.get(0)?,
                oldest_at: oldest.map(Timestamp::from_micros),
            })
        };
        connection.query_row(sql, [], read).unwrap()
    }

    fn backlog_count_follows(changes: &[BacklogChange]) -> Result<(), TestCaseError> {
        let connection = Connection::open_in_memory().unwrap();
        connection.execute_batch(OUTBOX).unwrap();
        let mut segments = BacklogSegments::new(BacklogRows::Unpublished, 5);
        let mut replayed = false;
        for change in changes {
            change.apply(&connection);
            match change {
                BacklogChange::Replay(_) => replayed = true,
                BacklogChange::Count => {
                    let counted = segments.count(&connection).unwrap();
                    let whole = whole_backlog(&connection);
                    prop_assert_eq!(counted.oldest_at, whole.oldest_at);
                    // A replay may change any segment.
                    prop_assert!(replayed || counted == whole, "{counted:?} {whole:?}");
                }
                BacklogChange::Commit(_) | BacklogChange::Publish(_) => {}
            }
        }
        // This count adds the segments of the last commits. The round has to include them, so it
        // begins afterwards: a round of the older segments alone once failed here.
        segments.count(&connection).unwrap();
        for _ in 0..segments.segments.len() {
            segments.count(&connection).unwrap();
        }
        prop_assert_eq!(
            segments.count(&connection).unwrap(),
            whole_backlog(&connection)
        );
        Ok(())
    }

    proptest! {
        #[test]
        fn the_backlog_count_is_exact_after_each_segment_was_recounted(
            changes in proptest::collection::vec(any_backlog_change(), 1..80)
        ) {
            backlog_count_follows(&changes)?;
        }
    }
}
