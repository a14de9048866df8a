//! Published events without a delivery, found above one low-water mark.
//!
//! Every event up to `node.consumed_through` has a delivery, is REJECTED, or was purged. The mark
//! moves only over rows that were read, a bounded number in each transaction; a REJECTED event that
//! is published again moves it back. So nothing here scans the outbox. Above the mark there are few
//! rows unless there is a fault.

use super::delivery::{self, DeliveryInsert};
use super::node_role;
use super::row::row_limit;
use super::waiting::Waiting;
use crate::domain::node_role::NodeRole;
use crate::domain::timestamp::Timestamp;
use crate::domain::topic::Topic;
use rusqlite::{Connection, OptionalExtension, Row, Transaction};

/// How many rows one page reads.
const PAGE_ROWS: usize = 10_000;

/// The rows above an id, in commit order. The columns: the id, whether it is REJECTED, when it was
/// published, whether it has a delivery, its partition, its offset.
const ROWS_ABOVE: &str = "SELECT o.id, o.status = 'REJECTED', o.published_at, \
     EXISTS (SELECT 1 FROM delivery d WHERE d.outbox_id = o.id), o.\"partition\", o.\"offset\" \
     FROM outbox o WHERE o.id > ?1 ORDER BY o.id LIMIT ?2";

/// A published event without a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unconsumed {
    /// Its place in commit order.
    pub outbox_id: i64,
    /// Its partition; `None` if it was not published to a topic.
    pub partition: Option<i32>,
    /// Its offset, if the broker reported it.
    pub offset: Option<i64>,
    /// When it was marked PUBLISHED.
    pub published_at: Timestamp,
}

/// The published events without a delivery among the next 10,000 rows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UnconsumedPage {
    /// In commit order.
    pub events: Vec<Unconsumed>,
    /// The id after which the next page begins; `None` for the last page.
    pub next: Option<i64>,
}

/// The low-water mark.
pub(super) fn unconsumed_low_water_mark(connection: &Connection) -> rusqlite::Result<i64> {
    connection
        .prepare_cached("SELECT max(consumed_through, edge_through) FROM node")?
        .query_row([], |row| row.get(0))
}

/// The page after an id, or after the mark if that is later. Costs a few milliseconds at most.
pub fn page_of_unconsumed(connection: &Connection, after: i64) -> rusqlite::Result<UnconsumedPage> {
    let mut page = UnconsumedPage::default();
    let mut rows_seen = 0;
    let mut statement = connection.prepare_cached(ROWS_ABOVE)?;
    let mut rows = statement.query((
        unconsumed_low_water_mark(connection)?.max(after),
        row_limit(PAGE_ROWS),
    ))?;
    while let Some(row) = rows.next()? {
        rows_seen += 1;
        let outbox_id = row.get(0)?;
        page.next = Some(outbox_id).filter(|_| rows_seen == PAGE_ROWS);
        let published_at: Option<i64> = row.get(2)?;
        let has_delivery: bool = row.get(3)?;
        if let Some(published_at) = published_at.filter(|_| !has_delivery) {
            let published_at = Timestamp::from_micros(published_at);
            page.events.push(Unconsumed {
                outbox_id,
                partition: row.get(4)?,
                offset: row.get(5)?,
                published_at,
            });
        }
    }
    Ok(page)
}

/// How many events are PUBLISHED and have no delivery, and when the first of them was published.
/// That is not when it was committed: it may have waited for Kafka for hours. After the first page
/// the number is an estimate.
pub fn count_unconsumed(connection: &Connection) -> rusqlite::Result<Waiting> {
    first_page_of_unconsumed(connection).map(|(waiting, _)| waiting)
}

/// The same, with the first page.
pub fn first_page_of_unconsumed(
    connection: &Connection,
) -> rusqlite::Result<(Waiting, UnconsumedPage)> {
    let page = page_of_unconsumed(connection, 0)?;
    let events = &page.events;
    let last = events
        .last()
        .map(|event| event.outbox_id)
        .filter(|last| Some(*last) == page.next);
    let beyond = last.map_or(Ok(0), |last| {
        count_unconsumed_ids_before_init(connection, last)
    })?;
    let oldest_at = events.iter().map(|event| event.published_at).min();
    let waiting = Waiting {
        count: row_limit(events.len()) + beyond,
        oldest_at,
    };
    Ok((waiting, page))
}

/// How many ids there are from an event to the first one that is not published.
fn count_unconsumed_ids_before_init(connection: &Connection, after: i64) -> rusqlite::Result<i64> {
    let init: Option<i64> = connection
        .prepare_cached(
            "SELECT id FROM outbox WHERE status = 'INIT' AND id > ?1 ORDER BY id LIMIT 1",
        )?
        .query_row([after], |row| row.get(0))
        .optional()?;
    let end = match init {
        Some(init) => init,
        None => connection
            .prepare_cached("SELECT max(id) + 1 FROM outbox")?
            .query_row([], |row| row.get(0))?,
    };
    Ok(end - after - 1)
}

