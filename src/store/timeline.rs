//! A payment with its event and its notification.

use rusqlite::{Connection, OptionalExtension, Result as SqlResult};

use super::delivery::{self, Notification};
use super::outbox::{self, EventState};
use super::payment::{COLUMNS, read};
use crate::domain::payment::Payment;

/// A payment and how far it has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PaymentTimeline {
    /// The payment.
    pub payment: Payment,
    /// Its event; `None` once it was purged, long after it was delivered.
    pub event: Option<EventState>,
    /// What became of telling it; `None` until its event has arrived at the delivery table, or once
    /// it was purged.
    pub notification: Option<Notification>,
}

/// One payment's whole way.
pub fn find(connection: &Connection, id: i64) -> SqlResult<Option<PaymentTimeline>> {
    let payment = connection
        .prepare_cached(&format!("SELECT {COLUMNS} FROM payment p WHERE p.id = ?1"))?
        .query_row([id], read)
        .optional()?;
    let Some(payment) = payment else {
        return Ok(None);
    };
    let event = outbox::of_payment(connection, id)?;
    let notification = match &event {
        Some(event) => delivery::find(connection, event.outbox_id)?,
        None => None,
    };
    Ok(Some(PaymentTimeline {
        payment,
        event,
        notification,
    }))
}
