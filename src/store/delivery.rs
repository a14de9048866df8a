//! Deliveries: a row for each event, keyed by its id, so that a duplicate of the event changes
//! nothing. Each row belongs to one channel, chosen when it is inserted.

use std::ops::RangeInclusive;

use super::dead_letter;
use super::id_runs::id_runs;
use super::payment::{self, COLUMN_COUNT, COLUMNS};
use super::row::row_limit;
use crate::domain::payment::Payment;
use crate::domain::text_enum::text_enum;
use crate::domain::timestamp::Timestamp;
use crate::domain::trace_context::recorded_trace_id;
use rusqlite::{Connection, OptionalExtension, Row, Transaction};

/// The channel of an event, in SQL: the first route that matches its payment. Without routes it is
/// "default".
macro_rules! channel_of {
    ($event:literal) => {
        concat!(
            "ifnull(CASE WHEN EXISTS (SELECT 1 FROM route) THEN (SELECT r.channel FROM outbox o \
                CROSS JOIN payment p CROSS JOIN route r WHERE o.id = ",
            $event,
            " AND p.id = o.payment_id AND (r.status IS NULL OR r.status = p.status) \
                AND p.amount BETWEEN r.amount_min AND r.amount_max \
                AND p.user_id BETWEEN r.user_min AND r.user_max \
                ORDER BY r.position LIMIT 1) END, 'default')"
        )
    };
}
pub(super) use channel_of;

text_enum! {
    /// The status of a delivery.
    pub enum DeliveryStatus {
        /// It waits.
        Pending = "PENDING",
        /// Its message is being sent. After a crash its outcome is unknown.
        Sending = "SENDING",
        /// The channel accepted it.
        Delivered = "DELIVERED",
        /// It could not be sent, and is a dead letter.
        Dead = "DEAD",
        /// An operator discarded its dead letter.
        Discarded = "DISCARDED",
    }
}

/// The outcome of inserting a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DeliveryInsert {
    /// It was inserted.
    New,
    /// An earlier copy of the event has one already.
    Existing,
}

/// Inserts an event's delivery, if it has none.
pub(super) fn insert_delivery(
    tx: &Transaction<'_>,
    outbox_id: i64,
    now: Timestamp,
) -> rusqlite::Result<DeliveryInsert> {
    let inserted = tx
        .prepare_cached(concat!(
            "INSERT INTO delivery (outbox_id, channel, created_at) VALUES (?1, ",
            channel_of!("?1"),
            ", ?2) ON CONFLICT (outbox_id) DO NOTHING"
        ))?
        .execute((outbox_id, now.as_micros()))?;
    Ok(if inserted > 0 {
        DeliveryInsert::New
    } else {
        DeliveryInsert::Existing
    })
}

/// Inserts the deliveries of a range of events, except those that exist.
pub(super) fn insert_deliveries(
    tx: &Transaction<'_>,
    events: &RangeInclusive<i64>,
    now: Timestamp,
) -> rusqlite::Result<()> {
    tx.prepare_cached(concat!(
        "INSERT INTO delivery (outbox_id, channel, created_at) SELECT e.id, ",
        channel_of!("e.id"),
        ", ?3 FROM outbox e WHERE e.id BETWEEN ?1 AND ?2 ON CONFLICT (outbox_id) DO NOTHING"
    ))?
    .execute((events.start(), events.end(), now.as_micros()))
    .map(drop)
}

/// Whether an event of a range has a delivery.
pub(super) fn has_deliveries(
    connection: &Connection,
    events: &RangeInclusive<i64>,
) -> rusqlite::Result<bool> {
    connection
        .prepare_cached("SELECT 1 FROM delivery WHERE outbox_id BETWEEN ?1 AND ?2 LIMIT 1")?
        .exists((events.start(), events.end()))
}

/// The delivery of a payment, as people see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notification {
    /// Its status.
    pub status: DeliveryStatus,
    /// The channel.
    pub channel: String,
    /// When its event arrived.
    pub created_at: Timestamp,
    /// The number of attempts.
    pub attempts: u32,
    /// The attempts with unknown outcome: they may have been shown.
    pub unknown_outcomes: u32,
    /// When the channel accepted it.
    pub delivered_at: Option<Timestamp>,
    /// The kind of message that carried it.
    pub delivered_in: Option<Carrier>,
    /// The error of the last failed attempt.
    pub last_error: Option<String>,
}

