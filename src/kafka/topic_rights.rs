//! Whether the topic can be used, for a command: connects as the publisher does, and changes
//! nothing.

use std::time::Duration;

use krafka::KrafkaError;
use krafka::error::ErrorCode;

use super::cluster::{
    ClusterConnection, ClusterError, KafkaRuntime, TopicDescription, describe_cluster_topic,
    with_kafka_timeout,
};
use super::errors::explain_cluster_error;
use super::reachability::Reachability;
use crate::config;
use crate::domain::node_id::NodeId;

/// How long one step of Kafka may need.
const CALL_TIMEOUT: Duration = Duration::from_secs(8);

/// An existing topic, and the rights on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TopicRights {
    /// How many partitions it has.
    pub partitions: usize,
    /// Whether payrelay may read it; true if the cluster does not say.
    pub may_read: bool,
    /// Whether payrelay may write to it; true if the cluster does not say.
    pub may_write: bool,
}

/// Connects, and describes the topic; `None`: it does not exist. An error says what to do.
pub fn find_topic_rights(
    settings: &config::Kafka,
    node: &NodeId,
) -> Result<Option<TopicRights>, String> {
    super::check(&settings.security).map_err(|problems| problems.to_string())?;
    let runtime = KafkaRuntime::new().map_err(|error| error.to_string())?;
    runtime.runtime().block_on(async {
        let mut link = ClusterConnection::new(settings.clone(), "payrelay-doctor".to_owned());
        match describe_topic_through(&mut link).await {
            Ok(TopicDescription {
                partitions,
                may_read,
                may_write,
                ..
            }) => Ok(Some(TopicRights {
                partitions,
                may_read,
                may_write,
            })),
            Err(ClusterError::Client(
                KrafkaError::UnknownTopic { .. }
                | KrafkaError::Broker {
                    code: ErrorCode::UnknownTopicOrPartition,
                    ..
                },
            )) => Ok(None),
            Err(failure) => {
                let mut reachability = Reachability::default();
                let kafka = link.kafka();
                Err(explain_cluster_error(&failure, kafka, &mut reachability, settings, node).await)
            }
        }
    })
}

async fn describe_topic_through(
    link: &mut ClusterConnection,
) -> Result<TopicDescription, ClusterError> {
    let kafka = with_kafka_timeout(CALL_TIMEOUT, link.connect()).await?;
    let described = describe_cluster_topic(&kafka, &link.settings().topic);
    with_kafka_timeout(CALL_TIMEOUT, described).await
}
