//! An event as a Kafka record in `CloudEvents`' Kafka binary mode, and back. Pure; names no client.
//!
//! Key: the user id, so that a user's events keep their order. Value: the payment id as text, or
//! the payment as JSON. The event's id is `<node>-<outbox id>` (the `CloudEvents` specification
//! 1.0.2, Kafka protocol binding, binary mode).

use crate::domain::node_id::NodeId;
use crate::domain::payment::{Payment, Status};
use crate::domain::payment_record::{PAYMENT_SCHEMA_ID, parse_payment_ids, payment_to_json};
use crate::domain::text_enum::text_enum;
use crate::domain::timestamp::Timestamp;
use crate::domain::trace_context::TraceContext;

text_enum! {
    /// The `CloudEvents` type of an event, also in the outbox: the outcome of its payment.
    pub enum EventType {
        /// The payment is COMPLETED.
        Completed = "payment.completed",
        /// The payment is FAILED.
        Failed = "payment.failed",
    }
}

/// What decides the partition of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecordKey {
    /// The user: a user's events keep their order.
    User,
    /// The node: all of its events keep their order.
    Node,
}

impl From<Status> for EventType {
    fn from(status: Status) -> Self {
        match status {
            Status::Completed => Self::Completed,
            Status::Failed => Self::Failed,
        }
    }
}

/// An outbox row to be published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Its place in commit order.
    pub outbox_id: i64,
    /// Its payment.
    pub payment_id: i64,
    /// The user of the payment.
    pub user_id: i64,
    /// The outcome of the payment.
    pub kind: EventType,
    /// When it was committed.
    pub created_at: Timestamp,
    /// The client's trace, if it sent one.
    pub trace: Option<TraceContext>,
    /// The payment, if the record is to carry it as JSON.
    pub payment: Option<Payment>,
}

/// What all records of a node have in common.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordSource {
    /// The node.
    pub node: NodeId,
    /// When its database was created: a new database under an old node id begins with event 1
    /// again.
    pub incarnation: Timestamp,
    /// What decides the partition.
    pub key: RecordKey,
}

/// A Kafka record without a client's types.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The user or the node. It decides the partition.
    pub key: String,
    /// The payment id, or the payment as JSON.
    pub value: String,
    /// Milliseconds since 1970.
    pub timestamp_ms: i64,
    /// In the order in which they are written.
    pub headers: Vec<(&'static str, String)>,
}

/// The header with the event's id.
pub const ID_HEADER: &str = "ce_id";

/// The header with the time of the commit.
pub const TIME_HEADER: &str = "ce_time";

/// The header with the time when the node's database was created, in microseconds since 1970.
pub const INCARNATION_HEADER: &str = "ce_incarnation";

/// The header with the id of the event before this one.
pub const PREVIOUS_HEADER: &str = "ce_previous";

impl Event {
    /// The record of this event. Its timestamp is `now`, the time of publishing; `ce_time` has the
    /// time of the commit. A broker may reject a record from the future, and reject or delete an
    /// old one (`message.timestamp.before.max.ms`, `message.timestamp.after.max.ms` and
    /// `retention.ms`).
    ///
    /// `previous` is the event of this database before it on the topic, 0 if there is none: a
    /// reader notices a gap.
    pub fn to_record(&self, source: &RecordSource, previous: i64, now: Timestamp) -> Record {
        let RecordSource {
            node, incarnation, ..
        } = source;
        let key = match source.key {
            RecordKey::User => self.user_id.to_string(),
            RecordKey::Node => node.to_string(),
        };
        let mut headers = vec![
            ("ce_specversion", "1.0".to_owned()),
            (ID_HEADER, node.event_id(self.outbox_id)),
            ("ce_source", format!("/payrelay/{node}")),
            ("ce_type", self.kind.as_str().to_owned()),
            (TIME_HEADER, self.created_at.to_string()),
        ];
        let value = if let Some(payment) = &self.payment {
            headers.extend([
                ("content-type", "application/json".to_owned()),
                ("ce_dataschema", PAYMENT_SCHEMA_ID.to_owned()),
                ("ce_partitionkey", key.clone()),
                (PREVIOUS_HEADER, previous.to_string()),
                (INCARNATION_HEADER, incarnation.as_micros().to_string()),
            ]);
            payment_to_json(payment)
        } else {
            headers.push(("content-type", "text/plain".to_owned()));
            self.payment_id.to_string()
        };
        if let Some(TraceContext { parent, state }) = self.trace.clone() {
            headers.push(("traceparent", parent));
            headers.extend(state.map(|state| ("tracestate", state)));
        }
        Record {
            key,
            value,
            timestamp_ms: now.as_millis(),
            headers,
        }
    }
}

