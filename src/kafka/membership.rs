//! The membership in the consumer group: joining, polling, and the position of each partition.
//!
//! Positions come from the database alone. krafka would begin a partition at the group's committed
//! offset. So its records count only after the partition was moved to the stored offset. An offset
//! that the partition does not have (deleted records, a truncated log), or that is unknown, is
//! replaced by one that it has. The records before it are not read; the caller backfills their
//! events from the outbox.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use krafka::admin::ListOffsetsOptions;
use krafka::consumer::{
    AutoOffsetReset, Consumer as Client, ConsumerRecord, GroupProtocol, IsolationLevel,
};
use krafka::error::KrafkaError;
use krafka::{CloseOptions, GroupMembershipOperation, Kafka};

use super::cluster::{
    ClusterConnection, ClusterError, FETCH_BYTES_MAX, INFLATED_BYTES_MAX, TopicDescription,
    cluster_end_offsets, describe_cluster_topic,
};
use super::poll_outcome::{AssignmentGeneration, FetchOutcome, Fetches, Polled, Stall};
use super::undecodable::{Attempts, RETRY_INTERVAL, Undecodable, next_decodable_offset};
use crate::domain::node_id::NodeId;
use crate::domain::timestamp::Timestamp;
use crate::domain::topic::Topic;
use crate::store::Store;
use crate::store::dead_letter::{self, DeadRecord};
use crate::store::topic;

/// How long one poll waits for records: also how late a stop is noticed.
const POLL: Duration = Duration::from_millis(500);

/// How often the topic is described: for new partitions, new leaders, another incarnation, our
/// rights.
const REFRESH_INTERVAL: Duration = Duration::from_secs(5);

/// How long the group may need to assign partitions to a member.
const ASSIGNMENT_LIMIT: Duration = Duration::from_secs(8);

/// How often the member sends a heartbeat. A connection that died without a sign is found after
/// this, plus one request timeout.
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(1);

/// The maximum number of records of one transaction.
const RECORDS_MAX: i32 = 1000;

/// The timestamps of `ListOffsets` that mean the ends of a partition.
const EARLIEST: i64 = -2;
const LATEST: i64 = -1;

/// A member of the group.
pub(crate) struct Membership {
    kafka: Kafka,
    client: Client,
    topic: Topic,
    partitions: usize,
    refreshed_at: Instant,
    /// Since when it has fewer partitions than the topic.
    fewer_since: Option<Instant>,
    /// Why it does not consume everything.
    stall: Option<Stall>,
    assignments: AssignmentGeneration,
    seeked_in: u64,
    /// The next offset of each partition that was moved to its position, as the database has it.
    positions: BTreeMap<i32, i64>,
    /// Whether it has just joined, or a position was replaced, since the last call.
    replaced: bool,
    /// Attempts at batches that cannot be decoded.
    attempts: Attempts,
    /// Partitions that wait for their next attempt.
    paused_until: BTreeMap<i32, Instant>,
    /// The offsets that were last committed to the group.
    committed: BTreeMap<i32, i64>,
    /// Fetches, and fetch errors, since the member joined.
    fetches: Fetches,
}

impl Membership {
    /// Connects, and joins the group at the first poll.
    pub(crate) async fn join(
        link: &mut ClusterConnection,
        node: &NodeId,
    ) -> Result<Self, KrafkaError> {
        let kafka = link.connect_to_topic().await?;
        let settings = link.settings();
        let TopicDescription {
            topic, partitions, ..
        } = describe_cluster_topic(&kafka, &settings.topic).await?;
        let assignments = AssignmentGeneration::default();
        let client = kafka
            .consumer(&settings.group)
            // With static membership on the classic protocol, a killed member resumes at once after
            // its restart. With KIP-848 it waits until its own session has timed out (measured: 45
            // s).
            .group_protocol(GroupProtocol::Classic)
            .group_instance_id(node.as_str())
            .heartbeat_interval(HEARTBEAT_INTERVAL)
            .enable_auto_commit(false)
            .isolation_level(IsolationLevel::ReadCommitted)
            .rebalance_listener(assignments.clone())
            .auto_offset_reset(AutoOffsetReset::None)
            .max_poll_records(RECORDS_MAX)
            .fetch_max_bytes(FETCH_BYTES_MAX)
            .max_decompressed_size(INFLATED_BYTES_MAX)
            .metrics_push(false)
            .build()
            .await?;
        client.subscribe([&settings.topic]).await?;
        Ok(Self {
            kafka,
            client,
            topic,
            partitions,
            refreshed_at: Instant::now(),
            fewer_since: None,
            stall: None,
            assignments,
            seeked_in: 0,
            positions: BTreeMap::new(),
            replaced: true,
            attempts: Attempts::default(),
            paused_until: BTreeMap::new(),
            committed: BTreeMap::new(),
            fetches: Fetches {
                begun: 0,
                failed: 0,
            },
        })
    }

