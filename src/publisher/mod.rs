//! Who takes the events of the outbox: one trait, two publishers.

pub mod application;
pub mod kafka;

use crate::event::Event;
use crate::store::outbox::Receipt;

/// What a publisher has taken of a batch.
#[derive(Debug, Default)]
pub struct Published {
    /// Its word for each event that it has. None of them may be published again.
    pub receipts: Vec<Receipt>,
    /// Why the other side does not answer, if it does not; the rest stays as it is, and is tried again.
    pub away: Option<Away>,
}

/// The other side does not answer. This is never the fault of an event.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Away(pub String);

/// Takes events in commit order.
pub trait Publisher: Send {
    /// Publishes a batch and waits for the other side's word, for a bounded time. A later event of a user is never
    /// taken before an earlier one. No transaction is open while this runs.
    ///
    /// What was handed over and is still without an answer is remembered: called again, it waits for those answers and
    /// hands nothing else over. So there may be fewer receipts than events although the other side is there.
    fn publish(&mut self, batch: &[Event]) -> Published;

    /// What it is called in the log.
    fn name(&self) -> &'static str;
}