/// One of our events, as the topic returns it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EventRef {
    /// Its outbox id.
    pub outbox_id: i64,
    /// The payment that it names.
    pub payment_id: i64,
    /// The time of its commit, if it names one. A database and an older copy of it may both issue
    /// an id. These are two events with different times.
    pub created_at: Option<Timestamp>,
}

/// Why a record of the topic is no event of this node.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotOwnEvent {
    /// It is no event.
    #[error("it has no {ID_HEADER} header that is text")]
    NoId,
    /// It is another node's event, or none.
    #[error("its {ID_HEADER} {0:?} is not one of this node's")]
    NotOurs(String),
    /// It is ours by its id, but not by its value.
    #[error("its value is neither a payment id nor a payment as JSON")]
    BadValue,
}

impl EventRef {
    /// Reads a record's id header and value.
    pub fn parse(
        node: &NodeId,
        event_id: Option<&str>,
        value: Option<&[u8]>,
    ) -> Result<Self, NotOwnEvent> {
        let event_id = event_id.ok_or(NotOwnEvent::NoId)?;
        let outbox_id = node
            .outbox_id(event_id)
            .ok_or_else(|| NotOwnEvent::NotOurs(truncate_event_id(event_id)))?;
        let ids = value.and_then(parse_payment_ids);
        Ok(Self {
            outbox_id,
            payment_id: ids.ok_or(NotOwnEvent::BadValue)?.payment_id,
            created_at: None,
        })
    }

    /// Adds the value of the time header.
    #[must_use]
    pub fn created_at(self, text: Option<&str>) -> Self {
        Self {
            created_at: text.and_then(Timestamp::parse),
            ..self
        }
    }
}

