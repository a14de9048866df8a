//! A payment, and the request for one. Pure: it parses and validates.
//!
//! A [`NewPayment`] is valid: its users check nothing any more.

use std::collections::HashSet;
use std::marker::PhantomData;

use serde::de::value::MapAccessDeserializer;
use serde::{Deserialize, Deserializer, Serialize, de};

use crate::domain::text_enum::text_enum;
use crate::domain::timestamp::Timestamp;

/// The maximum number of reservations of one request.
pub const RESERVATIONS_MAX: usize = 1000;

/// A valid payment request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewPayment {
    /// The paying user.
    pub user_id: i64,
    /// The paid reservations: 1 to [`RESERVATIONS_MAX`], none of them twice.
    pub reservations: Vec<Reservation>,
}

/// A reservation of a payment request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reservation {
    /// Its id.
    pub reservation_id: i64,
    /// In the currency's smallest unit.
    pub seat_price: i64,
}

/// The raw request. [`NewPayment::parse`] reports missing fields, because it knows their names.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPayment {
    user_id: Option<PaymentNumber>,
    reservations: Option<Vec<PaymentObject<RawReservation>>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawReservation {
    reservation_id: Option<PaymentNumber>,
    seat_price: Option<PaymentNumber>,
}

/// Why a request was refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidPayment {
    /// The body is not JSON at all.
    #[error("{0}")]
    NotJson(String),
    /// The body is JSON, but this field is invalid.
    #[error("{field}: {detail}")]
    Field {
        /// The path of the field, as in `reservations[1].seat_price`.
        field: String,
        /// The error, and the allowed values.
        detail: String,
    },
}

impl InvalidPayment {
    fn field(field: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::Field {
            field: truncate_payment_error(field.into()),
            detail: truncate_payment_error(detail.into()),
        }
    }
}

/// How much of a request an error repeats; the request may be large.
const SHOWN_MAX: usize = 300;

pub(crate) fn truncate_payment_error(mut text: String) -> String {
    if text.len() > SHOWN_MAX {
        text.truncate(text.floor_char_boundary(SHOWN_MAX));
        text.push_str("...");
    }
    text
}

impl NewPayment {
    /// Parses and validates a request body.
    pub fn parse(body: &[u8]) -> Result<Self, InvalidPayment> {
        let PaymentObject(raw): PaymentObject<RawPayment> = payment_from_json(body)?;
        let user_id = require_payment_field(raw.user_id, || "user_id".to_owned())?.0;
        let entries = require_payment_field(raw.reservations, || "reservations".to_owned())?;
        if !(1..=RESERVATIONS_MAX).contains(&entries.len()) {
            let detail = format!(
                "has {} entries; 1 to {RESERVATIONS_MAX} are allowed",
                entries.len()
            );
            return Err(InvalidPayment::field("reservations", detail));
        }
        let mut seen = HashSet::with_capacity(entries.len());
        let check = |(index, PaymentObject(entry)): (usize, PaymentObject<RawReservation>)| {
            let field = |name| move || format!("reservations[{index}].{name}");
            let reservation_id =
                require_payment_field(entry.reservation_id, field("reservation_id"))?.0;
            let seat_price = require_payment_field(entry.seat_price, field("seat_price"))?.0;
            if !seen.insert(reservation_id) {
                let detail = format!("{reservation_id} is given twice in this request");
                return Err(InvalidPayment::field(field("reservation_id")(), detail));
            }
            Ok(Reservation {
                reservation_id,
                seat_price,
            })
        };
        let reservations = entries
            .into_iter()
            .enumerate()
            .map(check)
            .collect::<Result<_, _>>()?;
        Ok(Self {
            user_id,
            reservations,
        })
    }
}

fn require_payment_field<T>(
    value: Option<T>,
    field: impl FnOnce() -> String,
) -> Result<T, InvalidPayment> {
    value.ok_or_else(|| InvalidPayment::field(field(), "is missing"))
}

/// Only a refused body pays for finding its offending field: it is read once more.
fn payment_from_json<'de, T: Deserialize<'de>>(body: &'de [u8]) -> Result<T, InvalidPayment> {
    serde_json::from_slice(body).or_else(|_| payment_from_json_by_field(body))
}

