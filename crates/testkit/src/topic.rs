//! The records of a topic, read without a group; and records of other producers.

use super::{POLL, wait_for};
use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use krafka::admin::{
    AclBinding, AclOperation, AclPatternType, AclPermissionType, AclResourceType,
    AlterConsumerGroupOffsetsOptions, CreateAclsOptions, CreatePartitionsOptions,
    CreateTopicsOptions, DeleteRecordsOptions, DeleteTopicsOptions, DescribeProducersOptions,
    DescribeTopicsOptions, DescribeTransactionsOptions, ListConsumerGroupOffsetsOptions,
    ListTopicsOptions, NewTopic,
};
use krafka::consumer::{AutoOffsetReset, Consumer, IsolationLevel, TopicPartition};
use krafka::error::{ErrorCode, KrafkaError};
use krafka::producer::TransactionalProducer;
use krafka::{Compression, ConsumerRecord, Kafka, Record};
use tokio::runtime::{Builder, Runtime};

/// A record as it lies on the topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    pub partition: i32,
    pub offset: i64,
    pub timestamp_ms: i64,
    pub key: String,
    pub value: String,
    pub headers: Vec<(String, String)>,
}

impl Found {
    pub fn header(&self, name: &str) -> &str {
        let found = self.headers.iter().find(|(candidate, _)| candidate == name);
        found.map_or("", |(_, value)| value)
    }
}

/// As [`read`], once there is this number of records: the broker answers a commit before the
/// transaction shows (<https://cwiki.apache.org/confluence/display/KAFKA/KIP-98>, 5.2).
pub fn read_all(bootstrap: &str, topic: &str, count: usize, limit: Duration) -> Vec<Found> {
    wait_for(&format!("{count} records on {topic}"), limit, || {
        let found = read(bootstrap, topic, limit);
        (found.len() >= count).then_some(found)
    })
}

/// All committed records of a topic, by partition, then by offset. Panics if they do not come
/// within `limit`.
pub fn read(bootstrap: &str, topic: &str, limit: Duration) -> Vec<Found> {
    block_on(async {
        let deadline = Instant::now() + limit;
        let consumer = committed_reader(bootstrap).await;
        let mut ends = loop {
            match assign(&consumer, topic).await {
                Ok(ends) => break ends,
                // What was just made, or whose broker has just come back, may have no leader yet.
                Err(error) => assert!(Instant::now() < deadline, "{topic}: {error}"),
            }
            thread::park_timeout(POLL);
        };
        let mut found = Vec::new();
        while !ends.is_empty() {
            assert!(
                Instant::now() < deadline,
                "{topic} could not be read to {ends:?} within {limit:?}"
            );
            let records = match consumer.poll(Duration::from_millis(100)).await {
                Ok(records) => records,
                Err(error) => {
                    // A batch that cannot be decoded: an offset further, until there is another
                    // batch.
                    let (partition, offset) =
                        undecodable(topic, &error.to_string()).expect("the topic can be read");
                    consumer
                        .seek(topic, partition, offset + 1)
                        .await
                        .expect("the partition is assigned");
                    Vec::new()
                }
            };
            found.extend(records.iter().map(Found::from));
            for (partition, end) in ends.clone() {
                if consumer.position(topic, partition).await >= Some(end) {
                    ends.remove(&partition);
                }
            }
        }
        found.sort_by_key(|record| (record.partition, record.offset));
        found
    })
}

/// The values of the committed records of a topic, in the order in which a consumer receives them.
/// It begins at the beginning and ends at this number. Panics if they do not come within `limit`.
pub fn follow(bootstrap: &str, topic: &str, count: usize, limit: Duration) -> Vec<String> {
    block_on(async {
        let deadline = Instant::now() + limit;
        let consumer = committed_reader(bootstrap).await;
        assign(&consumer, topic).await.expect("the topic exists");
        let mut values = Vec::new();
        while values.len() < count {
            let received = values.len();
            assert!(Instant::now() < deadline, "{received} of {count} records");
            let records = consumer
                .poll(Duration::from_millis(50))
                .await
                .expect("the topic can be read");
            values.extend(records.iter().map(Found::from).map(|found| found.value));
        }
        values
    })
}