pub(super) fn find_delivery(
    connection: &Connection,
    outbox_id: i64,
) -> rusqlite::Result<Option<Notification>> {
    connection
        .prepare_cached(
            "SELECT status, channel, attempts, unknown_outcomes, delivered_at, last_error, \
                delivered_in, created_at FROM delivery WHERE outbox_id = ?1",
        )?
        .query_row([outbox_id], |row| {
            Ok(Notification {
                status: row.get(0)?,
                channel: row.get(1)?,
                attempts: row.get(2)?,
                unknown_outcomes: row.get(3)?,
                delivered_at: row.get::<_, Option<i64>>(4)?.map(Timestamp::from_micros),
                last_error: row.get(5)?,
                delivered_in: row.get(6)?,
                created_at: Timestamp::from_micros(row.get(7)?),
            })
        })
        .optional()
}

/// A delivery that waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PendingDelivery {
    /// Its event.
    pub outbox_id: i64,
    /// When the event was committed.
    pub created_at: Timestamp,
    /// The id of its trace, if a tracer recorded it.
    pub trace_id: Option<String>,
    /// Its payment, or why that cannot be read.
    pub payment: Result<Payment, String>,
}

/// The oldest waiting deliveries of a channel, in commit order. An unreadable one does not hide the
/// others.
pub fn pending_deliveries(
    connection: &Connection,
    channel: &str,
    limit: usize,
) -> rusqlite::Result<Vec<PendingDelivery>> {
    read_pending_deliveries(connection, channel, "'PENDING', 'SENDING'", 0, limit)
}

/// The same without those that are SENDING.
pub fn unsent_deliveries(
    connection: &Connection,
    channel: &str,
    limit: usize,
) -> rusqlite::Result<Vec<PendingDelivery>> {
    read_pending_deliveries(connection, channel, "'PENDING'", 0, limit)
}

fn read_pending_deliveries(
    connection: &Connection,
    channel: &str,
    statuses: &str,
    after: i64,
    limit: usize,
) -> rusqlite::Result<Vec<PendingDelivery>> {
    let read = |row: &Row<'_>| {
        let payment = match row.get_ref(0)? {
            rusqlite::types::ValueRef::Null => Err("its payment does not exist".to_owned()),
            _ => payment::read_payment_row(row)
                .map_err(|error| format!("its payment cannot be read: {error}")),
        };
        Ok(PendingDelivery {
            payment,
            outbox_id: row.get(COLUMN_COUNT)?,
            created_at: Timestamp::from_micros(row.get(COLUMN_COUNT + 1)?),
            trace_id: match row.get_ref(COLUMN_COUNT + 2)? {
                rusqlite::types::ValueRef::Text(parent) => std::str::from_utf8(parent)
                    .ok()
                    .and_then(recorded_trace_id)
                    .map(str::to_owned),
                _ => None,
            },
        })
    };
    connection
        .prepare_cached(&format!(
            "SELECT {COLUMNS}, d.outbox_id, ifnull(o.created_at, d.created_at), o.traceparent \
                FROM delivery d LEFT JOIN outbox o ON o.id = d.outbox_id LEFT \
                JOIN payment p ON p.id = o.payment_id WHERE d.channel = ?1 \
                AND d.status IN ('PENDING', 'SENDING') AND d.status IN ({statuses}) \
                AND d.outbox_id > ?3 ORDER BY d.outbox_id LIMIT ?2"
        ))?
        .query_map((channel, row_limit(limit), after), read)?
        .collect()
}

/// Whether more than this number wait for a channel.
pub fn has_more_deliveries_than(
    connection: &Connection,
    channel: &str,
    count: usize,
) -> rusqlite::Result<bool> {
    connection
        .prepare_cached(
            "SELECT 1 FROM delivery WHERE channel = ?1 AND status IN ('PENDING', 'SENDING') \
             ORDER BY outbox_id LIMIT 1 OFFSET ?2",
        )?
        .exists((channel, row_limit(count)))
}

/// Marks deliveries as SENDING before their POST: if the process ends before the outcome is
/// recorded, the outcome is unknown.
pub fn mark_deliveries_sending(tx: &Transaction<'_>, outbox_ids: &[i64]) -> rusqlite::Result<()> {
    let mut update = tx.prepare_cached(
        "UPDATE delivery SET status = 'SENDING' WHERE outbox_id BETWEEN ?1 AND ?2 \
            AND status = 'PENDING'",
    )?;
    for run in id_runs(outbox_ids) {
        update.execute((run.start(), run.end()))?;
    }
    Ok(())
}

