//! A publisher session: a connection, a producer, and what both know of the topic.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use krafka::admin::{DescribeTransactionsOptions, ListOffsetsOptions};
use krafka::producer::murmur2;
use krafka::{Kafka, KrafkaError};
use tokio::sync::Mutex;

use super::cluster::{
    ClusterConnection, ClusterError, REQUEST_TIMEOUT, TopicDescription, cluster_partition_ends,
    describe_cluster_topic, ensure_cluster_topic, with_kafka_timeout,
};
use super::hanging::{
    OpenTransaction, Owner, end_hanging_transactions, foreign_transaction, open_transactions,
};
use super::producer::AnyProducer;
use super::producer_builder::transactional_producer;
use super::producer_ring::{ProducerRing, transactional_ids};
use super::status::{StatusReporter, StatusReports};
use super::topic_config::topic_config_risks;
use super::topic_reader::{ReadFrom, ReadTo, TopicReader};
use super::watch::{Visibility, VisibilityWatch};
use crate::config::{self, DeliveryGuarantee};
use crate::domain::event::{RecordKey, RecordSource};
use crate::domain::node_id::NodeId;
use crate::domain::node_role::NodeRole;
use crate::domain::timestamp::Timestamp;
use crate::domain::topic::Topic;
use crate::runtime::warnings::Warnings;
use crate::store::Store;
use crate::store::node_role;
use crate::store::publication::{Destination, Receipt};
use crate::store::topic::{self, PublishedOffsets, PublishedRecord};
use crate::store::unseen::{self, Unseen};

/// A session that was quiet for this long asks every broker that it uses for an answer, also while
/// nothing is published. Firewalls and NAT forget quiet connections without a sign.
const QUIET_LIMIT: Duration = Duration::from_secs(5);

/// How long the topic may need until its first record arrives. A topic that was just created, or
/// has a new leader, is refused at first.
pub(super) const OPEN_TIMEOUT: Duration = Duration::from_secs(20);

/// How long the cluster may need to describe open transactions.
const DESCRIBE_TIMEOUT: Duration = Duration::from_secs(3);

/// How far the clock of a new edge may be ahead of the broker's, so that it still finds its first
/// events.
const CLOCK_MARGIN: Duration = Duration::from_hours(24);

/// How often the end of an idle partition is saved.
const IDLE_END_INTERVAL: Duration = Duration::from_mins(1);

/// Work that outlives the call that began it.
pub(super) type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// What all sessions share.
pub(super) struct Context {
    pub(super) settings: config::Kafka,
    /// How many transactional producers take turns.
    pub(super) ring_size: NonZeroUsize,
    pub(super) node: NodeId,
    pub(super) store: Store,
    /// Kept from one session to the next: it knows that a broker rejected our credentials, and when
    /// the next attempt is due.
    pub(super) connection: Mutex<ClusterConnection>,
    /// Receives the risks of the topic's settings.
    pub(super) warnings: Warnings,
    /// The reports of an edge.
    pub(super) reports: Option<StatusReports>,
}

/// A producer on a topic.
pub(super) struct Session {
    kafka: Kafka,
    pub(super) producer: AnyProducer,
    pub(super) topic: Topic,
    /// Other producers' open transactions.
    pub(super) blocked_by: Option<String>,
    /// The first events of earlier sessions that may be hidden.
    pub(super) unseen: Vec<Unseen>,
    /// Those of their events that the topic has shown.
    pub(super) visible: BTreeSet<i64>,
    /// The first unpublished event whose id has another payment on the topic.
    pub(super) first_conflict: Option<i64>,
    /// The events that this session has published.
    pub(super) watch: VisibilityWatch,
    partitions: i32,
    /// With `kafka.key = "node"`: the partition of all events.
    pub(super) partition: Option<i32>,
    /// What its records have in common.
    pub(super) source: RecordSource,
    /// Whether the topic is of many nodes.
    pub(super) role: NodeRole,
    /// The largest id of an event of this database that is known to be on the topic.
    pub(super) last_published: i64,
    /// The reports of an edge.
    status: Option<StatusReporter>,
    /// When the end of the partition was last saved, and which it was.
    idle_end: Option<(Instant, i64)>,
    /// When every broker that it uses has last answered.
    pub(super) answered_at: Instant,
    /// By partition, the offset after the last record that was read or sent. Every new record has a
    /// higher offset.
    pub(super) ends: BTreeMap<i32, i64>,
}

