//! A payment as the value of a Kafka record: its id as text, or JSON by schema/payment-1.json.

use serde::{Deserialize, Serialize};

use crate::domain::node_id::parse_id;
use crate::domain::payment::{Payment, Status};
use crate::domain::text_enum::text_enum;
use crate::domain::timestamp::Timestamp;

/// The JSON Schema of the value in the format [`RecordFormat::Json`].
pub const PAYMENT_SCHEMA: &str = include_str!("../../schema/payment-1.json");

/// The name of [`PAYMENT_SCHEMA`] in the header `ce_dataschema`.
pub const PAYMENT_SCHEMA_ID: &str = "urn:payrelay:schema:payment:1";

text_enum! {
    /// What the value of a record has.
    pub enum RecordFormat {
        /// The payment id as text.
        Id = "id",
        /// The payment as JSON.
        Json = "json",
    }
}

#[derive(Serialize)]
struct PaymentRecord<'a> {
    payment_id: i64,
    user_id: i64,
    reservation_id: i64,
    amount: i64,
    currency: &'a str,
    status: Status,
    #[serde(skip_serializing_if = "Option::is_none")]
    failure: Option<&'a str>,
    executed_at: Timestamp,
}

/// The payment as JSON.
pub fn payment_to_json(payment: &Payment) -> String {
    let record = PaymentRecord {
        payment_id: payment.id,
        user_id: payment.user_id,
        reservation_id: payment.reservation_id,
        amount: payment.amount,
        currency: &payment.currency,
        status: payment.status,
        failure: payment.failure.as_deref(),
        executed_at: payment.executed_at,
    };
    // Numbers and texts always become JSON.
    serde_json::to_string(&record).unwrap_or_default()
}

/// The ids in a record's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PaymentIds {
    /// The payment.
    pub payment_id: i64,
    /// Its user, if the value names one.
    pub user_id: Option<i64>,
}

/// A payment as it was read.
#[derive(Deserialize)]
struct ReadPayment {
    payment_id: i64,
    user_id: i64,
    reservation_id: i64,
    amount: i64,
    currency: String,
    status: String,
    failure: Option<String>,
    executed_at: Timestamp,
}

/// Reads a payment as JSON. `None`: it does not follow the schema.
pub fn parse_payment(value: &[u8]) -> Option<Payment> {
    let read: ReadPayment = serde_json::from_slice(value).ok()?;
    let status = Status::parse(&read.status)?;
    let numbers = [read.user_id, read.reservation_id, read.amount];
    let is_valid = read.payment_id > 0
        && numbers.iter().all(|number| *number >= 0)
        && read.failure.is_some() == (status == Status::Failed);
    is_valid.then_some(Payment {
        id: read.payment_id,
        user_id: read.user_id,
        reservation_id: read.reservation_id,
        amount: read.amount,
        currency: read.currency,
        status,
        failure: read.failure,
        paid_by: None,
        executed_at: read.executed_at,
    })
}

#[derive(Deserialize)]
struct JsonIds {
    payment_id: i64,
    user_id: i64,
}

/// Reads a record's value in either format: only JSON begins with a brace. So a node may change its
/// format at any time.
pub fn parse_payment_ids(value: &[u8]) -> Option<PaymentIds> {
    if value.starts_with(b"{") {
        let JsonIds {
            payment_id,
            user_id,
        } = serde_json::from_slice(value).ok()?;
        let user_id = Some(user_id);
        return (payment_id > 0).then_some(PaymentIds {
            payment_id,
            user_id,
        });
    }
    let payment_id = parse_id(std::str::from_utf8(value).ok()?)?;
    Some(PaymentIds {
        payment_id,
        user_id: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::payment::example_payment;
    use proptest::prelude::*;

    fn failed_payment() -> Payment {
        Payment {
            status: Status::Failed,
            failure: Some("already paid".into()),
            paid_by: Some(12),
            ..example_payment()
        }
    }

    #[test]
    fn a_failed_payment_as_json_has_its_failure() {
        let expected = r#"{"payment_id":34,"user_id":42,"reservation_id":1001,"amount":150000,"#
            .to_owned()
            + r#""currency":"KRW","status":"FAILED","failure":"already paid","#
            + r#""executed_at":"2026-11-22T10:00:00.123456Z"}"#;
        assert_eq!(payment_to_json(&failed_payment()), expected);
    }

    #[test]
    fn the_payment_schema_refuses_what_no_payment_has() {
        let schema = serde_json::from_str(PAYMENT_SCHEMA).unwrap();
        let validator = jsonschema::validator_for(&schema).unwrap();
        let id = schema["$id"].as_str();
        assert_eq!(id, Some(PAYMENT_SCHEMA_ID));
        let valid: serde_json::Value =
            serde_json::from_str(&payment_to_json(&failed_payment())).unwrap();
        assert!(validator.is_valid(&valid));
        let changes = [
            ("payment_id", "0".into()),
            ("amount", (-1).into()),
            ("amount", 1.5.into()),
            ("currency", "won".into()),
            ("status", "PAID".into()),
            ("status", "COMPLETED".into()),
            ("failure", serde_json::Value::Null),
            ("executed_at", "2026-11-22 10:00".into()),
        ];
        for (field, value) in changes {
            let mut invalid = valid.clone();
            invalid[field] = value;
            assert!(!validator.is_valid(&invalid), "{invalid}");
        }
        let mut with_more = valid.clone();
        with_more["added_later"] = true.into();
        assert!(validator.is_valid(&with_more), "readers ignore new fields");
    }

    #[test]
    fn values_without_a_payment_id_are_no_payment() {
        let texts = [
            "",
            "x",
            "0",
            "034",
            "+34",
            "9223372036854775808",
            "{",
            "{}",
            "[34]",
            "null",
            r#"{"payment_id":0,"user_id":1}"#,
            r#"{"payment_id":"34","user_id":1}"#,
            r#"{"payment_id":9223372036854775808,"user_id":1}"#,
            r#"{"payment_id":1,"payment_id":2,"user_id":1}"#,
            r#"{"payment_id":1,"user_id":1} {}"#,
        ];
        for text in texts {
            assert_eq!(parse_payment_ids(text.as_bytes()), None, "{text}");
        }
        assert_eq!(parse_payment_ids(&[0xff]), None);
    }

    proptest! {
        #[test]
        fn a_payment_as_json_follows_the_schema_and_is_parsed_back(
            ids in (1..=i64::MAX, 0..=i64::MAX, 0..=i64::MAX, 0..=i64::MAX),
            failure in proptest::option::of(".{1,40}"),
            micros in 0..=253_402_300_799_999_999_i64,
        ) {
            let (id, user_id, reservation_id, amount) = ids;
            let status = if failure.is_some() { Status::Failed } else { Status::Completed };
            let payment = Payment {
                id,
                user_id,
                reservation_id,
                amount,
                status,
                failure,
                executed_at: Timestamp::from_micros(micros),
                ..example_payment()
            };
            let json = payment_to_json(&payment);
            let schema = serde_json::from_str(PAYMENT_SCHEMA).unwrap();
            let value: serde_json::Value = serde_json::from_str(&json).unwrap();
            prop_assert!(jsonschema::is_valid(&schema, &value), "{}", json);
            prop_assert_eq!(value["amount"].as_i64(), Some(amount));
            let parsed = PaymentIds { payment_id: id, user_id: Some(user_id) };
            prop_assert_eq!(parse_payment_ids(json.as_bytes()), Some(parsed));
            let payment = Payment { paid_by: None, ..payment };
            prop_assert_eq!(parse_payment(json.as_bytes()), Some(payment));
        }
    }
}
