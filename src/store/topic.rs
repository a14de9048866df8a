//! How far the topic is known, partition by partition: behind which offset everything of ours is
//! marked, and up to where it was consumed.
//!
//! Both are written in the transaction that writes what they speak of, so that neither is ever
//! ahead of the rows: the publisher looks for its events from the one on, the consumer goes on from
//! the other, and a crash costs neither.

use super::arrival::AcceptOutcome;
use super::{arrival, outbox, publication, unconsumed};
use crate::domain::event::EventRef;
use crate::domain::timestamp::Timestamp;
use crate::domain::topic::Topic;
use rusqlite::{Connection, Row, Transaction};
use serde::Serialize;
use std::collections::BTreeMap;

/// What is known of a partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Partition {
    /// Which.
    pub partition: i32,
    /// Every event of ours before this offset is marked.
    pub published_to: i64,
    /// The next offset to consume; `None`: not known.
    pub consumed_to: Option<i64>,
    /// The largest outbox id that was consumed.
    pub last_outbox_id: i64,
    /// Records of events that were there already.
    pub duplicates: i64,
    /// Events that should have come before a later one, and did not.
    pub gaps: i64,
    /// Events that came after a later one.
    pub inversions: i64,
}

/// What is known of a topic. What was known of an earlier life of it does not count.
pub fn partitions(connection: &Connection, topic: &Topic) -> rusqlite::Result<Vec<Partition>> {
    connection
        .prepare_cached(&format!(
            "{PARTITION} WHERE topic = ?1 AND topic_id = ?2 ORDER BY \"partition\""
        ))?
        .query_map((&topic.name, topic.id), read)?
        .collect()
}

/// What is known of the topic that has this name, for people to look at: of the incarnation that is
/// consumed, if one is.
pub fn partitions_by_name(connection: &Connection, name: &str) -> rusqlite::Result<Vec<Partition>> {
    connection
        .prepare_cached(&format!(
            "{PARTITION} WHERE topic = ?1 AND topic_id = coalesce( (SELECT topic_id \
                FROM topic_partition WHERE topic = ?1 AND consumed_to IS NOT NULL \
                LIMIT 1), (SELECT topic_id FROM topic_partition WHERE topic = ?1 LIMIT 1)) \
                ORDER BY \"partition\""
        ))?
        .query_map([name], read)?
        .collect()
}

const PARTITION: &str = "SELECT \"partition\", published_to, consumed_to, last_outbox_id, duplicates, gaps, inversions \
    FROM topic_partition";

fn read(row: &Row<'_>) -> rusqlite::Result<Partition> {
    Ok(Partition {
        partition: row.get(0)?,
        published_to: row.get(1)?,
        consumed_to: row.get(2)?,
        last_outbox_id: row.get(3)?,
        duplicates: row.get(4)?,
        gaps: row.get(5)?,
        inversions: row.get(6)?,
    })
}

/// Behind which offset of each partition every event of ours has its mark.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublishedOffsets {
    /// Of which topic.
    pub topic: Topic,
    /// By partition.
    pub offsets: BTreeMap<i32, i64>,
}

/// Records how far everything is marked, in the transaction that marks it.
pub fn save_published_offsets(
    tx: &Transaction<'_>,
    reached: &PublishedOffsets,
) -> rusqlite::Result<()> {
    let mut reach = tx.prepare_cached(
        "INSERT INTO topic_partition (topic, topic_id, \"partition\", published_to) \
            VALUES (?1, ?2, ?3, ?4) ON CONFLICT DO UPDATE SET published_to = excluded.published_to",
    )?;
    for (partition, offset) in &reached.offsets {
        reach.execute((&reached.topic.name, reached.topic.id, partition, offset))?;
    }
    Ok(())
}

/// An event of ours that is on the topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PublishedRecord {
    /// What the record says.
    pub notice: EventRef,
    /// Where it is.
    pub partition: i32,
    /// Where it is.
    pub offset: i64,
}

/// What came of looking at the topic before publishing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reconciled {
    /// Events that were not known to be published, and are.
    pub marked: usize,
    /// The first of the unpublished events whose id has another payment on the topic.
    pub first_conflict: Option<i64>,
    /// Events of payments that this database does not have.
    pub unknown: usize,
}

