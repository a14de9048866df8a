//! Reads a topic once, without a group: from given offsets, or from the beginning, to its end at
//! the start of the reading. It reads committed records only (`read_committed`): an open
//! transaction ends a partition before it, or the reader waits for its end.
//!
//! Markers of transactions have offsets and are no records. So the consumer's position says how far
//! a partition was read, never the offset of the last record.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use krafka::Kafka;
use krafka::admin::{ListOffsetsOptions, ListedOffset, OffsetSpec, TopicPartition};
use krafka::consumer::{AutoOffsetReset, Consumer, ConsumerRecord, IsolationLevel};
use krafka::error::KrafkaError;
use tokio::time::sleep;

use crate::domain::event::{ID_HEADER, INCARNATION_HEADER, TIME_HEADER};
use crate::domain::trace_context::TraceContext;
use crate::kafka::cluster::{
    ClusterError, FETCH_BYTES_MAX, INFLATED_BYTES_MAX, cluster_end_offsets, with_kafka_timeout,
};
use crate::kafka::undecodable::{Attempts, Undecodable, next_decodable_offset};

/// How long one poll waits for records: the end may be a marker, after which none come.
const POLL: Duration = Duration::from_millis(100);

/// Between two attempts.
const RETRY: Duration = Duration::from_millis(200);

/// How many records one batch has at most; up to as many more are in memory.
const RECORDS_MAX: i32 = 1000;

/// How long the search for the end of a batch that cannot be decoded may take.
const SKIP_LIMIT: Duration = Duration::from_secs(3);

/// A record as it lies on the topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TopicRecord {
    pub(crate) partition: i32,
    pub(crate) offset: i64,
    pub(crate) key: Option<Vec<u8>>,
    pub(crate) value: Option<Vec<u8>>,
    /// The header `ce_id`, if it has one that is text.
    pub(crate) event_id: Option<String>,
    /// The header `ce_time`, likewise.
    pub(crate) time: Option<String>,
    /// The header `ce_incarnation`, likewise.
    pub(crate) incarnation: Option<String>,
    /// Milliseconds since 1970.
    pub(crate) timestamp_ms: i64,
    /// The client's trace, if it has one.
    pub(crate) trace: Option<TraceContext>,
}

/// The offsets that a partition has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct OffsetRange {
    pub(crate) partition: i32,
    /// The oldest offset that the broker still has.
    pub(crate) start: i64,
    /// The offset after the last one to be read.
    pub(crate) end: i64,
}

/// Records that were skipped because they cannot be decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Skipped {
    pub(crate) partition: i32,
    pub(crate) first: i64,
    /// The offset after the last one.
    pub(crate) end: i64,
}

/// A reading in progress.
pub(crate) struct TopicReader {
    kafka: Kafka,
    consumer: Consumer,
    topic: String,
    topic_id: [u8; 16],
    ranges: Vec<OffsetRange>,
    /// The ends of the partitions that still have records to read.
    remaining: BTreeMap<i32, i64>,
    /// The partitions where a transaction is still open below the end offset.
    blocked: BTreeSet<i32>,
    attempts: Attempts,
    skipped: Vec<Skipped>,
}

/// The end of the reading.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ReadTo {
    /// Before the first open transaction.
    LastStableOffset,
    /// After the broker's last record. The reader waits for the end of each open transaction.
    HighWatermark,
}

/// Where the reading of a partition begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ReadFrom {
    /// At the oldest record.
    Oldest,
    /// At this offset; at the oldest record if the partition does not have it.
    Offset(i64),
    /// At the first record that is not older than this time, in milliseconds since 1970; at the end
    /// if there is none.
    Time(i64),
    /// The partition is not looked at.
    Nowhere,
}

#[cfg(test)]
impl From<Option<i64>> for ReadFrom {
    fn from(offset: Option<i64>) -> Self {
        offset.map_or(Self::Oldest, Self::Offset)
    }
}

