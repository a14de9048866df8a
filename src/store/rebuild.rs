//! A database that is built again from the records of its node: payments, their history, and the
//! outbox. Idempotency keys and what was never published are lost.

use std::path::{Path, PathBuf};

use rusqlite::{Connection, Result as SqlResult, Transaction, TransactionBehavior};

use super::OpenError;
use super::engine::open_error::open_error;
use super::engine::{files, open};
use super::error::StoreError;
use crate::domain::event::EventType;
use crate::domain::node_id::NodeId;
use crate::domain::payment::Payment;
use crate::domain::timestamp::Timestamp;
use crate::domain::topic::Topic;
use crate::domain::trace_context::TraceContext;

/// An event of the node, as its record has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RebuiltEvent {
    /// Its id.
    pub outbox_id: i64,
    /// Its payment.
    pub payment: Payment,
    /// When it was committed.
    pub created_at: Timestamp,
    /// When it was published.
    pub published_at: Timestamp,
    /// The client's trace, if it sent one.
    pub trace: Option<TraceContext>,
    /// Its partition.
    pub partition: i32,
    /// Its offset.
    pub offset: i64,
}

/// A database in the making, next to the configured one.
pub struct Rebuilding {
    connection: Connection,
    path: PathBuf,
}

const SUFFIX: &str = ".rebuilt";

impl Rebuilding {
    /// Creates an empty database of this node and incarnation. An earlier attempt is deleted.
    pub fn create(
        database: &Path,
        node: &NodeId,
        incarnation: Timestamp,
    ) -> Result<Self, OpenError> {
        let path = files::sibling_file(&files::resolve_database_file(database)?, SUFFIX);
        files::remove_database_files(&path);
        let (connection, _) = open::open_database(&path, Some(node))?;
        let set = || -> SqlResult<()> {
            // Only the finished file is synced: until then a crash means to begin again.
            connection.pragma_update(None, "synchronous", "OFF")?;
            connection
                .execute("UPDATE node SET created_at = ?1", [incarnation.as_micros()])
                .map(drop)
        };
        set().map_err(|source| open_error(&path, source))?;
        Ok(Self { connection, path })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Adds events in one transaction. A second copy of an event changes nothing. Returns how many
    /// were new.
    pub fn add(&mut self, events: &[RebuiltEvent]) -> Result<usize, StoreError> {
        let tx = Transaction::new(&mut self.connection, TransactionBehavior::Immediate)?;
        let mut added = 0;
        for event in events {
            added += add_event(&tx, event)?;
        }
        tx.commit()?;
        Ok(added)
    }

    /// Chains the history of each user, and records how far the topic was read. Others deliver its
    /// events. Closes the file.
    pub fn finish(
        mut self,
        topic: &Topic,
        partition: Option<i32>,
        ends: &[(i32, i64)],
        now: Timestamp,
    ) -> Result<(), StoreError> {
        let tx = Transaction::new(&mut self.connection, TransactionBehavior::Immediate)?;
        tx.execute_batch(
            // An event that was published again has two records, the first under its payment's id.
            "DELETE FROM outbox WHERE id NOT IN (SELECT max(id) FROM outbox GROUP BY payment_id); \
             CREATE TEMP TABLE chain AS SELECT id, lag(id) OVER (PARTITION BY user_id ORDER BY id) \
                AS previous FROM payment; \
             UPDATE payment SET previous_id = chain.previous FROM temp.chain \
                WHERE chain.id = payment.id AND chain.previous IS NOT NULL; \
             DROP TABLE temp.chain; \
             INSERT INTO user_history SELECT user_id, max(id) FROM payment GROUP BY user_id; \
             UPDATE node SET role = 'edge', edge_through = last, consumed_through = last \
                FROM (SELECT ifnull(max(id), 0) AS last FROM outbox)",
        )?;
        tx.execute(
            "INSERT INTO topic_incarnation (topic, topic_id, published_before, first_seen_at, \
                last_published, \"partition\") \
                SELECT ?1, ?2, 0, ?3, ifnull(max(id), 0), ?4 FROM outbox",
            (&topic.name, topic.id, now.as_micros(), partition),
        )?;
        for (number, end) in ends {
            tx.execute(
                "INSERT INTO topic_partition (topic, topic_id, \"partition\", published_to) \
                    VALUES (?1, ?2, ?3, ?4)",
                (&topic.name, topic.id, number, end),
            )?;
        }
        tx.commit()?;
        // Checkpoints the WAL into the file.
        self.connection.pragma_update(None, "synchronous", "FULL")?;
        let mut checkpoint = self.connection.prepare("PRAGMA wal_checkpoint(TRUNCATE)")?;
        checkpoint.query_row([], |_| Ok(()))?;
        Ok(())
    }
}

/// Deletes what was built next to this database, or a part of it.
pub fn remove_rebuilt(database: &Path) {
    if let Ok(database) = files::resolve_database_file(database) {
        files::remove_database_files(&files::sibling_file(&database, SUFFIX));
    }
}

/// Returns 1 if the event was new.
fn add_event(tx: &Transaction<'_>, event: &RebuiltEvent) -> SqlResult<usize> {
    let payment = &event.payment;
    tx.prepare_cached(
        "INSERT OR IGNORE INTO payment (id, user_id, reservation_id, amount, currency, status, \
            failure, executed_at) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
    )?
    .execute((
        payment.id,
        payment.user_id,
        payment.reservation_id,
        payment.amount,
        &payment.currency,
        payment.status,
        &payment.failure,
        payment.executed_at.as_micros(),
    ))?;
    // An earlier record of the same payment, which was published again under this id.
    tx.prepare_cached("DELETE FROM outbox WHERE payment_id = ?1 AND payment_id <> id AND id < ?2")?
        .execute((payment.id, event.outbox_id))?;
    tx.prepare_cached(
        "INSERT OR IGNORE INTO outbox (id, payment_id, user_id, type, traceparent, tracestate, \
            status, created_at, published_at, \"partition\", \"offset\") \
            SELECT ?1, id, user_id, ?3, ?4, ?5, 'PUBLISHED', ?6, ?7, ?8, ?9 FROM payment \
            WHERE id = ?2",
    )?
    .execute((
        event.outbox_id,
        payment.id,
        EventType::from(payment.status),
        event.trace.as_ref().map(|trace| &trace.parent),
        event.trace.as_ref().and_then(|trace| trace.state.as_ref()),
        event.created_at.as_micros(),
        event.published_at.as_micros(),
        event.partition,
        event.offset,
    ))
}
