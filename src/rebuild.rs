//! `payrelay restore --from-topic`: builds the database of a lost edge again, from its records.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::config::Config;
use crate::domain::event::RecordKey;
use crate::domain::node_id::{ID_MAX, NodeId};
use crate::domain::payment_record::parse_payment;
use crate::domain::timestamp::Timestamp;
use crate::domain::topic::Topic;
use crate::kafka::cluster::{ClusterConnection, ClusterError, KafkaRuntime, with_kafka_timeout};
use crate::kafka::fleet_topics::explain_fleet_error;
use crate::kafka::topic_reader::{ReadFrom, ReadTo, TopicReader, TopicRecord};
use crate::store::rebuild::{Rebuilding, RebuiltEvent, remove_rebuilt};
use crate::store::{OpenError, StoreError};

/// How long one step may take.
const STEP_TIMEOUT: Duration = Duration::from_secs(30);

/// Why nothing was built.
#[derive(Debug, thiserror::Error)]
pub enum RebuildError {
    /// Kafka does not answer. The text says what to do.
    #[error("{0}")]
    Kafka(String),
    /// The file cannot be created.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The file cannot be written.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// No runtime could be started.
    #[error("the operating system starts no further thread: {0}")]
    Spawn(#[from] io::Error),
    /// The topic has no payment of this node.
    #[error("the topic {topic} has no payment as JSON of node {node}: is node.id right?")]
    Empty {
        /// The topic.
        topic: String,
        /// The node.
        node: NodeId,
    },
}

/// A database that was built.
#[derive(Debug)]
pub struct Rebuilt {
    /// Its file.
    pub path: PathBuf,
    /// How many events it has.
    pub events: usize,
    /// How many records of the node cannot be used.
    pub unusable: usize,
    /// How many records belong to earlier databases of the same node id.
    pub of_earlier_databases: usize,
}

/// What was read so far.
#[derive(Default)]
struct Progress {
    building: Option<(Timestamp, Rebuilding)>,
    events: usize,
    unusable: usize,
    of_earlier_databases: usize,
    /// The largest id, and its partition.
    last_event: Option<(i64, i32)>,
}

/// Reads the topic, and builds the newest database of the node in a file next to the configured
/// one.
pub fn rebuild_from_topic(config: &Config, node: &NodeId) -> Result<Rebuilt, RebuildError> {
    let runtime = KafkaRuntime::new()?;
    let client_id = "payrelay-restore".to_owned();
    let mut link = ClusterConnection::new(config.kafka.clone(), client_id);
    runtime.runtime().block_on(async {
        let built = read_node(&mut link, config, node).await;
        if !matches!(built, Ok(Ok(_))) {
            remove_rebuilt(&config.database.path);
        }
        match built {
            Ok(built) => built,
            Err(ClusterError::Store(error)) => Err(error.into()),
            Err(failure) => Err(RebuildError::Kafka(
                explain_fleet_error(&failure, &link, &config.kafka).await,
            )),
        }
    })
}

async fn read_node(
    link: &mut ClusterConnection,
    config: &Config,
    node: &NodeId,
) -> Result<Result<Rebuilt, RebuildError>, ClusterError> {
    let kafka = with_kafka_timeout(STEP_TIMEOUT, link.connect()).await?;
    let name = &config.kafka.topic;
    let from = |_| ReadFrom::Oldest;
    let to = ReadTo::HighWatermark;
    let opened = TopicReader::open_within(STEP_TIMEOUT, &kafka, name, to, from).await?;
    let empty = || RebuildError::Empty {
        topic: name.clone(),
        node: node.clone(),
    };
    let Some(mut reader) = opened else {
        return Ok(Err(empty()));
    };
    let mut progress = Progress::default();
    while !reader.is_finished() {
        let records = reader.next_within(STEP_TIMEOUT).await?;
        if let Err(error) = progress.add(&records, config, node) {
            return Ok(Err(error));
        }
    }
    let topic = Topic {
        name: name.as_str().into(),
        id: reader.topic_id(),
    };
    let ends: Vec<(i32, i64)> = reader
        .ranges()
        .iter()
        .map(|range| (range.partition, range.end))
        .collect();
    Ok(progress
        .finish(&topic, &ends, config)
        .and_then(|built| built.ok_or_else(empty)))
}

impl Progress {
    fn add(
        &mut self,
        records: &[TopicRecord],
        config: &Config,
        node: &NodeId,
    ) -> Result<(), RebuildError> {
        let mut events = Vec::new();
        for record in records {
            let Some(outbox_id) = record.event_id.as_deref().and_then(|id| node.outbox_id(id))
            else {
                continue;
            };
            let Some((incarnation, event)) = rebuilt_event(record, outbox_id) else {
                self.unusable += 1;
                continue;
            };
            let newest = self.building.as_ref().map(|(newest, _)| *newest);
            if newest.is_some_and(|newest| incarnation < newest) {
                self.of_earlier_databases += 1;
                continue;
            }
            if newest != Some(incarnation) {
                // A later database of the node: what was read before belongs to an earlier one.
                self.of_earlier_databases += self.events + events.len();
                self.events = 0;
                self.last_event = None;
                events.clear();
                self.building = None;
                let building = Rebuilding::create(&config.database.path, node, incarnation)?;
                self.building = Some((incarnation, building));
            }
            if self.last_event.is_none_or(|(id, _)| id < event.outbox_id) {
                self.last_event = Some((event.outbox_id, event.partition));
            }
            events.push(event);
        }
        if let Some((_, building)) = &mut self.building {
            self.events += building.add(&events)?;
        }
        Ok(())
    }

    /// `None` if there was no event.
    fn finish(
        self,
        topic: &Topic,
        ends: &[(i32, i64)],
        config: &Config,
    ) -> Result<Option<Rebuilt>, RebuildError> {
        let Some((_, building)) = self.building else {
            return Ok(None);
        };
        let path = building.path().to_owned();
        let by_node = config.kafka.key == RecordKey::Node;
        let last = self.last_event.map(|(_, partition)| partition);
        let own = last.filter(|_| by_node);
        let ends: Vec<(i32, i64)> = ends
            .iter()
            .filter(|(partition, _)| own.is_none_or(|own| own == *partition))
            .copied()
            .collect();
        building.finish(topic, own, &ends, Timestamp::now())?;
        Ok(Some(Rebuilt {
            path,
            events: self.events,
            unusable: self.unusable,
            of_earlier_databases: self.of_earlier_databases,
        }))
    }
}

/// The event of a record, and the database that it belongs to. `None`: it is no payment as JSON.
fn rebuilt_event(record: &TopicRecord, outbox_id: i64) -> Option<(Timestamp, RebuiltEvent)> {
    let incarnation = record.incarnation.as_ref()?.parse().ok()?;
    let payment = parse_payment(record.value.as_deref()?)?;
    if outbox_id.max(payment.id) > ID_MAX {
        return None;
    }
    let event = RebuiltEvent {
        outbox_id,
        payment,
        created_at: Timestamp::parse(record.time.as_deref()?)?,
        published_at: Timestamp::from_micros(record.timestamp_ms.checked_mul(1000)?),
        trace: record.trace.clone(),
        partition: record.partition,
        offset: record.offset,
    };
    Some((Timestamp::from_micros(incarnation), event))
}