fn payment_from_json_by_field<'de, T: Deserialize<'de>>(
    body: &'de [u8],
) -> Result<T, InvalidPayment> {
    let mut json = serde_json::Deserializer::from_slice(body);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        let source = error.into_inner();
        match source.classify() {
            serde_json::error::Category::Data => {
                let whole = path == "." || path.is_empty();
                InvalidPayment::field(
                    if whole { "body" } else { &path },
                    describe_payment_json_error(&source),
                )
            }
            _ => InvalidPayment::NotJson(source.to_string()),
        }
    })?;
    json.end()
        .map_err(|error| InvalidPayment::NotJson(error.to_string()))?;
    Ok(value)
}

/// The message without its position: the path already names it.
fn describe_payment_json_error(error: &serde_json::Error) -> String {
    let text = error.to_string();
    match text.rfind(" at line ") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}

/// A JSON object. The implementation that serde derives also accepts an array of the values.
struct PaymentObject<T>(T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for PaymentObject<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PaymentObjectVisitor<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> de::Visitor<'de> for PaymentObjectVisitor<T> {
            type Value = PaymentObject<T>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: de::MapAccess<'de>>(
                self,
                map: A,
            ) -> Result<PaymentObject<T>, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map)).map(PaymentObject)
            }
        }

        deserializer.deserialize_map(PaymentObjectVisitor(PhantomData))
    }
}

/// An integer from 0 to 2^63 - 1.
struct PaymentNumber(i64);

impl<'de> Deserialize<'de> for PaymentNumber {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        const EXPECTED: &str = "an integer from 0 to 9223372036854775807";

        struct PaymentNumberVisitor;

        impl de::Visitor<'_> for PaymentNumberVisitor {
            type Value = PaymentNumber;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(EXPECTED)
            }

            fn visit_u64<E: de::Error>(self, value: u64) -> Result<PaymentNumber, E> {
                let number = i64::try_from(value);
                number
                    .map(PaymentNumber)
                    .map_err(|_| E::invalid_value(de::Unexpected::Unsigned(value), &EXPECTED))
            }

            fn visit_i64<E: de::Error>(self, value: i64) -> Result<PaymentNumber, E> {
                u64::try_from(value)
                    .map_err(|_| E::invalid_value(de::Unexpected::Signed(value), &EXPECTED))
                    .and_then(|value| self.visit_u64(value))
            }
        }

        deserializer.deserialize_i64(PaymentNumberVisitor)
    }
}

text_enum! {
    /// The outcome of a payment.
    pub enum Status {
        /// It was executed.
        Completed = "COMPLETED",
        /// It was not; the payment's `failure` has the reason.
        Failed = "FAILED",
    }
}

/// A stored payment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Payment {
    /// Assigned by the store; never issued twice.
    pub id: i64,
    /// The paying user.
    pub user_id: i64,
    /// The reservation.
    pub reservation_id: i64,
    /// In the currency's smallest unit.
    pub amount: i64,
    /// The currency at the time of its execution (ISO 4217).
    pub currency: String,
    /// The outcome.
    pub status: Status,
    /// Why the payment failed, if it is FAILED.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
    /// The COMPLETED payment of the same reservation, if this one is FAILED.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub paid_by: Option<i64>,
    /// The time of its execution.
    pub executed_at: Timestamp,
}

