//! A payment and its progress as JSON, for the API and the commands.

use serde::Serialize;

use super::delivery::{Carrier, DeliveryStatus};
use super::outbox::{EventState, EventStatus};
use super::timeline::PaymentTimeline;
use crate::domain::node_id::NodeId;
use crate::domain::payment::Payment;
use crate::domain::timestamp::Timestamp;

/// A payment and its progress.
#[derive(Serialize)]
pub struct PaymentView<'a> {
    #[serde(flatten)]
    payment: &'a Payment,
    event: Option<Event<'a>>,
    notification: Option<Notification<'a>>,
}

#[derive(Serialize)]
struct Event<'a> {
    id: String,
    status: EventStatus,
    created_at: Timestamp,
    published_at: Option<Timestamp>,
    partition: Option<i32>,
    offset: Option<i64>,
    /// The trace of the request that paid.
    #[serde(skip_serializing_if = "Option::is_none")]
    trace_id: Option<&'a str>,
    /// Why the broker rejects it, while it is a dead letter.
    #[serde(skip_serializing_if = "Option::is_none")]
    rejection: Option<&'a str>,
}

#[derive(Serialize)]
struct Notification<'a> {
    status: DeliveryStatus,
    channel: Option<&'a str>,
    attempts: u32,
    unknown_outcomes: u32,
    /// When its event arrived from the publisher.
    consumed_at: Option<Timestamp>,
    delivered_at: Option<Timestamp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    delivered_in: Option<Carrier>,
    last_error: Option<&'a str>,
}

impl<'a> PaymentView<'a> {
    /// The view of a timeline. `node` is a part of the event's id.
    pub fn new(timeline: &'a PaymentTimeline, node: &NodeId) -> Self {
        let event = timeline.event.as_ref().map(|event| Event {
            id: node.event_id(event.outbox_id),
            status: event.status,
            created_at: event.created_at,
            published_at: event.published_at,
            partition: event.partition,
            offset: event.offset,
            trace_id: trace_id(event),
            rejection: event.rejection.as_deref(),
        });
        let notification = match (&timeline.notification, &timeline.event) {
            (Some(delivery), _) => Some(Notification {
                status: delivery.status,
                channel: Some(&delivery.channel),
                attempts: delivery.attempts,
                unknown_outcomes: delivery.unknown_outcomes,
                consumed_at: Some(delivery.created_at),
                delivered_at: delivery.delivered_at,
                delivered_in: delivery.delivered_in,
                last_error: delivery.last_error.as_deref(),
            }),
            (None, Some(_)) if timeline.is_delivered_by_others => None,
            // Its delivery does not exist yet.
            (None, Some(_)) => Some(Notification {
                status: DeliveryStatus::Pending,
                channel: None,
                attempts: 0,
                unknown_outcomes: 0,
                consumed_at: None,
                delivered_at: None,
                delivered_in: None,
                last_error: None,
            }),
            (None, None) => None,
        };
        Self {
            payment: &timeline.payment,
            event,
            notification,
        }
    }
}

/// The second part of a traceparent (W3C Trace Context).
fn trace_id(event: &EventState) -> Option<&str> {
    event.traceparent.as_deref()?.split('-').nth(1)
}
