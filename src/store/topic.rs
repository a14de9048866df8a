//! Two positions for each partition: the offset before which every event of ours is marked, and the
//! next offset to consume.
//!
//! Each is written in the same transaction as the rows that it describes, so neither is ever ahead
//! of them. The publisher reads the topic from the first one, and the consumer resumes at the
//! second. A crash costs neither an event nor a duplicate.

use super::outbox::{self, OutboxMatch};
use super::{arrival, publication};
use crate::domain::event::EventRef;
use crate::domain::timestamp::Timestamp;
use crate::domain::topic::Topic;
use rusqlite::{Connection, Row, Transaction};
use serde::Serialize;
use std::collections::BTreeMap;

/// The state of a partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Partition {
    /// Its number.
    pub partition: i32,
    /// Every event of ours before this offset is marked.
    pub published_to: i64,
    /// The next offset to consume; `None` if unknown.
    pub consumed_to: Option<i64>,
    /// The largest consumed outbox id.
    pub last_outbox_id: i64,
    /// Duplicates: records of events that had a delivery.
    pub duplicates: i64,
    /// Gaps: events that did not arrive before a later one.
    pub gaps: i64,
    /// Inversions: events that arrived after a later one.
    pub inversions: i64,
}

/// The partitions of a topic incarnation. Those of earlier incarnations do not count.
pub fn topic_partitions(
    connection: &Connection,
    topic: &Topic,
) -> rusqlite::Result<Vec<Partition>> {
    connection
        .prepare_cached(&format!(
            "{PARTITION} WHERE topic = ?1 AND topic_id = ?2 ORDER BY \"partition\""
        ))?
        .query_map((&topic.name, topic.id), read_topic_partition)?
        .collect()
}

/// The partitions of the topic with this name, for people: of the consumed incarnation, if there is
/// one.
pub fn topic_partitions_by_name(
    connection: &Connection,
    name: &str,
) -> rusqlite::Result<Vec<Partition>> {
    connection
        .prepare_cached(&format!(
            "{PARTITION} WHERE topic = ?1 AND topic_id = coalesce((SELECT topic_id \
                FROM topic_partition WHERE topic = ?1 AND consumed_to IS NOT NULL \
                LIMIT 1), (SELECT topic_id FROM topic_partition WHERE topic = ?1 LIMIT 1)) \
                ORDER BY \"partition\""
        ))?
        .query_map([name], read_topic_partition)?
        .collect()
}

const PARTITION: &str = "SELECT \"partition\", published_to, consumed_to, last_outbox_id, \
    duplicates, gaps, inversions FROM topic_partition";

fn read_topic_partition(row: &Row<'_>) -> rusqlite::Result<Partition> {
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

/// The offset of each partition before which every event of ours is marked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublishedOffsets {
    /// The topic.
    pub topic: Topic,
    /// By partition.
    pub offsets: BTreeMap<i32, i64>,
    /// The largest id of an event of this database that is known to be on the topic.
    pub last_published: i64,
}

/// Saves how far every event is marked, in the transaction that marks it.
pub fn save_published_topic_offsets(
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
    tx.prepare_cached(
        "UPDATE topic_incarnation SET last_published = ?3 \
            WHERE topic = ?1 AND topic_id = ?2 AND last_published < ?3",
    )?
    .execute((
        &reached.topic.name,
        reached.topic.id,
        reached.last_published,
    ))?;
    Ok(())
}

/// Saves the end of a partition that others write to as well: nothing before it is read again. Does
/// nothing while an event of ours up to `last_published` waits for its mark.
pub fn save_idle_topic_end(
    tx: &Transaction<'_>,
    topic: &Topic,
    (partition, end): (i32, i64),
    last_published: i64,
) -> rusqlite::Result<()> {
    tx.prepare_cached(
        "UPDATE topic_partition SET published_to = ?4 WHERE topic = ?1 AND topic_id = ?2 \
            AND \"partition\" = ?3 AND published_to < ?4 \
            AND NOT EXISTS (SELECT 1 FROM outbox WHERE status = 'INIT' AND id <= ?5)",
    )?
    .execute((&topic.name, topic.id, partition, end, last_published))?;
    Ok(())
}

/// What is known of an incarnation of the topic before anything is published to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TopicIncarnation {
    /// The largest id of an event of this database that is known to be on it.
    pub last_published: i64,
    /// With `kafka.key = "node"`: the partition of all events.
    pub partition: Option<i32>,
}

