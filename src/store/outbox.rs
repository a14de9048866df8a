//! The outbox: a row an event, INIT until the publisher has it, PUBLISHED afterwards.
//!
//! Ids are commit order: there is one writer. The relay reads and marks; nothing here deletes but [`purge`].

use std::sync::Arc;

use rusqlite::{Connection, OptionalExtension, Transaction};

use super::payment::unknown;
use super::{dead_letter, delivery, sql_limit, unconsumed};
use crate::clock::Timestamp;
use crate::event::{Event, Kind, Notice, TraceContext};

pub(super) fn insert(
    tx: &Transaction<'_>,
    payment_id: i64,
    user_id: i64,
    kind: Kind,
    trace: Option<&TraceContext>,
    now: Timestamp,
) -> rusqlite::Result<()> {
    tx.prepare_cached(
        "INSERT INTO outbox (payment_id, user_id, type, traceparent, tracestate, created_at) \
         VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
    )?
    .execute((
        payment_id,
        user_id,
        kind.as_str(),
        trace.map(|trace| &trace.parent),
        trace.and_then(|trace| trace.state.as_ref()),
        now.as_micros(),
    ))?;
    Ok(())
}

/// The oldest unpublished events with a larger id than `after`, in commit order.
pub fn unpublished(connection: &Connection, after: i64, limit: usize) -> rusqlite::Result<Vec<Event>> {
    connection
        .prepare_cached(
            "SELECT id, payment_id, user_id, type, created_at, traceparent, tracestate FROM outbox \
             WHERE status = 'INIT' AND id > ?1 ORDER BY id LIMIT ?2",
        )?
        .query_map((after, sql_limit(limit)), |row| {
            let kind: String = row.get(3)?;
            Ok(Event {
                outbox_id: row.get(0)?,
                payment_id: row.get(1)?,
                user_id: row.get(2)?,
                kind: Kind::parse(&kind).ok_or_else(|| unknown(3, &kind))?,
                created_at: Timestamp::from_micros(row.get(4)?),
                trace: match row.get(5)? {
                    Some(parent) => Some(TraceContext { parent, state: row.get(6)? }),
                    None => None,
                },
            })
        })?
        .collect()
}

/// Whether a notice is of the event that has its id here; `None` if none has.
pub(super) fn is_of(connection: &Connection, notice: Notice) -> rusqlite::Result<Option<bool>> {
    let found: Option<(i64, i64)> = connection
        .prepare_cached("SELECT payment_id, created_at FROM outbox WHERE id = ?1")?
        .query_row([notice.outbox_id], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()?;
    let same = |(payment_id, created_at)| {
        payment_id == notice.payment_id && notice.created_at.is_none_or(|time| time.as_micros() == created_at)
    };
    Ok(found.map(same))
}

/// Whether an event has had this id, or may not have it any more.
pub(super) fn is_given(connection: &Connection, outbox_id: i64) -> rusqlite::Result<bool> {
    connection.prepare_cached("SELECT 1 FROM sqlite_sequence WHERE name = 'outbox' AND seq >= ?1")?.exists([outbox_id])
}

/// Where a publisher has put an event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// On a topic; the consumer will bring it to the delivery table.
    Topic {
        /// The topic's partition.
        partition: i32,
        /// `None` where the broker had the record already and did not tell where.
        offset: Option<i64>,
    },
    /// Into the delivery table, which is written in the same transaction as the mark.
    Delivery,
    /// Nowhere: the other side will never take this very event as it is, for this reason.
    Rejected(Arc<str>),
}

/// A publisher's last word on an event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Receipt {
    /// Which event.
    pub outbox_id: i64,
    /// Where it is now.
    pub place: Place,
}

/// Marks events PUBLISHED, or sets them aside. Marking one again changes nothing.
pub fn mark_published(tx: &Transaction<'_>, receipts: &[Receipt], now: Timestamp) -> rusqlite::Result<()> {
    receipts.iter().try_for_each(|receipt| mark(tx, receipt, now).map(drop))?;
    if receipts.iter().any(|receipt| receipt.place == Place::Delivery) {
        unconsumed::advance(tx, 2 * receipts.len())?;
    }
    Ok(())
}

