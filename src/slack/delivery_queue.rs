//! The deliveries of one channel in the database: read into batches, marked, and their outcomes
//! saved.

use serde_json::Value;

use crate::domain::payment::Payment;
use crate::domain::timestamp::Timestamp;
use crate::runtime::metrics::ChannelMetrics;
use crate::slack::message::{MessageStyle, MessageSummary};
use crate::store::delivery::{self, Carrier, DeliveryOutcome, PendingDelivery};
use crate::store::{SqlResult, Store, StoreError, Transaction};

/// The maximum number of deliveries that one transaction of a summary marks: it holds the writer
/// for a few milliseconds.
const SUMMARY_SLICE: usize = 200;

/// The maximum number of payments of one summary, so that it ends before the limit of a stop.
const SUMMARY_MAX: usize = 100_000;

/// The payments of one message.
pub(super) enum DeliveryBatch {
    Payments(Vec<OutgoingPayment>),
    Summary {
        summary: Box<MessageSummary>,
        oldest: Timestamp,
        last_event: i64,
    },
}

/// A payment in delivery.
pub(super) struct OutgoingPayment {
    pub(super) outbox_id: i64,
    pub(super) created_at: Timestamp,
    /// The id of its trace, if a tracer recorded it.
    pub(super) trace_id: Option<String>,
    pub(super) payment: Payment,
}

impl DeliveryBatch {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Payments(payments) => payments.len(),
            Self::Summary { summary, .. } => summary.count,
        }
    }

    pub(super) fn last_event(&self) -> i64 {
        match self {
            Self::Payments(payments) => payments.last().map_or(0, |last| last.outbox_id),
            Self::Summary { last_event, .. } => *last_event,
        }
    }

    pub(super) fn carrier(&self) -> Carrier {
        match self {
            Self::Payments(payments) if payments.len() <= 1 => Carrier::Single,
            Self::Payments(_) => Carrier::Digest,
            Self::Summary { .. } => Carrier::Summary,
        }
    }

    /// Counts how long its payments have waited. Those of a summary are counted as its oldest.
    pub(super) fn count_latencies(&self, metrics: &ChannelMetrics, now: Timestamp) {
        match self {
            Self::Payments(payments) => {
                for payment in payments {
                    let waited = now.since(payment.created_at);
                    metrics.latency.observe(waited, payment.trace_id.as_deref());
                }
            }
            Self::Summary {
                oldest, summary, ..
            } => {
                let waited = now.since(*oldest);
                (0..summary.count).for_each(|_| metrics.latency.observe(waited, None));
            }
        }
    }

    /// The first and the last payment.
    pub(super) fn span(&self) -> String {
        let ends = match self {
            Self::Payments(payments) => payments
                .first()
                .zip(payments.last())
                .map(|(first, last)| (first.payment.id, last.payment.id)),
            Self::Summary { summary, .. } => summary.span(),
        };
        match ends {
            Some((first, last)) if first == last => first.to_string(),
            Some((first, last)) => format!("{first} to {last}"),
            None => String::new(),
        }
    }
}

/// The outcome of a message that is still to be saved.
pub(super) struct UnsavedOutcome {
    pub(super) batch: DeliveryBatch,
    pub(super) outcome: DeliveryOutcome,
}

impl UnsavedOutcome {
    /// Whether it is the delivery of a few payments, which [`DeliveryQueue::begin`] can save.
    pub(super) fn is_delivered(&self) -> bool {
        matches!(self.batch, DeliveryBatch::Payments(_))
            && matches!(self.outcome, DeliveryOutcome::Delivered(_))
    }
}

fn event_ids(payments: &[OutgoingPayment]) -> Vec<i64> {
    payments.iter().map(|payment| payment.outbox_id).collect()
}

/// The waiting deliveries of a channel.
pub(super) struct DeliveryQueue {
    pub(super) store: Store,
    /// The name of the channel.
    pub(super) channel: String,
    pub(super) metrics: ChannelMetrics,
}

impl DeliveryQueue {
    /// Whether more than this number of payments wait.
    pub(super) fn has_more_than(&self, count: usize) -> Result<bool, StoreError> {
        self.store
            .read(|connection| delivery::has_more_deliveries_than(connection, &self.channel, count))
    }

    /// The oldest payments. Unreadable ones become dead letters first, and then it returns `None`.
    pub(super) fn oldest(&self, limit: usize) -> Result<Option<Vec<OutgoingPayment>>, StoreError> {
        let waiting = self
            .store
            .read(|connection| delivery::pending_deliveries(connection, &self.channel, limit))?;
        self.readable(waiting)
    }

