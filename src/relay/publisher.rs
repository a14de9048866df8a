//! Who takes the events of the outbox: one trait, two publishers.

use std::time::Instant;

use crate::domain::event::Event;
use crate::store::publication::Receipt;
use crate::store::topic::PublishedOffsets;

/// What a publisher has taken of a batch.
#[derive(Debug, Default)]
pub struct PublishOutcome {
    /// Its last word on each event that it has one for. None of them may be published again.
    pub receipts: Vec<Receipt>,
    /// How far these are the last ones on the topic.
    pub progress: Option<PublishedOffsets>,
    /// Why there is no more, where something stands in the way; the rest stays as it is.
    pub error: Option<PublishError>,
}

/// What stands in the way. Never the fault of an event.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    /// The other side does not answer: try again.
    #[error("{0}")]
    Unavailable(String),
    /// Events that were published are not visible to `read_committed` consumers. Publishing
    /// continues.
    #[error("{0}")]
    Hidden(String),
    /// Another process publishes as this node: nothing is published here until an operator resumes
    /// the relay.
    #[error("{0}")]
    Fenced(String),
}

/// Takes events in commit order.
pub trait Publisher: Send {
    /// Publishes a batch and waits for the other side's word, for a bounded time. A later event of
    /// a user is never taken before an earlier one. No transaction is open while this runs.
    ///
    /// What was handed over and is still without an answer is remembered: called again, it waits
    /// for those answers and hands nothing else over. So there may be fewer receipts than events
    /// although the other side is there; and what has none may have been marked by the publisher
    /// itself, and is to be read again.
    ///
    /// An empty batch looks after what was published before.
    fn publish(&mut self, batch: &[Event]) -> PublishOutcome;

    /// When [`Publisher::publish`] is to be called even if nothing waits: what was published may
    /// not be visible yet.
    fn due(&self) -> Option<Instant> {
        None
    }

    /// What it is called in the log.
    fn name(&self) -> &'static str;
}