/// Tells how many events it has marked: none, if this one was.
pub(super) fn mark(tx: &Transaction<'_>, receipt: &Receipt, now: Timestamp) -> rusqlite::Result<usize> {
    let (partition, offset) = match &receipt.place {
        Place::Topic { partition, offset } => (Some(*partition), *offset),
        Place::Delivery => {
            delivery::insert(tx, receipt.outbox_id, now)?;
            (None, None)
        }
        Place::Rejected(reason) => return reject(tx, receipt.outbox_id, reason, now),
    };
    tx.prepare_cached(
        "UPDATE outbox SET status = 'PUBLISHED', rejection = NULL, published_at = ?2, \"partition\" = ?3, \"offset\" = ?4 \
         WHERE id = ?1 AND status <> 'PUBLISHED'",
    )?
    .execute((receipt.outbox_id, now.as_micros(), partition, offset))
}

/// Sets an event aside that cannot be published as it is, so that the others go on: a dead letter, for a person to see.
fn reject(tx: &Transaction<'_>, outbox_id: i64, reason: &str, now: Timestamp) -> rusqlite::Result<usize> {
    let rejected = tx
        .prepare_cached("UPDATE outbox SET status = 'REJECTED', rejection = ?2 WHERE id = ?1 AND status = 'INIT'")?
        .execute((outbox_id, reason))?;
    if rejected > 0 {
        dead_letter::insert_event(tx, outbox_id, reason, now)?;
    }
    Ok(rejected)
}

/// Has an event published that was set aside; false if it was not.
pub(super) fn send_again(tx: &Transaction<'_>, outbox_id: i64) -> rusqlite::Result<bool> {
    let sql = "UPDATE outbox SET status = 'INIT', rejection = NULL WHERE id = ?1 AND status = 'REJECTED'";
    let sent_again = tx.prepare_cached(sql)?.execute([outbox_id])? > 0;
    if sent_again {
        unconsumed::reopen(tx, outbox_id)?;
    }
    Ok(sent_again)
}

/// What is known of an event's way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventState {
    /// Its place in commit order.
    pub outbox_id: i64,
    /// INIT, PUBLISHED or REJECTED.
    pub status: String,
    /// Why it was rejected, if it was.
    pub rejection: Option<String>,
    /// When it was committed.
    pub created_at: Timestamp,
    /// When the publisher's word was recorded.
    pub published_at: Option<Timestamp>,
    /// Where on the topic.
    pub partition: Option<i32>,
    /// Where in the partition.
    pub offset: Option<i64>,
}

pub(super) fn of_payment(connection: &Connection, payment_id: i64) -> rusqlite::Result<Option<EventState>> {
    connection
        .prepare_cached(
            "SELECT id, status, created_at, published_at, \"partition\", \"offset\", rejection FROM outbox \
             WHERE payment_id = ?1",
        )?
        .query_row([payment_id], |row| {
            Ok(EventState {
                outbox_id: row.get(0)?,
                status: row.get(1)?,
                created_at: Timestamp::from_micros(row.get(2)?),
                published_at: row.get::<_, Option<i64>>(3)?.map(Timestamp::from_micros),
                partition: row.get(4)?,
                offset: row.get(5)?,
                rejection: row.get(6)?,
            })
        })
        .optional()
}

/// Deletes at most `limit` events, with their deliveries, that were published and delivered before `cutoff`; tells
/// how many, and counts them. What is unfinished stays, however old.
pub fn purge(tx: &Transaction<'_>, cutoff: Timestamp, limit: usize) -> rusqlite::Result<usize> {
    let ids: Vec<i64> = tx
        .prepare_cached(
            "SELECT d.outbox_id FROM delivery d JOIN outbox o ON o.id = d.outbox_id \
             WHERE d.status = 'DELIVERED' AND d.delivered_at < ?1 \
             AND o.status = 'PUBLISHED' AND o.published_at < ?1 \
             ORDER BY d.delivered_at LIMIT ?2",
        )?
        .query_map((cutoff.as_micros(), sql_limit(limit)), |row| row.get(0))?
        .collect::<rusqlite::Result<_>>()?;
    let mut delivery = tx.prepare_cached("DELETE FROM delivery WHERE outbox_id = ?1")?;
    let mut outbox = tx.prepare_cached("DELETE FROM outbox WHERE id = ?1")?;
    for id in &ids {
        delivery.execute([id])?;
        outbox.execute([id])?;
    }
    if !ids.is_empty() {
        tx.prepare_cached("UPDATE node SET events_purged = events_purged + ?1")?.execute([sql_limit(ids.len())])?;
    }
    Ok(ids.len())
}
