//! Events that were acknowledged and may not be visible yet: the first offset and event of each
//! partition.
//!
//! The broker acknowledges the end of a transaction before its marker is in each partition. A lost
//! marker hides acknowledged events from `read_committed` consumers, and an abort by the same
//! producer removes them. So the transaction that marks events PUBLISHED also notes them here. The
//! note is deleted once a consumer could see them. A new session reads the noted range from the
//! topic, and publishes the missing events again.

use super::publication::{Destination, Receipt};
use crate::domain::topic::Topic;
use rusqlite::{Connection, Transaction};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// The first event of a partition that may not be visible.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unseen {
    /// The partition.
    pub partition: i32,
    /// Its offset.
    pub offset: i64,
    /// Every event that may be invisible has this id or a larger one.
    pub outbox_id: i64,
}

/// By partition, the first of these events that has an offset.
pub fn first_unseen_by_partition(receipts: &[Receipt]) -> BTreeMap<i32, Unseen> {
    let mut firsts: BTreeMap<i32, Unseen> = BTreeMap::new();
    for receipt in receipts {
        if let Destination::Topic {
            partition,
            offset: Some(offset),
        } = receipt.place
        {
            let outbox_id = receipt.outbox_id;
            let first = firsts.entry(partition).or_insert(Unseen {
                partition,
                offset,
                outbox_id,
            });
            first.offset = first.offset.min(offset);
            first.outbox_id = first.outbox_id.min(outbox_id);
        }
    }
    firsts
}

/// Notes events in the transaction that marks them PUBLISHED.
pub fn note_unseen(
    tx: &Transaction<'_>,
    topic: &Topic,
    receipts: &[Receipt],
) -> rusqlite::Result<()> {
    let mut note = tx.prepare_cached(
        "INSERT INTO topic_unseen (topic, topic_id, \"partition\", \"offset\", outbox_id) \
            VALUES (?1, ?2, ?3, ?4, ?5) ON CONFLICT (topic, topic_id, \"partition\") DO UPDATE \
            SET \"offset\" = min(\"offset\", excluded.\"offset\"), outbox_id = min(outbox_id, \
            excluded.outbox_id) WHERE excluded.\"offset\" < \"offset\" \
            OR excluded.outbox_id < outbox_id",
    )?;
    for Unseen {
        partition,
        offset,
        outbox_id,
    } in first_unseen_by_partition(receipts).values()
    {
        note.execute((&topic.name, topic.id, partition, offset, outbox_id))?;
    }
    Ok(())
}

/// Whether there is any note.
pub fn has_unseen(connection: &Connection) -> rusqlite::Result<bool> {
    connection
        .prepare_cached("SELECT 1 FROM topic_unseen LIMIT 1")?
        .exists([])
}

/// The notes of a topic.
pub fn unseen_of_topic(connection: &Connection, topic: &Topic) -> rusqlite::Result<Vec<Unseen>> {
    connection
        .prepare_cached(
            "SELECT \"partition\", \"offset\", outbox_id FROM topic_unseen WHERE topic = ?1 \
                AND topic_id = ?2 ORDER BY \"partition\"",
        )?
        .query_map((&topic.name, topic.id), |row| {
            Ok(Unseen {
                partition: row.get(0)?,
                offset: row.get(1)?,
                outbox_id: row.get(2)?,
            })
        })?
        .collect()
}

/// Deletes or shortens what is noted as unseen: a consumer can see each of these partitions up to
/// its offset.
pub fn shorten_unseen(
    tx: &Transaction<'_>,
    topic: &Topic,
    rest: &BTreeMap<i32, Option<Unseen>>,
) -> rusqlite::Result<()> {
    let key = "topic = ?1 AND topic_id = ?2 AND \"partition\" = ?3";
    let mut forget = tx.prepare_cached(&format!("DELETE FROM topic_unseen WHERE {key}"))?;
    let mut shrink = tx.prepare_cached(&format!(
        "UPDATE topic_unseen SET \"offset\" = ?4, outbox_id = ?5 WHERE {key}"
    ))?;
    for (partition, first) in rest {
        match first {
            None => forget.execute((&topic.name, topic.id, partition))?,
            Some(first) => shrink.execute((
                &topic.name,
                topic.id,
                partition,
                first.offset,
                first.outbox_id,
            ))?,
        };
    }
    Ok(())
}

/// Ends the reading of the topic: of each partition a range of offsets was read, and `visible`
/// events were found. Noted events of these ranges that were not found are requeued as INIT, and
/// all notes are deleted. Returns how many were requeued.
pub fn requeue_unseen(
    tx: &Transaction<'_>,
    noted: &[Unseen],
    read: &BTreeMap<i32, Range<i64>>,
    visible: &BTreeSet<i64>,
) -> rusqlite::Result<usize> {
    let mut requeued = 0;
    let mut requeue = tx.prepare_cached(
        "UPDATE outbox \
            SET status = 'INIT', published_at = NULL, \"partition\" = NULL, \"offset\" = NULL \
            WHERE id = ?1",
    )?;
    for first in noted {
        let Some(range) = read.get(&first.partition) else {
            continue;
        };
        for id in unseen_in_range(tx, *first, range)? {
            if !visible.contains(&id) {
                requeued += requeue.execute([id])?;
            }
        }
    }
    // Also the notes of other topics, and of earlier incarnations: the consumer backfills their
    // events from the outbox.
    tx.prepare_cached("DELETE FROM topic_unseen")?.execute([])?;
    Ok(requeued)
}

