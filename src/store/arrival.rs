//! An event comes from the topic: it gets its delivery, once.

use rusqlite::Transaction;

use super::delivery::insert;
use super::outbox;
use crate::domain::event::EventRef;
use crate::domain::timestamp::Timestamp;

/// What became of a notice from the topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AcceptOutcome {
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
pub fn accept(
    tx: &Transaction<'_>,
    notice: EventRef,
    now: Timestamp,
) -> rusqlite::Result<AcceptOutcome> {
    Ok(match outbox::matches(tx, notice)? {
        Some(true) if insert(tx, notice.outbox_id, now)? => AcceptOutcome::Accepted,
        Some(true) => AcceptOutcome::Duplicate,
        None if is_purged(tx, notice)? => AcceptOutcome::Purged,
        Some(false) | None => AcceptOutcome::Unknown,
    })
}

/// Whether an event that is not in the outbox once was: its id was given, and its payment is there.
pub(super) fn is_purged(tx: &Transaction<'_>, notice: EventRef) -> rusqlite::Result<bool> {
    tx.prepare_cached(
        "SELECT 1 FROM payment WHERE id = ?2 AND ?1 <= (SELECT seq FROM sqlite_sequence \
            WHERE name = 'outbox') AND (?3 IS NULL OR executed_at = ?3)",
    )?
    .exists((
        notice.outbox_id,
        notice.payment_id,
        notice.created_at.map(Timestamp::as_micros),
    ))
}