impl TopicReader {
    /// Opens a topic. `from` returns where the reading of a partition begins. Returns `None` if
    /// there is no such topic.
    pub(crate) async fn open(
        kafka: &Kafka,
        topic: &str,
        end: ReadTo,
        from: impl Fn(i32) -> ReadFrom,
    ) -> Result<Option<Self>, KrafkaError> {
        let consumer = kafka
            .consumer_without_group()
            .isolation_level(IsolationLevel::ReadCommitted)
            .auto_offset_reset(AutoOffsetReset::None)
            .enable_auto_commit(false)
            .max_poll_records(RECORDS_MAX)
            .max_buffered_records(RECORDS_MAX)
            .fetch_max_bytes(FETCH_BYTES_MAX)
            .fetch_max_wait(POLL)
            .max_decompressed_size(INFLATED_BYTES_MAX)
            .metrics_push(false)
            .build()
            .await?;
        let Some(info) = consumer.fetch_metadata(Some(topic)).await?.topics.pop() else {
            return Ok(None);
        };
        let mut partitions: Vec<i32> = info.partitions.keys().copied().collect();
        partitions.sort_unstable();
        partitions.retain(|partition| from(*partition) != ReadFrom::Nowhere);
        consumer.assign(topic, partitions.clone()).await?;
        let mut reader = Self {
            kafka: kafka.clone(),
            consumer,
            topic: topic.to_owned(),
            topic_id: info.topic_id,
            ranges: Vec::new(),
            remaining: BTreeMap::new(),
            blocked: BTreeSet::new(),
            attempts: Attempts::default(),
            skipped: Vec::new(),
        };
        for partition in partitions {
            reader.position(partition, end, from(partition)).await?;
        }
        Ok(Some(reader))
    }

    /// Finds the range of a partition, and seeks to the first offset to read.
    async fn position(
        &mut self,
        partition: i32,
        end: ReadTo,
        from: ReadFrom,
    ) -> Result<(), KrafkaError> {
        let Self {
            consumer, topic, ..
        } = self;
        let (start, stable) = consumer.fetch_watermarks(topic, partition).await?;
        let end = match end {
            ReadTo::LastStableOffset => stable,
            ReadTo::HighWatermark => high_watermark(&self.kafka, topic, partition)
                .await?
                .max(stable),
        };
        if stable < end {
            self.blocked.insert(partition);
        }
        self.ranges.push(OffsetRange {
            partition,
            start,
            end,
        });
        let first = match from {
            ReadFrom::Offset(offset) if (start..=end).contains(&offset) => offset,
            ReadFrom::Time(_) if start == end => end,
            ReadFrom::Time(time) => first_offset_at(&self.kafka, topic, partition, time)
                .await?
                .map_or(end, |offset| offset.clamp(start, end)),
            _ => start,
        };
        consumer.seek(topic, partition, first).await?;
        if first < end {
            self.remaining.insert(partition, end);
        } else {
            consumer.pause(topic, &[partition]).await;
        }
        Ok(())
    }

    /// As [`TopicReader::open`], with retries until the time limit: brokers reject requests for a
    /// new topic, or after a change of its leader, at first.
    pub(crate) async fn open_within(
        limit: Duration,
        kafka: &Kafka,
        topic: &str,
        end: ReadTo,
        from: impl Fn(i32) -> ReadFrom,
    ) -> Result<Option<Self>, ClusterError> {
        let started = Instant::now();
        loop {
            let opened = with_kafka_timeout(
                limit.saturating_sub(started.elapsed()),
                Self::open(kafka, topic, end, &from),
            )
            .await;
            if opened.is_ok() || reader_has_no_time_left(started, limit) {
                return opened;
            }
            sleep(RETRY).await;
        }
    }

    /// The topic's id (KIP-516): a recreated topic has another.
    pub(crate) fn topic_id(&self) -> [u8; 16] {
        self.topic_id
    }

    /// The partitions, by number.
    pub(crate) fn ranges(&self) -> &[OffsetRange] {
        &self.ranges
    }

    /// A partition that may be waiting for a transaction to end.
    pub(crate) fn blocked_partition(&self) -> Option<i32> {
        self.remaining
            .keys()
            .find(|partition| self.blocked.contains(partition))
            .copied()
    }