/// Cuts a foreign id, which may be of any length.
fn truncate_event_id(event_id: &str) -> String {
    const CHARS_MAX: usize = 150;
    event_id.chars().take(CHARS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::payment::example_payment;
    use proptest::prelude::*;

    const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn example_node() -> NodeId {
        NodeId::parse("shop-7").unwrap()
    }

    fn example_source() -> RecordSource {
        RecordSource {
            node: example_node(),
            incarnation: Timestamp::from_micros(1_795_000_000_000_000),
            key: RecordKey::User,
        }
    }

    fn example_event() -> Event {
        Event {
            outbox_id: 12,
            payment_id: 34,
            user_id: 42,
            kind: EventType::Completed,
            created_at: Timestamp::from_micros(1_795_341_600_123_456),
            trace: Some(TraceContext {
                parent: TRACE.into(),
                state: Some("a=1,b=2".into()),
            }),
            payment: None,
        }
    }

    #[test]
    fn the_record_of_an_event_is_a_cloud_event_in_binary_mode() {
        let record = example_event().to_record(&example_source(), 0, example_event().created_at);
        assert_eq!((record.key.as_str(), record.value.as_str()), ("42", "34"));
        assert_eq!(record.timestamp_ms, 1_795_341_600_123);
        let expected = [
            ("ce_specversion", "1.0"),
            ("ce_id", "shop-7-12"),
            ("ce_source", "/payrelay/shop-7"),
            ("ce_type", "payment.completed"),
            ("ce_time", "2026-11-22T10:00:00.123456Z"),
            ("content-type", "text/plain"),
            ("traceparent", TRACE),
            ("tracestate", "a=1,b=2"),
        ];
        assert_eq!(
            record.headers,
            expected.map(|(name, value)| (name, value.to_owned()))
        );
    }

    #[test]
    fn the_record_of_an_event_with_its_payment_is_json_with_a_schema() {
        let event = Event {
            payment: Some(example_payment()),
            trace: None,
            ..example_event()
        };
        let record = event.to_record(&example_source(), 9, event.created_at);
        assert_eq!(record.key, "42");
        assert_eq!(record.value, payment_to_json(&example_payment()));
        let expected = [
            ("ce_specversion", "1.0"),
            ("ce_id", "shop-7-12"),
            ("ce_source", "/payrelay/shop-7"),
            ("ce_type", "payment.completed"),
            ("ce_time", "2026-11-22T10:00:00.123456Z"),
            ("content-type", "application/json"),
            ("ce_dataschema", "urn:payrelay:schema:payment:1"),
            ("ce_partitionkey", "42"),
            ("ce_previous", "9"),
            ("ce_incarnation", "1795000000000000"),
        ];
        assert_eq!(
            record.headers,
            expected.map(|(name, value)| (name, value.to_owned()))
        );
        let by_node = RecordSource {
            key: RecordKey::Node,
            ..example_source()
        };
        let record = event.to_record(&by_node, 9, event.created_at);
        assert_eq!(record.key, "shop-7");
        assert!(
            record
                .headers
                .contains(&("ce_partitionkey", "shop-7".to_owned()))
        );
    }

    #[test]
    fn the_record_of_an_event_has_the_time_of_publishing_and_keeps_that_of_the_commit() {
        let day = std::time::Duration::from_hours(24);
        for now in [
            example_event().created_at.minus(day),
            example_event().created_at.plus(21 * day),
        ] {
            let record = example_event().to_record(&example_source(), 0, now);
            assert_eq!(record.timestamp_ms, now.as_millis());
            assert!(
                record
                    .headers
                    .contains(&("ce_time", example_event().created_at.to_string()))
            );
        }
    }

    #[test]
    fn foreign_event_records_are_recognized() {
        let parse =
            |id, value: &'static str| EventRef::parse(&example_node(), id, Some(value.as_bytes()));
        assert_eq!(
            parse(Some("shop-7-12"), "34"),
            Ok(EventRef {
                outbox_id: 12,
                payment_id: 34,
                created_at: None
            })
        );
        assert_eq!(parse(None, "34"), Err(NotOwnEvent::NoId));
        for id in [
            "shop-8-12",
            "shop-7-",
            "shop-7",
            "shop-7-012",
            "shop-7-+1",
            "shop-7--1",
            "shop-7-0",
            "",
        ] {
            assert_eq!(
                parse(Some(id), "34"),
                Err(NotOwnEvent::NotOurs(id.into())),
                "{id}"
            );
        }
        for value in ["", "x", "9223372036854775808"] {
            assert_eq!(
                parse(Some("shop-7-12"), value),
                Err(NotOwnEvent::BadValue),
                "{value}"
            );
        }
        assert_eq!(
            EventRef::parse(&example_node(), Some("shop-7-12"), None),
            Err(NotOwnEvent::BadValue)
        );
        assert_eq!(
            EventRef::parse(&example_node(), Some("shop-7-12"), Some(&[0xff])),
            Err(NotOwnEvent::BadValue)
        );
    }

    proptest! {
        #[test]
        fn a_published_event_is_parsed_back(
            outbox_id in 1..=i64::MAX,
            payment_id in 1..=i64::MAX,
            id in "[a-z0-9._-]{1,64}",
            with_payment in any::<bool>(),
        ) {
            let node = NodeId::parse(&id).unwrap();
            let payment = with_payment.then(|| Payment { id: payment_id, ..example_payment() });
            let event = Event { outbox_id, payment_id, payment, ..example_event() };
            let source = RecordSource { node: node.clone(), ..example_source() };
            let record = event.to_record(&source, 0, Timestamp::now());
            let header = |wanted| {
                let found = record.headers.iter().find(|(name, _)| *name == wanted);
                found.map(|(_, value)| value.as_str())
            };
            let parsed = EventRef::parse(&node, header(ID_HEADER), Some(record.value.as_bytes()))
                .map(|parsed| parsed.created_at(header(TIME_HEADER)));
            let created_at = Some(event.created_at);
            prop_assert_eq!(parsed, Ok(EventRef { outbox_id, payment_id, created_at }));
        }

        #[test]
        fn parsing_an_event_never_panics(
            id in proptest::option::of(".{0,80}"),
            value in proptest::option::of(proptest::collection::vec(any::<u8>(), 0..40)),
        ) {
            let _ = EventRef::parse(&example_node(), id.as_deref(), value.as_deref());
        }
    }
}
