//! What crosses Kafka: an event as a record in `CloudEvents`' Kafka binary mode, and back. Pure; names no client.
//!
//! Key: the user id, so that a user's events keep their order. Value: the payment id as text. The event's
//! id is `<node>-<outbox id>`
//! (<https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings/kafka-protocol-binding.md>).

use std::fmt;
use std::sync::Arc;

use crate::clock::Timestamp;
use crate::payment::Status;

/// Which payrelay this is: part of every event id, and of the consumer's identity in its group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeId(Arc<str>);

impl NodeId {
    /// 1 to 64 letters, digits, dots, underscores and hyphens.
    pub fn parse(text: &str) -> Option<Self> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        ((1..=64).contains(&text.len()) && text.chars().all(allowed)).then(|| Self(text.into()))
    }

    /// As it is written.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The id that the world knows an event by.
    pub fn event_id(&self, outbox_id: i64) -> String {
        format!("{self}-{outbox_id}")
    }

    /// The outbox id in an event id of this node.
    pub(crate) fn outbox_id(&self, event_id: &str) -> Option<i64> {
        id(event_id.strip_prefix(self.as_str())?.strip_prefix('-')?)
    }
}

/// Only the form in which ids are written: no sign, no leading zero.
fn id(digits: &str) -> Option<i64> {
    let id: i64 = digits.parse().ok()?;
    (id > 0 && id.to_string() == digits).then_some(id)
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What happened to a payment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The money was taken.
    Completed,
    /// It was not.
    Failed,
}

impl Kind {
    /// The `CloudEvents` type, also the outbox's.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Completed => "payment.completed",
            Self::Failed => "payment.failed",
        }
    }

    /// The reverse of [`Kind::as_str`].
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Completed, Self::Failed].into_iter().find(|kind| kind.as_str() == text)
    }
}

impl From<Status> for Kind {
    fn from(status: Status) -> Self {
        match status {
            Status::Completed => Self::Completed,
            Status::Failed => Self::Failed,
        }
    }
}

/// An outbox row on its way out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Its place in commit order.
    pub outbox_id: i64,
    /// Which payment it tells of.
    pub payment_id: i64,
    /// Whose payment.
    pub user_id: i64,
    /// What happened.
    pub kind: Kind,
    /// When it was committed.
    pub created_at: Timestamp,
    /// The client's trace, if it sent one.
    pub traceparent: Option<String>,
}

/// A Kafka record without a client's types.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Decides the partition.
    pub key: String,
    /// The payment id.
    pub value: String,
    /// Milliseconds since 1970.
    pub timestamp_ms: i64,
    /// In the order in which they are written.
    pub headers: Vec<(&'static str, String)>,
}

/// The header that holds the event's id.
pub const ID_HEADER: &str = "ce_id";

/// The header that holds when it was committed.
pub const TIME_HEADER: &str = "ce_time";

impl Event {
    /// The record that tells of this event. Its timestamp is when the event was committed, but never later than
    /// `now`: a broker refuses a record from the future (`message.timestamp.after.max.ms`, KIP-937), and a clock may
    /// have been ahead when the payment came. `ce_time` says what was stored.
    pub fn to_record(&self, node: &NodeId, now: Timestamp) -> Record {
        let mut headers = vec![
            ("ce_specversion", "1.0".to_owned()),
            (ID_HEADER, node.event_id(self.outbox_id)),
            ("ce_source", format!("/payrelay/{node}")),
            ("ce_type", self.kind.as_str().to_owned()),
            (TIME_HEADER, self.created_at.to_string()),
            ("content-type", "text/plain".to_owned()),
        ];
        headers.extend(self.traceparent.clone().map(|trace| ("traceparent", trace)));
        Record {
            key: self.user_id.to_string(),
            value: self.payment_id.to_string(),
            timestamp_ms: self.created_at.min(now).as_millis(),
            headers,
        }
    }
}

/// Our event as it came back from the topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Notice {
    /// Which event.
    pub outbox_id: i64,
    /// Which payment it says it tells of.
    pub payment_id: i64,
    /// When that was committed, if it says so: an id that was given twice, by a database and by an older copy of it, is two
    /// events.
    pub created_at: Option<Timestamp>,
}

/// Why a record of the topic is no event of this node.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Foreign {
    /// Nobody's event.
    #[error("it has no {ID_HEADER} header that is text")]
    NoId,
    /// Somebody else's, or nobody's.
    #[error("its {ID_HEADER} {0:?} is not one of this node's")]
    NotOurs(String),
    /// Ours by its id, but not by its value.
    #[error("its value is not a payment id")]
    BadValue,
}

impl Notice {
    /// Reads a record's id header and value.
    pub fn parse(node: &NodeId, event_id: Option<&str>, value: Option<&[u8]>) -> Result<Self, Foreign> {
        let event_id = event_id.ok_or(Foreign::NoId)?;
        let outbox_id = node.outbox_id(event_id).ok_or_else(|| Foreign::NotOurs(shown(event_id)))?;
        let payment_id =
            value.and_then(|bytes| std::str::from_utf8(bytes).ok()).and_then(id).ok_or(Foreign::BadValue)?;
        Ok(Self { outbox_id, payment_id, created_at: None })
    }

