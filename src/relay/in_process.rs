//! The publisher without a broker: events go to the delivery table of this process.
//!
//! It waits for no other side. The delivery is inserted in the transaction that marks the event
//! PUBLISHED, so an event is never in both places or in none.

use super::publisher::{PublishOutcome, Publisher};
use crate::domain::event::Event;
use crate::store::publication::{Destination, Receipt};

/// Publishes in the process.
#[derive(Debug, Default)]
pub struct InProcess;

impl Publisher for InProcess {
    fn publish(&mut self, batch: &[Event]) -> PublishOutcome {
        let receipt = |event: &Event| Receipt {
            outbox_id: event.outbox_id,
            place: Destination::Delivery,
        };
        PublishOutcome {
            receipts: batch.iter().map(receipt).collect(),
            ..PublishOutcome::default()
        }
    }

    fn name(&self) -> &'static str {
        "the delivery table"
    }
}