/// Marks the oldest PENDING deliveries of a channel after an event as SENDING, and returns them: a
/// part of a summary.
pub fn begin_sending_deliveries(
    tx: &Transaction<'_>,
    channel: &str,
    after: i64,
    limit: usize,
) -> rusqlite::Result<Vec<PendingDelivery>> {
    let waiting = read_pending_deliveries(tx, channel, "'PENDING'", after, limit)?;
    let readable: Vec<i64> = waiting
        .iter()
        .filter(|waiting| waiting.payment.is_ok())
        .map(|waiting| waiting.outbox_id)
        .collect();
    mark_deliveries_sending(tx, &readable)?;
    Ok(waiting)
}

text_enum! {
    /// The kind of message that carries a payment.
    pub enum Carrier {
        /// A message of its own, or a log line.
        Single = "single",
        /// A line of a digest.
        Digest = "digest",
        /// One of the payments that a summary counts.
        Summary = "summary",
    }
}

/// The outcome of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeliveryOutcome {
    /// The channel accepted it.
    Delivered(Carrier),
    /// Not sent: no attempt is counted.
    Requeued,
    /// The channel did not accept it, for this reason.
    Failed(String),
    /// No acknowledgement arrived: it may appear twice.
    Unknown(String),
}

/// Records the outcome for up to `limit` of a channel's SENDING deliveries up to an event. Returns
/// how many: fewer than `limit` when all are recorded.
pub fn save_delivery_outcomes(
    tx: &Transaction<'_>,
    channel: &str,
    last: i64,
    outcome: &DeliveryOutcome,
    limit: usize,
    now: Timestamp,
) -> rusqlite::Result<usize> {
    let ids: Vec<i64> = tx
        .prepare_cached(
            // The first condition selects the index.
            "SELECT outbox_id FROM delivery WHERE channel = ?1 \
                AND status IN ('PENDING', 'SENDING') AND outbox_id <= ?2 AND status = 'SENDING' \
                ORDER BY outbox_id LIMIT ?3",
        )?
        .query_map((channel, last, row_limit(limit)), |row| row.get(0))?
        .collect::<rusqlite::Result<_>>()?;
    record_delivery_outcome(tx, &ids, outcome, now)?;
    Ok(ids.len())
}

/// Requeues deliveries that were SENDING when the process ended, and counts their outcome as
/// unknown. Returns how many.
pub fn recover_deliveries(tx: &Transaction<'_>) -> rusqlite::Result<usize> {
    // The first condition selects the index: without it every finished row would be read.
    tx.execute(
        "UPDATE delivery SET status = 'PENDING', attempts = attempts + 1, unknown_outcomes = \
            unknown_outcomes + 1, last_error = 'payrelay ended before the answer was recorded' \
            WHERE status IN ('PENDING', 'SENDING') AND status = 'SENDING'",
        [],
    )
}

/// Records the outcome for these deliveries, if they still wait.
pub fn record_delivery_outcome(
    tx: &Transaction<'_>,
    outbox_ids: &[i64],
    outcome: &DeliveryOutcome,
    now: Timestamp,
) -> rusqlite::Result<()> {
    match outcome {
        DeliveryOutcome::Delivered(carrier) => {
            mark_deliveries_delivered(tx, outbox_ids, *carrier, now)
        }
        DeliveryOutcome::Requeued => {
            let sql = "UPDATE delivery SET status = 'PENDING' WHERE outbox_id BETWEEN ?1 AND ?2 \
                AND status = 'SENDING'";
            let mut update = tx.prepare_cached(sql)?;
            for run in id_runs(outbox_ids) {
                update.execute((run.start(), run.end()))?;
            }
            Ok(())
        }
        DeliveryOutcome::Failed(error) => mark_deliveries_failed(tx, outbox_ids, error, 0),
        DeliveryOutcome::Unknown(error) => mark_deliveries_failed(tx, outbox_ids, error, 1),
    }
}

