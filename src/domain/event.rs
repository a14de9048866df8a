//! An event as a Kafka record in `CloudEvents`' Kafka binary mode, and back. Pure; names no client.
//!
//! Key: the user id, so that a user's events keep their order. Value: the payment id as text. The
//! event's id is `<node>-<outbox id>`
//! (<https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings/kafka-protocol-binding.md>).

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;

use crate::domain::payment::Status;
use crate::domain::timestamp::Timestamp;

/// The id of a payrelay: part of every event id, and of the consumer's identity in its group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeId(Arc<str>);

impl NodeId {
    /// 1 to 64 letters, digits, dots, underscores and hyphens.
    pub fn parse(text: &str) -> Option<Self> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        ((1..=64).contains(&text.len()) && text.chars().all(allowed)).then(|| Self(text.into()))
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The id of an event outside of payrelay.
    pub fn event_id(&self, outbox_id: i64) -> String {
        format!("{self}-{outbox_id}")
    }

    /// The outbox id in an event id of this node.
    pub(crate) fn outbox_id(&self, event_id: &str) -> Option<i64> {
        id(event_id.strip_prefix(self.as_str())?.strip_prefix('-')?)
    }
}

/// Only the canonical form of an id: no sign, no leading zero.
fn id(digits: &str) -> Option<i64> {
    let id: i64 = digits.parse().ok()?;
    (id > 0 && id.to_string() == digits).then_some(id)
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The outcome of a payment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventType {
    /// The payment is COMPLETED.
    Completed,
    /// The payment is FAILED.
    Failed,
}

impl EventType {
    /// The `CloudEvents` type, also the outbox's.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Completed => "payment.completed",
            Self::Failed => "payment.failed",
        }
    }

    /// The reverse of [`EventType::as_str`].
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Completed, Self::Failed]
            .into_iter()
            .find(|kind| kind.as_str() == text)
    }
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
}

/// A W3C trace context (<https://www.w3.org/TR/trace-context/>), as it is passed on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceContext {
    /// `traceparent`, in version 00.
    pub parent: String,
    /// `tracestate`, if there is one.
    pub state: Option<String>,
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

/// The header with the event's id.
pub const ID_HEADER: &str = "ce_id";

/// The header with the time of the commit.
pub const TIME_HEADER: &str = "ce_time";