/// Marks what is on the topic already, so that it is not published again. Ids that the topic knows
/// and this database does not were given by a later state of it: they are not given a second time.
pub fn reconcile(
    tx: &Transaction<'_>,
    found: &[PublishedRecord],
    reached: &PublishedOffsets,
    now: Timestamp,
) -> rusqlite::Result<Reconciled> {
    record_incarnation(tx, &reached.topic, now)?;
    let mut result = Reconciled::default();
    let mut newest = 0;
    for record in found {
        let notice = record.notice;
        match outbox::matches(tx, notice)? {
            Some(true) => result.marked += mark_record(tx, record, now)?,
            Some(false) => {
                result.unknown += 1;
                if outbox::is_unpublished(tx, notice.outbox_id)? {
                    let first = result.first_conflict.unwrap_or(notice.outbox_id);
                    result.first_conflict = Some(first.min(notice.outbox_id));
                }
                newest = newest.max(notice.outbox_id);
            }
            None if arrival::is_purged(tx, notice)? => {}
            None => {
                result.unknown += 1;
                // A backup that was put back has left its ids behind already.
                if !outbox::is_given(tx, notice.outbox_id)? {
                    newest = newest.max(notice.outbox_id.max(notice.payment_id));
                }
            }
        }
    }
    if newest > 0 {
        super::engine::ids::advance_sequences(tx, newest, now)?;
    }
    // A conflict that is not settled has to be found again, should the process end.
    if result.first_conflict.is_none() {
        save_published_offsets(tx, reached)?;
    }
    Ok(result)
}

/// Returns how many events it has marked: 0 if this one was marked already.
fn mark_record(
    tx: &Transaction<'_>,
    record: &PublishedRecord,
    now: Timestamp,
) -> rusqlite::Result<usize> {
    let receipt = publication::Receipt {
        outbox_id: record.notice.outbox_id,
        place: publication::Destination::Topic {
            partition: record.partition,
            offset: Some(record.offset),
        },
    };
    publication::mark(tx, &receipt, now)
}

/// Records an incarnation of the topic when the publisher first sees it: what was published before
/// is on an earlier one. Every event up to the newest delivery was published, and those behind it
/// up to the next one that is INIT.
fn record_incarnation(tx: &Transaction<'_>, topic: &Topic, now: Timestamp) -> rusqlite::Result<()> {
    let known = "SELECT 1 FROM topic_incarnation WHERE topic = ?1 AND topic_id = ?2";
    if tx.prepare_cached(known)?.exists((&topic.name, topic.id))? {
        return Ok(());
    }
    tx.execute(
        "INSERT INTO topic_incarnation (topic, topic_id, published_before, first_seen_at) \
            VALUES (?1, ?2, coalesce( (SELECT id FROM outbox WHERE status = 'INIT' \
            AND id > ifnull((SELECT max(outbox_id) FROM delivery), 0) ORDER BY id \
            LIMIT 1) - 1, (SELECT seq FROM sqlite_sequence WHERE name = 'outbox'), 0), ?3)",
        (&topic.name, topic.id, now.as_micros()),
    )?;
    Ok(())
}

/// What was unusual in a batch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ConsumeStats {
    /// Records of events that had a delivery already.
    pub duplicates: i64,
    /// Events that came after a later one.
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
    /// Resumes from what is known of the topic.
    pub fn begin(tx: &'a Transaction<'a>, topic: &'a Topic) -> rusqlite::Result<Self> {
        let known = partitions(tx, topic)?;
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

    /// The record at this place was stored; `event` is what it was, if it was one of ours.
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

    /// Records how far everything is consumed, and moves the low-water mark over the new
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
        unconsumed::advance(self.tx, 2 * records)?;
        Ok(all)
    }
}

/// Sets the next offset of partitions where none is known, or where the topic does not have the
/// known one any more.
pub fn set_positions(
    tx: &Transaction<'_>,
    topic: &Topic,
    positions: &[(i32, i64)],
) -> rusqlite::Result<()> {
    let mut update = tx.prepare_cached(
        "INSERT INTO topic_partition (topic, topic_id, \"partition\", consumed_to) \
            VALUES (?1, ?2, ?3, ?4) ON CONFLICT DO UPDATE SET consumed_to = excluded.consumed_to",
    )?;
    for (partition, offset) in positions {
        update.execute((&topic.name, topic.id, partition, offset))?;
    }
    Ok(())
}

/// Forgets what is known of other topics, and of earlier incarnations of this one. Returns whether
/// there were any.
pub fn abandon_others(tx: &Transaction<'_>, topic: Option<&Topic>) -> rusqlite::Result<bool> {
    let (name, id) = topic.map(|topic| (&topic.name, topic.id)).unzip();
    let sql = "DELETE FROM topic_partition WHERE topic IS NOT ?1 OR topic_id IS NOT ?2";
    Ok(tx.prepare_cached(sql)?.execute((name, id))? > 0)
}
