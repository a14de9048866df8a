//! Payments: accepted, shown, listed.

use std::sync::Arc;

use hyper::header::{CONTENT_ENCODING, CONTENT_TYPE, HeaderMap, HeaderValue, LOCATION};
use hyper::{Response, StatusCode};
use serde::Serialize;
use tokio::sync::oneshot;

use super::app::{App, flatten};
use super::auth::Client;
use super::body::{self, IncomingBody};
use super::idempotency_key;
use super::problem::Problem;
use super::response::{Body, json};
use crate::domain::payment::{NewPayment, Payment};
use crate::domain::timestamp::Timestamp;
use crate::domain::trace_context::TraceContext;
use crate::store::Store;
use crate::store::delivery::{Carrier, DeliveryStatus};
use crate::store::idempotency::{self as keys, IdempotentOutcome, IdempotentRequest};
use crate::store::outbox::EventStatus;
use crate::store::payment::{self as payments, HistoryPage};
use crate::store::timeline::{self, PaymentTimeline};

/// A body without a content type, or with another one than JSON, is refused.
fn is_json(headers: &HeaderMap) -> bool {
    let text = headers
        .get(CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .unwrap_or("");
    let essence = text
        .split(';')
        .next()
        .unwrap_or("")
        .trim()
        .to_ascii_lowercase();
    essence == "application/json"
        || essence
            .strip_prefix("application/")
            .is_some_and(|subtype| subtype.ends_with("+json"))
}

/// Whether a body has no coding, or the identity (RFC 9110, 8.4.1).
fn is_plain(headers: &HeaderMap) -> bool {
    headers.get_all(CONTENT_ENCODING).iter().all(|value| {
        let mut codings = value
            .as_bytes()
            .split(|byte| *byte == b',')
            .map(<[u8]>::trim_ascii);
        codings.all(|coding| coding.is_empty() || coding.eq_ignore_ascii_case(b"identity"))
    })
}

/// A parsed payment request.
struct PaymentRequest {
    new: NewPayment,
    keyed: Option<IdempotentRequest>,
    trace: Option<TraceContext>,
}

impl App {
    pub(super) async fn pay(
        &self,
        client: &Client,
        headers: &HeaderMap,
        body: &mut IncomingBody,
    ) -> Result<Response<Body>, Problem> {
        if !is_json(headers) {
            return Err(Problem::unsupported_media_type());
        }
        if !is_plain(headers) {
            return Err(Problem::unsupported_coding());
        }
        let request = self.read_request(client, headers, body).await?;
        match self.execute(request).await? {
            IdempotentOutcome::Executed(payments) => Ok(created(&payments)),
            IdempotentOutcome::Replayed(payments) => {
                let mut response = created(&payments);
                response
                    .headers_mut()
                    .insert("idempotency-replayed", HeaderValue::from_static("true"));
                Ok(response)
            }
            IdempotentOutcome::KeyReused => Err(Problem::key_reused()),
        }
    }

    /// Reads and parses a request. Its body is not in memory any more while the writer works.
    async fn read_request(
        &self,
        client: &Client,
        headers: &HeaderMap,
        body: &mut IncomingBody,
    ) -> Result<PaymentRequest, Problem> {
        let key = idempotency_key::key(headers)?;
        let settings = &self.context.settings;
        let mut budget = self.limits.body_budget(&client.account);
        let (bytes_max, timeout) = (settings.body_bytes_max, settings.body_timeout);
        let bytes = body::read(body, bytes_max, timeout, &mut budget).await?;
        self.context.store.admit()?;
        let new = NewPayment::parse(&bytes)?;
        let keyed = key.map(|key| IdempotentRequest {
            client: client.name.to_string(),
            key,
            body_hash: idempotency_key::hash(&bytes),
        });
        let values = |name| {
            headers
                .get_all(name)
                .iter()
                .map(|value| value.to_str().unwrap_or_default())
        };
        let trace = TraceContext::parse(values("traceparent"), values("tracestate"));
        Ok(PaymentRequest { new, keyed, trace })
    }

    /// Executes a request, and returns after the commit.
    async fn execute(&self, request: PaymentRequest) -> Result<IdempotentOutcome, Problem> {
        let PaymentRequest { new, keyed, trace } = request;
        let (reply, replied) = oneshot::channel();
        let currency = self.context.currency.clone();
        let keys_max = self.context.keys_max;
        let arrived_at = self.context.store.service_time();
        let relay = self.context.relay.clone();
        let mailbox = Arc::clone(&self.mailbox);
        self.context.store.submit(
            new.reservations.len(),
            move |tx| {
                let now = Timestamp::now();
                let pay = || payments::execute_payments(tx, &new, &currency, trace.as_ref(), now);
                match &keyed {
                    Some(keyed) => keys::execute_once_per_key(tx, keyed, keys_max, arrived_at, pay),
                    None => pay().map(IdempotentOutcome::Executed),
                }
            },
            move |result| {
                if result.is_ok() {
                    relay.wake();
                }
                // A client that disconnected meanwhile has its payment all the same.
                mailbox.post(reply, result);
            },
        )?;
        flatten(replied.await).map_err(Problem::from)
    }

    /// Whether a reservation is paid, and by which payment.
    pub(super) async fn paid(&self, reservation_id: i64) -> Result<Response<Body>, Problem> {
        let paid = self
            .query(move |connection| {
                payments::find_payment_of_reservation(connection, reservation_id)
            })
            .await?;
        Ok(json(
            StatusCode::OK,
            &Payments {
                payments: paid.as_slice(),
            },
        ))
    }

    pub(super) async fn payment(&self, id: i64) -> Result<Response<Body>, Problem> {
        let way = self
            .query(move |connection| timeline::find_payment_timeline(connection, id))
            .await?;
        let way = way.ok_or_else(|| Problem::not_found(format!("there is no payment {id}")))?;
        Ok(json(
            StatusCode::OK,
            &TimelineView::new(&way, &self.context.store),
        ))
    }

    pub(super) async fn history(
        &self,
        user_id: i64,
        before: Option<i64>,
        limit: usize,
    ) -> Result<Response<Body>, Problem> {
        // One more row than the page shows whether there is a next page.
        let page = self
            .query(move |connection| {
                payments::payment_history(connection, user_id, before, limit + 1)
            })
            .await?;
        let HistoryPage::Payments(mut payments) = page else {
            return Err(Problem::invalid_field(
                "before",
                "is not a payment of this user; use the path in next",
            ));
        };
        let more = payments.len() > limit;
        payments.truncate(limit);
        let next = payments.last().filter(|_| more).map(|last| {
            format!(
                "/users/{user_id}/payment-history?before={}&limit={limit}",
                last.id
            )
        });
        Ok(json(
            StatusCode::OK,
            &History {
                user_id,
                payments: &payments,
                next,
            },
        ))
    }
}

/// The response to a payment request. A single payment has a Location.
fn created(payments: &[Payment]) -> Response<Body> {
    let mut response = json(StatusCode::CREATED, &Payments { payments });
    if let [payment] = payments
        && let Ok(location) = HeaderValue::from_str(&format!("/payments/{}", payment.id))
    {
        response.headers_mut().insert(LOCATION, location);
    }
    response
}

#[derive(Serialize)]
struct Payments<'a> {
    payments: &'a [Payment],
}

