//! The publisher of the outbox: one trait, two implementations.

use std::time::Instant;

use crate::domain::event::Event;
use crate::runtime::metrics::PublishFailure;
use crate::store::publication::Receipt;
use crate::store::topic::PublishedOffsets;

/// The outcome of publishing a batch.
#[derive(Debug, Default)]
pub struct PublishOutcome {
    /// The acknowledged or rejected events. None of them may be published again.
    pub receipts: Vec<Receipt>,
    /// The offsets after the last acknowledged events, if they are the last ones on the topic.
    pub progress: Option<PublishedOffsets>,
    /// Why other events have no receipt; they stay unpublished.
    pub error: Option<PublishError>,
}

impl PublishOutcome {
    /// Whether the other side does not answer.
    pub fn is_unavailable(&self) -> bool {
        matches!(
            self.error,
            Some(PublishError::Unavailable(_) | PublishError::Timeout(_))
        )
    }
}

/// Why events are not published. Never the fault of an event.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    /// The other side does not answer: try again.
    #[error("{0}")]
    Unavailable(String),
    /// The other side has not answered in time: the batch stays in flight.
    #[error("{0}")]
    Timeout(String),
    /// Published events are not visible to `read_committed` consumers. Publishing continues.
    #[error("{0}")]
    Hidden(String),
    /// Another process publishes as this node: the relay pauses until an operator resumes it.
    #[error("{0}")]
    Fenced(String),
}

impl PublishError {
    /// As it is counted.
    pub fn kind(&self) -> PublishFailure {
        match self {
            Self::Unavailable(_) => PublishFailure::Unavailable,
            Self::Timeout(_) => PublishFailure::Timeout,
            Self::Hidden(_) => PublishFailure::Hidden,
            Self::Fenced(_) => PublishFailure::Fenced,
        }
    }
}

/// Publishes events in commit order.
pub trait Publisher: Send {
    /// Publishes a batch, and waits a bounded time for acknowledgements. A later event of a user is
    /// never published before an earlier one. No transaction is open meanwhile.
    ///
    /// A batch without acknowledgement stays in flight: the next call waits for it, and sends
    /// nothing else. So there may be fewer receipts than events although the other side is
    /// available. The publisher may have marked an event without a receipt itself, so the relay has
    /// to read the outbox again.
    ///
    /// An empty batch checks the connection, and what was published before.
    fn publish(&mut self, batch: &[Event]) -> PublishOutcome;

    /// When [`Publisher::publish`] is due even if no event waits: published events may not be
    /// visible yet.
    fn due(&self) -> Option<Instant> {
        None
    }

    /// Its name in the log.
    fn name(&self) -> &'static str;
}
