//! The outbox: a row for each event, INIT until it is acknowledged, PUBLISHED afterwards.
//!
//! Ids are in commit order, because there is one writer. The relay reads and marks; only
//! [`purge_outbox`] deletes.

use super::id_runs::id_runs;
use super::node_role::{advance_edge_mark, purgeable_edge_events};
use super::row::row_limit;
use crate::domain::event::{Event, EventRef, EventType};
use crate::domain::payment::Payment;
use crate::domain::payment_record::RecordFormat;
use crate::domain::text_enum::text_enum;
use crate::domain::timestamp::Timestamp;
use crate::domain::trace_context::TraceContext;
use rusqlite::{Connection, OptionalExtension, Row, Statement, Transaction};

text_enum! {
    /// The status of an event in the outbox.
    pub enum EventStatus {
        /// It waits to be published.
        Init = "INIT",
        /// The publisher has its acknowledgement.
        Published = "PUBLISHED",
        /// The broker rejects it as it is, and it is a dead letter.
        Rejected = "REJECTED",
    }
}

/// What [`insert_outbox_row`] runs.
pub(super) const INSERT_OUTBOX_EVENT: &str = "INSERT INTO outbox (payment_id, user_id, type, \
    traceparent, tracestate, created_at) VALUES (?1, ?2, ?3, ?4, ?5, ?6)";

/// Inserts the event of a payment of a user.
pub(super) fn insert_outbox_row(
    insert: &mut Statement<'_>,
    (payment_id, user_id): (i64, i64),
    kind: EventType,
    trace: Option<&TraceContext>,
    now: Timestamp,
) -> rusqlite::Result<()> {
    insert.execute((
        payment_id,
        user_id,
        kind,
        trace.map(|trace| &trace.parent),
        trace.and_then(|trace| trace.state.as_ref()),
        now.as_micros(),
    ))?;
    Ok(())
}

/// The oldest unpublished events with a larger id than `after`, in commit order. With
/// [`RecordFormat::Json`] they have their payments.
pub fn unpublished_outbox_events(
    connection: &Connection,
    after: i64,
    limit: usize,
    format: RecordFormat,
) -> rusqlite::Result<Vec<Event>> {
    let sql = match format {
        RecordFormat::Id => UNPUBLISHED_EVENTS,
        RecordFormat::Json => UNPUBLISHED_EVENTS_WITH_PAYMENTS,
    };
    connection
        .prepare_cached(sql)?
        .query_map((after, row_limit(limit)), |row| read_event_row(row, format))?
        .collect()
}

const UNPUBLISHED_EVENTS: &str = "SELECT id, payment_id, user_id, type, created_at, traceparent, \
    tracestate FROM outbox WHERE status = 'INIT' AND id > ?1 ORDER BY id LIMIT ?2";

const UNPUBLISHED_EVENTS_WITH_PAYMENTS: &str = "SELECT o.id, o.payment_id, o.user_id, o.type, \
    o.created_at, o.traceparent, o.tracestate, p.reservation_id, p.amount, p.currency, p.status, \
    p.failure, p.executed_at FROM outbox o JOIN payment p ON p.id = o.payment_id \
    WHERE o.status = 'INIT' AND o.id > ?1 ORDER BY o.id LIMIT ?2";

fn read_event_row(row: &Row<'_>, format: RecordFormat) -> rusqlite::Result<Event> {
    let payment_id = row.get(1)?;
    let user_id = row.get(2)?;
    let payment = match format {
        RecordFormat::Id => None,
        RecordFormat::Json => Some(Payment {
            id: payment_id,
            user_id,
            reservation_id: row.get(7)?,
            amount: row.get(8)?,
            currency: row.get(9)?,
            status: row.get(10)?,
            failure: row.get(11)?,
            executed_at: Timestamp::from_micros(row.get(12)?),
            paid_by: None,
        }),
    };
    Ok(Event {
        outbox_id: row.get(0)?,
        payment_id,
        user_id,
        kind: row.get(3)?,
        created_at: Timestamp::from_micros(row.get(4)?),
        trace: match row.get(5)? {
            Some(parent) => Some(TraceContext {
                parent,
                state: row.get(6)?,
            }),
            None => None,
        },
        payment,
    })
}

/// How an event of the topic compares with the outbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OutboxMatch {
    /// The outbox has this event.
    Same,
    /// The outbox has another event with this id.
    Other,
    /// The outbox has no event with this id.
    Missing,
}

/// Whether a row of the outbox is this event: a record may lack the time.
fn is_same_event(event: EventRef, payment_id: i64, created_at: i64) -> bool {
    let is_same_time = event
        .created_at
        .is_none_or(|time| time.as_micros() == created_at);
    event.payment_id == payment_id && is_same_time
}

