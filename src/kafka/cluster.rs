//! What the publisher and the consumer share of Kafka: the runtime, the connection, the topic.
//!
//! krafka is an async client. Each thread that uses it owns a current-thread runtime and drives it
//! with `block_on` for as long as it waits; no other part of the program knows that there is one.

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
use crate::domain::topic::Topic;
use crate::store::StoreError;

/// How long connecting to one broker may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// How long one request may wait for its answer. It bounds how late krafka notices a silent broker.
pub(crate) const REQUEST_TIMEOUT: Duration = Duration::from_secs(7);

const FOREVER: Duration = Duration::from_hours(24 * 3650);

/// What one answer with records may hold: on a slow link it has to come within the few seconds that
/// a call has, and memory stays small however many partitions there are. A batch that is larger
/// comes all the same (KIP-74).
pub(crate) const FETCH_BYTES_MAX: i32 = 512 * 1024;

/// What one batch of records may hold once it is inflated; gzip makes 16 MiB of 16 KiB.
pub(crate) const INFLATED_BYTES_MAX: usize = 16 * 1024 * 1024;

/// How old may be what is known of the cluster.
const METADATA_AGE: Duration = Duration::from_secs(30);

/// Why work with Kafka did not get on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClusterError {
    /// krafka says why.
    #[error(transparent)]
    Client(#[from] KrafkaError),
    /// It was the database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The topic is not as it was when the work began.
    #[error("the topic was changed")]
    TopicChanged,
    /// Nothing came in the time that one call may take.
    #[error("no answer within {} s", .0.as_secs())]
    Timeout(Duration),
}

/// Waits no longer than `limit`, so that a thread that drives krafka looks up in time.
pub(crate) async fn with_timeout<T, E: Into<ClusterError>>(
    limit: Duration,
    work: impl Future<Output = Result<T, E>>,
) -> Result<T, ClusterError> {
    match timeout(limit, work).await {
        Ok(result) => result.map_err(Into::into),
        Err(_) => Err(ClusterError::Timeout(limit)),
    }
}

/// The runtime of one Kafka thread. Ending it waits for nobody: a name that is just being resolved
/// would take long.
pub(crate) struct KafkaRuntime(Option<Runtime>);

impl KafkaRuntime {
    pub(crate) fn new() -> io::Result<Self> {
        let runtime = Builder::new_current_thread()
            .enable_all()
            // Names are resolved on a thread that is there from the start: tokio panics where there
            // is no room for one later.
            .max_blocking_threads(1)
            .thread_keep_alive(FOREVER)
            .build()?;
        // What it finds does not matter.
        let _ =
            runtime.block_on(async { timeout(CONNECT_TIMEOUT, lookup_host("localhost:0")).await });
        Ok(Self(Some(runtime)))
    }

    /// `None` only while the driver is being dropped, when nobody can call any more.
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

/// A connection to the cluster that is made step by step: what was reached stays when a later step
/// takes too long.
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

    /// The connection, once a bootstrap server has answered.
    pub(crate) fn kafka(&self) -> Option<&Kafka> {
        self.kafka.as_ref()
    }

    /// Connects, unless connected. Creates nothing.
    pub(crate) async fn connect(&mut self) -> Result<Kafka, KrafkaError> {
        if let Some(kafka) = &self.kafka {
            return Ok(kafka.clone());
        }
        let connecting = connect(&self.settings, &self.client_id);
        let kafka = self.refusal.connect(connecting).await?;
        Ok(self.kafka.insert(kafka).clone())
    }

    /// Connects, unless connected, and makes sure that the topic is there.
    pub(crate) async fn connect_to_topic(&mut self) -> Result<Kafka, KrafkaError> {
        let kafka = self.connect().await?;
        if !self.topic_is_there {
            ensure_topic(&kafka, &self.settings).await?;
            self.topic_is_there = true;
        }
        Ok(kafka)
    }

    /// The next use starts afresh.
    pub(crate) fn disconnect(&mut self) {
        self.kafka = None;
        self.topic_is_there = false;
    }
}

async fn connect(settings: &config::Kafka, client_id: &str) -> Result<Kafka, KrafkaError> {
    Kafka::builder(settings.bootstrap_servers.join(","))
        .client_id(client_id)
        .connect_timeout(CONNECT_TIMEOUT)
        .request_timeout(REQUEST_TIMEOUT)
        // For the consumer, which is not told when a leader has gone for good.
        .metadata_max_age(METADATA_AGE)
        // A payment may come after a quiet night: the topic's metadata is kept.
        .metadata_topic_cache_ttl(None)
        .security(tls::auth(&settings.security))
        .connect()
        .await
}

/// Creates the topic if it is missing, replicated as the cluster's default says. A cluster that
/// lets us publish but not create topics is no error here: if the topic is missing there,
/// publishing says so.
pub(crate) async fn ensure_topic(
    kafka: &Kafka,
    settings: &config::Kafka,
) -> Result<(), KrafkaError> {
    const CLUSTER_DEFAULT: i16 = -1;
    let topic = NewTopic::new(&settings.topic, settings.partitions, CLUSTER_DEFAULT)?
        // The broker's time: neither a wrong clock here nor a long outage makes it refuse or delete
        // a record.
        .with_config("message.timestamp.type", "LogAppendTime");
    let mut results = kafka
        .admin()
        .create_topics([topic], CreateTopicsOptions::default())
        .await?;
    match results.remove(&settings.topic) {
        Some(Ok(())) => {
            log::info!(
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

/// A topic, as it is now.
pub(crate) struct TopicDescription {
    pub(crate) topic: Topic,
    pub(crate) partitions: usize,
    /// Whether we have the right READ on it; true where the cluster does not say.
    pub(crate) may_read: bool,
}

/// The bit of `AclOperation.READ` in the authorized operations of a topic (KIP-430).
const READ: i32 = 1 << 3;

/// Which of its lives the topic is in. One that was just made is not known to every broker at once.
pub(crate) async fn describe_topic(
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
                let may_read = found
                    .authorized_operations
                    .is_none_or(|allowed| allowed & READ != 0);
                return Ok(TopicDescription {
                    topic,
                    partitions: found.partitions.len(),
                    may_read,
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

/// Where each of these partitions ends, or why its leader does not say.
pub(crate) async fn partition_ends(
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

/// Where these partitions end. An error of one is an error of all.
pub(crate) async fn end_offsets(
    kafka: &Kafka,
    topic: &str,
    partitions: impl IntoIterator<Item = i32>,
    options: ListOffsetsOptions,
) -> Result<BTreeMap<i32, i64>, KrafkaError> {
    let ends = partition_ends(kafka, topic, partitions, options).await?;
    ends.into_iter()
        .map(|(partition, end)| Ok((partition, end?)))
        .collect()
}