/// A COMPLETED payment for unit tests.
#[cfg(test)]
pub(crate) fn example_payment() -> Payment {
    Payment {
        id: 34,
        user_id: 42,
        reservation_id: 1001,
        amount: 150_000,
        currency: "KRW".into(),
        status: Status::Completed,
        failure: None,
        paid_by: None,
        executed_at: Timestamp::from_micros(1_795_341_600_123_456),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn payment_refusal(body: &str) -> (String, String) {
        match NewPayment::parse(body.as_bytes()).unwrap_err() {
            InvalidPayment::NotJson(detail) => ("not JSON".into(), detail),
            InvalidPayment::Field { field, detail } => (field, detail),
        }
    }

    fn payment_with_reservations(count: usize) -> String {
        let one = |id| format!(r#"{{"reservation_id":{id},"seat_price":1}}"#);
        format!(
            r#"{{"user_id":1,"reservations":[{}]}}"#,
            (0..count).map(one).collect::<Vec<_>>().join(",")
        )
    }

    #[test]
    fn the_payment_request_of_the_contract_is_accepted() {
        let body =
            br#"{"user_id": 42, "reservations": [{"reservation_id": 1001, "seat_price": 150000}]}"#;
        let new = NewPayment::parse(body).unwrap();
        assert_eq!(new.user_id, 42);
        assert_eq!(
            new.reservations,
            [Reservation {
                reservation_id: 1001,
                seat_price: 150_000
            }]
        );
    }

    #[test]
    fn a_payment_that_is_no_json_is_refused() {
        for body in [
            "",
            "{",
            "nonsense",
            "{\"user_id\":1,}",
            "{\"user_id\":1,\"reservations\":[]} x",
            "\u{0}",
        ] {
            assert_eq!(payment_refusal(body).0, "not JSON", "{body:?}");
        }
    }

    #[test]
    fn a_payment_error_names_the_invalid_field() {
        let cases = [
            ("[]", "body"),
            ("null", "body"),
            (r#"{"reservations":[]}"#, "user_id"),
            (r#"{"user_id":1}"#, "reservations"),
            (r#"{"user_id":null,"reservations":[]}"#, "user_id"),
            (r#"{"user_id":"42","reservations":[]}"#, "user_id"),
            (r#"{"user_id":-1,"reservations":[]}"#, "user_id"),
            (r#"{"user_id":1.5,"reservations":[]}"#, "user_id"),
            (
                r#"{"user_id":9223372036854775808,"reservations":[]}"#,
                "user_id",
            ),
            (
                r#"{"user_id":18446744073709551616,"reservations":[]}"#,
                "user_id",
            ),
            (r#"{"user_id":1,"reservations":{}}"#, "reservations"),
            (r#"{"user_id":1,"reservations":[],"coupon":1}"#, "coupon"),
            (
                r#"{"user_id":1,"reservations":[{"reservation_id":1}]}"#,
                "reservations[0].seat_price",
            ),
            (
                r#"{"user_id":1,"reservations":[{"reservation_id":1,"seat_price":-1}]}"#,
                "reservations[0].seat_price",
            ),
            (
                r#"{"user_id":1,"reservations":[{"reservation_id":1,"seat_price":1,"x":1}]}"#,
                "reservations[0].x",
            ),
        ];
        for (body, field) in cases {
            assert_eq!(
                payment_refusal(body).0,
                field,
                "{body}: {:?}",
                payment_refusal(body)
            );
        }
    }

    #[test]
    fn a_payment_has_1_to_1000_reservations() {
        assert!(
            payment_refusal(&payment_with_reservations(0))
                .1
                .contains("has 0 entries; 1 to 1000")
        );
        assert!(
            payment_refusal(&payment_with_reservations(1001))
                .1
                .contains("has 1001 entries")
        );
        assert_eq!(
            NewPayment::parse(payment_with_reservations(1000).as_bytes())
                .unwrap()
                .reservations
                .len(),
            1000
        );
    }

    #[test]
    fn a_payment_of_the_same_reservation_twice_is_refused() {
        let body = r#"{"user_id":1,"reservations":[
            {"reservation_id":7,"seat_price":1},{"reservation_id":7,"seat_price":2}]}"#;
        assert_eq!(
            payment_refusal(body),
            (
                "reservations[1].reservation_id".into(),
                "7 is given twice in this request".into()
            )
        );
    }

    /// A duplicate is refused even if both values are the same: the client may have meant another
    /// one.
    #[test]
    fn a_payment_field_given_twice_is_refused() {
        let cases = [
            (
                r#"{"user_id":1,"user_id":2,"reservations":[]}"#,
                "body",
                "user_id",
            ),
            (
                r#"{"user_id":1,"\u0075ser_id":1,"reservations":[]}"#,
                "body",
                "user_id",
            ),
            (
                r#"{"user_id":1,"reservations":[],"reservations":[]}"#,
                "body",
                "reservations",
            ),
            (
                r#"{"user_id":1,"reservations":[
                    {"reservation_id":1,"seat_price":1,"seat_price":1}]}"#,
                "reservations[0]",
                "seat_price",
            ),
        ];
        for (body, field, name) in cases {
            assert_eq!(
                payment_refusal(body),
                (field.to_owned(), format!("duplicate field `{name}`")),
                "{body}"
            );
        }
    }

    #[test]
    fn a_payment_array_in_place_of_an_object_is_refused() {
        for (body, field) in [
            ("[42,[[1001,150000]]]", "body"),
            (
                r#"{"user_id":1,"reservations":[[1001,150000]]}"#,
                "reservations[0]",
            ),
        ] {
            let (found, detail) = payment_refusal(body);
            assert!(
                found == field && detail.contains("expected an object"),
                "{body}: {found}: {detail}"
            );
        }
    }

    #[test]
    fn a_payment_error_repeats_little_of_the_body() {
        let long = "é".repeat(5000);
        for body in [
            format!(r#"{{"{long}":1}}"#),
            format!(r#"{{"user_id":"{long}"}}"#),
        ] {
            let (field, detail) = payment_refusal(&body);
            assert!(
                field.len() <= SHOWN_MAX + 3 && detail.len() <= SHOWN_MAX + 3,
                "{field}: {detail}"
            );
        }
    }

    fn payment_as_json(new: &NewPayment) -> serde_json::Value {
        let as_json = |reservation: &Reservation| {
            serde_json::json!({
                "reservation_id": reservation.reservation_id,
                "seat_price": reservation.seat_price,
            })
        };
        let reservations: Vec<_> = new.reservations.iter().map(as_json).collect();
        serde_json::json!({"user_id": new.user_id, "reservations": reservations})
    }

    #[test]
    fn the_corpus_of_payment_bodies() {
        let words = [
            "\"user_id\":",
            "\"reservations\":",
            "\"reservation_id\":",
            "\"seat_price\":",
            "null",
            "[",
            "{",
            "]",
            "}",
            ",",
            "\\u0075",
        ];
        crate::fuzz::fuzz_corpus("body", 5000, &words, |body| match NewPayment::parse(body) {
            Ok(new) => {
                assert!(
                    (1..=RESERVATIONS_MAX).contains(&new.reservations.len()) && new.user_id >= 0
                );
                assert!(
                    new.reservations
                        .iter()
                        .all(|r| r.reservation_id >= 0 && r.seat_price >= 0)
                );
                let ids: HashSet<_> = new.reservations.iter().map(|r| r.reservation_id).collect();
                assert_eq!(ids.len(), new.reservations.len());
                // The parsed request has everything of the body, and is the same when it is written
                // and parsed again.
                let whole: serde_json::Value = serde_json::from_slice(body).unwrap();
                assert_eq!(payment_as_json(&new), whole);
                assert_eq!(NewPayment::parse(whole.to_string().as_bytes()), Ok(new));
                true
            }
            Err(InvalidPayment::NotJson(detail)) => {
                let whole = serde_json::from_slice::<serde_json::Value>(body);
                assert!(whole.is_err() && !detail.is_empty(), "{detail}");
                false
            }
            Err(InvalidPayment::Field { field, detail }) => {
                let bound = 1..=SHOWN_MAX + 3;
                assert!(
                    bound.contains(&field.len()) && bound.contains(&detail.len()),
                    "{field}: {detail}"
                );
                false
            }
        });
    }

    proptest! {
        #[test]
        fn parsing_a_payment_never_panics(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = NewPayment::parse(&body);
        }

        #[test]
        fn a_payment_may_have_every_allowed_number(
            user in 0..=i64::MAX,
            id in 0..=i64::MAX,
            price in 0..=i64::MAX,
        ) {
            let body = format!(
                r#"{{"user_id":{user},"reservations":
                    [{{"reservation_id":{id},"seat_price":{price}}}]}}"#
            );
            let new = NewPayment::parse(body.as_bytes()).unwrap();
            let reservation = Reservation { reservation_id: id, seat_price: price };
            prop_assert_eq!(new, NewPayment { user_id: user, reservations: vec![reservation] });
        }
    }
}