/// Whether the outbox has each of these events, whose ids rise by one.
pub(super) fn outbox_has_events(
    connection: &Connection,
    events: &[EventRef],
) -> rusqlite::Result<bool> {
    let (Some(first), Some(last)) = (events.first(), events.last()) else {
        return Ok(true);
    };
    let mut statement = connection.prepare_cached(
        "SELECT id, payment_id, created_at FROM outbox WHERE id BETWEEN ?1 AND ?2 ORDER BY id",
    )?;
    let mut rows = statement.query((first.outbox_id, last.outbox_id))?;
    for event in events {
        let Some(row) = rows.next()? else {
            return Ok(false);
        };
        let id: i64 = row.get(0)?;
        if id != event.outbox_id || !is_same_event(*event, row.get(1)?, row.get(2)?) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Looks for an event of the topic in the outbox.
pub(super) fn match_outbox_event(
    connection: &Connection,
    event: EventRef,
) -> rusqlite::Result<OutboxMatch> {
    let found: Option<(i64, i64)> = connection
        .prepare_cached("SELECT payment_id, created_at FROM outbox WHERE id = ?1")?
        .query_row([event.outbox_id], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()?;
    let Some((payment_id, created_at)) = found else {
        return Ok(OutboxMatch::Missing);
    };
    Ok(if is_same_event(event, payment_id, created_at) {
        OutboxMatch::Same
    } else {
        OutboxMatch::Other
    })
}

/// Whether this id has been issued, or skipped.
pub(super) fn outbox_id_was_issued(
    connection: &Connection,
    outbox_id: i64,
) -> rusqlite::Result<bool> {
    connection
        .prepare_cached("SELECT 1 FROM sqlite_sequence WHERE name = 'outbox' AND seq >= ?1")?
        .exists([outbox_id])
}

/// Events that are on no topic, and have no delivery: only this database knows their ids.
const UNPUBLISHED: &str = "status IN ('INIT', 'REJECTED') AND NOT EXISTS (SELECT 1 \
    FROM delivery d WHERE d.outbox_id = outbox.id)";

/// Whether an event is on no topic, and has no delivery.
pub(super) fn is_unpublished_outbox_event(
    connection: &Connection,
    outbox_id: i64,
) -> rusqlite::Result<bool> {
    connection
        .prepare_cached(&format!(
            "SELECT 1 FROM outbox WHERE id = ?1 AND {UNPUBLISHED}"
        ))?
        .exists([outbox_id])
}

/// Gives unpublished events new ids, in their order, from `first` on: the topic has their ids under
/// other payments. [`reconcile_topic`](super::topic::reconcile_topic) has advanced the sequence
/// past every id of the topic. Returns how many.
pub fn renumber_outbox(tx: &Transaction<'_>, first: i64) -> rusqlite::Result<usize> {
    let ids: Vec<i64> = tx
        .prepare_cached(&format!(
            "SELECT id FROM outbox WHERE id >= ?1 AND {UNPUBLISHED} ORDER BY id"
        ))?
        .query_map([first], |row| row.get(0))?
        .collect::<rusqlite::Result<_>>()?;
    move_outbox_events(tx, &ids)?;
    Ok(ids.len())
}

/// Makes up to `limit` published events of an edge wait again, under new ids. What this node has
/// delivered itself stays.
pub fn republish_outbox(
    tx: &Transaction<'_>,
    from: i64,
    through: i64,
    limit: usize,
) -> rusqlite::Result<Republished> {
    let ids: Vec<i64> = tx
        .prepare_cached(
            "SELECT id FROM outbox o WHERE id BETWEEN ?1 AND ?2 AND status = 'PUBLISHED' \
                AND NOT EXISTS (SELECT 1 FROM delivery d WHERE d.outbox_id = o.id) \
                ORDER BY id LIMIT ?3",
        )?
        .query_map((from, through, row_limit(limit)), |row| row.get(0))?
        .collect::<rusqlite::Result<_>>()?;
    let mut waits = tx.prepare_cached(
        "UPDATE outbox SET status = 'INIT', published_at = NULL, \"partition\" = NULL, \
            \"offset\" = NULL WHERE id = ?1",
    )?;
    for id in &ids {
        waits.execute([id])?;
    }
    move_outbox_events(tx, &ids)?;
    Ok(Republished {
        count: ids.len(),
        next: ids
            .last()
            .filter(|_| ids.len() == limit)
            .map(|last| last + 1),
    })
}

/// The largest id of a published event.
pub fn last_published_event(connection: &Connection) -> rusqlite::Result<i64> {
    connection
        .prepare_cached(
            "SELECT ifnull((SELECT id FROM outbox WHERE status = 'PUBLISHED' \
                ORDER BY id DESC LIMIT 1), 0)",
        )?
        .query_row([], |row| row.get(0))
}

/// How many events wait to be published.
pub fn count_unpublished_events(connection: &Connection) -> rusqlite::Result<i64> {
    connection
        .prepare_cached("SELECT count(*) FROM outbox WHERE status = 'INIT'")?
        .query_row([], |row| row.get(0))
}

/// The first event that waits, if it comes before one that is on the topic. Readers of an edge drop
/// an id below the largest that they know.
pub fn first_unpublished_before(
    connection: &Connection,
    published: i64,
) -> rusqlite::Result<Option<i64>> {
    connection
        .prepare_cached(
            "SELECT id FROM outbox WHERE status = 'INIT' AND id < ?1 ORDER BY id LIMIT 1",
        )?
        .query_row([published], |row| row.get(0))
        .optional()
}

/// A part of what is to be published again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Republished {
    /// How many events wait again.
    pub count: usize,
    /// Where the next part begins; `None`: there is no more.
    pub next: Option<i64>,
}

/// Gives these events new ids, in their order, after all that were issued.
pub(super) fn move_outbox_events(tx: &Transaction<'_>, ids: &[i64]) -> rusqlite::Result<()> {
    let mut last: i64 = tx.query_row(
        "SELECT seq FROM sqlite_sequence WHERE name = 'outbox'",
        [],
        |row| row.get(0),
    )?;
    let mut event = tx.prepare_cached("UPDATE outbox SET id = ?2 WHERE id = ?1")?;
    let mut letter =
        tx.prepare_cached("UPDATE dead_letter SET outbox_id = ?2 WHERE outbox_id = ?1")?;
    for id in ids {
        last += 1;
        event.execute((id, last))?;
        letter.execute((id, last))?;
    }
    // A new payment gets the same id as its event.
    tx.execute(
        "UPDATE sqlite_sequence SET seq = ?1 WHERE name IN ('outbox', 'payment') AND seq < ?1",
        [last],
    )?;
    Ok(())
}

/// The event of a payment, as people see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventState {
    /// Its place in commit order.
    pub outbox_id: i64,
    /// Its status.
    pub status: EventStatus,
    /// Why it was rejected, if it was.
    pub rejection: Option<String>,
    /// When it was committed.
    pub created_at: Timestamp,
    /// When it was marked PUBLISHED.
    pub published_at: Option<Timestamp>,
    /// Its partition.
    pub partition: Option<i32>,
    /// Its offset.
    pub offset: Option<i64>,
    /// The trace of its request.
    pub traceparent: Option<String>,
}

pub(super) fn find_outbox_event_of_payment(
    connection: &Connection,
    payment_id: i64,
) -> rusqlite::Result<Option<EventState>> {
    connection
        .prepare_cached(
            "SELECT id, status, created_at, published_at, \"partition\", \"offset\", rejection, \
                traceparent FROM outbox WHERE (id = ?1 AND payment_id = id) \
                OR (payment_id = ?1 AND payment_id <> id)",
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
                traceparent: row.get(7)?,
            })
        })
        .optional()
}

