//! Events that were published and have no delivery: found above one low-water mark.
//!
//! Every event up to `node.consumed_through` has a delivery, is REJECTED, or was purged. The mark only moves over rows that
//! were looked at, a bounded number in each transaction; a REJECTED event that is sent again moves it back. So nothing
//! here scans the outbox, and what is above the mark is short unless something is wrong.

use rusqlite::{Connection, OptionalExtension, Transaction};

use super::backlog::Waiting;
use super::sql_limit;
use crate::clock::Timestamp;

/// How many rows above the mark one count looks at.
const COUNTED_ROWS: usize = 10_000;

/// The rows above an id, in commit order: whether each is REJECTED, when it was published, whether it has a delivery.
const ROWS_ABOVE: &str = "SELECT o.id, o.status = 'REJECTED', o.published_at, \
     EXISTS (SELECT 1 FROM delivery d WHERE d.outbox_id = o.id) FROM outbox o WHERE o.id > ?1 ORDER BY o.id LIMIT ?2";

/// The low-water mark.
pub(super) fn mark(connection: &Connection) -> rusqlite::Result<i64> {
    connection.prepare_cached("SELECT consumed_through FROM node")?.query_row([], |row| row.get(0))
}

/// The events that are PUBLISHED and have no delivery, and when the first of them was published: it may have waited for Kafka
/// for hours before that. Beyond 10,000 rows above the mark the count is an estimate. Costs a few milliseconds at most.
pub fn count(connection: &Connection) -> rusqlite::Result<Waiting> {
    let mut found = Waiting::default();
    let mut rows_seen = 0;
    let mut last: Option<i64> = None;
    let mut statement = connection.prepare_cached(ROWS_ABOVE)?;
    let mut rows = statement.query((mark(connection)?, sql_limit(COUNTED_ROWS)))?;
    while let Some(row) = rows.next()? {
        rows_seen += 1;
        last = None;
        let published_at: Option<i64> = row.get(2)?;
        let has_delivery: bool = row.get(3)?;
        if let Some(published_at) = published_at.filter(|_| !has_delivery) {
            let published_at = Timestamp::from_micros(published_at);
            found.count += 1;
            found.oldest_at = Some(found.oldest_at.map_or(published_at, |oldest| oldest.min(published_at)));
            last = Some(row.get(0)?);
        }
    }
    if let Some(last) = last.filter(|_| rows_seen == COUNTED_ROWS) {
        found.count += ids_up_to_init(connection, last)?;
    }
    Ok(found)
}

/// How many ids there are between an event and the first one that is not published.
fn ids_up_to_init(connection: &Connection, after: i64) -> rusqlite::Result<i64> {
    let init: Option<i64> = connection
        .prepare_cached("SELECT id FROM outbox WHERE status = 'INIT' AND id > ?1 ORDER BY id LIMIT 1")?
        .query_row([after], |row| row.get(0))
        .optional()?;
    let end = match init {
        Some(init) => init,
        None => connection.prepare_cached("SELECT max(id) + 1 FROM outbox")?.query_row([], |row| row.get(0))?,
    };
    Ok(end - after - 1)
}

/// Moves the mark over up to `limit` rows. Returns whether there may be more to move over.
pub fn advance(tx: &Transaction<'_>, limit: usize) -> rusqlite::Result<bool> {
    let before = mark(tx)?;
    let mut reached = before;
    let mut moved = 0;
    let mut statement = tx.prepare_cached(ROWS_ABOVE)?;
    let mut rows = statement.query((before, sql_limit(limit)))?;
    while let Some(row) = rows.next()? {
        let (rejected, has_delivery): (bool, bool) = (row.get(1)?, row.get(3)?);
        if !rejected && !has_delivery {
            break;
        }
        moved += 1;
        reached = row.get(0)?;
    }
    if reached > before {
        tx.prepare_cached("UPDATE node SET consumed_through = ?1")?.execute([reached])?;
    }
    Ok(moved == limit)
}