/// Records an incarnation of the topic. `partition` is chosen once: partitions that are added later
/// move no events.
pub fn open_topic_incarnation(
    tx: &Transaction<'_>,
    topic: &Topic,
    partition: Option<i32>,
    now: Timestamp,
) -> rusqlite::Result<TopicIncarnation> {
    record_topic_incarnation(tx, topic, now)?;
    tx.prepare_cached(
        "UPDATE topic_incarnation SET \"partition\" = ifnull(\"partition\", ?3) \
            WHERE topic = ?1 AND topic_id = ?2",
    )?
    .execute((&topic.name, topic.id, partition))?;
    let sql = "SELECT last_published, \"partition\" FROM topic_incarnation \
        WHERE topic = ?1 AND topic_id = ?2";
    tx.prepare_cached(sql)?
        .query_row((&topic.name, topic.id), |row| {
            Ok(TopicIncarnation {
                last_published: row.get(0)?,
                partition: row
                    .get::<_, Option<i32>>(1)?
                    .filter(|_| partition.is_some()),
            })
        })
}

fn has_topic_incarnation(connection: &Connection, topic: &Topic) -> rusqlite::Result<bool> {
    connection
        .prepare_cached("SELECT 1 FROM topic_incarnation WHERE topic = ?1 AND topic_id = ?2")?
        .exists((&topic.name, topic.id))
}

/// An event of ours that is on the topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PublishedRecord {
    /// The event, from the record's headers and value.
    pub notice: EventRef,
    /// Its partition.
    pub partition: i32,
    /// Its offset.
    pub offset: i64,
}

/// The result of reading the topic before publishing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reconciled {
    /// Events that were INIT, and are on the topic.
    pub marked: usize,
    /// The first of the unpublished events whose id has another payment on the topic.
    pub first_conflict: Option<i64>,
    /// Events of payments that this database does not have.
    pub unknown: usize,
}

/// Marks events that are on the topic already, so that they are not published again. Ids that the
/// topic has and this database does not know were issued by a later state of it: they are not
/// issued again.
pub fn reconcile_topic(
    tx: &Transaction<'_>,
    found: &[PublishedRecord],
    reached: &PublishedOffsets,
    now: Timestamp,
) -> rusqlite::Result<Reconciled> {
    record_topic_incarnation(tx, &reached.topic, now)?;
    let mut result = Reconciled::default();
    let mut newest = 0;
    for record in found {
        let notice = record.notice;
        match outbox::match_outbox_event(tx, notice)? {
            OutboxMatch::Same => result.marked += mark_topic_record(tx, record, now)?,
            OutboxMatch::Other => {
                result.unknown += 1;
                if outbox::is_unpublished_outbox_event(tx, notice.outbox_id)? {
                    let first = result.first_conflict.unwrap_or(notice.outbox_id);
                    result.first_conflict = Some(first.min(notice.outbox_id));
                }
                newest = newest.max(notice.outbox_id);
            }
            OutboxMatch::Missing if arrival::is_purged_arrival(tx, notice)? => {}
            OutboxMatch::Missing => {
                result.unknown += 1;
                // The ids have advanced already after the restore of a backup.
                if !outbox::outbox_id_was_issued(tx, notice.outbox_id)? {
                    newest = newest.max(notice.outbox_id.max(notice.payment_id));
                }
            }
        }
    }
    if newest > 0 {
        super::engine::ids::advance_id_sequences(tx, newest, now)?;
    }
    // An open conflict has to be found again, should the process end.
    if result.first_conflict.is_none() {
        save_published_topic_offsets(tx, reached)?;
    }
    Ok(result)
}

/// Returns how many events it has marked: 0 if this one was marked already.
fn mark_topic_record(
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
    publication::record_publication(tx, &receipt, now)
}

/// Records an incarnation of the topic when the publisher first sees it: earlier events are on an
/// earlier one. Every event up to the newest delivery was published before, and those after it up
/// to the next INIT one.
fn record_topic_incarnation(
    tx: &Transaction<'_>,
    topic: &Topic,
    now: Timestamp,
) -> rusqlite::Result<()> {
    if has_topic_incarnation(tx, topic)? {
        return Ok(());
    }
    tx.execute(
        "INSERT INTO topic_incarnation (topic, topic_id, published_before, first_seen_at) \
            VALUES (?1, ?2, coalesce((SELECT id FROM outbox WHERE status = 'INIT' \
            AND id > ifnull((SELECT max(outbox_id) FROM delivery), 0) ORDER BY id \
            LIMIT 1) - 1, (SELECT seq FROM sqlite_sequence WHERE name = 'outbox'), 0), ?3)",
        (&topic.name, topic.id, now.as_micros()),
    )?;
    Ok(())
}

/// Sets the next offset of partitions where it is unknown, or where the topic no longer has it.
pub fn set_topic_positions(
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

/// Deletes the state of other topics, and of earlier incarnations of this one. Returns whether
/// there was any.
pub fn abandon_other_topics(tx: &Transaction<'_>, topic: Option<&Topic>) -> rusqlite::Result<bool> {
    let (name, id) = topic.map(|topic| (&topic.name, topic.id)).unzip();
    let sql = "DELETE FROM topic_partition WHERE topic IS NOT ?1 OR topic_id IS NOT ?2";
    Ok(tx.prepare_cached(sql)?.execute((name, id))? > 0)
}
