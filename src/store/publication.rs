//! Marks events after a publisher has published, delivered or rejected them.

use std::sync::Arc;

use rusqlite::Transaction;

use super::{dead_letter, delivery, node_role, unconsumed};
use crate::domain::timestamp::Timestamp;

/// Where a publisher has put an event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Destination {
    /// On a topic; the consumer brings it to the delivery table.
    Topic {
        /// The topic's partition.
        partition: i32,
        /// `None` if the broker dropped a duplicate and did not report the first copy.
        offset: Option<i64>,
    },
    /// Into the delivery table, in the same transaction as the mark.
    Delivery,
    /// Nowhere: the broker never accepts this event as it is, for this reason.
    Rejected(Arc<str>),
}

/// The acknowledgement of an event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Receipt {
    /// The event.
    pub outbox_id: i64,
    /// Where the publisher has put it.
    pub place: Destination,
}

impl Receipt {
    /// Whether the next event is the next one at its place as well: one statement marks both.
    fn is_followed_by(&self, next: &Self) -> bool {
        let is_next_place = match (&self.place, &next.place) {
            (
                Destination::Topic {
                    partition,
                    offset: Some(offset),
                },
                Destination::Topic {
                    partition: next_partition,
                    offset: Some(next_offset),
                },
            ) => partition == next_partition && offset.checked_add(1) == Some(*next_offset),
            (Destination::Delivery, Destination::Delivery) => true,
            _ => false,
        };
        is_next_place && self.outbox_id.checked_add(1) == Some(next.outbox_id)
    }
}

/// Marks events PUBLISHED, or dead-letters rejected ones. Marking an event again changes nothing.
pub fn record_publications(
    tx: &Transaction<'_>,
    receipts: &[Receipt],
    now: Timestamp,
) -> rusqlite::Result<()> {
    for run in receipts.chunk_by(Receipt::is_followed_by) {
        record_publication_run(tx, run, now)?;
    }
    if receipts
        .iter()
        .any(|receipt| receipt.place == Destination::Delivery)
    {
        unconsumed::advance_unconsumed_mark(tx, 2 * receipts.len())?;
    }
    node_role::advance_edge_mark(tx).map(drop)
}

/// Returns how many events it has marked: 0 if this one was marked already.
pub(super) fn record_publication(
    tx: &Transaction<'_>,
    receipt: &Receipt,
    now: Timestamp,
) -> rusqlite::Result<usize> {
    record_publication_run(tx, std::slice::from_ref(receipt), now)
}

/// Marks events of which each follows the one before. Returns how many it has marked.
fn record_publication_run(
    tx: &Transaction<'_>,
    run: &[Receipt],
    now: Timestamp,
) -> rusqlite::Result<usize> {
    let (Some(first), Some(last)) = (run.first(), run.last()) else {
        return Ok(0);
    };
    let events = first.outbox_id..=last.outbox_id;
    let (partition, offset) = match &first.place {
        Destination::Topic { partition, offset } => (Some(*partition), *offset),
        Destination::Delivery => {
            delivery::insert_deliveries(tx, &events, now)?;
            (None, None)
        }
        Destination::Rejected(reason) => {
            return reject_publication(tx, first.outbox_id, reason, now);
        }
    };
    tx.prepare_cached(
        "UPDATE outbox SET status = 'PUBLISHED', rejection = NULL, published_at = ?3, \
            \"partition\" = ?4, \"offset\" = ?5 + (id - ?1) WHERE id BETWEEN ?1 AND ?2 \
            AND status <> 'PUBLISHED'",
    )?
    .execute((
        events.start(),
        events.end(),
        now.as_micros(),
        partition,
        offset,
    ))
}

/// Dead-letters an event that cannot be published as it is, so that the others continue.
pub(super) fn reject_publication(
    tx: &Transaction<'_>,
    outbox_id: i64,
    reason: &str,
    now: Timestamp,
) -> rusqlite::Result<usize> {
    let rejected = tx
        .prepare_cached(
            "UPDATE outbox SET status = 'REJECTED', rejection = ?2 WHERE id = ?1 \
            AND status = 'INIT'",
        )?
        .execute((outbox_id, reason))?;
    if rejected > 0 {
        dead_letter::insert_dead_event(tx, outbox_id, reason, now)?;
    }
    Ok(rejected)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::payment::{NewPayment, Reservation};
    use crate::store::engine::open;
    use crate::store::payment::execute_payments;

    const NOW: Timestamp = Timestamp::from_micros(7);

    fn topic(outbox_id: i64, partition: i32, offset: Option<i64>) -> Receipt {
        let place = Destination::Topic { partition, offset };
        Receipt { outbox_id, place }
    }

    #[test]
    fn publications_are_recorded_with_their_place_in_runs_and_between_them() {
        let dir = tempfile::tempdir().unwrap();
        let (mut connection, _) = open::open_database(&dir.path().join("a.db"), None).unwrap();
        let tx = connection.transaction().unwrap();
        let reservations = (1..=11).map(|reservation_id| Reservation {
            reservation_id,
            seat_price: 1,
        });
        let new = NewPayment {
            user_id: 1,
            reservations: reservations.collect(),
        };
        execute_payments(&tx, &new, "KRW", None, NOW).unwrap();
        let delivered = |outbox_id| Receipt {
            outbox_id,
            place: Destination::Delivery,
        };
        let rejected = Receipt {
            outbox_id: 10,
            place: Destination::Rejected("no".into()),
        };
        let receipts = [
            topic(1, 0, Some(5)),
            topic(2, 0, Some(6)),
            topic(3, 1, Some(7)),
            topic(4, 1, Some(9)),
            topic(5, 1, None),
            topic(7, 1, Some(10)),
            delivered(8),
            delivered(9),
            rejected,
        ];
        record_publications(&tx, &receipts, NOW).unwrap();
        // Again, elsewhere: nothing changes.
        record_publications(&tx, &[topic(1, 3, Some(50)), topic(2, 3, Some(51))], NOW).unwrap();
        let mut query = tx
            .prepare(
                "SELECT o.status || ' ' || ifnull(\"partition\", '-') || ' ' || \
                    ifnull(\"offset\", '-') || ifnull(' ' || d.status, '') \
                    FROM outbox o LEFT JOIN delivery d ON d.outbox_id = o.id ORDER BY o.id",
            )
            .unwrap();
        let rows: Vec<String> = query
            .query_map([], |row| row.get(0))
            .unwrap()
            .map(Result::unwrap)
            .collect();
        let expected = [
            "PUBLISHED 0 5",
            "PUBLISHED 0 6",
            "PUBLISHED 1 7",
            "PUBLISHED 1 9",
            "PUBLISHED 1 -",
            "INIT - -",
            "PUBLISHED 1 10",
            "PUBLISHED - - PENDING",
            "PUBLISHED - - PENDING",
            "REJECTED - -",
            "INIT - -",
        ];
        assert_eq!(rows, expected);
    }
}
