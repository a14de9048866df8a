//! The id of a node, and the ids of its events outside of payrelay. Pure.

use std::fmt;
use std::sync::Arc;

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
        parse_id(event_id.strip_prefix(self.as_str())?.strip_prefix('-')?)
    }
}

/// A double holds larger ids inexactly (RFC 8259, 6), so payrelay never issues them.
pub const ID_MAX: i64 = (1 << 53) - 1;

/// Only the canonical form of an id: no sign, no leading zero.
pub(super) fn parse_id(digits: &str) -> Option<i64> {
    let id: i64 = digits.parse().ok()?;
    (id > 0 && id.to_string() == digits).then_some(id)
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_id_is_short_and_plain() {
        for bad in ["", "a b", "ä", "a/b", &"x".repeat(65)] {
            assert_eq!(NodeId::parse(bad), None, "{bad}");
        }
    }
}
