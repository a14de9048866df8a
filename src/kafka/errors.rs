//! The meaning of a cluster's error for an operator: in plain words, with the right to grant. And
//! the few errors that mean an invalid record; no error of the environment is one.

use krafka::error::ErrorCode;
use krafka::{Kafka, KrafkaError};

use super::cluster::ClusterError;
use super::reachability::Reachability;
use crate::config;
use crate::domain::node_id::NodeId;

/// Whether another process of this node has joined the group in our place.
pub(super) fn is_fenced_by_another_member(failure: &ClusterError) -> bool {
    matches!(
        failure,
        ClusterError::Client(KrafkaError::Broker {
            code: ErrorCode::FencedInstanceId,
            ..
        })
    )
}

/// Errors that the same record would meet again, and another record would not. Every other code
/// concerns the cluster, a right, the network or a clock: the event waits.
const RECORD_ERRORS: [ErrorCode; 3] = [
    ErrorCode::MessageTooLarge,
    ErrorCode::RecordListTooLarge,
    ErrorCode::InvalidRecord,
];

/// Whether the broker rejected the record itself.
pub(crate) fn is_record_error(error: &KrafkaError) -> bool {
    matches!(error, KrafkaError::Broker { code, .. } if RECORD_ERRORS.contains(code))
}

/// Whether the client only knows that the transaction has to be aborted: the record may be the
/// reason, or not.
pub(crate) fn is_unexplained_error(error: &KrafkaError) -> bool {
    error.requires_abort()
}

/// The error and its remedy; if the network may be the reason, with the addresses that do not
/// answer. `kafka` is `None` before the first answer of a bootstrap server.
pub(crate) async fn explain_cluster_error(
    failure: &ClusterError,
    kafka: Option<&Kafka>,
    reachability: &mut Reachability,
    settings: &config::Kafka,
    node: &NodeId,
) -> String {
    let servers = &settings.bootstrap_servers;
    match (failure, kafka) {
        (ClusterError::Timeout(limit), _) => {
            format!(
                "no answer within {} s: {}",
                limit.as_secs(),
                reachability.locate_silence(kafka, servers).await
            )
        }
        (ClusterError::Client(error), Some(kafka)) if is_network_error(error) => {
            let text = explain_error(error, settings, node);
            match reachability.unreachable(kafka, servers).await {
                Some(unreachable) => format!("{text}; {unreachable}"),
                None => text,
            }
        }
        (ClusterError::Client(error), _) => explain_error(error, settings, node),
        (failure, _) => failure.to_string(),
    }
}

fn is_network_error(error: &KrafkaError) -> bool {
    matches!(
        error,
        KrafkaError::Network(_) | KrafkaError::Timeout { .. } | KrafkaError::DeliveryTimeout { .. }
    )
}

/// The error and its remedy.
pub(crate) fn explain_error(
    error: &KrafkaError,
    settings: &config::Kafka,
    node: &NodeId,
) -> String {
    let KrafkaError::Broker { code, .. } = error else {
        return error_without_programmer_advice(error_without_client_backoff(&error.to_string()));
    };
    let topic = &settings.topic;
    let grant = |operations: &str, resource: &str| {
        format!("kafka-acls.sh --add --allow-principal User:NAME {operations} {resource}")
    };
    match code {
        ErrorCode::TopicAuthorizationFailed => format!(
            "no right to use the topic {topic} (TOPIC_AUTHORIZATION_FAILED): grant WRITE, READ \
                and DESCRIBE, as by {}",
            grant(
                "--operation Write --operation Read --operation Describe",
                &format!("--topic {topic}")
            )
        ),
        ErrorCode::TransactionalIdAuthorizationFailed => format!(
            "no right to the transactional ids that begin with payrelay-{node} \
                (TRANSACTIONAL_ID_AUTHORIZATION_FAILED): grant WRITE and DESCRIBE, as by {}",
            grant(
                "--operation Write --operation Describe",
                &format!("--transactional-id payrelay-{node} --resource-pattern-type prefixed")
            )
        ),
        ErrorCode::GroupAuthorizationFailed => format!(
            "no right to use the group {} (GROUP_AUTHORIZATION_FAILED): grant READ, as by {}",
            settings.group,
            grant("--operation Read", &format!("--group {}", settings.group))
        ),
        ErrorCode::ClusterAuthorizationFailed => format!(
            "no right on the cluster (CLUSTER_AUTHORIZATION_FAILED): grant IDEMPOTENT_WRITE, as \
                by {}",
            grant("--operation IdempotentWrite", "--cluster")
        ),
        ErrorCode::FencedInstanceId => format!(
            "another payrelay of node {node} is in the group {} (FENCED_INSTANCE_ID): stop one of \
                the two",
            settings.group
        ),
        ErrorCode::InvalidTimestamp => {
            "the topic does not accept the present time of this machine (INVALID_TIMESTAMP): \
             this machine's clock is ahead of the broker's, or behind it; set both by NTP, or set \
             message.timestamp.type=LogAppendTime on the topic"
                .to_owned()
        }
        _ => error_without_programmer_advice(&error.to_string()),
    }
}