    /// The same while the outcome of a message is unsaved: its payments are SENDING.
    pub(super) fn oldest_unsent(
        &self,
        limit: usize,
    ) -> Result<Option<Vec<OutgoingPayment>>, StoreError> {
        let waiting = self
            .store
            .read(|connection| delivery::unsent_deliveries(connection, &self.channel, limit))?;
        self.readable(waiting)
    }

    fn readable(
        &self,
        waiting: Vec<PendingDelivery>,
    ) -> Result<Option<Vec<OutgoingPayment>>, StoreError> {
        let mut payments = Vec::with_capacity(waiting.len());
        let mut unreadable = Vec::new();
        for PendingDelivery {
            outbox_id,
            created_at,
            trace_id,
            payment,
        } in waiting
        {
            match payment {
                Ok(payment) => payments.push(OutgoingPayment {
                    outbox_id,
                    created_at,
                    trace_id,
                    payment,
                }),
                Err(reason) => unreadable.push((outbox_id, reason)),
            }
        }
        if unreadable.is_empty() {
            return Ok(Some(payments));
        }
        self.dead_letter(unreadable)?;
        Ok(None)
    }

    fn dead_letter(&self, dead: Vec<(i64, String)>) -> Result<(), StoreError> {
        for (outbox_id, reason) in &dead {
            log::error!(
                event = "delivery_dead_lettered", outbox_id = outbox_id;
                "event {outbox_id} dead-lettered, it cannot be delivered: {reason}"
            );
        }
        let count = dead.len();
        let now = Timestamp::now();
        self.store
            .write(move |tx: &Transaction<'_>| -> SqlResult<()> {
                dead.iter().try_for_each(|(outbox_id, reason)| {
                    delivery::mark_delivery_dead(tx, *outbox_id, Some(reason), now)
                })
            })?;
        self.metrics.dead(count);
        Ok(())
    }

    /// Marks payments as SENDING, and saves the outcome of the message before in the same
    /// transaction.
    pub(super) fn begin(
        &self,
        payments: &[OutgoingPayment],
        before: Option<&UnsavedOutcome>,
        now: Timestamp,
    ) -> Result<(), StoreError> {
        let ids = event_ids(payments);
        let before = before.and_then(|last| match &last.batch {
            DeliveryBatch::Payments(payments) => Some((event_ids(payments), last.outcome.clone())),
            DeliveryBatch::Summary { .. } => None,
        });
        self.store.write(move |tx| {
            if let Some((ids, outcome)) = &before {
                delivery::record_delivery_outcome(tx, ids, outcome, now)?;
            }
            delivery::mark_deliveries_sending(tx, &ids)
        })
    }

    /// All waiting payments, marked as SENDING in slices, so that no transaction is long; and the
    /// message that counts them.
    pub(super) fn summary(
        &self,
        style: &MessageStyle,
    ) -> Result<(DeliveryBatch, Value), StoreError> {
        let mut summary = Box::<MessageSummary>::default();
        let mut oldest = None;
        let mut last_event = 0;
        while summary.count < SUMMARY_MAX {
            let name = self.channel.clone();
            let slice = self.store.write(move |tx| {
                delivery::begin_sending_deliveries(tx, &name, last_event, SUMMARY_SLICE)
            })?;
            let Some(last) = slice.last() else { break };
            last_event = last.outbox_id;
            for pending in slice {
                match pending.payment {
                    Ok(payment) => {
                        oldest.get_or_insert(pending.created_at);
                        summary.add(payment);
                    }
                    Err(reason) => self.dead_letter(vec![(pending.outbox_id, reason)])?,
                }
            }
        }
        let message = style.summary(&summary);
        let batch = DeliveryBatch::Summary {
            summary,
            oldest: oldest.unwrap_or_else(Timestamp::now),
            last_event,
        };
        Ok((batch, message))
    }

    /// Saves the outcome of a batch, in slices.
    pub(super) fn save(
        &self,
        batch: &DeliveryBatch,
        outcome: &DeliveryOutcome,
        now: Timestamp,
    ) -> Result<(), StoreError> {
        let last = batch.last_event();
        loop {
            let name = self.channel.clone();
            let outcome = outcome.clone();
            let saved = self.store.write(move |tx| {
                delivery::save_delivery_outcomes(tx, &name, last, &outcome, SUMMARY_SLICE, now)
            })?;
            if saved < SUMMARY_SLICE {
                return Ok(());
            }
        }
    }
}