impl Session {
    pub(super) fn guarantee(&self) -> DeliveryGuarantee {
        self.producer.guarantee()
    }

    /// When [`check`] is due.
    pub(super) fn check_due(&self) -> Instant {
        let quiet = self.answered_at + QUIET_LIMIT;
        self.watch.due().map_or(quiet, |at| at.min(quiet))
    }

    /// When [`check`] is due, if no event waits.
    pub(super) fn idle_check_due(&self) -> Instant {
        let due = self.check_due();
        let status = self.status.as_ref().map(StatusReporter::due);
        status.map_or(due, |at| at.min(due))
    }

    /// The partitions that it may write to.
    fn own_partitions(&self) -> Range<i32> {
        match self.partition {
            Some(partition) => partition..partition + 1,
            None => 0..self.partitions,
        }
    }

    /// Asks the leaders and the coordinator for an answer. Any answer of a broker will do, also an
    /// authorization error. Returns the end of each partition whose leader has named it.
    async fn ping(&self) -> Result<Vec<(i32, i64)>, KrafkaError> {
        let options = ListOffsetsOptions::default();
        let partitions = self.own_partitions();
        let found =
            cluster_partition_ends(&self.kafka, &self.topic.name, partitions, options).await?;
        let mut ends = Vec::new();
        for (partition, end) in found {
            match end {
                Ok(end) => ends.push((partition, end)),
                Err(KrafkaError::Broker { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        if let AnyProducer::Transactional(ring) = &self.producer {
            self.kafka
                .admin()
                .describe_transactions(ring.ids(), DescribeTransactionsOptions::default())
                .await?;
        }
        Ok(ends)
    }

    /// While nothing is published, the records of others need not be read at the next start.
    fn save_idle_end(&mut self, store: &Store, ends: &[(i32, i64)]) {
        let Some(end) = ends.iter().find(|(own, _)| Some(*own) == self.partition) else {
            return;
        };
        let end = *end;
        let is_due = self
            .idle_end
            .is_none_or(|(at, saved)| saved != end.1 && at.elapsed() >= IDLE_END_INTERVAL);
        if !is_due {
            return;
        }
        self.idle_end = Some((Instant::now(), end.1));
        let topic = self.topic.clone();
        let last = self.last_published;
        let saved = store.write(move |tx| topic::save_idle_topic_end(tx, &topic, end, last));
        if let Err(error) = saved {
            log::debug!("the end of the partition was not saved: {error}");
        }
    }

    /// Records that these are on the topic, where `read_committed` consumers see them.
    pub(super) fn saw(&mut self, found: &[PublishedRecord]) {
        for record in found {
            let is_unseen = |first: &Unseen| {
                first.partition == record.partition && first.offset <= record.offset
            };
            if self.unseen.iter().any(is_unseen) {
                self.visible.insert(record.notice.outbox_id);
            }
        }
    }

    /// Watches the visibility of acknowledged events. Returns, for each partition, the offset after
    /// the last one: a partition accepts batches in order, so everything before it is acknowledged
    /// too. `None` if the topic has had such an offset before: then it was recreated.
    pub(super) fn record_progress(&mut self, receipts: &[Receipt]) -> Option<PublishedOffsets> {
        self.watch.add(receipts, Instant::now());
        let mut offsets = BTreeMap::new();
        for receipt in receipts {
            if let Destination::Topic {
                partition,
                offset: Some(offset),
            } = receipt.place
            {
                if self.ends.get(&partition).is_some_and(|end| offset < *end) {
                    return None;
                }
                let end = offsets.entry(partition).or_insert(0);
                *end = offset.max(*end - 1) + 1;
            }
        }
        self.ends.extend(&offsets);
        let on_topic = receipts
            .iter()
            .filter(|receipt| matches!(receipt.place, Destination::Topic { .. }))
            .map(|receipt| receipt.outbox_id);
        self.last_published = on_topic.max().unwrap_or(0).max(self.last_published);
        (!offsets.is_empty()).then(|| PublishedOffsets {
            topic: self.topic.clone(),
            offsets,
            last_published: self.last_published,
        })
    }
}

/// A session, and the reader of its topic.
pub(super) type Opened = (Box<Session>, TopicReader);

/// Connects, and opens the topic at the first offset that may not be recorded.
pub(super) async fn open(
    context: Arc<Context>,
    guarantee: DeliveryGuarantee,
) -> Result<Opened, ClusterError> {
    let settings = &context.settings;
    let kafka = reconnect(&context).await?;
    // An operator creates the topic of many nodes, with its partitions.
    if settings.role == NodeRole::Single {
        ensure_cluster_topic(&kafka, settings).await?;
    }
    // The producers first: once they exist, no record of an earlier one arrives any more.
    let producer = match guarantee {
        DeliveryGuarantee::AtLeastOnce => AnyProducer::plain(&kafka, settings.compression).await?,
        DeliveryGuarantee::ExactlyOnce => {
            let ring =
                ProducerRing::acquire(&kafka, &context.node, settings, context.ring_size).await?;
            AnyProducer::Transactional(ring)
        }
    };
    let TopicDescription {
        topic, partitions, ..
    } = describe_cluster_topic(&kafka, &settings.topic).await?;
    let risks = topic_config_risks(&kafka, &settings.topic, &settings.bootstrap_servers).await;
    context.warnings.set(risks);
    let partitions = i32::try_from(partitions).unwrap_or(i32::MAX);
    let source = RecordSource {
        node: context.node.clone(),
        incarnation: context.store.read(node_role::node_created_at)?,
        key: settings.key,
    };
    let chosen = match settings.key {
        RecordKey::User => None,
        RecordKey::Node => Some(partition_of_node(&context.node, partitions)),
    };
    let name = topic.clone();
    let incarnation = context
        .store
        .write(move |tx| topic::open_topic_incarnation(tx, &name, chosen, Timestamp::now()))?;
    let mut session = Session {
        kafka,
        producer,
        topic,
        blocked_by: None,
        unseen: Vec::new(),
        visible: BTreeSet::new(),
        first_conflict: None,
        watch: VisibilityWatch::default(),
        partitions,
        partition: incarnation.partition,
        source,
        role: settings.role,
        last_published: incarnation.last_published,
        status: context
            .reports
            .as_ref()
            .map(|reports| StatusReporter::new(reports.interval)),
        idle_end: None,
        answered_at: Instant::now(),
        ends: BTreeMap::new(),
    };
    session.blocked_by = end_transactions_before_session(&session, &context).await?;
    let unknown = start_of_unknown_partition(&session);
    let reader = open_session_reader(&mut session, &context, unknown).await?;
    Ok((Box::new(session), reader))
}

/// A partition of an edge has the records of many nodes. None of this database is older than it.
fn start_of_unknown_partition(session: &Session) -> ReadFrom {
    match session.role {
        NodeRole::Single => ReadFrom::Oldest,
        NodeRole::Edge => {
            ReadFrom::Time(session.source.incarnation.minus(CLOCK_MARGIN).as_millis())
        }
    }
}

/// As Kafka's own clients choose it for this key.
fn partition_of_node(node: &NodeId, partitions: i32) -> i32 {
    let hash = murmur2(node.as_str().as_bytes()) & 0x7fff_ffff;
    let partitions = u32::try_from(partitions.max(1)).unwrap_or(1);
    i32::try_from(hash % partitions).unwrap_or(0)
}

async fn reconnect(context: &Context) -> Result<Kafka, KrafkaError> {
    let mut connection = context.connection.lock().await;
    connection.disconnect();
    connection.connect().await
}

/// Opens the topic from the first offset that may not be recorded; a partition that was not read
/// before from `unknown`. Reads the first events that may be hidden as well.
async fn open_session_reader(
    session: &mut Session,
    context: &Context,
    unknown: ReadFrom,
) -> Result<TopicReader, ClusterError> {
    let topic = session.topic.clone();
    let known = context
        .store
        .read(|connection| topic::topic_partitions(connection, &topic))?;
    // On the writer's thread, after it has recorded the latest receipts.
    let name = topic.clone();
    let unseen = context
        .store
        .write(move |tx| unseen::unseen_of_topic(tx, &name))?;
    let own = session.partition;
    let from = |number| {
        let Some(known) = known.iter().find(|known| known.partition == number) else {
            let is_own = own.is_none_or(|own| own == number);
            return if is_own { unknown } else { ReadFrom::Nowhere };
        };
        let first_unseen = unseen
            .iter()
            .find(|first| first.partition == number)
            .map(|first| first.offset);
        let published_to = known.published_to;
        ReadFrom::Offset(first_unseen.map_or(published_to, |offset| offset.min(published_to)))
    };
    let kafka = &session.kafka;
    let to = ReadTo::HighWatermark;
    let reader = TopicReader::open_within(OPEN_TIMEOUT, kafka, &topic.name, to, from).await?;
    session.unseen = unseen;
    // Deleted or recreated since it was described: the next attempt starts with the new state.
    let reader = reader.filter(|reader| reader.topic_id() == topic.id);
    Ok(reader.ok_or_else(|| KrafkaError::UnknownTopic {
        topic: context.settings.topic.clone(),
    })?)
}

/// Ends our own hanging transactions, before anything else is sent. Returns the description of
/// another producer's open transaction.
async fn end_transactions_before_session(
    session: &Session,
    context: &Context,
) -> Result<Option<String>, KrafkaError> {
    let Session { kafka, topic, .. } = session;
    let partitions = session.own_partitions().collect();
    let ids = transactional_ids(&context.node);
    let describe = open_transactions(kafka, &topic.name, &partitions, &ids);
    let open = match with_kafka_timeout(DESCRIBE_TIMEOUT, describe).await {
        Ok(open) => open,
        Err(error) => {
            log::debug!("the cluster does not describe open transactions: {error}");
            return Ok(None);
        }
    };
    for (id, partitions) in hanging_partitions(&open) {
        let in_ring = match &session.producer {
            AnyProducer::Transactional(ring) => ring.find(id),
            AnyProducer::Plain(_) => None,
        };
        if let Some(producer) = in_ring {
            end_hanging_transactions(producer, &topic.name, &partitions).await?;
        } else {
            let producer = transactional_producer(kafka, id, context.settings.compression).await?;
            end_hanging_transactions(&producer, &topic.name, &partitions).await?;
        }
    }
    let other = foreign_transaction(&open);
    Ok(other.map(|open| format!(": {}", open.describe(&context.settings.bootstrap_servers))))
}

/// The partitions of our own transactions that hang, by transactional id.
fn hanging_partitions(open: &[OpenTransaction]) -> BTreeMap<&str, Vec<i32>> {
    let mut hanging = BTreeMap::<&str, Vec<i32>>::new();
    for open in open {
        if let Owner::OursEnded { transactional_id } = &open.owner {
            log::warn!(
                event = "hanging_transaction_ended";
                "{open}, although its coordinator has ended it: ending it, and publishing its \
                    events again"
            );
            let partitions = hanging.entry(transactional_id).or_default();
            partitions.push(open.partition);
        }
    }
    hanging
}

/// The session after a check. `None` if no check of the visibility was due.
pub(super) type Checked = (Box<Session>, Result<Option<Visibility>, ClusterError>);

/// Asks quiet connections for an answer, and checks whether published events are visible. While no
/// event waits, an edge reports its state.
pub(super) async fn check(
    mut session: Box<Session>,
    context: Arc<Context>,
    waiting: usize,
) -> Checked {
    if session.answered_at.elapsed() >= QUIET_LIMIT {
        match with_kafka_timeout(REQUEST_TIMEOUT, session.ping()).await {
            Ok(ends) => session.save_idle_end(&context.store, &ends),
            Err(error) => return (session, Err(error)),
        }
        session.answered_at = Instant::now();
    }
    if waiting == 0 {
        report_status(&mut session, &context).await;
    }
    if session.watch.due().is_none_or(|at| at > Instant::now()) {
        return (session, Ok(None));
    }
    let ids = transactional_ids(&context.node);
    let servers = &context.settings.bootstrap_servers;
    let Session {
        kafka,
        topic,
        watch,
        ..
    } = &mut *session;
    let visibility = watch
        .check(kafka, &context.store, topic, &ids, servers)
        .await;
    (session, visibility.map(Some))
}

async fn report_status(session: &mut Session, context: &Context) {
    let (Some(status), Some(reports)) = (&mut session.status, &context.reports) else {
        return;
    };
    if status.due() <= Instant::now() {
        let place = (&context.node, context.settings.topic.as_str());
        let last = session.last_published;
        status.report(&session.kafka, place, reports, last).await;
    }
}