    /// With what its time header says.
    #[must_use]
    pub fn created_at(self, text: Option<&str>) -> Self {
        Self { created_at: text.and_then(Timestamp::parse), ..self }
    }
}

/// Somebody else's id, which may be of any length.
fn shown(event_id: &str) -> String {
    const CHARS_MAX: usize = 150;
    event_id.chars().take(CHARS_MAX).collect()
}

/// A W3C trace context that may be passed on, version 00 (<https://www.w3.org/TR/trace-context/>). A receiver
/// that cannot read one goes on as if there were none.
pub fn parse_traceparent(text: &str) -> Option<&str> {
    let hex = |part: &str, len: usize| {
        part.len() == len && part.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    };
    let mut parts = text.split('-');
    let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let whole = parts.next().is_none()
        && version == "00"
        && hex(trace, 32)
        && hex(span, 16)
        && hex(flags, 2)
        && trace.bytes().any(|b| b != b'0')
        && span.bytes().any(|b| b != b'0');
    whole.then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn node() -> NodeId {
        NodeId::parse("shop-7").unwrap()
    }

    fn event() -> Event {
        Event {
            outbox_id: 12,
            payment_id: 34,
            user_id: 42,
            kind: Kind::Completed,
            created_at: Timestamp::from_micros(1_795_341_600_123_456),
            traceparent: Some(TRACE.into()),
        }
    }

    #[test]
    fn a_record_is_a_cloud_event_in_binary_mode() {
        let record = event().to_record(&node(), Timestamp::from_micros(i64::MAX));
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
        ];
        assert_eq!(record.headers, expected.map(|(name, value)| (name, value.to_owned())));
    }

    #[test]
    fn a_record_is_never_from_the_future() {
        let now = event().created_at.minus(std::time::Duration::from_hours(24));
        let record = event().to_record(&node(), now);
        assert_eq!(record.timestamp_ms, now.as_millis());
        assert!(record.headers.contains(&("ce_time", event().created_at.to_string())));
    }

    #[test]
    fn what_is_not_ours_is_told_apart() {
        let parse = |id, value: &'static str| Notice::parse(&node(), id, Some(value.as_bytes()));
        assert_eq!(parse(Some("shop-7-12"), "34"), Ok(Notice { outbox_id: 12, payment_id: 34, created_at: None }));
        assert_eq!(parse(None, "34"), Err(Foreign::NoId));
        for id in ["shop-8-12", "shop-7-", "shop-7", "shop-7-012", "shop-7-+1", "shop-7--1", "shop-7-0", ""] {
            assert_eq!(parse(Some(id), "34"), Err(Foreign::NotOurs(id.into())), "{id}");
        }
        for value in ["", "x", "9223372036854775808"] {
            assert_eq!(parse(Some("shop-7-12"), value), Err(Foreign::BadValue), "{value}");
        }
        assert_eq!(Notice::parse(&node(), Some("shop-7-12"), None), Err(Foreign::BadValue));
        assert_eq!(Notice::parse(&node(), Some("shop-7-12"), Some(&[0xff])), Err(Foreign::BadValue));
    }

    #[test]
    fn only_a_whole_traceparent_is_passed_on() {
        assert_eq!(parse_traceparent(TRACE), Some(TRACE));
        let bad = [
            "",
            "00",
            "01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-x",
        ];
        for text in bad {
            assert_eq!(parse_traceparent(text), None, "{text}");
        }
    }

    #[test]
    fn the_corpus_of_trace_contexts() {
        crate::fuzz::corpus("traceparent", 10_000, &["00-", "-01", "ff"], |bytes| {
            let text = String::from_utf8_lossy(bytes);
            let Some(taken) = parse_traceparent(&text) else { return false };
            assert!(taken == text && taken.len() == 55 && taken.is_ascii(), "{taken}");
            true
        });
    }

    #[test]
    fn a_node_id_is_short_and_plain() {
        for bad in ["", "a b", "ä", "a/b", &"x".repeat(65)] {
            assert_eq!(NodeId::parse(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn what_goes_out_comes_back(outbox_id in 1..=i64::MAX, payment_id in 1..=i64::MAX, id in "[a-z0-9._-]{1,64}") {
            let node = NodeId::parse(&id).unwrap();
            let record = Event { outbox_id, payment_id, ..event() }.to_record(&node, Timestamp::now());
            let event_id = record.headers.iter().find(|(name, _)| *name == ID_HEADER).map(|(_, value)| value.as_str());
            let time = record.headers.iter().find(|(name, _)| *name == TIME_HEADER).map(|(_, value)| value.as_str());
            let notice = Notice::parse(&node, event_id, Some(record.value.as_bytes())).map(|notice| notice.created_at(time));
            prop_assert_eq!(notice, Ok(Notice { outbox_id, payment_id, created_at: Some(event().created_at) }));
        }

        #[test]
        fn never_panics(id in proptest::option::of(".{0,80}"), value in proptest::option::of(proptest::collection::vec(any::<u8>(), 0..40))) {
            let _ = Notice::parse(&node(), id.as_deref(), value.as_deref());
        }
    }
}