    /// Whether every partition is read to its end.
    pub(crate) fn is_finished(&self) -> bool {
        self.remaining.is_empty()
    }

    /// The next records, in the order of their offsets within a partition. It may return none while
    /// there are more: the caller decides how long to continue. An error loses no record.
    pub(crate) async fn next_batch(
        &mut self,
        limit: Duration,
    ) -> Result<Vec<TopicRecord>, ClusterError> {
        if self.is_finished() {
            return Ok(Vec::new());
        }
        let polled = match with_kafka_timeout(limit, self.consumer.poll(POLL.min(limit))).await {
            Ok(polled) => polled,
            Err(ClusterError::Client(error)) => {
                self.skip(error).await?;
                Vec::new()
            }
            Err(failure) => return Err(failure),
        };
        let inside = |record: &ConsumerRecord| {
            self.remaining
                .get(&record.partition)
                .is_some_and(|end| record.offset < *end)
        };
        let records = polled
            .into_iter()
            .filter(inside)
            .map(TopicRecord::from)
            .collect();
        let partitions: Vec<(i32, i64)> = self
            .remaining
            .iter()
            .map(|(partition, end)| (*partition, *end))
            .collect();
        for (partition, end) in partitions {
            if self
                .consumer
                .position(&self.topic, partition)
                .await
                .is_some_and(|position| position >= end)
            {
                self.remaining.remove(&partition);
                self.consumer.pause(&self.topic, &[partition]).await;
            }
        }
        Ok(records)
    }

    /// Skips deleted records and, after some attempts, a batch that cannot be decoded.
    async fn skip(&mut self, error: KrafkaError) -> Result<(), ClusterError> {
        if let KrafkaError::NoOffset { partitions } = error {
            for (_, partition) in partitions {
                let (start, _) = self
                    .consumer
                    .fetch_watermarks(&self.topic, partition)
                    .await?;
                self.consumer.seek(&self.topic, partition, start).await?;
            }
            return Ok(());
        }
        let Some(batch) = Undecodable::parse(&error, &self.topic) else {
            return Err(error.into());
        };
        if !self.attempts.add(&batch, Instant::now()) {
            sleep(RETRY).await;
            return Ok(());
        }
        let partition = batch.partition;
        let first = batch.offset;
        let end = with_kafka_timeout(
            SKIP_LIMIT,
            next_decodable_offset(&self.kafka, &self.topic, &batch),
        )
        .await?;
        self.consumer.seek(&self.topic, partition, end).await?;
        log::warn!(
            event = "records_undecodable", partition = partition, offset = first;
            "{}/{partition}: the records {first} to {} cannot be decoded: {}",
            self.topic,
            end - 1,
            batch.reason
        );
        self.skipped.push(Skipped {
            partition,
            first,
            end,
        });
        Ok(())
    }

    /// The records that were skipped because they cannot be decoded.
    pub(crate) fn skipped(&self) -> &[Skipped] {
        &self.skipped
    }

    /// The next records; none only at the end. Retries after errors, until no record has arrived
    /// within the limit.
    pub(crate) async fn next_within(
        &mut self,
        limit: Duration,
    ) -> Result<Vec<TopicRecord>, ClusterError> {
        let started = Instant::now();
        while !self.is_finished() {
            let left = limit.saturating_sub(started.elapsed());
            match self.next_batch(left).await {
                Ok(records) if records.is_empty() && left.is_zero() => {
                    return Err(ClusterError::Timeout(limit));
                }
                Ok(records) if records.is_empty() => {}
                Err(failure) if left <= RETRY => return Err(failure),
                Err(_) => sleep(RETRY).await,
                records => return records,
            }
        }
        Ok(Vec::new())
    }

    /// Reads the oldest offsets again: records that the broker deleted meanwhile need not have been
    /// read.
    pub(crate) async fn refresh_start_offsets(
        &mut self,
        limit: Duration,
    ) -> Result<(), ClusterError> {
        let started = Instant::now();
        loop {
            let fetched = with_kafka_timeout(
                limit.saturating_sub(started.elapsed()),
                self.fetch_start_offsets(),
            )
            .await;
            if fetched.is_ok() || reader_has_no_time_left(started, limit) {
                return fetched;
            }
            sleep(RETRY).await;
        }
    }

