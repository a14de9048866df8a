//! The publisher without a broker: events go to the delivery table of this process.
//!
//! There is nobody to wait for. The delivery row is written in the transaction that marks the event
//! PUBLISHED, so there is no moment in which an event is in one place and not yet, or no longer, in
//! the other.

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
