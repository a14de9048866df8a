//! How far the topic is known, partition by partition: behind which offset everything of ours is marked, and up to
//! where it was taken.
//!
//! Both are written in the transaction that writes what they speak of, so that neither is ever ahead of the rows: the
//! publisher looks for its events from the one on, the consumer goes on from the other, and a crash costs neither.

use std::collections::BTreeMap;
use std::sync::Arc;

use rusqlite::{Connection, Row, Transaction};
use serde::Serialize;

use super::delivery::{self, Arrival};
use super::outbox;
use crate::clock::Timestamp;
use crate::event::Notice;

/// A topic in one of its lives: one that is deleted and made again has another id (KIP-516).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topic {
    /// As it is configured.
    pub name: Arc<str>,
    /// Given by the cluster; zeros where it gives none.
    pub id: [u8; 16],
}

/// What is known of a partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Partition {
    /// Which.
    pub partition: i32,
    /// Every event of ours before this offset is marked.
    pub published_to: i64,
    /// The next offset to take, once anything was taken.
    pub consumed_to: Option<i64>,
    /// The largest outbox id that was taken.
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
        .prepare_cached(&format!("{PARTITION} WHERE topic = ?1 AND topic_id = ?2 ORDER BY \"partition\""))?
        .query_map((&topic.name, topic.id), read)?
        .collect()
}

/// What is known of whatever topic has this name, for people to look at.
pub fn of_name(connection: &Connection, name: &str) -> rusqlite::Result<Vec<Partition>> {
    connection
        .prepare_cached(&format!("{PARTITION} WHERE topic = ?1 ORDER BY \"partition\""))?
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
pub struct Reached {
    /// Of which topic.
    pub topic: Topic,
    /// By partition.
    pub offsets: BTreeMap<i32, i64>,
}

/// Records how far everything is marked, in the transaction that marks it. A topic that was made anew is left as one that
/// something was taken from, at no place: [`begin_anew`] finds it so.
pub fn reach(tx: &Transaction<'_>, reached: &Reached) -> rusqlite::Result<()> {
    let mut reach = tx.prepare_cached(
        "INSERT INTO topic_partition (topic, \"partition\", topic_id, published_to) VALUES (?1, ?2, ?3, ?4) \
         ON CONFLICT (topic, \"partition\") DO UPDATE SET published_to = excluded.published_to, \
         last_outbox_id = CASE WHEN topic_id = excluded.topic_id THEN last_outbox_id ELSE max(last_outbox_id, 1) END, \
         consumed_to = CASE WHEN topic_id = excluded.topic_id THEN consumed_to END, topic_id = excluded.topic_id",
    )?;
    for (partition, offset) in &reached.offsets {
        reach.execute((&reached.topic.name, partition, reached.topic.id, offset))?;
    }
    Ok(())
}

/// An event of ours that is on the topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// What the record says.
    pub notice: Notice,
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

/// Marks what is on the topic already, so that it is not published again. Ids that the topic knows and this database
/// does not were given by a later state of it: they are not given a second time.
pub fn reconcile(
    tx: &Transaction<'_>,
    found: &[Found],
    reached: &Reached,
    now: Timestamp,
) -> rusqlite::Result<Reconciled> {
    record_incarnation(tx, &reached.topic, now)?;
    let mut result = Reconciled::default();
    let mut newest = 0;
    for Found { notice, partition, offset } in found {
        match outbox::is_of(tx, *notice)? {
            Some(true) => {
                let place = outbox::Place::Topic { partition: *partition, offset: Some(*offset) };
                result.marked += outbox::mark(tx, &outbox::Receipt { outbox_id: notice.outbox_id, place }, now)?;
            }
            Some(false) => {
                result.unknown += 1;
                if outbox::is_unpublished(tx, notice.outbox_id)? {
                    let first = result.first_conflict.unwrap_or(notice.outbox_id);
                    result.first_conflict = Some(first.min(notice.outbox_id));
                }
                newest = newest.max(notice.outbox_id);
            }
            None if delivery::is_purged(tx, *notice)? => {}
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
        super::schema::skip_ids(tx, newest, now)?;
    }
    // A conflict that is not settled has to be found again, should the process end.
    if result.first_conflict.is_none() {
        reach(tx, reached)?;
    }
    Ok(result)
}

/// Records an incarnation of the topic when the publisher first sees it: what was published before is on an earlier one.
/// Every event up to the newest delivery was published, and those behind it up to the next one that is INIT.
fn record_incarnation(tx: &Transaction<'_>, topic: &Topic, now: Timestamp) -> rusqlite::Result<()> {
    let known = "SELECT 1 FROM topic_incarnation WHERE topic = ?1 AND topic_id = ?2";
    if tx.prepare_cached(known)?.exists((&topic.name, topic.id))? {
        return Ok(());
    }
    tx.execute(
        "INSERT INTO topic_incarnation (topic, topic_id, published_before, first_seen_at) VALUES (?1, ?2, coalesce( \
         (SELECT id FROM outbox WHERE status = 'INIT' AND id > ifnull((SELECT max(outbox_id) FROM delivery), 0) \
         ORDER BY id LIMIT 1) - 1, (SELECT seq FROM sqlite_sequence WHERE name = 'outbox'), 0), ?3)",
        (&topic.name, topic.id, now.as_micros()),
    )?;
    Ok(())
}

/// What came of taking records.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Taken {
    /// Records of events that were there already.
    pub duplicates: i64,
    /// Events that were missing before a later one; they were taken from the outbox instead.
    pub gaps: i64,
    /// Events that came after a later one.
    pub inversions: i64,
}

/// Records that are being taken, in the order of each partition.
pub struct Intake<'a> {
    tx: &'a Transaction<'a>,
    topic: &'a Topic,
    before: BTreeMap<i32, Partition>,
    now: BTreeMap<i32, Moving>,
}