/// Within its own backoff the client repeats the last error, each time with another waiting time.
fn error_without_client_backoff(text: &str) -> &str {
    match text.split_once("; last error: ") {
        Some((before, last)) if before.contains("not reconnecting to") => last,
        _ => text,
    }
}

/// The client's messages end with advice for a program.
fn error_without_programmer_advice(text: &str) -> String {
    let calls = [".idempotent(", "`idempotent(", ".enable_", "builder"];
    let sentences = text
        .split_inclusive(['.', ';'])
        .filter(|sentence| !calls.iter().any(|call| sentence.contains(call)));
    let kept: String = sentences.collect();
    let kept = kept.trim_end_matches([';', ' ']).trim();
    if kept.is_empty() {
        text.to_owned()
    } else {
        kept.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn only_three_codes_are_a_records_fault() {
        let of = |code| is_record_error(&KrafkaError::broker(code, ""));
        assert!(
            of(ErrorCode::MessageTooLarge)
                && of(ErrorCode::RecordListTooLarge)
                && of(ErrorCode::InvalidRecord)
        );
        let environment = [
            ErrorCode::InvalidTimestamp,
            ErrorCode::TopicAuthorizationFailed,
            ErrorCode::TransactionalIdAuthorizationFailed,
            ErrorCode::ClusterAuthorizationFailed,
            ErrorCode::NotEnoughReplicas,
            ErrorCode::CorruptMessage,
            ErrorCode::UnsupportedForMessageFormat,
            ErrorCode::PolicyViolation,
            ErrorCode::InvalidRequiredAcks,
        ];
        for code in environment {
            assert!(!of(code), "{code:?}");
        }
    }

    #[test]
    fn a_missing_right_is_named_with_the_command_that_grants_it() {
        let settings = config::Config::load("", &BTreeMap::new())
            .unwrap()
            .config
            .kafka;
        let node = NodeId::parse("shop-7").unwrap();
        let text = |code| {
            explain_error(
                &KrafkaError::broker(code, "use .idempotent(false)"),
                &settings,
                &node,
            )
        };
        for (code, words) in [
            (
                ErrorCode::TopicAuthorizationFailed,
                ["TOPIC_AUTHORIZATION_FAILED", "--topic payment-event"],
            ),
            (
                ErrorCode::TransactionalIdAuthorizationFailed,
                ["payrelay-shop-7", "--transactional-id"],
            ),
            (
                ErrorCode::GroupAuthorizationFailed,
                ["--group payment-group", "READ"],
            ),
            (
                ErrorCode::ClusterAuthorizationFailed,
                ["IDEMPOTENT_WRITE", "--cluster"],
            ),
            (
                ErrorCode::InvalidTimestamp,
                ["clock is ahead of the broker's", "INVALID_TIMESTAMP"],
            ),
        ] {
            let text = text(code);
            assert!(
                words.iter().all(|word| text.contains(word)) && !text.contains("idempotent("),
                "{text}"
            );
        }
    }
}