    /// The topic, in the consumed incarnation.
    pub(crate) fn topic(&self) -> &Topic {
        &self.topic
    }

    /// Why it does not consume everything.
    pub(crate) fn stall(&self) -> Option<&Stall> {
        self.stall.as_ref()
    }

    /// The next records of the partitions in position. Dropping the future loses none.
    pub(crate) async fn poll(
        &mut self,
        store: &Store,
        rejoined_for: &mut Option<usize>,
    ) -> Result<Polled, ClusterError> {
        if self.refreshed_at.elapsed() > REFRESH_INTERVAL {
            self.refresh(rejoined_for).await?;
        }
        // A partition whose leader is unavailable does not block the others.
        let misplaced = match self.reposition(store).await {
            Err(ClusterError::Client(error)) => Some(error),
            result => result.map(|()| None)?,
        };
        self.resume_paused().await;
        let polled = self.client.poll(POLL).await;
        let generation = self.assignments.get();
        if self.seeked_in != generation {
            self.seeked_in = generation;
            self.positions.clear();
        }
        let mut records = match polled {
            Ok(records) => records,
            Err(KrafkaError::NoOffset { partitions }) => {
                for (_, partition) in partitions {
                    self.positions.remove(&partition);
                }
                Vec::new()
            }
            Err(error) => match Undecodable::parse(&error, &self.topic.name) {
                Some(batch) => return Ok(self.tried(batch).await),
                None => return Err(error.into()),
            },
        };
        self.forget_truncated().await;
        records.retain(|record| {
            self.positions
                .get(&record.partition)
                .is_some_and(|next| *next <= record.offset)
        });
        if !records.is_empty() {
            return Ok(Polled::new(records, FetchOutcome::Answered));
        }
        let fetch = match misplaced {
            Some(error) => FetchOutcome::Failed(error),
            None => self.fetch_outcome().await,
        };
        Ok(Polled::new(records, fetch))
    }

    /// The other partitions do not wait for the next attempt.
    async fn tried(&mut self, batch: Undecodable) -> Polled {
        let now = Instant::now();
        self.client
            .pause(&self.topic.name, &[batch.partition])
            .await;
        self.paused_until
            .insert(batch.partition, now + RETRY_INTERVAL);
        let undecodable = self.attempts.add(&batch, now).then_some(batch);
        Polled {
            records: Vec::new(),
            fetch: FetchOutcome::Answered,
            undecodable,
        }
    }

    async fn resume_paused(&mut self) {
        let now = Instant::now();
        let due: Vec<i32> = self
            .paused_until
            .iter()
            .filter(|(_, until)| **until <= now)
            .map(|(partition, _)| *partition)
            .collect();
        self.client.resume(&self.topic.name, &due).await;
        self.paused_until.retain(|_, until| *until > now);
    }

    /// Skips a batch that cannot be decoded. It becomes a dead letter; our events in it are
    /// backfilled like other passed ones.
    pub(crate) async fn skip(
        &mut self,
        batch: &Undecodable,
        store: &Store,
    ) -> Result<DeadRecord, ClusterError> {
        let partition = batch.partition;
        let offset = batch.offset;
        let next = next_decodable_offset(&self.kafka, &self.topic.name, batch).await?;
        let now = Timestamp::now();
        let letter = DeadRecord {
            topic: self.topic.name.to_string(),
            partition,
            offset,
            written_at_ms: now.as_micros() / 1000,
            reason: format!(
                "the records {offset} to {} cannot be decoded: {}",
                next - 1,
                batch.reason
            ),
            key: None,
            value: None,
            headers: Vec::new(),
        };
        let kept = letter.clone();
        let topic = self.topic.clone();
        store.write(move |tx| {
            dead_letter::insert_dead_record(tx, &kept, now)?;
            topic::set_topic_positions(tx, &topic, &[(partition, next)])
        })?;
        self.replaced = true;
        // It is moved to the stored position like one that was just assigned.
        self.positions.remove(&partition);
        self.paused_until.insert(partition, Instant::now());
        Ok(letter)
    }

