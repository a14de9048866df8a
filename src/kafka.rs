//! What the publisher and the consumer share of Kafka: the connection, the runtime, the topic.
//!
//! krafka is an async client. Each thread that uses it owns a current-thread runtime and drives it with `block_on`
//! for as long as it waits; no other part of the program knows that there is one.

use std::io;
use std::time::Duration;

use krafka::admin::{CreateTopicsOptions, NewTopic};
use krafka::error::ErrorCode;
use krafka::{Kafka, KrafkaError};
use tokio::runtime::{Builder, Runtime};

use crate::config;

/// How long connecting to one broker may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// How long one request may wait for its answer. It bounds how late a silent broker is noticed.
pub(crate) const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// The runtime of one Kafka thread.
pub(crate) fn runtime() -> io::Result<Runtime> {
    Builder::new_current_thread().enable_all().build()
}

/// Connects to the cluster and makes sure that the topic is there.
pub(crate) async fn connect(settings: &config::Kafka, client_id: String) -> Result<Kafka, KrafkaError> {
    let kafka = Kafka::builder(settings.bootstrap_servers.join(","))
        .client_id(client_id)
        .connect_timeout(CONNECT_TIMEOUT)
        .request_timeout(REQUEST_TIMEOUT)
        // A payment may come after a quiet night: the topic's metadata is kept.
        .metadata_topic_cache_ttl(None)
        .connect()
        .await?;
    ensure_topic(&kafka, settings).await?;
    Ok(kafka)
}

/// Creates the topic if it is missing, replicated as the cluster's default says. A cluster that lets us publish but
/// not create topics is no error here: if the topic is missing there, publishing says so.
async fn ensure_topic(kafka: &Kafka, settings: &config::Kafka) -> Result<(), KrafkaError> {
    const CLUSTER_DEFAULT: i16 = -1;
    let topic = NewTopic::new(&settings.topic, settings.partitions, CLUSTER_DEFAULT)?;
    let mut results = kafka.admin().create_topics([topic], CreateTopicsOptions::default()).await?;
    match results.remove(&settings.topic) {
        Some(Ok(())) => {
            log::info!("created the topic {} with {} partitions", settings.topic, settings.partitions);
            Ok(())
        }
        Some(Err(KrafkaError::Broker {
            code:
                ErrorCode::TopicAlreadyExists | ErrorCode::TopicAuthorizationFailed | ErrorCode::ClusterAuthorizationFailed,
            ..
        }))
        | None => Ok(()),
        Some(Err(error)) => Err(error),
    }
}
