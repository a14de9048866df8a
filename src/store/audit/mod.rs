//! The audit of the database: the consistency of payments, outbox, deliveries and the topic, in one
//! snapshot.
//!
//! The connection cannot write. The records of the topic are in its temporary tables. SQLite keeps
//! these on the disk (<https://sqlite.org/tempfiles.html>), so that a long topic needs little
//! memory.

mod checks;
mod findings;
mod totals;

pub use self::checks::COPY_KIND;
pub(super) use self::checks::UNCONSUMED_KIND;
use self::checks::{
    CONSUMED_WITHIN, FILE, GONE, INVISIBLE, MISSING, NOTES, TEMPORARY, TOPIC, UNCONSUMED,
    VISIBLE_WITHIN,
};
pub use self::findings::DAMAGED_KIND;
pub use self::findings::Finding;
use self::findings::Findings;
pub use self::totals::AuditTotals;
use self::totals::count_audit_totals;
use super::engine::{open, open_error};
use super::offline::existing_database;
use super::{OpenError, StoreError};
use crate::domain::node_id::NodeId;
use crate::domain::timestamp::Timestamp;
use rusqlite::Connection;
use serde::Serialize;
use std::cell::Cell;
use std::path::Path;

/// A database under audit. It may be in use, and stays as it is.
pub struct AuditDatabase {
    connection: Connection,
    node: NodeId,
    /// The newest event that was published before the topic was read.
    published_before: i64,
    /// Events that were published before this must be visible.
    visible_before: Timestamp,
}

/// A record of the topic that is one of this node's events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TopicEvent {
    /// Its partition.
    pub partition: i32,
    /// Its offset.
    pub offset: i64,
    /// The event that it names.
    pub outbox_id: i64,
    /// Its key, if that is a number.
    pub user_id: Option<i64>,
    /// Its value, if that is a number.
    pub payment_id: Option<i64>,
}

/// The offsets that were read of a partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct OffsetRange {
    /// The partition.
    pub partition: i32,
    /// The oldest offset.
    pub start: i64,
    /// The offset after the last one.
    pub end: i64,
}

/// The topic, as it was read.
#[derive(Debug, Clone, Copy)]
pub struct TopicSnapshot<'a> {
    /// Its incarnation (KIP-516); `None` if there is no such topic.
    pub id: Option<[u8; 16]>,
    /// By partition.
    pub ranges: &'a [OffsetRange],
}

/// The result of all checks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CheckResult {
    /// The number of rows.
    pub totals: AuditTotals,
    /// Inconsistencies.
    pub findings: Vec<Finding>,
    /// Facts worth knowing that are no inconsistency.
    pub notes: Vec<Finding>,
}

