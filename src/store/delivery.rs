//! What is to be told: a row an event, keyed by it, so that a second copy of an event changes nothing. Each row belongs
//! to one channel, decided when it comes.

use rusqlite::{Connection, OptionalExtension, Row, Transaction};

use super::payment::{self, COLUMN_COUNT, COLUMNS};
use super::{dead_letter, outbox, sql_limit};
use crate::clock::Timestamp;
use crate::event::Notice;
use crate::payment::Payment;

/// The channel of event `?1`: the first route that fits its payment. Without routes nothing is looked up.
pub(super) const CHANNEL: &str = "ifnull(CASE WHEN EXISTS (SELECT 1 FROM route) THEN (\
     SELECT r.channel FROM outbox o CROSS JOIN payment p CROSS JOIN route r \
     WHERE o.id = ?1 AND p.id = o.payment_id AND (r.status IS NULL OR r.status = p.status) \
     AND p.amount BETWEEN r.amount_min AND r.amount_max AND p.user_id BETWEEN r.user_min AND r.user_max \
     ORDER BY r.position LIMIT 1) END, 'default')";

/// Queues an event's message; false if it is queued or told already.
pub(super) fn insert(tx: &Transaction<'_>, outbox_id: i64, now: Timestamp) -> rusqlite::Result<bool> {
    let inserted = tx
        .prepare_cached(&format!(
            "INSERT INTO delivery (outbox_id, channel, created_at) VALUES (?1, {CHANNEL}, ?2) \
         ON CONFLICT (outbox_id) DO NOTHING"
        ))?
        .execute((outbox_id, now.as_micros()))?;
    Ok(inserted > 0)
}

/// What became of a notice from the topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrival {
    /// It is in the delivery table now.
    Accepted,
    /// An earlier copy of it is.
    Duplicate,
    /// Its event was delivered and purged long ago.
    Purged,
    /// No event of this database has this id and payment.
    Unknown,
}

/// Takes a notice of one of our events from the topic.
pub fn accept(tx: &Transaction<'_>, notice: Notice, now: Timestamp) -> rusqlite::Result<Arrival> {
    Ok(match outbox::is_of(tx, notice)? {
        Some(true) if insert(tx, notice.outbox_id, now)? => Arrival::Accepted,
        Some(true) => Arrival::Duplicate,
        None if is_purged(tx, notice)? => Arrival::Purged,
        Some(false) | None => Arrival::Unknown,
    })
}

/// Whether an event that is not in the outbox once was: its id was given, and its payment is there.
pub(super) fn is_purged(tx: &Transaction<'_>, notice: Notice) -> rusqlite::Result<bool> {
    tx.prepare_cached(
        "SELECT 1 FROM payment WHERE id = ?2 AND ?1 <= (SELECT seq FROM sqlite_sequence WHERE name = 'outbox') \
         AND (?3 IS NULL OR executed_at = ?3)",
    )?
    .exists((notice.outbox_id, notice.payment_id, notice.created_at.map(Timestamp::as_micros)))
}

/// What became of telling a payment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notification {
    /// PENDING, SENDING, DELIVERED, DEAD or DISCARDED.
    pub status: String,
    /// Who is told.
    pub channel: String,
    /// How many times it was tried.
    pub attempts: u32,
    /// How many of these may have been shown although no answer came.
    pub unknown_outcomes: u32,
    /// When it was answered with success.
    pub delivered_at: Option<Timestamp>,
    /// Why the last failed attempt failed.
    pub last_error: Option<String>,
}

pub(super) fn find(connection: &Connection, outbox_id: i64) -> rusqlite::Result<Option<Notification>> {
    connection
        .prepare_cached(
            "SELECT status, channel, attempts, unknown_outcomes, delivered_at, last_error FROM delivery \
             WHERE outbox_id = ?1",
        )?
        .query_row([outbox_id], |row| {
            Ok(Notification {
                status: row.get(0)?,
                channel: row.get(1)?,
                attempts: row.get(2)?,
                unknown_outcomes: row.get(3)?,
                delivered_at: row.get::<_, Option<i64>>(4)?.map(Timestamp::from_micros),
                last_error: row.get(5)?,
            })
        })
        .optional()
}

/// A message that waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    /// Which event it tells.
    pub outbox_id: i64,
    /// When that was committed.
    pub created_at: Timestamp,
    /// What it tells of, or why that cannot be told.
    pub payment: Result<Payment, String>,
}

/// The oldest messages that wait for a channel, in commit order. One that cannot be read does not hide the others.
pub fn waiting(connection: &Connection, channel: &str, limit: usize) -> rusqlite::Result<Vec<Waiting>> {
    let read = |row: &Row<'_>| {
        let payment = match row.get_ref(0)? {
            rusqlite::types::ValueRef::Null => Err("its payment is not there".to_owned()),
            _ => payment::read(row).map_err(|error| format!("its payment cannot be read: {error}")),
        };
        Ok(Waiting {
            payment,
            outbox_id: row.get(COLUMN_COUNT)?,
            created_at: Timestamp::from_micros(row.get(COLUMN_COUNT + 1)?),
        })
    };
    connection
        .prepare_cached(&format!(
            "SELECT {COLUMNS}, d.outbox_id, ifnull(o.created_at, d.created_at) FROM delivery d \
             LEFT JOIN outbox o ON o.id = d.outbox_id LEFT JOIN payment p ON p.id = o.payment_id \
             WHERE d.channel = ?1 AND d.status IN ('PENDING', 'SENDING') ORDER BY d.outbox_id LIMIT ?2"
        ))?
        .query_map((channel, sql_limit(limit)), read)?
        .collect()
}

