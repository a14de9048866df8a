//! What is to be told to Slack: a row an event, keyed by it, so that a second copy of an event changes nothing.

use rusqlite::{Connection, OptionalExtension, Row, Transaction};

use super::payment::{self, COLUMNS};
use super::sql_limit;
use crate::clock::Timestamp;
use crate::event::Notice;
use crate::payment::Payment;

/// Queues an event's message, unless it is queued or told already.
pub(super) fn insert(tx: &Transaction<'_>, outbox_id: i64, now: Timestamp) -> rusqlite::Result<()> {
    tx.prepare_cached(
        "INSERT INTO delivery (outbox_id, created_at, next_attempt_at) VALUES (?1, ?2, ?2) \
         ON CONFLICT (outbox_id) DO NOTHING",
    )?
    .execute((outbox_id, now.as_micros()))?;
    Ok(())
}

/// What became of a notice from the topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrival {
    /// It is in the delivery table, perhaps since an earlier copy of it.
    Accepted,
    /// Its event was delivered and purged long ago.
    Purged,
    /// No event of this database has this id and payment.
    Unknown,
}

/// Takes a notice of one of our events from the topic.
pub fn accept(tx: &Transaction<'_>, notice: Notice, now: Timestamp) -> rusqlite::Result<Arrival> {
    let payment: Option<i64> = tx
        .prepare_cached("SELECT payment_id FROM outbox WHERE id = ?1")?
        .query_row([notice.outbox_id], |row| row.get(0))
        .optional()?;
    match payment {
        Some(payment) if payment == notice.payment_id => {
            insert(tx, notice.outbox_id, now)?;
            Ok(Arrival::Accepted)
        }
        Some(_) => Ok(Arrival::Unknown),
        None => {
            let last: Option<i64> = tx
                .prepare_cached("SELECT seq FROM sqlite_sequence WHERE name = 'outbox'")?
                .query_row([], |row| row.get(0))
                .optional()?;
            Ok(if last.is_some_and(|last| notice.outbox_id <= last) { Arrival::Purged } else { Arrival::Unknown })
        }
    }
}

/// What became of telling a payment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notification {
    /// PENDING or DELIVERED.
    pub status: String,
    /// How many times it was tried.
    pub attempts: u32,
    /// When it was answered with success.
    pub delivered_at: Option<Timestamp>,
    /// Why the last failed attempt failed.
    pub last_error: Option<String>,
}

pub(super) fn find(connection: &Connection, outbox_id: i64) -> rusqlite::Result<Option<Notification>> {
    connection
        .prepare_cached("SELECT status, attempts, delivered_at, last_error FROM delivery WHERE outbox_id = ?1")?
        .query_row([outbox_id], |row| {
            Ok(Notification {
                status: row.get(0)?,
                attempts: row.get(1)?,
                delivered_at: row.get::<_, Option<i64>>(2)?.map(Timestamp::from_micros),
                last_error: row.get(3)?,
            })
        })
        .optional()
}

/// A message that waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pending {
    /// Which event it tells.
    pub outbox_id: i64,
    /// How many times it was tried in vain.
    pub attempts: u32,
    /// Not to be tried before.
    pub next_attempt_at: Timestamp,
    /// What it tells of.
    pub payment: Payment,
    /// When that was committed.
    pub created_at: Timestamp,
}

/// The oldest messages that wait, in commit order.
pub fn pending(connection: &Connection, limit: usize) -> rusqlite::Result<Vec<Pending>> {
    let read = |row: &Row<'_>| {
        Ok(Pending {
            payment: payment::read(row)?,
            outbox_id: row.get(8)?,
            attempts: row.get(9)?,
            next_attempt_at: Timestamp::from_micros(row.get(10)?),
            created_at: Timestamp::from_micros(row.get(11)?),
        })
    };
    connection
        .prepare_cached(&format!(
            "SELECT {COLUMNS}, d.outbox_id, d.attempts, d.next_attempt_at, o.created_at \
             FROM delivery d JOIN outbox o ON o.id = d.outbox_id JOIN payment p ON p.id = o.payment_id \
             WHERE d.status = 'PENDING' ORDER BY d.outbox_id LIMIT ?1"
        ))?
        .query_map([sql_limit(limit)], read)?
        .collect()
}

/// Records that messages were told.
pub fn mark_delivered(tx: &Transaction<'_>, outbox_ids: &[i64], now: Timestamp) -> rusqlite::Result<()> {
    let mut mark = tx.prepare_cached(
        "UPDATE delivery SET status = 'DELIVERED', delivered_at = ?2, attempts = attempts + 1 \
         WHERE outbox_id = ?1 AND status = 'PENDING'",
    )?;
    for id in outbox_ids {
        mark.execute((id, now.as_micros()))?;
    }
    Ok(())
}

/// Records that a message could not be told.
pub fn mark_failed(
    tx: &Transaction<'_>,
    outbox_id: i64,
    error: &str,
    next_attempt_at: Timestamp,
) -> rusqlite::Result<()> {
    tx.prepare_cached(
        "UPDATE delivery SET attempts = attempts + 1, last_error = ?2, next_attempt_at = ?3 \
         WHERE outbox_id = ?1 AND status = 'PENDING'",
    )?
    .execute((outbox_id, error, next_attempt_at.as_micros()))?;
    Ok(())
}