/// Records that a channel accepted messages.
pub fn mark_deliveries_delivered(
    tx: &Transaction<'_>,
    outbox_ids: &[i64],
    carrier: Carrier,
    now: Timestamp,
) -> rusqlite::Result<()> {
    let mut mark = tx.prepare_cached(
        "UPDATE delivery SET status = 'DELIVERED', delivered_at = ?3, delivered_in = ?4, attempts \
            = attempts + 1 WHERE outbox_id BETWEEN ?1 AND ?2 \
            AND status IN ('PENDING', 'SENDING')",
    )?;
    for run in id_runs(outbox_ids) {
        mark.execute((run.start(), run.end(), now.as_micros(), carrier))?;
    }
    Ok(())
}

/// Records that messages were not accepted. `unknown_outcomes` is 1 if that is uncertain, else 0.
fn mark_deliveries_failed(
    tx: &Transaction<'_>,
    outbox_ids: &[i64],
    error: &str,
    unknown_outcomes: i64,
) -> rusqlite::Result<()> {
    let mut mark = tx.prepare_cached(
        "UPDATE delivery SET status = 'PENDING', attempts = attempts + 1, unknown_outcomes = \
            unknown_outcomes + ?4, last_error = ?3 WHERE outbox_id BETWEEN ?1 AND ?2 \
            AND status IN ('PENDING', 'SENDING')",
    )?;
    for run in id_runs(outbox_ids) {
        mark.execute((run.start(), run.end(), error, unknown_outcomes))?;
    }
    Ok(())
}

/// Discards a dead letter's delivery: one that could not be sent, or one of an event that could not
/// be published and so never arrived.
pub(super) fn discard_delivery(
    tx: &Transaction<'_>,
    outbox_id: i64,
    now: Timestamp,
) -> rusqlite::Result<()> {
    tx.prepare_cached(
        "UPDATE delivery SET status = 'DISCARDED' WHERE outbox_id = ?1 AND status = 'DEAD'",
    )?
    .execute([outbox_id])?;
    tx.prepare_cached(concat!(
        "INSERT INTO delivery (outbox_id, channel, status, created_at) SELECT ?1, ",
        channel_of!("?1"),
        ", 'DISCARDED', ?2 WHERE EXISTS (SELECT 1 FROM outbox \
            WHERE id = ?1 AND status = 'REJECTED') ON CONFLICT (outbox_id) DO NOTHING"
    ))?
    .execute((outbox_id, now.as_micros()))?;
    Ok(())
}

/// A delivery that was skipped: its payment, and its dead letter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SkippedDelivery {
    /// The payment; `None` if it cannot be read.
    pub payment_id: Option<i64>,
    /// The id of the dead letter.
    pub dead_letter_id: i64,
}

/// Dead-letters the oldest waiting delivery of a channel.
pub fn skip_oldest_delivery(
    tx: &Transaction<'_>,
    channel: &str,
    reason: &str,
    now: Timestamp,
) -> rusqlite::Result<Option<SkippedDelivery>> {
    let oldest = pending_deliveries(tx, channel, 1)?
        .first()
        .map(|waiting| waiting.outbox_id);
    let Some(outbox_id) = oldest else {
        return Ok(None);
    };
    mark_delivery_dead(tx, outbox_id, Some(reason), now)?;
    tx.prepare_cached("SELECT id, payment_id FROM dead_letter WHERE outbox_id = ?1")?
        .query_row([outbox_id], |row| {
            Ok(SkippedDelivery {
                dead_letter_id: row.get(0)?,
                payment_id: row.get(1)?,
            })
        })
        .map(Some)
}

/// Dead-letters a delivery that cannot be sent as it is; without a reason, that of its last failure
/// applies.
pub fn mark_delivery_dead(
    tx: &Transaction<'_>,
    outbox_id: i64,
    reason: Option<&str>,
    now: Timestamp,
) -> rusqlite::Result<()> {
    let reason: Option<Option<String>> = tx
        .prepare_cached(
            "UPDATE delivery SET status = 'DEAD', last_error = ifnull(?2, last_error) \
             WHERE outbox_id = ?1 AND status IN ('PENDING', 'SENDING') RETURNING last_error",
        )?
        .query_row((outbox_id, reason), |row| row.get(0))
        .optional()?;
    match reason {
        Some(reason) => {
            dead_letter::insert_dead_event(tx, outbox_id, &reason.unwrap_or_default(), now)
        }
        None => Ok(()),
    }
}