impl Event {
    /// The record of this event. Its timestamp is `now`, the time of publishing: a broker rejects a
    /// record from the future, and may reject or delete an old one
    /// (`message.timestamp.before.max.ms` and `after.max.ms`, KIP-937; `retention.ms`). `ce_time`
    /// has the time of the commit.
    pub fn to_record(&self, node: &NodeId, now: Timestamp) -> Record {
        let mut headers = vec![
            ("ce_specversion", "1.0".to_owned()),
            (ID_HEADER, node.event_id(self.outbox_id)),
            ("ce_source", format!("/payrelay/{node}")),
            ("ce_type", self.kind.as_str().to_owned()),
            (TIME_HEADER, self.created_at.to_string()),
            ("content-type", "text/plain".to_owned()),
        ];
        if let Some(TraceContext { parent, state }) = self.trace.clone() {
            headers.push(("traceparent", parent));
            headers.extend(state.map(|state| ("tracestate", state)));
        }
        Record {
            key: self.user_id.to_string(),
            value: self.payment_id.to_string(),
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
    /// The time of its commit, if it names one: an id that was given twice, by a database and by an
    /// older copy of it, is two events.
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
    #[error("its value is not a payment id")]
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
            .ok_or_else(|| NotOwnEvent::NotOurs(shown(event_id)))?;
        let payment_id = value
            .and_then(|bytes| std::str::from_utf8(bytes).ok())
            .and_then(id)
            .ok_or(NotOwnEvent::BadValue)?;
        Ok(Self {
            outbox_id,
            payment_id,
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
fn shown(event_id: &str) -> String {
    const CHARS_MAX: usize = 150;
    event_id.chars().take(CHARS_MAX).collect()
}

impl TraceContext {
    /// Reads the values of the headers `traceparent` and `tracestate`. Without a valid and unique
    /// `traceparent` there is no trace context.
    pub fn parse<'a>(
        parents: impl IntoIterator<Item = &'a str>,
        states: impl IntoIterator<Item = &'a str>,
    ) -> Option<Self> {
        let mut parents = parents.into_iter();
        let parent = parents.next().and_then(parse_traceparent)?;
        if parents.next().is_some() {
            return None;
        }
        let states: Vec<_> = states
            .into_iter()
            .map(str::trim)
            .filter(|state| !state.is_empty())
            .collect();
        Some(Self {
            parent,
            state: parse_tracestate(&states.join(",")),
        })
    }
}

/// The fields of version 00, with which every later version begins (section 3.2.2, "Versioning of
/// traceparent").
fn parse_traceparent(text: &str) -> Option<String> {
    /// `00-` and 32, 16 and 2 digits with hyphens between them.
    const LENGTH: usize = 55;
    let hex = |part: &str, len: usize| {
        part.len() == len
            && part
                .bytes()
                .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    };
    let (known, rest) = text.split_at_checked(LENGTH)?;
    let mut parts = known.split('-');
    let (version, trace, span, flags) =
        (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let rest_fits = if version == "00" {
        rest.is_empty()
    } else {
        rest.is_empty() || rest.starts_with('-')
    };
    let whole = parts.next().is_none()
        && hex(version, 2)
        && version != "ff"
        && rest_fits
        && hex(trace, 32)
        && hex(span, 16)
        && hex(flags, 2)
        && trace.bytes().any(|b| b != b'0')
        && span.bytes().any(|b| b != b'0');
    whole.then(|| format!("00-{trace}-{span}-{flags}"))
}

/// A list of at most 32 members and 512 characters (section 3.3), or empty: one invalid member
/// invalidates the list. Keys and values follow the second level of the recommendation, which
/// allows everything that the first one does.
fn parse_tracestate(text: &str) -> Option<String> {
    let members: Vec<_> = text
        .split(',')
        .map(|member| member.trim_matches([' ', '\t']))
        .filter(|member| !member.is_empty())
        .collect();
    let mut keys = HashSet::new();
    let right = members.iter().all(|member| {
        member.split_once('=').is_some_and(|(key, value)| {
            is_state_key(key) && is_state_value(value) && keys.insert(key)
        })
    });
    let fits = (1..=32).contains(&members.len()) && text.len() <= 512;
    (right && fits).then(|| text.to_owned())
}

fn is_state_key(key: &str) -> bool {
    let is_first = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let is_next = |byte: u8| is_first(byte) || b"_-*/@".contains(&byte);
    let bytes = key.as_bytes();
    bytes.len() <= 256
        && bytes.first().is_some_and(|first| is_first(*first))
        && bytes.iter().all(|byte| is_next(*byte))
}

fn is_state_value(value: &str) -> bool {
    value.len() <= 256
        && value
            .bytes()
            .all(|byte| (b' '..=b'~').contains(&byte) && !b",=".contains(&byte))
        && !value.is_empty()
        && !value.ends_with(' ')
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
            kind: EventType::Completed,
            created_at: Timestamp::from_micros(1_795_341_600_123_456),
            trace: Some(TraceContext {
                parent: TRACE.into(),
                state: Some("a=1,b=2".into()),
            }),
        }
    }

    #[test]
    fn a_record_is_a_cloud_event_in_binary_mode() {
        let record = event().to_record(&node(), event().created_at);
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
    fn a_record_has_the_time_of_publishing_and_keeps_that_of_the_commit() {
        let day = std::time::Duration::from_hours(24);
        for now in [
            event().created_at.minus(day),
            event().created_at.plus(21 * day),
        ] {
            let record = event().to_record(&node(), now);
            assert_eq!(record.timestamp_ms, now.as_millis());
            assert!(
                record
                    .headers
                    .contains(&("ce_time", event().created_at.to_string()))
            );
        }
    }

    #[test]
    fn foreign_records_are_recognized() {
        let parse = |id, value: &'static str| EventRef::parse(&node(), id, Some(value.as_bytes()));
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
            EventRef::parse(&node(), Some("shop-7-12"), None),
            Err(NotOwnEvent::BadValue)
        );
        assert_eq!(
            EventRef::parse(&node(), Some("shop-7-12"), Some(&[0xff])),
            Err(NotOwnEvent::BadValue)
        );
    }

    #[test]
    fn only_a_whole_traceparent_is_passed_on() {
        let rest = &TRACE[2..];
        assert_eq!(parse_traceparent(TRACE).as_deref(), Some(TRACE));
        for later in [
            format!("01{rest}"),
            format!("fe{rest}-more-fields"),
            format!("cc{rest}-"),
        ] {
            assert_eq!(parse_traceparent(&later).as_deref(), Some(TRACE), "{later}");
        }
        let bad = [
            String::new(),
            "00".to_owned(),
            format!("ff{rest}"),
            format!("0G{rest}"),
            format!("01{rest}x"),
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01".to_owned(),
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01".to_owned(),
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01".to_owned(),
            format!("{TRACE}-x"),
        ];
        for text in bad {
            assert_eq!(parse_traceparent(&text), None, "{text}");
        }
    }

    #[test]
    fn two_traceparents_are_none_and_the_state_goes_along() {
        let state = |states: &[&str]| {
            TraceContext::parse([TRACE], states.iter().copied())
                .unwrap()
                .state
        };
        assert_eq!(TraceContext::parse([TRACE, TRACE], []), None);
        assert_eq!(TraceContext::parse(["nonsense"], ["a=1"]), None);
        assert_eq!(state(&[]), None);
        assert_eq!(state(&["a=1", "", " b=2 "]).as_deref(), Some("a=1,b=2"));
        let long = format!("a={}", "x".repeat(511));
        let many = (0..33)
            .map(|n| format!("k{n}=1"))
            .collect::<Vec<_>>()
            .join(",");
        for bad in [
            "=1", "a", "a=", "a=1=2", "A=1", "a b=1", "_a=1", "a=1,a=2", "a=1,b", "a=\u{1}", "a=ü",
            &long, &many,
        ] {
            assert_eq!(state(&[bad]), None, "{bad}");
        }
        for good in ["a=1\t,\tb=2", "1@vendor=x y", "a-_*/z=!~", ",a=1,"] {
            assert_eq!(state(&[good]).as_deref(), Some(good));
        }
    }

    #[test]
    fn the_corpus_of_trace_contexts() {
        crate::fuzz::corpus(
            "traceparent",
            10_000,
            &["00-", "-01", "ff", "fe-"],
            |bytes| {
                let text = String::from_utf8_lossy(bytes);
                let Some(parsed) = parse_traceparent(&text) else {
                    return false;
                };
                assert!(
                    parsed.len() == 55 && parsed.is_ascii() && parsed[2..] == text[2..55],
                    "{parsed}"
                );
                true
            },
        );
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
            let notice = EventRef::parse(&node, event_id, Some(record.value.as_bytes())).map(|notice| notice.created_at(time));
            prop_assert_eq!(notice, Ok(EventRef { outbox_id, payment_id, created_at: Some(event().created_at) }));
        }

        #[test]
        fn never_panics(id in proptest::option::of(".{0,80}"), value in proptest::option::of(proptest::collection::vec(any::<u8>(), 0..40))) {
            let _ = EventRef::parse(&node(), id.as_deref(), value.as_deref());
        }
    }
}
