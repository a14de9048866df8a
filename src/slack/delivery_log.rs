//! The log lines of delivered payments.

use crate::domain::timestamp::Timestamp;
use crate::slack::channel::SlackChannel;
use crate::slack::delivery_queue::{DeliveryBatch, OutgoingPayment};

/// One line for a message that its channel has accepted.
pub(super) fn log_delivered_batch(channel: &SlackChannel, batch: &DeliveryBatch, now: Timestamp) {
    let to = channel.display_name();
    let oldest = match batch {
        DeliveryBatch::Payments(payments) => match payments.as_slice() {
            [only] => return log_delivered_payment(channel, &to, only, now),
            [first, ..] => first.created_at,
            [] => return,
        },
        DeliveryBatch::Summary { oldest, .. } => *oldest,
    };
    let kind = batch.carrier().as_str();
    log::info!(
        event = "delivered", channel = channel.name.as_str(), payments = batch.len();
        "delivered to {to} in a {kind}: {} payments, {}; the oldest {} ms after its commit",
        batch.len(),
        batch.span(),
        now.since(oldest).as_millis()
    );
}

/// One line for a payment.
pub(super) fn log_delivered_payment(
    channel: &SlackChannel,
    to: &str,
    payment: &OutgoingPayment,
    now: Timestamp,
) {
    let age_ms = now.since(payment.created_at).as_millis();
    let line = channel.style.line(&payment.payment);
    let trace_id = payment.trace_id.as_deref().unwrap_or_default();
    log::info!(
        event = "delivered", channel = channel.name.as_str(), payments = 1,
        payment = payment.payment.id, age_ms = age_ms, trace_id = trace_id;
        "delivered to {to}, {age_ms} ms after its commit: {line}"
    );
}
