//! Marks events after a publisher has published, delivered or rejected them.

use std::sync::Arc;

use rusqlite::Transaction;

use super::{dead_letter, delivery, unconsumed};
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

/// Marks events PUBLISHED, or dead-letters rejected ones. Marking an event again changes nothing.
pub fn record_publications(
    tx: &Transaction<'_>,
    receipts: &[Receipt],
    now: Timestamp,
) -> rusqlite::Result<()> {
    receipts
        .iter()
        .try_for_each(|receipt| record_publication(tx, receipt, now).map(drop))?;
    if receipts
        .iter()
        .any(|receipt| receipt.place == Destination::Delivery)
    {
        unconsumed::advance_unconsumed_mark(tx, 2 * receipts.len())?;
    }
    Ok(())
}

/// Returns how many events it has marked: 0 if this one was marked already.
pub(super) fn record_publication(
    tx: &Transaction<'_>,
    receipt: &Receipt,
    now: Timestamp,
) -> rusqlite::Result<usize> {
    let (partition, offset) = match &receipt.place {
        Destination::Topic { partition, offset } => (Some(*partition), *offset),
        Destination::Delivery => {
            delivery::insert_delivery(tx, receipt.outbox_id, now)?;
            (None, None)
        }
        Destination::Rejected(reason) => {
            return reject_publication(tx, receipt.outbox_id, reason, now);
        }
    };
    tx.prepare_cached(
        "UPDATE outbox SET status = 'PUBLISHED', rejection = NULL, published_at = ?2, \
            \"partition\" = ?3, \"offset\" = ?4 WHERE id = ?1 AND status <> 'PUBLISHED'",
    )?
    .execute((receipt.outbox_id, now.as_micros(), partition, offset))
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
