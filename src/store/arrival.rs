//! An event arrives from the topic: it gets its delivery, once.

use rusqlite::Transaction;

use super::delivery::{DeliveryInsert, insert_delivery};
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
    /// It was delivered and purged long ago.
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
