//! The trace context of a client, which is passed on with the event. Pure.

use std::collections::HashSet;

/// A W3C trace context (<https://www.w3.org/TR/trace-context/>), as it is passed on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceContext {
    /// `traceparent`, in version 00.
    pub parent: String,
    /// `tracestate`, if there is one.
    pub state: Option<String>,
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

impl TraceContext {
    /// The id of the trace, if a tracer recorded it: the flag "sampled" is set (section 3.2.2.5).
    pub fn recorded_id(&self) -> Option<&str> {
        recorded_trace_id(&self.parent)
    }
}

/// The id of a stored `traceparent`, if a tracer recorded it.
pub fn recorded_trace_id(parent: &str) -> Option<&str> {
    let flags = u8::from_str_radix(parent.get(53..55)?, 16).ok()?;
    if flags & 1 == 1 {
        parent.get(3..35)
    } else {
        None
    }
}

/// The id of a trace: 32 lower-case hexadecimal digits, not all of them zero.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceId(String);

impl TraceId {
    /// Reads an id. Some tools write it in upper case.
    pub fn parse(text: &str) -> Option<Self> {
        let id = text.to_ascii_lowercase();
        let parent = parse_traceparent(&format!("00-{id}-0000000000000001-01"));
        parent.map(|_| Self(id))
    }

    /// The id.
    pub fn as_str(&self) -> &str {
        &self.0
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
            is_tracestate_key(key) && is_tracestate_value(value) && keys.insert(key)
        })
    });
    let fits = (1..=32).contains(&members.len()) && text.len() <= 512;
    (right && fits).then(|| text.to_owned())
}

fn is_tracestate_key(key: &str) -> bool {
    let is_first = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let is_next = |byte: u8| is_first(byte) || b"_-*/@".contains(&byte);
    let bytes = key.as_bytes();
    bytes.len() <= 256
        && bytes.first().is_some_and(|first| is_first(*first))
        && bytes.iter().all(|byte| is_next(*byte))
}

fn is_tracestate_value(value: &str) -> bool {
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

    const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

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
    fn two_traceparents_are_none_and_the_tracestate_is_passed_on() {
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
        crate::fuzz::fuzz_corpus(
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
}
