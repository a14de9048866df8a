//! A payment with its event and its notification.

use rusqlite::{Connection, OptionalExtension, Result as SqlResult};

use super::delivery::{self, Notification};
use super::node_role;
use super::outbox::{self, EventState};
use super::payment::{COLUMNS, read_payment_row};
use crate::domain::payment::Payment;

/// A payment and its progress.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PaymentTimeline {
    /// The payment.
    pub payment: Payment,
    /// Its event; `None` once purged, long after its delivery.
    pub event: Option<EventState>,
    /// Its delivery; `None` until its event has arrived, or once purged.
    pub notification: Option<Notification>,
    /// Whether its event is one of an edge, which others deliver.
    pub is_delivered_by_others: bool,
}

/// One payment's timeline.
pub fn find_payment_timeline(
    connection: &Connection,
    id: i64,
) -> SqlResult<Option<PaymentTimeline>> {
    let payment = connection
        .prepare_cached(&format!("SELECT {COLUMNS} FROM payment p WHERE p.id = ?1"))?
        .query_row([id], read_payment_row)
        .optional()?;
    let Some(payment) = payment else {
        return Ok(None);
    };
    let event = outbox::find_outbox_event_of_payment(connection, id)?;
    let notification = match &event {
        Some(event) => delivery::find_delivery(connection, event.outbox_id)?,
        None => None,
    };
    let is_delivered_by_others = match &event {
        Some(event) => node_role::is_edge_event(connection, event.outbox_id)?,
        None => false,
    };
    Ok(Some(PaymentTimeline {
        payment,
        event,
        notification,
        is_delivered_by_others,
    }))
}