/// Moves the mark over up to `limit` rows. Returns whether there may be more.
pub fn advance_unconsumed_mark(tx: &Transaction<'_>, limit: usize) -> rusqlite::Result<bool> {
    let before = unconsumed_low_water_mark(tx)?;
    let mut reached = before;
    let mut moved = 0;
    let mut statement = tx.prepare_cached(ROWS_ABOVE)?;
    let mut rows = statement.query((before, row_limit(limit)))?;
    while let Some(row) = rows.next()? {
        let rejected: bool = row.get(1)?;
        let has_delivery: bool = row.get(3)?;
        if !rejected && !has_delivery {
            break;
        }
        moved += 1;
        reached = row.get(0)?;
    }
    if reached > before {
        tx.prepare_cached("UPDATE node SET consumed_through = ?1")?
            .execute([reached])?;
    }
    Ok(moved == limit)
}

/// Backfills the deliveries of published events that no topic will bring any more. Returns how many
/// had none. Those count as gaps of their partitions of `topic`.
pub fn backfill_unconsumed(
    tx: &Transaction<'_>,
    topic: Option<&Topic>,
    ids: &[i64],
    now: Timestamp,
) -> rusqlite::Result<usize> {
    let mut count = 0;
    for id in ids {
        // Its state may have changed since the search.
        let published: Option<Option<i32>> = tx
            .prepare_cached(
                "SELECT \"partition\" FROM outbox WHERE id = ?1 AND status = 'PUBLISHED'",
            )?
            .query_row([id], |row| row.get(0))
            .optional()?;
        let Some(partition) = published else { continue };
        if delivery::insert_delivery(tx, *id, now)? == DeliveryInsert::Existing {
            continue;
        }
        count += 1;
        if let Some(topic) = topic {
            let sql = "UPDATE topic_partition SET gaps = gaps + 1 WHERE topic = ?1 \
                AND topic_id = ?2 AND \"partition\" = ?3";
            tx.prepare_cached(sql)?
                .execute((&topic.name, topic.id, partition))?;
        }
    }
    advance_unconsumed_mark(tx, 2 * ids.len())?;
    Ok(count)
}

/// How many events this node still has to deliver itself: before that it cannot be an edge.
pub fn count_own_deliveries(connection: &Connection) -> rusqlite::Result<i64> {
    let sql = "SELECT count(*) FROM delivery WHERE status IN ('PENDING', 'SENDING', 'DEAD')";
    let deliveries: i64 = connection.query_row(sql, [], |row| row.get(0))?;
    // Delivered, and not marked as published: as an edge this node would publish them again.
    let sql = "SELECT count(*) FROM outbox o JOIN delivery d ON d.outbox_id = o.id \
        WHERE o.status = 'INIT' AND d.status NOT IN ('PENDING', 'SENDING', 'DEAD')";
    let unmarked: i64 = connection.query_row(sql, [], |row| row.get(0))?;
    let deliveries = deliveries + unmarked;
    if node_role::node_role(connection)? == NodeRole::Edge {
        return Ok(deliveries);
    }
    Ok(deliveries + count_unconsumed(connection)?.count)
}

/// Whether the low-water mark lags: the row after it has a delivery or is REJECTED.
pub fn is_unconsumed_mark_behind(connection: &Connection) -> rusqlite::Result<bool> {
    let next = |row: &Row<'_>| Ok(row.get(1)? || row.get(3)?);
    let found = connection
        .prepare_cached(ROWS_ABOVE)?
        .query_row((unconsumed_low_water_mark(connection)?, 1), next)
        .optional()?;
    Ok(found.unwrap_or(false))
}

