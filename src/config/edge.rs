//! Values that contradict `node.role = "edge"`.

use super::kafka::{DeliveryGuarantee, Kafka};
use super::source::Source;
use crate::domain::event::RecordKey;
use crate::domain::payment_record::RecordFormat;

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

/// Without the payment, a record with the node as its key does not name the user.
pub(super) fn check_key(kafka: &Kafka, source: &mut Source<'_>) {
    if kafka.key == RecordKey::Node && kafka.format == RecordFormat::Id {
        source.add_problem(
            "kafka.key = \"node\" needs kafka.format = \"json\": the record would not name the user"
                .to_owned(),
        );
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