impl AuditDatabase {
    /// Opens an existing database, for reading only.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let (connection, node) = open::open_database_to_read(&existing_database(path)?)?;
        let failed = |source| open_error::open_error(path, source);
        connection.execute_batch(TEMPORARY).map_err(failed)?;
        Ok(Self {
            connection,
            node,
            published_before: 0,
            visible_before: Timestamp::from_micros(0),
        })
    }

    /// The node that it belongs to.
    pub fn node(&self) -> &NodeId {
        &self.node
    }

    /// Call it before the topic's ends are read: events that are published by now must be before
    /// them.
    pub fn begin(&mut self) -> Result<(), StoreError> {
        let sql = "SELECT ifnull(max(id), 0) FROM outbox WHERE status = 'PUBLISHED'";
        self.published_before = self.connection.query_row(sql, [], |row| row.get(0))?;
        self.visible_before = Timestamp::now().minus(VISIBLE_WITHIN);
        Ok(())
    }

    /// Stores records of the topic.
    pub fn store_records(&mut self, records: &[TopicEvent]) -> Result<(), StoreError> {
        let tx = self.connection.transaction()?;
        {
            let mut insert = tx
                .prepare_cached("INSERT OR IGNORE INTO topic_record VALUES (?1, ?2, ?3, ?4, ?5)")?;
            for TopicEvent {
                partition,
                offset,
                outbox_id,
                user_id,
                payment_id,
            } in records
            {
                insert.execute((partition, offset, outbox_id, user_id, payment_id))?;
            }
        }
        Ok(tx.commit()?)
    }

    /// Stores the ranges of the topic that cannot be decoded.
    pub fn store_skipped_ranges(&mut self, skipped: &[OffsetRange]) -> Result<(), StoreError> {
        for OffsetRange {
            partition,
            start,
            end,
        } in skipped
        {
            self.connection.execute(
                "INSERT INTO undecodable VALUES (?1, ?2, ?3)",
                (partition, start, end),
            )?;
        }
        Ok(())
    }

    /// Runs all checks in one snapshot, and those of the topic if that was read. Each finding has
    /// at most `limit` examples.
    pub fn check(
        self,
        topic: &str,
        snapshot: Option<TopicSnapshot<'_>>,
        limit: usize,
    ) -> Result<CheckResult, StoreError> {
        self.check_with_progress(topic, snapshot, limit, &|_, _| ())
    }

    /// As [`AuditDatabase::check`]. `progress` gets the number of checks that are done, and of all.
    pub fn check_with_progress(
        mut self,
        topic: &str,
        snapshot: Option<TopicSnapshot<'_>>,
        limit: usize,
        progress: &dyn Fn(usize, usize),
    ) -> Result<CheckResult, StoreError> {
        let of_topic = if snapshot.is_some() {
            TOPIC.len() + 2 + GONE.len()
        } else {
            0
        };
        // Integrity, foreign keys, and unconsumed events.
        let total = 3 + FILE.len() + NOTES.len() + of_topic;
        let count = Cell::new(0);
        let next = || {
            progress(count.get(), total);
            count.set(count.get() + 1);
        };
        self.fill_topic_tables(topic, snapshot)?;
        let published_before = self.published_before;
        let visible_before = self.visible_before;
        let tx = self.connection.transaction()?;
        let mut findings = Findings::new(&tx, limit);
        next();
        findings.check_integrity()?;
        next();
        findings.check_foreign_keys()?;
        for check in &FILE {
            next();
            findings.run_check(check, [])?;
        }
        let consumed_before = Timestamp::now().minus(CONSUMED_WITHIN).as_micros();
        next();
        findings.run_check(&UNCONSUMED, (topic, consumed_before))?;
        let mut notes = Findings::new(&tx, limit);
        for check in &NOTES {
            next();
            notes.run_check(check, [])?;
        }
        if snapshot.is_some() {
            for check in &TOPIC {
                next();
                findings.run_check(check, [])?;
            }
            next();
            findings.run_check(&MISSING, [published_before])?;
            next();
            findings.run_check(&INVISIBLE, [visible_before.as_micros()])?;
            for check in &GONE {
                next();
                notes.run_check(check, [])?;
            }
        }
        progress(total, total);
        // A damaged file may not be countable.
        let is_damaged = findings
            .found
            .iter()
            .any(|finding| finding.kind == DAMAGED_KIND);
        let totals = match count_audit_totals(&tx) {
            Err(_) if is_damaged => AuditTotals::default(),
            totals => totals?,
        };
        Ok(CheckResult {
            totals,
            findings: findings.found,
            notes: notes.found,
        })
    }

    /// Fills the temporary tables of the topic.
    fn fill_topic_tables(
        &self,
        topic: &str,
        snapshot: Option<TopicSnapshot<'_>>,
    ) -> Result<(), StoreError> {
        self.connection
            .execute_batch("CREATE INDEX temp.topic_event ON topic_record (outbox_id)")?;
        for range in snapshot.map_or(&[][..], |snapshot| snapshot.ranges) {
            self.connection.execute(
                "INSERT INTO extent VALUES (?1, ?2, ?3)",
                (range.partition, range.start, range.end),
            )?;
        }
        self.connection.execute(
            "INSERT INTO incarnation SELECT ifnull(max(published_before), 0) \
                FROM topic_incarnation WHERE topic = ?1 AND topic_id = ?2",
            (topic, snapshot.and_then(|snapshot| snapshot.id)),
        )?;
        Ok(())
    }
}
