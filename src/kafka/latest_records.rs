//! The last record of each key of a short, compacted topic.

use std::collections::BTreeMap;
use std::time::Duration;

use super::cluster::{ClusterConnection, ClusterError, KafkaRuntime, with_kafka_timeout};
use super::fleet_topics::explain_fleet_error;
use super::topic_reader::{ReadFrom, ReadTo, TopicReader};
use crate::config;
use crate::domain::timestamp::Timestamp;

/// How long one step may take.
const STEP_TIMEOUT: Duration = Duration::from_secs(10);

/// The last record of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LatestRecord {
    /// Its timestamp: when the broker appended it, on a topic of a fleet.
    pub(crate) appended_at: Timestamp,
    /// Its value.
    pub(crate) value: Vec<u8>,
}

/// Reads a topic to its end. A record without a value deletes its key. `None`: there is no such
/// topic.
pub(crate) fn read_latest_records(
    settings: &config::Kafka,
    topic: &str,
) -> Result<Option<BTreeMap<String, LatestRecord>>, String> {
    let runtime = KafkaRuntime::new().map_err(|error| error.to_string())?;
    let mut link = ClusterConnection::new(settings.clone(), "payrelay-fleet".to_owned());
    runtime.runtime().block_on(async {
        match read_latest(&mut link, topic).await {
            Ok(found) => Ok(found),
            Err(failure) => Err(explain_fleet_error(&failure, &link, settings).await),
        }
    })
}

async fn read_latest(
    link: &mut ClusterConnection,
    topic: &str,
) -> Result<Option<BTreeMap<String, LatestRecord>>, ClusterError> {
    let kafka = with_kafka_timeout(STEP_TIMEOUT, link.connect()).await?;
    let from = |_| ReadFrom::Oldest;
    let to = ReadTo::HighWatermark;
    let opened = TopicReader::open_within(STEP_TIMEOUT, &kafka, topic, to, from).await?;
    let Some(mut reader) = opened else {
        return Ok(None);
    };
    let mut latest = BTreeMap::new();
    while !reader.is_finished() {
        for record in reader.next_within(STEP_TIMEOUT).await? {
            let Some(key) = record.key.and_then(|key| String::from_utf8(key).ok()) else {
                continue;
            };
            match record.value {
                Some(value) => {
                    let appended_at =
                        Timestamp::from_micros(record.timestamp_ms.saturating_mul(1000));
                    latest.insert(key, LatestRecord { appended_at, value });
                }
                None => drop(latest.remove(&key)),
            }
        }
    }
    Ok(Some(latest))
}
