//! An event arrives from the topic: it gets its delivery, once.

use rusqlite::Transaction;

use super::delivery::{self, DeliveryInsert, insert_delivery};
use super::outbox::{self, OutboxMatch};
use crate::domain::event::EventRef;
use crate::domain::timestamp::Timestamp;

/// The outcome of an arriving event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AcceptOutcome {
    /// It has a delivery now.
    Accepted,
    /// An earlier copy has a delivery already.
    Duplicate,
    /// The event was delivered, and its row was purged since.
    Purged,
    /// No event of this database has this id and payment.
    Unknown,
}

/// Accepts one of our events from the topic.
pub fn accept_arrival(
    tx: &Transaction<'_>,
    event: EventRef,
    now: Timestamp,
) -> rusqlite::Result<AcceptOutcome> {
    Ok(match outbox::match_outbox_event(tx, event)? {
        OutboxMatch::Same => match insert_delivery(tx, event.outbox_id, now)? {
            DeliveryInsert::New => AcceptOutcome::Accepted,
            DeliveryInsert::Existing => AcceptOutcome::Duplicate,
        },
        OutboxMatch::Missing if is_purged_arrival(tx, event)? => AcceptOutcome::Purged,
        OutboxMatch::Other | OutboxMatch::Missing => AcceptOutcome::Unknown,
    })
}

/// Accepts events in their order. Those whose ids rise by one are accepted at once, if all of them
/// are in the outbox and none has a delivery.
pub fn accept_arrivals(
    tx: &Transaction<'_>,
    events: &[EventRef],
    now: Timestamp,
) -> rusqlite::Result<Vec<AcceptOutcome>> {
    let mut outcomes = Vec::with_capacity(events.len());
    for run in events.chunk_by(|one, next| one.outbox_id.checked_add(1) == Some(next.outbox_id)) {
        let ids = run[0].outbox_id..=run[run.len() - 1].outbox_id;
        if run.len() > 1
            && outbox::outbox_has_events(tx, run)?
            && !delivery::has_deliveries(tx, &ids)?
        {
            delivery::insert_deliveries(tx, &ids, now)?;
            outcomes.extend(run.iter().map(|_| AcceptOutcome::Accepted));
        } else {
            for event in run {
                outcomes.push(accept_arrival(tx, *event, now)?);
            }
        }
    }
    Ok(outcomes)
}

/// Whether a missing event was once in the outbox: its id was issued, and its payment exists.
pub(super) fn is_purged_arrival(tx: &Transaction<'_>, event: EventRef) -> rusqlite::Result<bool> {
    tx.prepare_cached(
        "SELECT 1 FROM payment WHERE id = ?2 AND ?1 <= (SELECT seq FROM sqlite_sequence \
            WHERE name = 'outbox') AND (?3 IS NULL OR executed_at = ?3)",
    )?
    .exists((
        event.outbox_id,
        event.payment_id,
        event.created_at.map(Timestamp::as_micros),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::payment::{NewPayment, Reservation};
    use crate::store::engine::open;
    use crate::store::payment::execute_payments;
    use proptest::prelude::*;
    use rusqlite::TransactionBehavior;

    const NOW: Timestamp = Timestamp::from_micros(7);
    const EVENTS: i64 = 12;

    /// Accepts events in a new database that has events 1 to [`EVENTS`], of which the third was
    /// purged and the sixth has a delivery. Returns the outcomes, and the events with a delivery.
    fn accept(
        events: &[EventRef],
        accept: impl Fn(&Transaction<'_>, &[EventRef]) -> Vec<AcceptOutcome>,
    ) -> (Vec<AcceptOutcome>, Vec<i64>) {
        let dir = tempfile::tempdir().unwrap();
        let (mut connection, _) = open::open_database(&dir.path().join("a.db"), None).unwrap();
        let tx = connection
            .transaction_with_behavior(TransactionBehavior::Immediate)
            .unwrap();
        let reservations = (1..=EVENTS).map(|reservation_id| Reservation {
            reservation_id,
            seat_price: 1,
        });
        let new = NewPayment {
            user_id: 1,
            reservations: reservations.collect(),
        };
        execute_payments(&tx, &new, "KRW", None, NOW).unwrap();
        tx.execute("DELETE FROM outbox WHERE id = 3", []).unwrap();
        insert_delivery(&tx, 6, NOW).unwrap();
        let outcomes = accept(&tx, events);
        let mut query = tx
            .prepare("SELECT outbox_id FROM delivery ORDER BY 1")
            .unwrap();
        let deliveries = query.query_map([], |row| row.get(0)).unwrap();
        (outcomes, deliveries.map(Result::unwrap).collect())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn arrivals_accepted_at_once_have_the_outcomes_of_single_ones(
            runs in proptest::collection::vec((1..=EVENTS, 1..8_i64, 0..10_u8), 1..6),
        ) {
            let events: Vec<EventRef> = runs
                .into_iter()
                .flat_map(|(first, length, kind)| {
                    (first..first + length).map(move |outbox_id| EventRef {
                        outbox_id,
                        payment_id: outbox_id + i64::from(kind == 0),
                        created_at: match kind {
                            1 => Some(Timestamp::from_micros(8)),
                            2..=4 => Some(NOW),
                            _ => None,
                        },
                    })
                })
                .collect();
            let at_once = accept(&events, |tx, events| accept_arrivals(tx, events, NOW).unwrap());
            let single = accept(&events, |tx, events| {
                let accept = |event: &EventRef| accept_arrival(tx, *event, NOW).unwrap();
                events.iter().map(accept).collect()
            });
            prop_assert_eq!(at_once, single);
        }
    }
}
