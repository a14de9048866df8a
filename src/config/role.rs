//! What `node.role` decides about other keys: their defaults, and values that contradict it.

use super::kafka::{DeliveryGuarantee, Kafka};
use super::source::Source;
use crate::domain::event::RecordKey;
use crate::domain::node_role::NodeRole;
use crate::domain::payment_record::RecordFormat;

/// The defaults of keys that depend on the role.
#[derive(Debug, Clone, Copy)]
pub(super) struct RoleDefaults {
    pub(super) publisher: &'static str,
    pub(super) format: &'static str,
    pub(super) key: &'static str,
    pub(super) delivery: &'static str,
    pub(super) compression: &'static str,
    pub(super) reconnect_max: &'static str,
}

impl RoleDefaults {
    pub(super) fn of(role: NodeRole) -> Self {
        match role {
            NodeRole::Single => Self {
                publisher: "application",
                format: "id",
                key: "user",
                delivery: "exactly-once",
                compression: "none",
                reconnect_max: "5s",
            },
            // A thousand nodes share a topic: none holds up the others with an open transaction,
            // and they do not come back in step after an outage.
            NodeRole::Edge => Self {
                publisher: "kafka",
                format: "json",
                key: "node",
                delivery: "at-least-once",
                compression: "lz4",
                reconnect_max: "30s",
            },
        }
    }
}

/// Reports values that contradict the role of an edge.
pub(super) fn check_edge(publishes_to_kafka: bool, kafka: &Kafka, source: &mut Source<'_>) {
    let needs = [
        ("publisher.kind", "kafka", publishes_to_kafka),
        ("kafka.format", "json", kafka.format == RecordFormat::Json),
        ("kafka.key", "node", kafka.key == RecordKey::Node),
    ];
    for (key, value, is_met) in needs {
        if !is_met {
            source.add_problem(format!(
                "{key}: node.role = \"edge\" needs {value:?}, its default; remove the key"
            ));
        }
    }
    for key in source.changed_keys("slack.") {
        source.add_problem(format!(
            "{key}: node.role = \"edge\" delivers nothing to Slack; remove the key"
        ));
    }
}

/// What is allowed for an edge, and risky.
pub(super) fn warn_of_edge(kafka: &Kafka) -> Option<String> {
    (kafka.delivery == DeliveryGuarantee::ExactlyOnce).then(|| {
        "kafka.delivery is \"exactly-once\": if this edge dies within a transaction, the other \
            nodes of its partition wait up to a minute; remove the key if they share the topic"
            .to_owned()
    })
}
