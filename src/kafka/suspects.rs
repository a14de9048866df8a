//! The events that are sent alone, because the broker has rejected a batch.
//!
//! A rejected batch does not say which of its records is the reason, so its events go one at a
//! time. An event that is rejected alone in a transaction is still no proof: the transaction itself
//! may be the reason. After it was rejected so twice, it is sent once more outside of a
//! transaction, where the client reports the broker's error code.

use super::producer::SentEvent;
use crate::config::DeliveryGuarantee;
use crate::domain::event::Event;

/// What a rejection means.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Rejection {
    /// One of the events may be the reason: they go one at a time.
    Batch,
    /// The event may be the reason: it goes alone once more.
    Suspect,
    /// The event is the reason.
    Event,
}

/// The events under suspicion.
#[derive(Debug, Default)]
pub(super) struct Suspects {
    /// Events up to this one go one at a time.
    single_until: i64,
    /// Rejected alone in a transaction.
    rejected_once: Option<i64>,
    /// Rejected so twice.
    rejected_twice: Option<i64>,
}

impl Suspects {
    /// How many of these events may go together.
    pub(super) fn batch_len(&self, events: &[Event]) -> usize {
        let Some(first) = events.first().map(|event| event.outbox_id) else {
            return 0;
        };
        let suspected = [self.rejected_once, self.rejected_twice].contains(&Some(first));
        if suspected || first <= self.single_until {
            1
        } else {
            events.len()
        }
    }

    /// Whether the first of these events is due outside of a transaction.
    pub(super) fn guarantee(
        &self,
        events: &[Event],
        configured: DeliveryGuarantee,
    ) -> DeliveryGuarantee {
        let first = events.first().map(|event| event.outbox_id);
        if first.is_some() && first == self.rejected_twice {
            DeliveryGuarantee::AtLeastOnce
        } else {
            configured
        }
    }

    /// The broker has answered a batch: later events go together again.
    pub(super) fn answered(&mut self, events: &[SentEvent]) {
        if events
            .first()
            .is_some_and(|first| first.outbox_id > self.single_until)
        {
            self.single_until = 0;
        }
    }

    /// The broker has accepted a batch.
    pub(super) fn accepted(&mut self) {
        self.rejected_twice = None;
    }

    /// The broker has rejected a batch, sent with this guarantee.
    pub(super) fn rejected(
        &mut self,
        events: &[SentEvent],
        guarantee: DeliveryGuarantee,
    ) -> Rejection {
        match (events, guarantee) {
            ([event], DeliveryGuarantee::ExactlyOnce) => {
                let id = Some(event.outbox_id);
                let before = std::mem::replace(&mut self.rejected_once, id);
                self.rejected_twice = id.filter(|_| before == id);
                Rejection::Suspect
            }
            ([_], DeliveryGuarantee::AtLeastOnce) => {
                self.rejected_twice = None;
                Rejection::Event
            }
            _ => {
                self.single_until = events.last().map_or(0, |last| last.outbox_id);
                Rejection::Batch
            }
        }
    }
}