    /// krafka moves back by itself if the leader's log ends before our position.
    async fn forget_truncated(&mut self) {
        for (partition, next) in self.positions.clone() {
            let position = self.client.position(&self.topic.name, partition).await;
            if position.is_some_and(|position| position < next) {
                self.positions.remove(&partition);
            }
        }
    }

    async fn fetch_outcome(&mut self) -> FetchOutcome {
        let counted = self.client.metrics().consumer;
        let now = Fetches {
            begun: counted.fetches,
            failed: counted.errors,
        };
        let before = std::mem::replace(&mut self.fetches, now);
        if now.failed == before.failed {
            return if now.begun == before.begun {
                FetchOutcome::Unknown
            } else {
                FetchOutcome::Answered
            };
        }
        let partitions: Vec<i32> = self.positions.keys().copied().collect();
        let asked = self.offsets(&partitions, LATEST).await;
        match asked.into_values().find_map(Result::err) {
            Some(error) => FetchOutcome::Failed(error),
            None => FetchOutcome::Unknown,
        }
    }

    async fn offsets(
        &self,
        partitions: &[i32],
        timestamp: i64,
    ) -> BTreeMap<i32, Result<i64, KrafkaError>> {
        let name = &*self.topic.name;
        let asked: Vec<(&str, i32)> = partitions
            .iter()
            .map(|partition| (name, *partition))
            .collect();
        let found = self.client.offsets_for_times(&asked, timestamp).await;
        found
            .into_iter()
            .map(|((_, partition), offset)| (partition, offset))
            .collect()
    }

    /// After the records were stored: advances the positions of their partitions.
    pub(crate) fn stored(&mut self, records: &[ConsumerRecord]) {
        for record in records {
            self.positions.insert(record.partition, record.offset + 1);
        }
    }

    /// Moves newly assigned partitions to their stored offsets, or to their ends if there is none.
    async fn reposition(&mut self, store: &Store) -> Result<(), ClusterError> {
        let name = Arc::clone(&self.topic.name);
        let mut rest = self
            .client
            .assignment()
            .await
            .remove(&*name)
            .unwrap_or_default();
        rest.retain(|partition| !self.positions.contains_key(partition));
        if rest.is_empty() {
            return Ok(());
        }
        let mut ends = self.offsets(&rest, LATEST).await;
        let mut starts = self.offsets(&rest, EARLIEST).await;
        let known = store.read(|connection| topic::topic_partitions(connection, &self.topic))?;
        let mut found = Vec::new();
        let mut replaced = Vec::new();
        let mut failed = None;
        for partition in rest {
            match (starts.remove(&partition), ends.remove(&partition)) {
                (Some(Ok(start)), Some(Ok(end))) => {
                    let stored = known
                        .iter()
                        .find(|known| known.partition == partition)
                        .and_then(|k| k.consumed_to);
                    let position = match stored {
                        Some(offset) if offset <= end => offset.max(start),
                        _ => end,
                    };
                    if stored != Some(position) {
                        log::info!(
                            event = "position_replaced", partition = partition, offset = position;
                            "{name}/{partition}: {}",
                            replacement_in_membership(stored, start, position)
                        );
                        replaced.push((partition, position));
                    }
                    found.push((partition, position));
                }
                (Some(Err(error)), _) | (_, Some(Err(error))) => failed = Some(error),
                _ => {}
            }
        }
        if !replaced.is_empty() {
            let topic = self.topic.clone();
            store.write(move |tx| topic::set_topic_positions(tx, &topic, &replaced))?;
            self.replaced = true;
        }
        for (partition, position) in found {
            self.client.seek(&name, partition, position).await?;
            self.positions.insert(partition, position);
        }
        failed.map_or(Ok(()), |error| Err(error.into()))
    }

