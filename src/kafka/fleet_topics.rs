//! The topics of a fleet: created once, by an operator.

use std::time::Duration;

use krafka::admin::{CreateTopicsOptions, NewTopic};
use krafka::error::{ErrorCode, KrafkaError};

use super::cluster::{ClusterConnection, ClusterError, KafkaRuntime, with_kafka_timeout};
use super::errors::explain_cluster_error;
use super::reachability::Reachability;
use crate::config;
use crate::domain::node_id::NodeId;
use crate::domain::node_status::status_topic;

const CREATE_TIMEOUT: Duration = Duration::from_secs(30);

/// A topic of a fleet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FleetTopic {
    /// Its name.
    pub name: String,
    /// How many partitions it has.
    pub partitions: i32,
    /// Its settings, other than the cluster's defaults.
    pub settings: Vec<(&'static str, String)>,
}

/// A year: a reader that comes back late still finds every event.
const RETENTION_MS: &str = "31536000000";

/// An hour: a compacted topic is soon short.
const SEGMENT_MS: &str = "3600000";

/// The topics of a fleet, by the name of its events' topic. With three copies of each record, two
/// have to be written before an event counts as published.
pub fn fleet_topics(settings: &config::Kafka, replication: i16) -> Vec<FleetTopic> {
    let append_time = || ("message.timestamp.type", "LogAppendTime".to_owned());
    let mut topics = vec![
        FleetTopic {
            name: settings.topic.clone(),
            partitions: settings.partitions,
            settings: vec![append_time(), ("retention.ms", RETENTION_MS.to_owned())],
        },
        FleetTopic {
            name: status_topic(&settings.topic),
            partitions: 1,
            settings: vec![
                append_time(),
                ("cleanup.policy", "compact".to_owned()),
                ("segment.ms", SEGMENT_MS.to_owned()),
            ],
        },
    ];
    if replication >= 3 {
        for topic in &mut topics {
            let in_sync = ("min.insync.replicas", "2".to_owned());
            topic.settings.push(in_sync);
        }
    }
    topics
}

/// What has become of a topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CreatedTopic {
    /// It is new.
    Created,
    /// It existed, and was not changed.
    Existed,
}

/// Creates the topics that are missing. An existing one is not changed.
pub fn create_fleet_topics(
    settings: &config::Kafka,
    topics: &[FleetTopic],
    replication: i16,
) -> Result<Vec<CreatedTopic>, String> {
    let runtime = KafkaRuntime::new().map_err(|error| error.to_string())?;
    let mut link = ClusterConnection::new(settings.clone(), "payrelay-fleet".to_owned());
    runtime.runtime().block_on(async {
        let created = with_kafka_timeout(CREATE_TIMEOUT, async {
            let kafka = link.connect().await?;
            let mut new = Vec::new();
            for topic in topics {
                let topic_settings = topic.settings.iter();
                let bare = NewTopic::new(&topic.name, topic.partitions, replication)?;
                new.push(
                    topic_settings.fold(bare, |new, (name, value)| new.with_config(*name, value)),
                );
            }
            let mut results = kafka
                .admin()
                .create_topics(new, CreateTopicsOptions::default())
                .await?;
            topics
                .iter()
                .map(|topic| created_topic(results.remove(&topic.name)))
                .collect::<Result<Vec<_>, KrafkaError>>()
        });
        match created.await {
            Ok(created) => Ok(created),
            Err(failure) => Err(explain_fleet_error(&failure, &link, settings).await),
        }
    })
}

fn created_topic(result: Option<Result<(), KrafkaError>>) -> Result<CreatedTopic, KrafkaError> {
    match result {
        Some(Err(KrafkaError::Broker {
            code: ErrorCode::TopicAlreadyExists,
            ..
        })) => Ok(CreatedTopic::Existed),
        Some(Err(error)) => Err(error),
        Some(Ok(())) | None => Ok(CreatedTopic::Created),
    }
}

/// The error of a command of the fleet, and what to do about it.
pub(crate) async fn explain_fleet_error(
    failure: &ClusterError,
    link: &ClusterConnection,
    settings: &config::Kafka,
) -> String {
    // The name is for rights of transactions, which no command of the fleet needs.
    let Some(node) = NodeId::parse("fleet") else {
        return failure.to_string();
    };
    let mut reachability = Reachability::default();
    explain_cluster_error(failure, link.kafka(), &mut reachability, settings, &node).await
}