/// Moves the mark back before an event that is published again.
pub(super) fn move_unconsumed_mark_back(
    tx: &Transaction<'_>,
    outbox_id: i64,
) -> rusqlite::Result<()> {
    let sql = "UPDATE node SET consumed_through = min(consumed_through, ?1 - 1)";
    tx.prepare_cached(sql)?.execute([outbox_id]).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::engine::open;
    use rusqlite::TransactionBehavior;

    /// Runs `work` on a database with these events: their statuses, and a `+` after those that have
    /// a delivery.
    fn with_unconsumed_events<T>(events: &[&str], work: impl FnOnce(&Transaction<'_>) -> T) -> T {
        let dir = tempfile::tempdir().unwrap();
        let (mut connection, _) = open::open_database(&dir.path().join("a.db"), None).unwrap();
        let tx = Transaction::new(&mut connection, TransactionBehavior::Immediate).unwrap();
        for (id, event) in (1_i64..).zip(events) {
            let status = event.trim_end_matches('+');
            tx.execute(
                "INSERT INTO payment VALUES (?1, 1, ?1, 1, 'KRW', 'COMPLETED', NULL, ?1, NULL)",
                [id],
            )
            .unwrap();
            tx.execute(
                "INSERT INTO outbox (id, payment_id, user_id, type, status, rejection, \
                    created_at, published_at) VALUES (?1, ?1, 1, 'payment.completed', ?2, iif(?2 \
                    = 'REJECTED', 'no', NULL), ?1, iif(?2 = 'PUBLISHED', 100 + ?1, NULL))",
                (id, status),
            )
            .unwrap();
            if event.ends_with('+') {
                tx.execute(
                    "INSERT INTO delivery (outbox_id, channel, created_at) \
                    VALUES (?1, 'default', 1)",
                    [id],
                )
                .unwrap();
            }
        }
        work(&tx)
    }

    fn counted_unconsumed(tx: &Transaction<'_>) -> (i64, Option<i64>) {
        let Waiting { count, oldest_at } = count_unconsumed(tx).unwrap();
        (count, oldest_at.map(Timestamp::as_micros))
    }

    #[test]
    fn the_unconsumed_mark_passes_deliveries_and_rejected_events_and_stops_before_others() {
        for (events, through, unconsumed) in [
            (&[][..], 0, (0, None)),
            (&["PUBLISHED+", "REJECTED", "PUBLISHED+"], 3, (0, None)),
            (&["PUBLISHED+", "INIT", "PUBLISHED+"], 1, (0, None)),
            (
                &["PUBLISHED+", "PUBLISHED", "PUBLISHED+", "PUBLISHED"],
                1,
                (2, Some(102)),
            ),
            // A consumer may see an event before its mark.
            (&["INIT+", "INIT"], 1, (0, None)),
        ] {
            with_unconsumed_events(events, |tx| {
                assert!(!advance_unconsumed_mark(tx, 100).unwrap());
                assert_eq!(
                    (
                        unconsumed_low_water_mark(tx).unwrap(),
                        counted_unconsumed(tx)
                    ),
                    (through, unconsumed),
                    "{events:?}"
                );
            });
        }
    }

    #[test]
    fn the_unconsumed_mark_moves_over_a_bounded_number_of_rows() {
        with_unconsumed_events(&["PUBLISHED+"; 5], |tx| {
            assert!(advance_unconsumed_mark(tx, 2).unwrap());
            assert_eq!(unconsumed_low_water_mark(tx).unwrap(), 2);
            assert!(advance_unconsumed_mark(tx, 2).unwrap());
            assert!(!advance_unconsumed_mark(tx, 2).unwrap());
            assert_eq!(unconsumed_low_water_mark(tx).unwrap(), 5);
        });
    }

    #[test]
    fn a_node_has_own_deliveries_until_each_event_of_the_topic_is_delivered() {
        with_unconsumed_events(&["PUBLISHED+", "PUBLISHED", "INIT"], |tx| {
            let count = |tx| count_own_deliveries(tx).unwrap();
            assert_eq!(count(tx), 2, "one waits, one is unconsumed");
            tx.execute("DELETE FROM outbox WHERE id = 2", []).unwrap();
            let delivered = "UPDATE delivery SET status = 'DELIVERED', delivered_at = 1";
            tx.execute(delivered, []).unwrap();
            assert_eq!(count(tx), 0, "unpublished events may wait");
        });
    }

    #[test]
    fn purged_events_do_not_stop_the_unconsumed_mark() {
        with_unconsumed_events(&["PUBLISHED+"; 5], |tx| {
            tx.execute_batch(
                "DELETE FROM delivery WHERE outbox_id < 5; DELETE FROM outbox WHERE id < 5",
            )
            .unwrap();
            assert!(!advance_unconsumed_mark(tx, 2).unwrap());
            assert_eq!(unconsumed_low_water_mark(tx).unwrap(), 5);
        });
    }

    #[test]
    fn a_republished_event_counts_as_unconsumed_again() {
        with_unconsumed_events(&["PUBLISHED+", "REJECTED", "PUBLISHED+"], |tx| {
            advance_unconsumed_mark(tx, 100).unwrap();
            assert!(crate::store::dead_letter_action::replay_rejected_event(tx, 2).unwrap());
            advance_unconsumed_mark(tx, 100).unwrap();
            assert_eq!(
                (
                    unconsumed_low_water_mark(tx).unwrap(),
                    counted_unconsumed(tx)
                ),
                (1, (0, None))
            );
            tx.execute(
                "UPDATE outbox SET status = 'PUBLISHED', published_at = 7 WHERE id = 2",
                [],
            )
            .unwrap();
            assert_eq!(counted_unconsumed(tx), (1, Some(7)));
        });
    }

    #[test]
    fn a_long_backlog_of_unconsumed_events_is_estimated() {
        let rows = PAGE_ROWS + 5;
        let mut events = vec!["PUBLISHED"; rows];
        with_unconsumed_events(&events, |tx| {
            assert_eq!(counted_unconsumed(tx), (row_limit(rows), Some(101)));
        });
        events.push("INIT");
        with_unconsumed_events(&events, |tx| {
            assert_eq!(counted_unconsumed(tx), (row_limit(rows), Some(101)));
        });
        // All but the first have a delivery, so nothing is estimated.
        events = vec!["PUBLISHED+"; rows];
        events[0] = "PUBLISHED";
        with_unconsumed_events(&events, |tx| {
            assert_eq!(counted_unconsumed(tx), (1, Some(101)));
        });
    }
}
