//! A batch of records that is being consumed: the next offset of each partition, and its
//! irregularities.

use std::collections::BTreeMap;

use rusqlite::Transaction;

use super::arrival::AcceptOutcome;
use super::topic::topic_partitions;
use super::unconsumed;
use crate::domain::topic::Topic;

/// The irregularities of a batch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ConsumeStats {
    /// Records of events that had a delivery.
    pub duplicates: i64,
    /// Events that arrived after a later one.
    pub inversions: i64,
}

/// Records that are being consumed, in the order of each partition.
pub struct ConsumeBatch<'a> {
    tx: &'a Transaction<'a>,
    topic: &'a Topic,
    /// The largest outbox id of each partition before this batch.
    last_outbox_ids: BTreeMap<i32, i64>,
    partitions: BTreeMap<i32, PartitionProgress>,
}

struct PartitionProgress {
    consumed_to: i64,
    last_outbox_id: i64,
    stats: ConsumeStats,
}

impl<'a> ConsumeBatch<'a> {
    /// Resumes from the saved state of the topic.
    pub fn begin(tx: &'a Transaction<'a>, topic: &'a Topic) -> rusqlite::Result<Self> {
        let known = topic_partitions(tx, topic)?;
        let last_outbox_ids = known
            .into_iter()
            .map(|known| (known.partition, known.last_outbox_id))
            .collect();
        Ok(Self {
            tx,
            topic,
            last_outbox_ids,
            partitions: BTreeMap::new(),
        })
    }

    /// Adds a stored record; `event` is its event, if it is one of ours.
    pub fn add(&mut self, partition: i32, offset: i64, event: Option<(i64, AcceptOutcome)>) {
        let last_outbox_id = self.last_outbox_ids.get(&partition).copied().unwrap_or(0);
        let new = || PartitionProgress {
            consumed_to: 0,
            last_outbox_id,
            stats: ConsumeStats::default(),
        };
        let progress = self.partitions.entry(partition).or_insert_with(new);
        progress.consumed_to = offset + 1;
        match event {
            Some((id, AcceptOutcome::Accepted)) => {
                progress.stats.inversions += i64::from(id < progress.last_outbox_id);
                progress.last_outbox_id = progress.last_outbox_id.max(id);
            }
            Some((_, AcceptOutcome::Duplicate | AcceptOutcome::Purged)) => {
                progress.stats.duplicates += 1;
            }
            Some((_, AcceptOutcome::Unknown)) | None => {}
        }
    }

    /// Saves how far the partitions are consumed, and moves the low-water mark over the new
    /// deliveries.
    pub fn finish(self, records: usize) -> rusqlite::Result<ConsumeStats> {
        let mut all = ConsumeStats::default();
        let mut update = self.tx.prepare_cached(
            "INSERT INTO topic_partition (topic, topic_id, \"partition\", consumed_to, \
                last_outbox_id, duplicates, inversions) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7) \
                ON CONFLICT DO UPDATE SET consumed_to = excluded.consumed_to, last_outbox_id = \
                excluded.last_outbox_id, duplicates = duplicates + excluded.duplicates, \
                inversions = inversions + excluded.inversions",
        )?;
        for (
            partition,
            PartitionProgress {
                consumed_to,
                last_outbox_id,
                stats,
            },
        ) in self.partitions
        {
            let ConsumeStats {
                duplicates,
                inversions,
            } = stats;
            let Topic { name, id } = self.topic;
            update.execute((
                name,
                id,
                partition,
                consumed_to,
                last_outbox_id,
                duplicates,
                inversions,
            ))?;
            all.duplicates += duplicates;
            all.inversions += inversions;
        }
        unconsumed::advance_unconsumed_mark(self.tx, 2 * records)?;
        Ok(all)
    }
}