    async fn fetch_start_offsets(&mut self) -> Result<(), KrafkaError> {
        for range in &mut self.ranges {
            range.start = self
                .consumer
                .fetch_watermarks(&self.topic, range.partition)
                .await?
                .0;
        }
        Ok(())
    }
}

async fn high_watermark(kafka: &Kafka, topic: &str, partition: i32) -> Result<i64, KrafkaError> {
    let options = ListOffsetsOptions::default();
    let mut ends = cluster_end_offsets(kafka, topic, [partition], options).await?;
    let unknown = || KrafkaError::UnknownTopic {
        topic: topic.to_owned(),
    };
    ends.remove(&partition).ok_or_else(unknown)
}

/// The first offset whose record is not older than a time. `None`: there is no such record.
async fn first_offset_at(
    kafka: &Kafka,
    topic: &str,
    partition: i32,
    time: i64,
) -> Result<Option<i64>, KrafkaError> {
    // The client waits for ever for an offset that does not exist: first the newest time.
    let newest = list_offset(kafka, topic, partition, OffsetSpec::MaxTimestamp).await?;
    if newest
        .and_then(|newest| newest.timestamp)
        .is_none_or(|newest| newest < time)
    {
        return Ok(None);
    }
    let found = list_offset(kafka, topic, partition, OffsetSpec::Timestamp(time)).await?;
    Ok(found.map(|found| found.offset))
}

async fn list_offset(
    kafka: &Kafka,
    topic: &str,
    partition: i32,
    spec: OffsetSpec,
) -> Result<Option<ListedOffset>, KrafkaError> {
    let wanted = [(TopicPartition::new(topic, partition), spec)];
    let options = ListOffsetsOptions::default();
    let found = kafka.admin().list_offsets(wanted, options).await?;
    found.into_values().next().transpose()
}

/// Whether there is no time for another attempt.
fn reader_has_no_time_left(started: Instant, limit: Duration) -> bool {
    started.elapsed() + RETRY >= limit
}