#[derive(Serialize)]
struct History<'a> {
    user_id: i64,
    payments: &'a [Payment],
    /// The path of older payments.
    next: Option<String>,
}

/// A payment and its progress.
#[derive(Serialize)]
struct TimelineView<'a> {
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
    delivered_at: Option<Timestamp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    delivered_in: Option<Carrier>,
    last_error: Option<&'a str>,
}

impl<'a> TimelineView<'a> {
    fn new(way: &'a PaymentTimeline, store: &Store) -> Self {
        let event = way.event.as_ref().map(|event| Event {
            id: store.node().event_id(event.outbox_id),
            status: event.status,
            created_at: event.created_at,
            published_at: event.published_at,
            partition: event.partition,
            offset: event.offset,
            rejection: event.rejection.as_deref(),
        });
        let notification = match (&way.notification, &way.event) {
            (Some(delivery), _) => Some(Notification {
                status: delivery.status,
                channel: Some(&delivery.channel),
                attempts: delivery.attempts,
                unknown_outcomes: delivery.unknown_outcomes,
                delivered_at: delivery.delivered_at,
                delivered_in: delivery.delivered_in,
                last_error: delivery.last_error.as_deref(),
            }),
            // Its delivery does not exist yet.
            (None, Some(_)) => Some(Notification {
                status: DeliveryStatus::Pending,
                channel: None,
                attempts: 0,
                unknown_outcomes: 0,
                delivered_at: None,
                delivered_in: None,
                last_error: None,
            }),
            (None, None) => None,
        };
        Self {
            payment: &way.payment,
            event,
            notification,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_recognized_by_its_content_type() {
        let typed = |text| {
            let mut headers = HeaderMap::new();
            headers.insert(CONTENT_TYPE, HeaderValue::from_static(text));
            is_json(&headers)
        };
        assert!(
            typed("application/json")
                && typed("Application/JSON; charset=utf-8")
                && typed("application/x+json")
        );
        assert!(
            !typed("text/plain")
                && !typed("application/jsonp")
                && !typed("")
                && !is_json(&HeaderMap::new())
        );
    }
}