/// Deletes at most `limit` events, with their deliveries, that were published and delivered before
/// `cutoff`; those of an edge once they are published. Returns how many, and adds that to
/// `node.events_purged`. Unfinished events stay, however old.
pub fn purge_outbox(
    tx: &Transaction<'_>,
    cutoff: Timestamp,
    limit: usize,
) -> rusqlite::Result<usize> {
    // Events that were found on the topic were marked without it.
    advance_edge_mark(tx)?;
    let mut ids: Vec<i64> = tx
        .prepare_cached(
            "SELECT d.outbox_id FROM delivery d JOIN outbox o ON o.id = d.outbox_id \
             WHERE d.status = 'DELIVERED' AND d.delivered_at < ?1 \
             AND o.status = 'PUBLISHED' AND o.published_at < ?1 \
             ORDER BY d.delivered_at LIMIT ?2",
        )?
        .query_map((cutoff.as_micros(), row_limit(limit)), |row| row.get(0))?
        .collect::<rusqlite::Result<_>>()?;
    let others = limit.saturating_sub(ids.len());
    ids.extend(purgeable_edge_events(tx, cutoff.as_micros(), others)?);
    let mut delivery =
        tx.prepare_cached("DELETE FROM delivery WHERE outbox_id BETWEEN ?1 AND ?2")?;
    let mut outbox = tx.prepare_cached("DELETE FROM outbox WHERE id BETWEEN ?1 AND ?2")?;
    for run in id_runs(&ids) {
        delivery.execute((run.start(), run.end()))?;
        outbox.execute((run.start(), run.end()))?;
    }
    if !ids.is_empty() {
        tx.prepare_cached("UPDATE node SET events_purged = events_purged + ?1")?
            .execute([row_limit(ids.len())])?;
    }
    Ok(ids.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::delivery;
    use crate::store::engine::open;
    use crate::store::publication::{Destination, Receipt, record_publication, reject_publication};
    use rusqlite::TransactionBehavior;

    /// Creates an event for each entry: its status, and `+` if it has a delivery. Then unpublished
    /// events from id `first` on get new ids. Returns all ids in the order of their payments.
    fn outbox_ids_after_renumbering(events: &[&str], first: i64) -> Vec<i64> {
        let dir = tempfile::tempdir().unwrap();
        let (mut connection, _) = open::open_database(&dir.path().join("a.db"), None).unwrap();
        let tx = Transaction::new(&mut connection, TransactionBehavior::Immediate).unwrap();
        for (id, event) in (1_i64..).zip(events) {
            insert_outbox_event_in_state(&tx, id, event);
        }
        tx.execute(
            "UPDATE sqlite_sequence SET seq = 100 WHERE name = 'outbox'",
            [],
        )
        .unwrap();
        let count = renumber_outbox(&tx, first).unwrap();
        let ids: Vec<i64> = (tx
            .prepare("SELECT id FROM outbox ORDER BY payment_id")
            .unwrap())
        .query_map([], |row| row.get(0))
        .unwrap()
        .collect::<rusqlite::Result<_>>()
        .unwrap();
        assert_eq!(ids.iter().filter(|id| **id > 100).count(), count);
        let letters = "SELECT count(*) FROM dead_letter l JOIN outbox o ON o.id = l.outbox_id \
            WHERE o.status = 'REJECTED'";
        let rejected = row_limit(
            events
                .iter()
                .filter(|event| event.starts_with("REJECTED"))
                .count(),
        );
        assert_eq!(
            tx.query_row(letters, [], |row| row.get::<_, i64>(0))
                .unwrap(),
            rejected,
            "each keeps its dead letter"
        );
        // The next payment's event follows them.
        insert_next_outbox_event(&tx);
        let next: i64 = tx
            .query_row("SELECT max(id) FROM outbox", [], |row| row.get(0))
            .unwrap();
        assert_eq!(next, 101 + row_limit(count));
        ids
    }

    fn insert_event(tx: &Transaction<'_>, payment_id: i64, now: Timestamp) {
        let mut insert = tx.prepare(INSERT_OUTBOX_EVENT).unwrap();
        insert_outbox_row(
            &mut insert,
            (payment_id, 1),
            EventType::Completed,
            None,
            now,
        )
        .unwrap();
    }

    /// Inserts a payment with its event, in a status, and with a delivery for `+`.
    fn insert_outbox_event_in_state(tx: &Transaction<'_>, id: i64, event: &str) {
        let now = Timestamp::now();
        tx.execute(
            "INSERT INTO payment VALUES (?1, 1, ?1, 1, 'KRW', 'COMPLETED', NULL, ?1, NULL)",
            [id],
        )
        .unwrap();
        insert_event(tx, id, now);
        if event.starts_with("REJECTED") {
            reject_publication(tx, id, "no", now).unwrap();
        }
        if event.starts_with("PUBLISHED") {
            let receipt = Receipt {
                outbox_id: id,
                place: Destination::Topic {
                    partition: 0,
                    offset: Some(id),
                },
            };
            record_publication(tx, &receipt, now).unwrap();
        }
        if event.ends_with('+') {
            delivery::insert_delivery(tx, id, now).unwrap();
        }
    }

    fn insert_next_outbox_event(tx: &Transaction<'_>) {
        tx.execute(
            "INSERT INTO payment VALUES (1000, 1, 1000, 1, 'KRW', 'COMPLETED', NULL, 1, NULL)",
            [],
        )
        .unwrap();
        insert_event(tx, 1000, Timestamp::now());
    }

    #[test]
    fn unpublished_outbox_events_get_new_ids_in_their_order() {
        assert_eq!(
            outbox_ids_after_renumbering(&["INIT", "INIT", "INIT"], 1),
            [101, 102, 103]
        );
        assert_eq!(
            outbox_ids_after_renumbering(&["INIT", "INIT", "INIT"], 2),
            [1, 101, 102]
        );
        assert_eq!(
            outbox_ids_after_renumbering(
                &["PUBLISHED+", "INIT", "PUBLISHED", "REJECTED", "INIT"],
                1
            ),
            [1, 101, 3, 102, 103]
        );
        // A discarded event, or one that arrived before its mark, has a delivery under its id.
        assert_eq!(
            outbox_ids_after_renumbering(&["REJECTED+", "INIT+", "INIT"], 1),
            [1, 2, 101]
        );
        assert_eq!(outbox_ids_after_renumbering(&["INIT"], 2), [1]);
    }
}