    /// krafka requests metadata after certain errors only. Without one the consumer would never
    /// notice new partitions, a leader that is gone for good, or a recreated topic: then it joins
    /// again.
    async fn refresh(&mut self, rejoined_for: &mut Option<usize>) -> Result<(), ClusterError> {
        let _ = self.client.fetch_metadata(Some(&self.topic.name)).await?;
        let found = describe_cluster_topic(&self.kafka, &self.topic.name).await?;
        let changed = (&found.topic, found.partitions) != (&self.topic, self.partitions);
        // They were added while this process was stopped: a returning static member gets its former
        // assignment.
        let assigned = self
            .client
            .assignment()
            .await
            .remove(&*self.topic.name)
            .unwrap_or_default()
            .len();
        self.fewer_since =
            (assigned < found.partitions).then(|| self.fewer_since.unwrap_or_else(Instant::now));
        let fewer = self
            .fewer_since
            .is_some_and(|since| since.elapsed() > ASSIGNMENT_LIMIT);
        if changed || (fewer && *rejoined_for != Some(found.partitions)) {
            *rejoined_for = Some(found.partitions);
            return Err(ClusterError::TopicChanged);
        }
        self.stall = if !found.may_read {
            Some(Stall::ReadDenied(Arc::clone(&self.topic.name)))
        } else if fewer {
            Some(Stall::PartitionsNotAssigned(assigned, found.partitions))
        } else {
            None
        };
        self.refreshed_at = Instant::now();
        Ok(())
    }

    /// Whether a position was replaced since the last call: events before it may need a backfill.
    pub(crate) fn take_replaced(&mut self) -> bool {
        std::mem::take(&mut self.replaced)
    }

    /// Whether records before this place will never arrive.
    pub(crate) fn has_passed(&self, partition: i32, offset: i64) -> bool {
        self.positions
            .get(&partition)
            .is_some_and(|next| offset < *next)
    }

    /// The high watermark of every partition: records of open transactions are before it as well.
    pub(crate) async fn ends(&self) -> Result<BTreeMap<i32, i64>, KrafkaError> {
        let partitions = 0..i32::try_from(self.partitions).unwrap_or(i32::MAX);
        let options = ListOffsetsOptions::default();
        cluster_end_offsets(&self.kafka, &self.topic.name, partitions, options).await
    }

    /// Whether everything before these offsets was read, as far as it exists.
    pub(crate) async fn has_read(&self, ends: &BTreeMap<i32, i64>) -> bool {
        for (partition, end) in ends {
            let position = self.client.position(&self.topic.name, *partition).await;
            if !self.positions.contains_key(partition)
                || position.is_none_or(|position| position < *end)
            {
                return false;
            }
        }
        true
    }

    /// Commits the positions to the group, for people who look at its lag.
    pub(crate) async fn commit(&mut self) -> Result<(), KrafkaError> {
        let mut reached = BTreeMap::new();
        for partition in self.positions.keys() {
            // The position may be after the transaction markers that follow the last record.
            let position = self.client.position(&self.topic.name, *partition).await;
            reached.extend(position.map(|position| (*partition, position)));
        }
        if reached != self.committed {
            self.client.commit().await?;
            self.committed = reached;
        }
        Ok(())
    }

    /// A returning static member gets its former assignment (KIP-345): for another one it has to
    /// leave first.
    pub(crate) async fn leave(self, limit: Duration) {
        let leave = CloseOptions::new()
            .timeout(limit)
            .group_membership_operation(GroupMembershipOperation::LeaveGroup);
        if let Err(error) = self.client.close_with(leave).await {
            log::debug!("the group could not be left: {error}");
        }
    }
}

/// Why a position differs from the stored one.
fn replacement_in_membership(stored: Option<i64>, start: i64, position: i64) -> String {
    match stored {
        None => format!("no stored offset, consuming from the end: {position}"),
        Some(stored) if stored < start => {
            format!("records {stored} to {start} were deleted, resuming at {position}")
        }
        Some(stored) => {
            format!("the partition ends before the stored offset {stored}, resuming at {position}")
        }
    }
}