impl From<ConsumerRecord> for TopicRecord {
    fn from(record: ConsumerRecord) -> Self {
        Self {
            partition: record.partition,
            offset: record.offset,
            event_id: record.header_str(ID_HEADER).map(str::to_owned),
            time: record.header_str(TIME_HEADER).map(str::to_owned),
            incarnation: record.header_str(INCARNATION_HEADER).map(str::to_owned),
            timestamp_ms: record.timestamp,
            trace: record.header_str("traceparent").map(|parent| TraceContext {
                parent: parent.to_owned(),
                state: record.header_str("tracestate").map(str::to_owned),
            }),
            key: record.key.map(Vec::from),
            value: record.value.map(Vec::from),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use krafka::Record;
    use krafka::testing::FakeBroker;

    const TOPIC: &str = "t";
    const CALL_TIMEOUT: Duration = Duration::from_secs(10);

    fn record(partition: i32, value: i64) -> Record {
        Record::new(TOPIC, value.to_string())
            .partition(partition)
            .header(ID_HEADER, format!("n-{value}"))
    }

    async fn put(kafka: &Kafka, partition: i32, values: impl IntoIterator<Item = i64>) {
        let producer = kafka.producer().metrics_push(false).build().await.unwrap();
        for value in values {
            drop(producer.enqueue(record(partition, value)).await.unwrap());
        }
        producer.close().await.unwrap();
    }

    /// To the end, as (partition, offset, value).
    async fn read(reader: &mut TopicReader) -> Vec<(i32, i64, i64)> {
        let mut found = Vec::new();
        while !reader.is_finished() {
            found.extend(reader.next_batch(CALL_TIMEOUT).await.unwrap());
        }
        found.sort_by_key(|record| (record.partition, record.offset));
        let value = |record: &TopicRecord| {
            String::from_utf8(record.value.clone().unwrap())
                .unwrap()
                .parse()
                .unwrap()
        };
        for record in &found {
            assert_eq!(record.event_id, Some(format!("n-{}", value(record))));
        }
        found
            .iter()
            .map(|record| (record.partition, record.offset, value(record)))
            .collect()
    }

    async fn open(kafka: &Kafka, from: impl Fn(i32) -> Option<i64>) -> TopicReader {
        let from = |partition| ReadFrom::from(from(partition));
        TopicReader::open(kafka, TOPIC, ReadTo::LastStableOffset, from)
            .await
            .unwrap()
            .unwrap()
    }

    #[tokio::test]
    async fn reads_from_the_given_offsets_to_the_ends_at_the_start() {
        let broker = FakeBroker::start().await.unwrap();
        broker.create_topic(TOPIC, 4);
        let kafka = broker.kafka().connect().await.unwrap();
        put(&kafka, 0, 0..2500).await;
        put(&kafka, 1, 0..5).await;
        put(&kafka, 2, 0..5).await;
        let from = |partition| [None, Some(3), Some(6), None][usize::try_from(partition).unwrap()];
        let mut reader = open(&kafka, from).await;
        put(&kafka, 1, 100..200).await;
        put(&kafka, 3, 100..200).await;
        let found = read(&mut reader).await;
        assert_eq!(
            reader
                .ranges()
                .iter()
                .map(|range| range.end)
                .collect::<Vec<_>>(),
            [2500, 5, 5, 0]
        );
        assert_eq!(reader.topic_id(), broker.topic_id(TOPIC).unwrap());
        let expected = (0..2500)
            .map(|n| (0, n, n))
            .chain([(1, 3, 3), (1, 4, 4)])
            .chain((0..5).map(|n| (2, n, n)));
        assert_eq!(found, expected.collect::<Vec<_>>());
        assert_eq!(reader.next_batch(CALL_TIMEOUT).await.unwrap(), []);
        let mut nothing = open(&kafka, |partition| {
            Some([2500, 105, 5, 100][usize::try_from(partition).unwrap()])
        })
        .await;
        assert!(nothing.is_finished() && read(&mut nothing).await.is_empty());
    }

    #[tokio::test]
    async fn reads_past_markers_and_what_was_aborted_and_stops_before_what_is_open() {
        let broker = FakeBroker::start().await.unwrap();
        broker.create_topic(TOPIC, 1);
        let kafka = broker.kafka().connect().await.unwrap();
        let producer = kafka
            .producer()
            .metrics_push(false)
            .build_transactional("tx")
            .await
            .unwrap();
        for turn in 0..4 {
            producer.begin().unwrap();
            for value in 0..3 {
                let _ = producer.send(record(0, 10 * turn + value)).await.unwrap();
            }
            if turn % 2 == 0 {
                producer.commit().await.unwrap();
            } else {
                producer.abort().await.unwrap();
            }
        }
        let mut reader = open(&kafka, |_| None).await;
        let found = read(&mut reader).await;
        assert_eq!(
            found,
            [
                (0, 0, 0),
                (0, 1, 1),
                (0, 2, 2),
                (0, 8, 20),
                (0, 9, 21),
                (0, 10, 22)
            ]
        );
        assert_eq!(
            reader.ranges(),
            [OffsetRange {
                partition: 0,
                start: 0,
                end: 16
            }],
            "the last is a marker"
        );
        producer.begin().unwrap();
        let _ = producer.send(record(0, 99)).await.unwrap();
        put(&kafka, 0, [100]).await;
        let mut reader = open(&kafka, |_| Some(8)).await;
        assert_eq!(read(&mut reader).await.last(), Some(&(0, 10, 22)));
        assert_eq!(reader.ranges()[0].end, 16);
    }

    #[tokio::test]
    async fn a_topic_that_is_not_there_is_no_error_and_is_not_made() {
        let broker = FakeBroker::start().await.unwrap();
        let kafka = broker.kafka().connect().await.unwrap();
        assert!(
            TopicReader::open(&kafka, TOPIC, ReadTo::LastStableOffset, |_| {
                ReadFrom::Oldest
            })
            .await
            .unwrap()
            .is_none()
        );
        assert_eq!(broker.topic_id(TOPIC), None);
    }
}