/// Whether more than so many wait for a channel.
pub fn more_than(connection: &Connection, channel: &str, count: usize) -> rusqlite::Result<bool> {
    connection
        .prepare_cached(
            "SELECT 1 FROM delivery WHERE channel = ?1 AND status IN ('PENDING', 'SENDING') \
             ORDER BY outbox_id LIMIT 1 OFFSET ?2",
        )?
        .exists((channel, sql_limit(count)))
}

/// A POST for these begins: should the process end before its answer is recorded, the outcome is not known.
pub fn mark_sending(tx: &Transaction<'_>, outbox_ids: &[i64]) -> rusqlite::Result<()> {
    let sql = "UPDATE delivery SET status = 'SENDING' WHERE outbox_id = ?1 AND status = 'PENDING'";
    each(tx, sql, outbox_ids)
}

/// Slack has said that it did not take these; no attempt is counted.
pub fn release(tx: &Transaction<'_>, outbox_ids: &[i64]) -> rusqlite::Result<()> {
    let sql = "UPDATE delivery SET status = 'PENDING' WHERE outbox_id = ?1 AND status = 'SENDING'";
    each(tx, sql, outbox_ids)
}

fn each(tx: &Transaction<'_>, sql: &str, outbox_ids: &[i64]) -> rusqlite::Result<()> {
    let mut update = tx.prepare_cached(sql)?;
    for id in outbox_ids {
        update.execute([id])?;
    }
    Ok(())
}

/// What a process that ended has left SENDING waits again, its outcome counted as unknown. Tells how many.
pub fn recover(tx: &Transaction<'_>) -> rusqlite::Result<usize> {
    // The first condition is the index's: without it every finished row would be looked at.
    tx.execute(
        "UPDATE delivery SET status = 'PENDING', attempts = attempts + 1, unknown_outcomes = unknown_outcomes + 1, \
         last_error = 'payrelay ended before the answer was recorded' \
         WHERE status IN ('PENDING', 'SENDING') AND status = 'SENDING'",
        [],
    )
}

/// Records that messages were told.
pub fn mark_delivered(tx: &Transaction<'_>, outbox_ids: &[i64], now: Timestamp) -> rusqlite::Result<()> {
    let mut mark = tx.prepare_cached(
        "UPDATE delivery SET status = 'DELIVERED', delivered_at = ?2, attempts = attempts + 1 \
         WHERE outbox_id = ?1 AND status IN ('PENDING', 'SENDING')",
    )?;
    for id in outbox_ids {
        mark.execute((id, now.as_micros()))?;
    }
    Ok(())
}

/// Records that messages could not be told, or that nobody knows whether they were.
pub fn mark_failed(tx: &Transaction<'_>, outbox_ids: &[i64], error: &str, unknown: bool) -> rusqlite::Result<()> {
    let mut mark = tx.prepare_cached(
        "UPDATE delivery SET status = 'PENDING', attempts = attempts + 1, unknown_outcomes = unknown_outcomes + ?3, \
         last_error = ?2 WHERE outbox_id = ?1 AND status IN ('PENDING', 'SENDING')",
    )?;
    for id in outbox_ids {
        mark.execute((id, error, unknown))?;
    }
    Ok(())
}

/// Nobody wants to be told: of what could not be told, or of what could not be published and therefore never came to be told.
pub(super) fn discard(tx: &Transaction<'_>, outbox_id: i64, now: Timestamp) -> rusqlite::Result<()> {
    tx.prepare_cached("UPDATE delivery SET status = 'DISCARDED' WHERE outbox_id = ?1 AND status = 'DEAD'")?
        .execute([outbox_id])?;
    tx.prepare_cached(&format!(
        "INSERT INTO delivery (outbox_id, channel, status, created_at) SELECT ?1, {CHANNEL}, 'DISCARDED', ?2 \
         WHERE EXISTS (SELECT 1 FROM outbox WHERE id = ?1 AND status = 'REJECTED') ON CONFLICT (outbox_id) DO NOTHING"
    ))?
    .execute((outbox_id, now.as_micros()))?;
    Ok(())
}

/// Sets a message aside that cannot be told as it is; without a reason for that of its last failure.
pub fn bury(tx: &Transaction<'_>, outbox_id: i64, reason: Option<&str>, now: Timestamp) -> rusqlite::Result<()> {
    let reason: Option<Option<String>> = tx
        .prepare_cached(
            "UPDATE delivery SET status = 'DEAD', last_error = ifnull(?2, last_error) \
             WHERE outbox_id = ?1 AND status IN ('PENDING', 'SENDING') RETURNING last_error",
        )?
        .query_row((outbox_id, reason), |row| row.get(0))
        .optional()?;
    match reason {
        Some(reason) => dead_letter::insert_event(tx, outbox_id, &reason.unwrap_or_default(), now),
        None => Ok(()),
    }
}