/// The partition and the offset that the client cannot decode.
fn undecodable(topic: &str, error: &str) -> Option<(i32, i64)> {
    let (_, rest) = error.split_once(&format!("undecodable record batch at {topic}-"))?;
    let (partition, rest) = rest.split_once(" offset ")?;
    Some((
        partition.parse().ok()?,
        rest.split(';').next()?.parse().ok()?,
    ))
}

/// Lets the consumer begin all partitions of a topic, if it exists; returns the end of each that
/// has anything.
async fn assign(consumer: &Consumer, topic: &str) -> krafka::Result<BTreeMap<i32, i64>> {
    let mut ends = BTreeMap::new();
    let known = consumer.fetch_metadata(Some(topic)).await?.topics;
    let Some(info) = known.first() else {
        return Ok(ends);
    };
    let partitions: Vec<i32> = info.partitions.keys().copied().collect();
    consumer.assign(topic, partitions.clone()).await?;
    // Markers of transactions have offsets: the position is the end, not the number of records.
    for partition in partitions {
        let (low, end) = consumer.fetch_watermarks(topic, partition).await?;
        if low < end {
            ends.insert(partition, end);
        }
    }
    Ok(ends)
}

impl From<&ConsumerRecord> for Found {
    fn from(record: &ConsumerRecord) -> Self {
        let text =
            |bytes: Option<&[u8]>| String::from_utf8_lossy(bytes.unwrap_or_default()).into_owned();
        let headers = record
            .headers
            .iter()
            .map(|(name, value)| (name.clone(), text(value.as_deref())));
        Found {
            partition: record.partition,
            offset: record.offset,
            timestamp_ms: record.timestamp,
            key: text(record.key.as_deref()),
            value: text(record.value.as_deref()),
            headers: headers.collect(),
        }
    }
}

/// Makes a topic of one partition with these settings.
pub fn create(bootstrap: &str, topic: &str, settings: &[(&str, &str)]) {
    block_on(async {
        let kafka = connect(bootstrap).await;
        let mut new = NewTopic::new(topic, 1, 1).expect("the name is right");
        for (name, value) in settings {
            new = new.with_config(*name, *value);
        }
        let made = kafka
            .admin()
            .create_topics([new], CreateTopicsOptions::default())
            .await
            .expect("the broker answers");
        assert!(made.values().all(Result::is_ok), "{made:?}");
    });
}

/// Deletes a topic, and waits until no broker knows it any more.
pub fn delete(bootstrap: &str, topic: &str, limit: Duration) {
    block_on(async {
        let kafka = connect(bootstrap).await;
        let options = || DeleteTopicsOptions::default();
        let gone = kafka
            .admin()
            .delete_topics([topic], options())
            .await
            .expect("the broker answers");
        let is_gone = |deleted: &krafka::Result<()>| match deleted {
            Err(KrafkaError::Broker { code, .. }) => *code == ErrorCode::UnknownTopicOrPartition,
            deleted => deleted.is_ok(),
        };
        assert!(gone.values().all(is_gone), "{gone:?}");
        let deadline = Instant::now() + limit;
        while !kafka
            .admin()
            .list_topics(ListTopicsOptions::default())
            .await
            .is_ok_and(|all| !all.contains(&topic.into()))
        {
            assert!(
                Instant::now() < deadline,
                "{topic} is still there after {limit:?}"
            );
        }
    });
}

/// Adds partitions to a topic up to this number, and waits until all of them exist.
pub fn add_partitions(bootstrap: &str, topic: &str, total: i32, limit: Duration) {
    block_on(async {
        let kafka = connect(bootstrap).await;
        let options = CreatePartitionsOptions::default();
        let done = kafka
            .admin()
            .create_partitions([(topic, total)], options)
            .await;
        assert!(
            done.as_ref()
                .is_ok_and(|done| done.values().all(Result::is_ok)),
            "{done:?}"
        );
        let deadline = Instant::now() + limit;
        loop {
            let delivered = kafka
                .admin()
                .describe_topics([topic], DescribeTopicsOptions::default())
                .await;
            let shown = delivered
                .as_ref()
                .ok()
                .and_then(|delivered| delivered.get(topic)?.as_ref().ok())
                .map(|now| now.partitions.len());
            if shown == usize::try_from(total).ok() {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "{topic} has not {total} partitions after {limit:?}: {delivered:?}"
            );
            thread::park_timeout(POLL);
        }
    });
}