/// A partition on its way.
#[derive(Default)]
struct Moving {
    consumed_to: i64,
    last_outbox_id: i64,
    new: i64,
    taken: Taken,
}

impl<'a> Intake<'a> {
    /// Goes on from what is known. `None`: the topic is known to have been made anew since.
    pub fn begin(tx: &'a Transaction<'a>, topic: &'a Topic) -> rusqlite::Result<Option<Self>> {
        let other = tx
            .prepare_cached("SELECT 1 FROM topic_partition WHERE topic = ?1 AND topic_id <> ?2")?
            .exists((&topic.name, topic.id))?;
        if other {
            return Ok(None);
        }
        let before = partitions(tx, topic)?.into_iter().map(|partition| (partition.partition, partition)).collect();
        Ok(Some(Self { tx, topic, before, now: BTreeMap::new() }))
    }

    /// The record at this place was taken, or kept aside.
    pub fn took(&mut self, partition: i32, offset: i64, event: Option<(i64, Arrival)>) {
        let last = self.before.get(&partition).map_or(0, |before| before.last_outbox_id);
        let moving = self.now.entry(partition).or_insert_with(|| Moving { last_outbox_id: last, ..Moving::default() });
        moving.consumed_to = offset + 1;
        match event {
            Some((id, Arrival::Accepted)) => {
                moving.new += i64::from(id > moving.last_outbox_id);
                moving.taken.inversions += i64::from(id < moving.last_outbox_id);
                moving.last_outbox_id = moving.last_outbox_id.max(id);
            }
            Some((_, Arrival::Duplicate | Arrival::Purged)) => moving.taken.duplicates += 1,
            Some((_, Arrival::Unknown)) | None => {}
        }
    }

    /// Takes from the outbox what the topic should have brought and did not, and remembers how far everything is.
    pub fn finish(self, now: Timestamp) -> rusqlite::Result<Taken> {
        let mut whole = Taken::default();
        for (partition, moving) in self.now {
            let last = self.before.get(&partition).map_or(0, |before| before.last_outbox_id);
            let mut taken = moving.taken;
            // Its end was cut off, as by an unclean election: what was there, and was not taken, may be gone.
            let cut = self.before.get(&partition).and_then(|before| before.consumed_to) > Some(moving.consumed_to);
            if cut {
                taken.gaps = delivery::fill_gaps(self.tx, Some((partition, i64::MAX)), 1..=i64::MAX, now)?;
            } else if moving.last_outbox_id - last > moving.new {
                let ids = last + 1..=moving.last_outbox_id;
                taken.gaps = delivery::fill_gaps(self.tx, Some((partition, moving.consumed_to)), ids, now)?;
            }
            advance(self.tx, self.topic, partition, moving.consumed_to, moving.last_outbox_id, taken)?;
            whole.duplicates += taken.duplicates;
            whole.gaps += taken.gaps;
            whole.inversions += taken.inversions;
        }
        Ok(whole)
    }
}

