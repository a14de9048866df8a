//! Transactions that hold back a partition's last stable offset: their owners, and the end of our
//! own hanging ones.
//!
//! A broker can die between acknowledging a commit and writing its markers. It can return with a
//! transaction that is complete for its coordinator, and open for a partition (KIP-664). No timeout
//! ends it. The next marker of the same producer id on that partition does, and decides the outcome
//! of its events.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use krafka::admin::{
    DescribeProducersOptions, DescribeTransactionsOptions, ListOffsetsOptions,
    ListTransactionsOptions, TopicPartition,
};
use krafka::error::KrafkaError;
use krafka::producer::TransactionalProducer;
use krafka::{Kafka, Record};

use crate::domain::timestamp::Timestamp;
use crate::kafka::cluster::cluster_end_offsets;

/// A transaction that a partition's leader calls open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct OpenTransaction {
    pub(crate) topic: Arc<str>,
    pub(crate) partition: i32,
    producer_id: i64,
    start_offset: i64,
    last_write: Option<Timestamp>,
    pub(crate) owner: Owner,
}

/// The owner of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Owner {
    /// Ours, and ended at its coordinator: it hangs.
    OursEnded { transactional_id: String },
    /// Ours, and its coordinator has not ended it yet.
    OursRunning,
    /// Another producer's, with its transactional id if the cluster reports it.
    Other { transactional_id: Option<String> },
}

impl OpenTransaction {
    /// A description for people: the owner, and the command that ends it.
    pub(crate) fn describe(&self, bootstrap_servers: &[String]) -> String {
        format!(
            "{self}; events behind it are invisible until it ends. If its producer is dead, end \
                it with: kafka-transactions.sh --bootstrap-server {} abort --topic {} --partition \
                {} --start-offset {}",
            bootstrap_servers.join(","),
            self.topic,
            self.partition,
            self.start_offset
        )
    }
}

impl fmt::Display for OpenTransaction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            topic,
            partition,
            producer_id,
            start_offset,
            last_write,
            owner,
        } = self;
        write!(
            f,
            "a transaction is open on partition {partition} of {topic} from offset {start_offset}"
        )?;
        write!(f, " (producer id {producer_id}")?;
        match owner {
            Owner::OursEnded { transactional_id }
            | Owner::Other {
                transactional_id: Some(transactional_id),
            } => {
                write!(f, ", transactional id {transactional_id}")?;
            }
            Owner::OursRunning
            | Owner::Other {
                transactional_id: None,
            } => {}
        }
        if let Some(last_write) = last_write {
            write!(f, ", last write at {last_write}")?;
        }
        write!(f, ")")
    }
}

/// Markers of a commit that need longer are investigated.
pub(super) const VISIBLE_WITHIN: Duration = Duration::from_secs(5);

/// Whether one of our own transactions hangs: a new session ends it.
pub(super) fn has_hanging_transaction(open: &[OpenTransaction]) -> bool {
    open.iter()
        .any(|open| matches!(open.owner, Owner::OursEnded { .. }))
}

/// Whether another producer holds a partition back.
pub(super) fn foreign_transaction(open: &[OpenTransaction]) -> Option<&OpenTransaction> {
    open.iter()
        .find(|open| matches!(open.owner, Owner::Other { .. }))
}

/// The last stable offsets: a `read_committed` consumer sees what is before them.
pub(crate) async fn last_stable_offsets(
    kafka: &Kafka,
    topic: &str,
    partitions: impl IntoIterator<Item = i32>,
) -> Result<BTreeMap<i32, i64>, KrafkaError> {
    cluster_end_offsets(
        kafka,
        topic,
        partitions,
        ListOffsetsOptions::default().read_committed(true),
    )
    .await
}

