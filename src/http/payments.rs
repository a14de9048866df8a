//! Payments: accepted, shown, listed.

use std::sync::Arc;

use hyper::header::{CONTENT_ENCODING, CONTENT_TYPE, HeaderMap, HeaderValue, LOCATION};
use hyper::{Response, StatusCode};
use serde::Serialize;
use tokio::sync::oneshot;

use super::app::{App, flatten_store_reply};
use super::auth::AuthenticatedClient;
use super::body::IncomingBody;
use super::idempotency_key;
use super::problem::Problem;
use super::response::{Body, json_response};
use crate::domain::payment::{NewPayment, Payment, Status};
use crate::domain::timestamp::Timestamp;
use crate::domain::trace_context::TraceContext;
use crate::runtime::metrics::HttpMetrics;
use crate::store::idempotency::{self as keys, IdempotentOutcome, IdempotentRequest};
use crate::store::payment::{self as payments, HistoryPage};
use crate::store::payment_view::PaymentView;
use crate::store::timeline;

/// Refuses a body without a content type, or with another one than JSON.
fn check_payment_content_type(headers: &HeaderMap) -> Result<(), Problem> {
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
    let is_json = essence == "application/json"
        || essence
            .strip_prefix("application/")
            .is_some_and(|subtype| subtype.ends_with("+json"));
    if is_json {
        Ok(())
    } else {
        Err(Problem::unsupported_media_type())
    }
}

/// Refuses a body with a coding other than the identity (RFC 9110, 8.4.1).
fn check_payment_content_encoding(headers: &HeaderMap) -> Result<(), Problem> {
    let is_plain = headers.get_all(CONTENT_ENCODING).iter().all(|value| {
        let mut codings = value
            .as_bytes()
            .split(|byte| *byte == b',')
            .map(<[u8]>::trim_ascii);
        codings.all(|coding| coding.is_empty() || coding.eq_ignore_ascii_case(b"identity"))
    });
    if is_plain {
        Ok(())
    } else {
        Err(Problem::unsupported_coding())
    }
}

/// A parsed payment request.
struct PaymentRequest {
    new: NewPayment,
    keyed: Option<IdempotentRequest>,
    trace: Option<TraceContext>,
}

impl App {
    pub(super) async fn post_payments(
        &self,
        client: &AuthenticatedClient,
        headers: &HeaderMap,
        body: &mut IncomingBody,
    ) -> Result<Response<Body>, Problem> {
        check_payment_content_type(headers)?;
        check_payment_content_encoding(headers)?;
        let request = self.read_payment_request(client, headers, body).await?;
        match self.execute_payments(request).await? {
            IdempotentOutcome::Executed(payments) => Ok(payments_created(&payments)),
            IdempotentOutcome::Replayed(payments) => {
                self.context.store.metrics().http().replayed.inc();
                let mut response = payments_created(&payments);
                response
                    .headers_mut()
                    .insert("idempotency-replayed", HeaderValue::from_static("true"));
                Ok(response)
            }
            IdempotentOutcome::KeyReused => {
                self.context.store.metrics().http().key_reused.inc();
                Err(Problem::key_reused())
            }
        }
    }

    /// Reads and parses a request. Its body is not in memory any more while the writer works.
    async fn read_payment_request(
        &self,
        client: &AuthenticatedClient,
        headers: &HeaderMap,
        body: &mut IncomingBody,
    ) -> Result<PaymentRequest, Problem> {
        let key = idempotency_key::idempotency_key_header(headers)?;
        let settings = &self.context.settings;
        let mut limit = self.limits.body_limit(&client.usage);
        let bytes = body
            .read_to_end(settings.body_bytes_max, settings.body_timeout, &mut limit)
            .await?;
        self.context.store.admit()?;
        let new = NewPayment::parse(&bytes)?;
        let keyed = key.map(|key| IdempotentRequest {
            client: client.name.to_string(),
            key,
            body_hash: idempotency_key::idempotency_key_body_hash(&bytes),
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
    async fn execute_payments(
        &self,
        request: PaymentRequest,
    ) -> Result<IdempotentOutcome, Problem> {
        let PaymentRequest { new, keyed, trace } = request;
        let (answer, answered) = oneshot::channel();
        let currency = self.context.currency.clone();
        let keys_max = self.context.keys_max;
        let arrived_at = self.context.store.service_time();
        let relay = self.context.relay.clone();
        let metrics = self.context.store.metrics().clone();
        let replies = Arc::clone(&self.replies);
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
                if let Ok(outcome) = &result {
                    count_executed_payments(metrics.http(), outcome);
                    relay.wake();
                }
                // A client that disconnected meanwhile has its payment all the same.
                replies.push(answer, result);
            },
        )?;
        flatten_store_reply(answered.await).map_err(Problem::from)
    }

    /// Whether a reservation is paid, and by which payment.
    pub(super) async fn payment_of_reservation(
        &self,
        reservation_id: i64,
    ) -> Result<Response<Body>, Problem> {
        let paid = self
            .query(move |connection| {
                payments::find_payment_of_reservation(connection, reservation_id)
            })
            .await?;
        Ok(json_response(
            StatusCode::OK,
            &Payments {
                payments: paid.as_slice(),
            },
        ))
    }

    pub(super) async fn payment_by_id(&self, id: i64) -> Result<Response<Body>, Problem> {
        let timeline = self
            .query(move |connection| timeline::find_payment_timeline(connection, id))
            .await?;
        let timeline =
            timeline.ok_or_else(|| Problem::not_found(format!("there is no payment {id}")))?;
        Ok(json_response(
            StatusCode::OK,
            &PaymentView::new(&timeline, self.context.store.node()),
        ))
    }

    pub(super) async fn payment_history(
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
        Ok(json_response(
            StatusCode::OK,
            &History {
                user_id,
                payments: &payments,
                next,
            },
        ))
    }
}

/// Counts payments that were stored now.
fn count_executed_payments(metrics: &HttpMetrics, outcome: &IdempotentOutcome) {
    if let IdempotentOutcome::Executed(payments) = outcome {
        let failed = payments
            .iter()
            .filter(|payment| payment.status != Status::Completed);
        let failed = failed.count() as u64;
        metrics.failed.inc_by(failed);
        metrics.completed.inc_by(payments.len() as u64 - failed);
    }
}

/// The response to a payment request. A single payment has a Location.
fn payments_created(payments: &[Payment]) -> Response<Body> {
    let mut response = json_response(StatusCode::CREATED, &Payments { payments });
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payment_is_json_by_its_content_type() {
        let is_json = |text| {
            let mut headers = HeaderMap::new();
            headers.insert(CONTENT_TYPE, HeaderValue::from_static(text));
            check_payment_content_type(&headers).is_ok()
        };
        for json in [
            "application/json",
            "Application/JSON; charset=utf-8",
            "application/x+json",
        ] {
            assert!(is_json(json), "{json}");
        }
        for other in ["text/plain", "application/jsonp", ""] {
            assert!(!is_json(other), "{other}");
        }
        assert!(check_payment_content_type(&HeaderMap::new()).is_err());
    }
}
