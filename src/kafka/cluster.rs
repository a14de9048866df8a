//! The parts of Kafka that publisher and consumer share: the runtime, the connection, the topic.
//!
//! krafka is an async client. Each thread that uses it owns a private current-thread runtime, and
//! drives it with `block_on` while it waits.

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::time::Duration;

use krafka::admin::{
    CreateTopicsOptions, DescribeTopicsOptions, ListOffsetsOptions, ListedOffset, NewTopic,
    OffsetSpec, TopicPartition,
};
use krafka::error::ErrorCode;
use krafka::{Kafka, KrafkaError};
use tokio::net::lookup_host;
use tokio::runtime::{Builder, Runtime};
use tokio::time::{sleep, timeout};

use super::tls::{self, AuthBackoff};
use crate::config;
use crate::domain::node_role::NodeRole;
use crate::domain::topic::Topic;
use crate::store::StoreError;

/// How long connecting to one broker may need.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// How long one request may wait for its response. It bounds how late krafka notices a silent
/// broker.
pub(crate) const REQUEST_TIMEOUT: Duration = Duration::from_secs(7);

const FOREVER: Duration = Duration::from_hours(24 * 3650);

/// The maximum number of bytes of one fetch response. On a slow link it has to arrive within the
/// few seconds of a call. Memory stays small however many partitions there are. A larger batch
/// arrives all the same (KIP-74).
pub(crate) const FETCH_BYTES_MAX: i32 = 512 * 1024;

/// The maximum number of bytes of one decompressed batch; gzip makes 16 MiB of 16 KiB.
pub(crate) const INFLATED_BYTES_MAX: usize = 16 * 1024 * 1024;

/// How old the cluster's metadata may be.
const METADATA_AGE: Duration = Duration::from_secs(30);

/// The same for an edge: a thousand of them ask the same cluster. A producer renews it at once when
/// a leader has moved.
const METADATA_AGE_OF_EDGE: Duration = Duration::from_mins(5);

/// Why work with Kafka failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClusterError {
    /// An error of krafka.
    #[error(transparent)]
    Client(#[from] KrafkaError),
    /// An error of the database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The topic was recreated or has other partitions since the work began.
    #[error("the topic was changed")]
    TopicChanged,
    /// No response arrived within the time of one call.
    #[error("no answer within {} s", .0.as_secs())]
    Timeout(Duration),
}

/// Waits no longer than `limit`, so that the thread soon sees a request to stop.
pub(crate) async fn with_kafka_timeout<T, E: Into<ClusterError>>(
    limit: Duration,
    work: impl Future<Output = Result<T, E>>,
) -> Result<T, ClusterError> {
    match timeout(limit, work).await {
        Ok(result) => result.map_err(Into::into),
        Err(_) => Err(ClusterError::Timeout(limit)),
    }
}

/// The runtime of one Kafka thread. Dropping it waits for no task: a DNS lookup could last long.
pub(crate) struct KafkaRuntime(Option<Runtime>);

impl KafkaRuntime {
    pub(crate) fn new() -> io::Result<Self> {
        let runtime = Builder::new_current_thread()
            .enable_all()
            // DNS lookups run on a thread that exists from the start: tokio panics when it cannot
            // start one later.
            .max_blocking_threads(1)
            .thread_keep_alive(FOREVER)
            .build()?;
        // The result does not matter: the lookup starts the thread.
        let _ =
            runtime.block_on(async { timeout(CONNECT_TIMEOUT, lookup_host("localhost:0")).await });
        Ok(Self(Some(runtime)))
    }

    /// `None` only while it is being dropped, when no caller is left.
    pub(crate) fn runtime(&self) -> &Runtime {
        self.0
            .as_ref()
            .unwrap_or_else(|| unreachable!("the runtime ends with its owner"))
    }
}

impl Drop for KafkaRuntime {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// A connection to the cluster that is made step by step: completed steps stay when a later one
/// times out.
pub(crate) struct ClusterConnection {
    settings: config::Kafka,
    client_id: String,
    kafka: Option<Kafka>,
    topic_is_there: bool,
    refusal: AuthBackoff,
}

impl ClusterConnection {
    pub(crate) fn new(settings: config::Kafka, client_id: String) -> Self {
        Self {
            settings,
            client_id,
            kafka: None,
            topic_is_there: false,
            refusal: AuthBackoff::default(),
        }
    }

    pub(crate) fn settings(&self) -> &config::Kafka {
        &self.settings
    }

    /// The client, once a bootstrap server has answered.
    pub(crate) fn kafka(&self) -> Option<&Kafka> {
        self.kafka.as_ref()
    }

    /// Connects, unless connected. Creates nothing.
    pub(crate) async fn connect(&mut self) -> Result<Kafka, KrafkaError> {
        if let Some(kafka) = &self.kafka {
            return Ok(kafka.clone());
        }
        let connecting = connect_cluster(&self.settings, &self.client_id);
        let kafka = self.refusal.connect(connecting).await?;
        Ok(self.kafka.insert(kafka).clone())
    }

    /// Connects, unless connected, and creates the topic if it is missing.
    pub(crate) async fn connect_to_topic(&mut self) -> Result<Kafka, KrafkaError> {
        let kafka = self.connect().await?;
        if !self.topic_is_there {
            ensure_cluster_topic(&kafka, &self.settings).await?;
            self.topic_is_there = true;
        }
        Ok(kafka)
    }