/// Moves the mark back before an event that is sent again.
pub(super) fn reopen(tx: &Transaction<'_>, outbox_id: i64) -> rusqlite::Result<()> {
    let sql = "UPDATE node SET consumed_through = min(consumed_through, ?1 - 1)";
    tx.prepare_cached(sql)?.execute([outbox_id]).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::schema;
    use rusqlite::TransactionBehavior;

    /// Runs `work` on a database whose events are these: their statuses, and a `+` after those that have a delivery.
    fn with_events<T>(events: &[&str], work: impl FnOnce(&Transaction<'_>) -> T) -> T {
        let dir = tempfile::tempdir().unwrap();
        let (mut connection, _) = schema::open(&dir.path().join("a.db"), None).unwrap();
        let tx = Transaction::new(&mut connection, TransactionBehavior::Immediate).unwrap();
        for (id, event) in (1_i64..).zip(events) {
            let status = event.trim_end_matches('+');
            tx.execute("INSERT INTO payment VALUES (?1, 1, ?1, 1, 'KRW', 'COMPLETED', NULL, ?1)", [id]).unwrap();
            tx.execute(
                "INSERT INTO outbox (id, payment_id, user_id, type, status, rejection, created_at, published_at) \
                 VALUES (?1, ?1, 1, 'payment.completed', ?2, iif(?2 = 'REJECTED', 'no', NULL), ?1, \
                 iif(?2 = 'PUBLISHED', 100 + ?1, NULL))",
                (id, status),
            )
            .unwrap();
            if event.ends_with('+') {
                tx.execute("INSERT INTO delivery (outbox_id, channel, created_at) VALUES (?1, 'default', 1)", [id])
                    .unwrap();
            }
        }
        work(&tx)
    }

    fn counted(tx: &Transaction<'_>) -> (i64, Option<i64>) {
        let Waiting { count, oldest_at } = count(tx).unwrap();
        (count, oldest_at.map(Timestamp::as_micros))
    }

    #[test]
    fn the_mark_passes_deliveries_and_rejected_events_and_stops_before_others() {
        for (events, through, unconsumed) in [
            (&[][..], 0, (0, None)),
            (&["PUBLISHED+", "REJECTED", "PUBLISHED+"], 3, (0, None)),
            (&["PUBLISHED+", "INIT", "PUBLISHED+"], 1, (0, None)),
            (&["PUBLISHED+", "PUBLISHED", "PUBLISHED+", "PUBLISHED"], 1, (2, Some(102))),
            // A consumer may see an event before its mark.
            (&["INIT+", "INIT"], 1, (0, None)),
        ] {
            with_events(events, |tx| {
                assert!(!advance(tx, 100).unwrap());
                assert_eq!((mark(tx).unwrap(), counted(tx)), (through, unconsumed), "{events:?}");
            });
        }
    }

    #[test]
    fn the_mark_moves_over_a_bounded_number_of_rows() {
        with_events(&["PUBLISHED+"; 5], |tx| {
            assert!(advance(tx, 2).unwrap());
            assert_eq!(mark(tx).unwrap(), 2);
            assert!(advance(tx, 2).unwrap());
            assert!(!advance(tx, 2).unwrap());
            assert_eq!(mark(tx).unwrap(), 5);
        });
    }

    #[test]
    fn purged_events_do_not_stop_the_mark() {
        with_events(&["PUBLISHED+"; 5], |tx| {
            tx.execute_batch("DELETE FROM delivery WHERE outbox_id < 5; DELETE FROM outbox WHERE id < 5").unwrap();
            assert!(!advance(tx, 2).unwrap());
            assert_eq!(mark(tx).unwrap(), 5);
        });
    }

    #[test]
    fn an_event_that_is_sent_again_is_counted_again() {
        with_events(&["PUBLISHED+", "REJECTED", "PUBLISHED+"], |tx| {
            advance(tx, 100).unwrap();
            assert!(crate::store::outbox::send_again(tx, 2).unwrap());
            advance(tx, 100).unwrap();
            assert_eq!((mark(tx).unwrap(), counted(tx)), (1, (0, None)));
            tx.execute("UPDATE outbox SET status = 'PUBLISHED', published_at = 7 WHERE id = 2", []).unwrap();
            assert_eq!(counted(tx), (1, Some(7)));
        });
    }

    #[test]
    fn a_long_backlog_is_estimated() {
        let rows = COUNTED_ROWS + 5;
        let mut events = vec!["PUBLISHED"; rows];
        with_events(&events, |tx| assert_eq!(counted(tx), (sql_limit(rows), Some(101))));
        events.push("INIT");
        with_events(&events, |tx| assert_eq!(counted(tx), (sql_limit(rows), Some(101))));
        // All but the first have a delivery: nothing is estimated.
        events = vec!["PUBLISHED+"; rows];
        events[0] = "PUBLISHED";
        with_events(&events, |tx| assert_eq!(counted(tx), (1, Some(101))));
    }
}