/// Deletes a partition's records before an offset, as the retention does.
pub fn truncate(bootstrap: &str, topic: &str, partition: i32, offset: i64) {
    block_on(async {
        let kafka = connect(bootstrap).await;
        let before = [(TopicPartition::new(topic, partition), offset)];
        let done = kafka
            .admin()
            .delete_records(before, DeleteRecordsOptions::default())
            .await
            .expect("the broker answers");
        assert!(done.values().all(Result::is_ok), "{done:?}");
    });
}

/// Deletes everything that a partition has, if the topic is there.
pub fn truncate_to_end(bootstrap: &str, topic: &str, partition: i32) {
    block_on(async {
        let kafka = connect(bootstrap).await;
        // To the high watermark (https://kafka.apache.org/documentation/#deleterecords).
        let before = [(TopicPartition::new(topic, partition), -1)];
        // Not while the partition has no leader.
        let _ = kafka
            .admin()
            .delete_records(before, DeleteRecordsOptions::default())
            .await;
    });
}

/// Sets the offset of partition 0 of a group without members, as an operator's tool does.
pub fn commit(bootstrap: &str, group: &str, topic: &str, offset: i64) {
    block_on(async {
        let kafka = connect(bootstrap).await;
        let offsets = [(TopicPartition::new(topic, 0), offset)];
        let options = AlterConsumerGroupOffsetsOptions::default();
        let altered = kafka
            .admin()
            .alter_consumer_group_offsets(group, offsets, options)
            .await;
        assert!(
            altered
                .as_ref()
                .is_ok_and(|altered| altered.values().all(Result::is_ok)),
            "{altered:?}"
        );
    });
}

/// The offsets of a group, by partition.
pub fn committed(bootstrap: &str, group: &str) -> BTreeMap<i32, i64> {
    block_on(async {
        let kafka = connect(bootstrap).await;
        let options = ListConsumerGroupOffsetsOptions::default();
        let offsets = kafka
            .admin()
            .list_consumer_group_offsets(group, options)
            .await
            .expect("the broker answers");
        offsets
            .into_iter()
            .filter_map(|(place, offset)| Some((place.partition, offset.ok()?.offset?)))
            .collect()
    })
}

/// Allows a user operations on a topic; what is not allowed is then denied.
pub fn allow(bootstrap: &str, user: &str, topic: &str, operation: AclOperation) {
    block_on(async {
        let kafka = connect(bootstrap).await;
        let allowed = AclPermissionType::Allow;
        let mut acl = AclBinding::new(
            AclResourceType::Topic,
            topic,
            format!("User:{user}"),
            "*",
            operation,
            allowed,
        );
        // krafka 0.28.1 writes the number of LITERAL for this one
        // (https://kafka.apache.org/protocol#The_Messages_CreateAcls).
        acl.pattern_type = AclPatternType::Prefixed;
        let created = kafka
            .admin()
            .create_acls(vec![acl], CreateAclsOptions::default())
            .await
            .expect("the broker answers");
        assert!(
            created.iter().all(|(_, result)| result.is_ok()),
            "{created:?}"
        );
    });
}

/// An open transaction of another producer.
pub struct OpenTransaction {
    producer: TransactionalProducer,
    runtime: Runtime,
}

impl OpenTransaction {
    /// With one record in it, which is on the broker.
    pub fn begin(bootstrap: &str, id: &str, topic: &str, value: &str, event_id: &str) -> Self {
        let runtime = Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        let producer = runtime.block_on(async {
            let kafka = connect(bootstrap).await;
            let producer = kafka
                .producer()
                .metrics_push(false)
                .transaction_timeout(Duration::from_mins(5))
                .build_transactional(id)
                .await
                .expect("it can be dropped");
            producer.begin().expect("it is new");
            let record = Record::new(topic, value.to_owned())
                .key("1")
                .header("ce_id", event_id.to_owned());
            let _ = producer.send(record).await.expect("the broker takes it");
            producer
        });
        Self { producer, runtime }
    }

    /// Whether the broker takes the commit.
    pub fn commit(self) -> bool {
        self.runtime
            .block_on(async { self.producer.commit().await.is_ok() })
    }

    /// Its record never shows, and what is behind it does.
    pub fn abort(self) {
        let aborted = self.runtime.block_on(self.producer.abort());
        aborted.expect("the broker takes the abort");
    }