/// Goes on at `offset` although nothing was taken up to there: the records before it are gone from the topic. Their
/// events are taken from the outbox instead; tells how many.
pub fn skip(tx: &Transaction<'_>, topic: &Topic, partition: i32, offset: i64, now: Timestamp) -> rusqlite::Result<i64> {
    let gaps = delivery::fill_gaps(tx, Some((partition, offset)), 1..=i64::MAX, now)?;
    advance(tx, topic, partition, offset, 0, Taken { gaps, ..Taken::default() })?;
    Ok(gaps)
}

/// Whether there was an earlier life of the topic. What of it never came, will not come any more: it is taken from the
/// outbox instead; tells how many. What is on the new one by now may be among it: then it comes as a second copy.
pub fn begin_anew(tx: &Transaction<'_>, topic: &Topic, now: Timestamp) -> rusqlite::Result<Option<i64>> {
    let earlier = tx
        .prepare_cached(
            "SELECT 1 FROM topic_partition \
             WHERE topic = ?1 AND (topic_id <> ?2 OR (consumed_to IS NULL AND last_outbox_id > 0))",
        )?
        .exists((&topic.name, topic.id))?;
    if !earlier {
        return Ok(None);
    }
    let gaps = delivery::fill_gaps(tx, None, 1..=i64::MAX, now)?;
    // Partitions that it does not have any more go; the others are read from their beginning.
    tx.prepare_cached("DELETE FROM topic_partition WHERE topic = ?1 AND topic_id <> ?2")?
        .execute((&topic.name, topic.id))?;
    tx.prepare_cached("UPDATE topic_partition SET consumed_to = 0 WHERE topic = ?1 AND consumed_to IS NULL")?
        .execute([&topic.name])?;
    advance(tx, topic, 0, 0, 0, Taken { gaps, ..Taken::default() })?;
    Ok(Some(gaps))
}

/// Events go by way of this topic, or of none, and not of another one any more: what was published to another one and did not
/// come from it is taken from the outbox, and how far that one is known is forgotten. Tells how many.
pub fn leave_others(tx: &Transaction<'_>, topic: Option<&str>, now: Timestamp) -> rusqlite::Result<i64> {
    if !tx.prepare_cached("SELECT 1 FROM topic_partition WHERE topic IS NOT ?1 LIMIT 1")?.exists([topic])? {
        return Ok(0);
    }
    let gaps = delivery::fill_gaps(tx, None, 1..=i64::MAX, now)?;
    tx.execute("DELETE FROM topic_partition WHERE topic IS NOT ?1", [topic])?;
    Ok(gaps)
}

fn advance(
    tx: &Transaction<'_>,
    topic: &Topic,
    partition: i32,
    consumed_to: i64,
    last_outbox_id: i64,
    taken: Taken,
) -> rusqlite::Result<()> {
    tx.prepare_cached(
        "INSERT INTO topic_partition \
             (topic, \"partition\", topic_id, consumed_to, last_outbox_id, duplicates, gaps, inversions) \
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8) ON CONFLICT (topic, \"partition\") DO UPDATE SET \
         published_to = CASE WHEN topic_id = excluded.topic_id THEN published_to ELSE 0 END, \
         topic_id = excluded.topic_id, consumed_to = excluded.consumed_to, \
         last_outbox_id = max(last_outbox_id, excluded.last_outbox_id), duplicates = duplicates + excluded.duplicates, gaps = gaps + excluded.gaps, \
         inversions = inversions + excluded.inversions",
    )?
    .execute((
        &topic.name,
        partition,
        topic.id,
        consumed_to,
        last_outbox_id,
        taken.duplicates,
        taken.gaps,
        taken.inversions,
    ))?;
    Ok(())
}