/// Every open transaction on those of these partitions whose last stable offset is before their
/// end.
pub(crate) async fn open_transactions(
    kafka: &Kafka,
    topic: &Arc<str>,
    partitions: &BTreeSet<i32>,
    ours: &[String],
) -> Result<Vec<OpenTransaction>, KrafkaError> {
    let stable = last_stable_offsets(kafka, topic, partitions.iter().copied()).await?;
    let whole = cluster_end_offsets(
        kafka,
        topic,
        partitions.iter().copied(),
        ListOffsetsOptions::default(),
    )
    .await?;
    let held: Vec<_> = stable
        .iter()
        .filter(|(number, end)| whole.get(number) > Some(end))
        .map(|(n, _)| *n)
        .collect();
    if held.is_empty() {
        return Ok(Vec::new());
    }
    let wanted = held
        .into_iter()
        .map(|number| TopicPartition::new(&**topic, number));
    let mut found = Vec::new();
    for (partition, producers) in kafka
        .admin()
        .describe_producers(wanted, DescribeProducersOptions::default())
        .await?
    {
        for producer in producers? {
            let Some(start_offset) = producer.current_transaction_start_offset else {
                continue;
            };
            found.push(OpenTransaction {
                topic: Arc::clone(topic),
                partition: partition.partition,
                producer_id: producer.producer_id,
                start_offset,
                last_write: last_write_of_transaction(producer.last_timestamp),
                owner: Owner::Other {
                    transactional_id: None,
                },
            });
        }
    }
    found.sort_by_key(|open| (open.partition, open.start_offset));
    name_transaction_owners(kafka, &mut found, ours).await?;
    Ok(found)
}

fn last_write_of_transaction(timestamp_ms: i64) -> Option<Timestamp> {
    timestamp_ms
        .checked_mul(1000)
        .filter(|micros| *micros >= 0)
        .map(Timestamp::from_micros)
}

async fn name_transaction_owners(
    kafka: &Kafka,
    found: &mut [OpenTransaction],
    ours: &[String],
) -> Result<(), KrafkaError> {
    let admin = kafka.admin();
    let described = admin
        .describe_transactions(ours, DescribeTransactionsOptions::default())
        .await?;
    for (transactional_id, described) in described {
        // The coordinator does not know an id that was never used, or not for a week.
        let Ok(described) = described else { continue };
        let ended = matches!(
            &*described.state,
            "Empty" | "CompleteCommit" | "CompleteAbort" | "Dead"
        );
        for open in found
            .iter_mut()
            .filter(|open| open.producer_id == described.producer_id)
        {
            let transactional_id = transactional_id.clone();
            open.owner = if ended {
                Owner::OursEnded { transactional_id }
            } else {
                Owner::OursRunning
            };
        }
    }
    let others: Vec<i64> = found
        .iter()
        .filter(|open| matches!(open.owner, Owner::Other { .. }))
        .map(|open| open.producer_id)
        .collect();
    if others.is_empty() {
        return Ok(());
    }
    // The name is helpful, and we often have no right to see it.
    let options = ListTransactionsOptions::default().producer_ids(others);
    let listed = admin.list_transactions(options).await.unwrap_or_default();
    for listing in listed.into_values().flatten().flatten() {
        for open in found
            .iter_mut()
            .filter(|open| open.producer_id == listing.producer_id)
        {
            if let Owner::Other { transactional_id } = &mut open.owner {
                *transactional_id = Some(listing.transactional_id.clone());
            }
        }
    }
    Ok(())
}

/// Ends the hanging transactions of this producer's id on these partitions: aborts a transaction of
/// the same id with a record on each. Its markers end the hanging ones as aborted, so their events
/// have to be published again.
pub(crate) async fn end_hanging_transactions(
    producer: &TransactionalProducer,
    topic: &str,
    partitions: &[i32],
) -> Result<(), KrafkaError> {
    producer.begin()?;
    let mut handles = Vec::new();
    for partition in partitions {
        // A compacted topic accepts no record without a key.
        let record =
            Record::tombstone(topic, producer.transactional_id().to_owned()).partition(*partition);
        handles.push(producer.enqueue(record).await?);
    }
    producer.flush().await?;
    for handle in handles {
        let _ = handle.await?;
    }
    producer.abort().await
}