    /// The next use connects again.
    pub(crate) fn disconnect(&mut self) {
        self.kafka = None;
        self.topic_is_there = false;
    }
}

async fn connect_cluster(settings: &config::Kafka, client_id: &str) -> Result<Kafka, KrafkaError> {
    let metadata_age = match settings.role {
        NodeRole::Single => METADATA_AGE,
        NodeRole::Edge => METADATA_AGE_OF_EDGE,
    };
    Kafka::builder(settings.bootstrap_servers.join(","))
        .client_id(client_id)
        .connect_timeout(CONNECT_TIMEOUT)
        .request_timeout(REQUEST_TIMEOUT)
        // The consumer gets no error when a leader has gone for good.
        .metadata_max_age(metadata_age)
        // A payment may arrive after a quiet night: the topic's metadata stays cached.
        .metadata_topic_cache_ttl(None)
        .security(tls::kafka_tls_auth(&settings.security))
        .connect()
        .await
}

/// Creates the topic if it is missing, with the cluster's default replication. A cluster that
/// allows publishing but not creating topics is no error here: publishing reports a missing topic.
pub(crate) async fn ensure_cluster_topic(
    kafka: &Kafka,
    settings: &config::Kafka,
) -> Result<(), KrafkaError> {
    const CLUSTER_DEFAULT: i16 = -1;
    let topic = NewTopic::new(&settings.topic, settings.partitions, CLUSTER_DEFAULT)?
        // The broker's time: then neither a wrong clock here nor a long outage makes the broker
        // reject or delete a record.
        .with_config("message.timestamp.type", "LogAppendTime");
    let mut results = kafka
        .admin()
        .create_topics([topic], CreateTopicsOptions::default())
        .await?;
    match results.remove(&settings.topic) {
        Some(Ok(())) => {
            log::info!(
                event = "topic_created", partitions = settings.partitions;
                "created the topic {} with {} partitions",
                settings.topic,
                settings.partitions
            );
            Ok(())
        }
        Some(Err(KrafkaError::Broker {
            code:
                ErrorCode::TopicAlreadyExists
                | ErrorCode::TopicAuthorizationFailed
                | ErrorCode::ClusterAuthorizationFailed,
            ..
        }))
        | None => Ok(()),
        Some(Err(error)) => Err(error),
    }
}

/// A topic, as the cluster describes it now.
pub(crate) struct TopicDescription {
    pub(crate) topic: Topic,
    pub(crate) partitions: usize,
    /// Whether we have the right READ on it; true if the cluster does not say.
    pub(crate) may_read: bool,
    /// Whether we have the right WRITE on it; true if the cluster does not say.
    pub(crate) may_write: bool,
}

/// The bits of `AclOperation.READ` and `WRITE` in the authorized operations of a topic (KIP-430).
const READ: i32 = 1 << 3;
const WRITE: i32 = 1 << 4;

/// Describes the topic's current incarnation. Not every broker knows a new topic at once.
pub(crate) async fn describe_cluster_topic(
    kafka: &Kafka,
    name: &str,
) -> Result<TopicDescription, KrafkaError> {
    const TRIES: u32 = 20;
    for attempt in 1.. {
        let mut described = kafka
            .admin()
            .describe_topics([name], DescribeTopicsOptions::default())
            .await?;
        match described.remove(name) {
            Some(Ok(found)) => {
                let topic = Topic {
                    name: name.into(),
                    id: found.topic_id,
                };
                let may = |right| {
                    let allowed = found.authorized_operations;
                    allowed.is_none_or(|allowed| allowed & right != 0)
                };
                return Ok(TopicDescription {
                    topic,
                    partitions: found.partitions.len(),
                    may_read: may(READ),
                    may_write: may(WRITE),
                });
            }
            Some(Err(KrafkaError::Broker {
                code: ErrorCode::UnknownTopicOrPartition,
                ..
            }))
            | None
                if attempt < TRIES =>
            {
                sleep(Duration::from_millis(100)).await;
            }
            Some(Err(error)) => return Err(error),
            None => break,
        }
    }
    Err(KrafkaError::UnknownTopic {
        topic: name.to_owned(),
    })
}

/// The end of each of these partitions, or the error of its leader.
pub(crate) async fn cluster_partition_ends(
    kafka: &Kafka,
    topic: &str,
    partitions: impl IntoIterator<Item = i32>,
    options: ListOffsetsOptions,
) -> Result<BTreeMap<i32, Result<i64, KrafkaError>>, KrafkaError> {
    let wanted = partitions
        .into_iter()
        .map(|number| (TopicPartition::new(topic, number), OffsetSpec::Latest));
    let found = kafka.admin().list_offsets(wanted, options).await?;
    let end = |(place, end): (TopicPartition, Result<ListedOffset, KrafkaError>)| {
        (place.partition, end.map(|end| end.offset))
    };
    Ok(found.into_iter().map(end).collect())
}

/// The ends of these partitions. An error of one is an error of all.
pub(crate) async fn cluster_end_offsets(
    kafka: &Kafka,
    topic: &str,
    partitions: impl IntoIterator<Item = i32>,
    options: ListOffsetsOptions,
) -> Result<BTreeMap<i32, i64>, KrafkaError> {
    let ends = cluster_partition_ends(kafka, topic, partitions, options).await?;
    ends.into_iter()
        .map(|(partition, end)| Ok((partition, end?)))
        .collect()
}