fn unseen_in_range(
    tx: &Transaction<'_>,
    first: Unseen,
    range: &Range<i64>,
) -> rusqlite::Result<Vec<i64>> {
    tx.prepare_cached(
        "SELECT id FROM outbox WHERE id >= ?1 AND status = 'PUBLISHED' AND \"partition\" = ?2 \
            AND \"offset\" >= ?3 AND \"offset\" < ?4 ORDER BY id",
    )?
    .query_map(
        (
            first.outbox_id,
            first.partition,
            first.offset.max(range.start),
            range.end,
        ),
        |row| row.get(0),
    )?
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::payment_record::RecordFormat;
    use crate::domain::timestamp::Timestamp;
    use crate::store::engine::open;
    use crate::store::{outbox, publication};
    use rusqlite::TransactionBehavior;

    fn unseen_topic() -> Topic {
        Topic {
            name: "t".into(),
            id: [1; 16],
        }
    }

    fn unseen_receipt(outbox_id: i64, partition: i32, offset: i64) -> Receipt {
        Receipt {
            outbox_id,
            place: Destination::Topic {
                partition,
                offset: Some(offset),
            },
        }
    }

    /// Runs `work` on a database with 6 events: the odd ones are PUBLISHED to partition 1, the even
    /// ones to 0.
    fn with_unseen_events<T>(work: impl FnOnce(&Transaction<'_>) -> T) -> T {
        let dir = tempfile::tempdir().unwrap();
        let (mut connection, _) = open::open_database(&dir.path().join("a.db"), None).unwrap();
        let tx = Transaction::new(&mut connection, TransactionBehavior::Immediate).unwrap();
        let mut receipts = Vec::new();
        for id in 1..=6_i64 {
            tx.execute(
                "INSERT INTO payment VALUES (?1, 1, ?1, 1, 'KRW', 'COMPLETED', NULL, ?1, NULL)",
                [id],
            )
            .unwrap();
            let sql = "INSERT INTO outbox (payment_id, user_id, type, created_at) \
                VALUES (?1, 1, 'payment.completed', 1)";
            tx.execute(sql, [id]).unwrap();
            receipts.push(unseen_receipt(id, i32::from(id % 2 == 1), 10 + id));
        }
        publication::record_publications(&tx, &receipts, Timestamp::now()).unwrap();
        note_unseen(&tx, &unseen_topic(), &receipts).unwrap();
        work(&tx)
    }

    fn requeued_outbox_ids(tx: &Transaction<'_>) -> Vec<i64> {
        outbox::unpublished_outbox_events(tx, 0, 100, RecordFormat::Id)
            .unwrap()
            .iter()
            .map(|event| event.outbox_id)
            .collect()
    }

    fn noted_unseen(tx: &Transaction<'_>) -> Vec<(i32, i64, i64)> {
        unseen_of_topic(tx, &unseen_topic())
            .unwrap()
            .iter()
            .map(|first| (first.partition, first.offset, first.outbox_id))
            .collect()
    }

    #[test]
    fn the_first_unseen_event_of_each_partition_is_noted_until_a_consumer_could_see_it() {
        with_unseen_events(|tx| {
            assert_eq!(noted_unseen(tx), [(0, 12, 2), (1, 11, 1)]);
            // Later events change nothing; an older id, of a republished event, does.
            note_unseen(
                tx,
                &unseen_topic(),
                &[unseen_receipt(9, 0, 20), unseen_receipt(1, 0, 21)],
            )
            .unwrap();
            assert_eq!(noted_unseen(tx), [(0, 12, 1), (1, 11, 1)]);
            let rest = Unseen {
                partition: 1,
                offset: 15,
                outbox_id: 5,
            };
            shorten_unseen(
                tx,
                &unseen_topic(),
                &BTreeMap::from([(0, None), (1, Some(rest))]),
            )
            .unwrap();
            assert_eq!(noted_unseen(tx), [(1, 15, 5)]);
            assert!(has_unseen(tx).unwrap());
            shorten_unseen(tx, &unseen_topic(), &BTreeMap::from([(1, None)])).unwrap();
            assert!(!has_unseen(tx).unwrap());
        });
    }

    #[test]
    fn only_unseen_events_of_the_read_offsets_are_requeued() {
        type Read = [(i32, Range<i64>); 2];
        let cases: [(Read, &[i64], &[i64]); 4] = [
            ([(0, 0..17), (1, 0..17)], &[1, 2, 3, 4, 5, 6], &[]),
            ([(0, 0..17), (1, 0..17)], &[1, 2, 3], &[4, 5, 6]),
            // The retention deleted partition 0 up to 14; it ends at 16. Partition 1 was not read.
            ([(0, 14..16), (1, 17..17)], &[], &[4]),
            ([(0, 0..0), (7, 0..17)], &[], &[]),
        ];
        for (read, visible, expected) in cases {
            with_unseen_events(|tx| {
                let visible = visible.iter().copied().collect();
                let noted = unseen_of_topic(tx, &unseen_topic()).unwrap();
                let requeued =
                    requeue_unseen(tx, &noted, &BTreeMap::from(read.clone()), &visible).unwrap();
                assert_eq!(
                    (requeued, requeued_outbox_ids(tx)),
                    (expected.len(), expected.to_vec()),
                    "{read:?}"
                );
                assert!(!has_unseen(tx).unwrap());
            });
        }
    }

    #[test]
    fn unseen_events_of_another_topic_are_forgotten_without_a_requeue() {
        with_unseen_events(|tx| {
            let noted = unseen_of_topic(
                tx,
                &Topic {
                    name: "t".into(),
                    id: [2; 16],
                },
            )
            .unwrap();
            let read = BTreeMap::from([(0, 0..100), (1, 0..100)]);
            assert_eq!(
                requeue_unseen(tx, &noted, &read, &BTreeSet::new()).unwrap(),
                0
            );
            assert!(!has_unseen(tx).unwrap());
        });
    }
}