    /// Asks for the commit, and dies after this number of turns of its runtime. Then the request
    /// was not written yet, or not answered, or was answered.
    pub fn die_while_committing(self, turns: usize) {
        self.runtime.block_on(async {
            let after_turns = async {
                for _ in 0..turns {
                    tokio::task::yield_now().await;
                }
            };
            tokio::select! {
                biased;
                _ = self.producer.commit() => {}
                () = after_turns => {}
            }
        });
    }

    /// Writes one more record to its connection, and dies before the broker answers.
    pub fn die_while_sending(self, topic: &str, value: &str, event_id: &str) {
        self.runtime.block_on(async {
            let record = Record::new(topic, value.to_owned())
                .key("1")
                .header("ce_id", event_id.to_owned());
            let sent = self.producer.send(record);
            let answer = tokio::time::timeout(Duration::from_millis(300), sent).await;
            assert!(answer.is_err(), "the connection holds its bytes");
        });
    }
}

/// The partitions whose leader calls a transaction open, and where that begins.
pub fn open_transactions(bootstrap: &str, topic: &str, partitions: i32) -> Vec<(i32, i64)> {
    block_on(async {
        let kafka = connect(bootstrap).await;
        let all = (0..partitions).map(|partition| TopicPartition::new(topic, partition));
        let described = kafka
            .admin()
            .describe_producers(all, DescribeProducersOptions::default())
            .await;
        let mut open = Vec::new();
        for (partition, producers) in described.expect("the broker answers") {
            let starts = producers
                .expect("it leads")
                .into_iter()
                .filter_map(|one| one.current_transaction_start_offset);
            open.extend(starts.map(|start| (partition.partition, start)));
        }
        open.sort_unstable();
        open
    })
}

/// What the coordinator calls the state of a transactional id.
pub fn transaction_state(bootstrap: &str, id: &str) -> String {
    block_on(async {
        let kafka = connect(bootstrap).await;
        let mut described = kafka
            .admin()
            .describe_transactions([id], DescribeTransactionsOptions::default())
            .await;
        let description = described
            .as_mut()
            .ok()
            .and_then(|described| described.remove(id))
            .and_then(Result::ok);
        description.map_or_else(String::new, |description| description.state)
    })
}

/// A consumer of committed records, from the beginning and without a group.
async fn committed_reader(bootstrap: &str) -> Consumer {
    connect(bootstrap)
        .await
        .consumer_without_group()
        .isolation_level(IsolationLevel::ReadCommitted)
        .auto_offset_reset(AutoOffsetReset::Earliest)
        .metrics_push(false)
        .build()
        .await
        .expect("the settings are right")
}

async fn connect(bootstrap: &str) -> Kafka {
    Kafka::builder(bootstrap)
        .connect()
        .await
        .expect("the broker answers")
}

/// Puts a record on a topic: key, value, headers.
pub fn put(
    bootstrap: &str,
    topic: &str,
    key: Option<&str>,
    value: Option<&[u8]>,
    headers: &[(&str, &str)],
) {
    block_on(async {
        let kafka = connect(bootstrap).await;
        let producer = kafka
            .producer()
            .metrics_push(false)
            .build()
            .await
            .expect("the settings are right");
        let mut record = Record::new(topic, value.unwrap_or_default().to_vec());
        if value.is_none() {
            record = record.without_value();
        }
        if let Some(key) = key {
            record = record.key(key.to_owned());
        }
        for (name, value) in headers {
            record = record.header(*name, (*value).to_owned());
        }
        let _ = producer
            .send(record)
            .await
            .expect("the broker takes the record");
        producer.close().await.expect("nothing is left to be sent");
    });
}

/// Puts a record on a topic whose batch is small, and holds this number of bytes once it is
/// inflated.
pub fn put_inflating(bootstrap: &str, topic: &str, bytes: usize) {
    block_on(async {
        let kafka = connect(bootstrap).await;
        let producer = kafka
            .producer()
            .metrics_push(false)
            .compression(Compression::Gzip);
        let producer = producer
            .max_request_size(2 * bytes)
            .buffer_memory(4 * bytes)
            .batch_size(2 * bytes);
        let producer = producer.build().await.expect("the settings are right");
        let _ = producer
            .send(Record::new(topic, vec![0; bytes]))
            .await
            .expect("the broker takes the record");
        producer.close().await.expect("nothing is left to be sent");
    });
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime")
        .block_on(work)
}
