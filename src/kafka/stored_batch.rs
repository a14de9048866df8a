//! Consumed records, written to the database: events to the delivery table, other records to the
//! dead letters.

use std::sync::Arc;

use krafka::consumer::ConsumerRecord;

use crate::domain::event::{EventRef, ID_HEADER, TIME_HEADER};
use crate::domain::node_id::NodeId;
use crate::domain::timestamp::Timestamp;
use crate::domain::topic::Topic;
use crate::store::arrival::{self, AcceptOutcome};
use crate::store::consume_batch::ConsumeBatch;
use crate::store::consume_batch::ConsumeStats;
use crate::store::dead_letter::{self, DeadRecord};
use crate::store::{SqlResult, Transaction};

/// The result of storing a batch.
pub(super) struct StoredBatch {
    /// The first record that is not ours, or cannot be read.
    first_dead: Option<DeadRecord>,
    /// How many became dead letters.
    dead_count: usize,
    /// How many were only counted.
    dropped_count: usize,
    /// How many have an id of this node.
    unknown: Option<UnknownEvents>,
    stats: ConsumeStats,
}

/// Records of this node that this database did not write, and the place of the first.
pub(super) struct UnknownEvents {
    pub(super) count: usize,
    partition: i32,
    offset: i64,
}

impl StoredBatch {
    /// Logs everything that is unusual in the batch.
    pub(super) fn log(&self, node: &NodeId, topic: &str) {
        if let Some(unknown) = &self.unknown {
            let UnknownEvents {
                count,
                partition,
                offset,
            } = unknown;
            log::error!(
                event = "foreign_events", records = count, partition = partition, offset = offset;
                "{topic} has {count} records of node {node} that this database did not write, the \
                    first at {partition}@{offset}: another process publishes as this node, or this \
                    database is older than the topic"
            );
        }
        if let Some(dead) = &self.first_dead {
            log::warn!(
                event = "records_dead_lettered", records = self.dead_count,
                dropped = self.dropped_count;
                "dead-lettered {} records of {topic} and dropped {}, the first at {}@{}: {}",
                self.dead_count,
                self.dropped_count,
                dead.partition,
                dead.offset,
                dead.reason
            );
        }
        if self.stats != ConsumeStats::default() {
            let ConsumeStats {
                duplicates,
                inversions,
            } = self.stats;
            log::warn!(
                event = "duplicates_consumed", duplicates = duplicates, inversions = inversions;
                "{topic}: consumed {duplicates} duplicates and {inversions} out-of-order events"
            );
        }
    }

    /// How many records became dead letters.
    pub(super) fn dead_records(&self) -> usize {
        self.dead_count
    }

    /// How many records were only counted, because too many dead letters are open.
    pub(super) fn dropped_records(&self) -> usize {
        self.dropped_count
    }

    /// How many records have an id of this node, and were not written by this database.
    pub(super) fn unknown_events(&self) -> usize {
        self.unknown.as_ref().map_or(0, |unknown| unknown.count)
    }
}

impl UnknownEvents {
    fn among(dead: &[DeadRecord], node: &NodeId) -> Option<Self> {
        let names_us = |(name, value): &(String, Option<String>)| {
            name == ID_HEADER
                && value
                    .as_deref()
                    .is_some_and(|id| node.outbox_id(id).is_some())
        };
        let unknown: Vec<_> = dead
            .iter()
            .filter(|record| record.headers.iter().any(names_us))
            .collect();
        let first = unknown.first()?;
        Some(Self {
            count: unknown.len(),
            partition: first.partition,
            offset: first.offset,
        })
    }
}

/// Consumed records of a topic.
pub(super) struct RecordBatch {
    pub(super) node: NodeId,
    pub(super) topic: Topic,
    pub(super) records: Arc<Vec<ConsumerRecord>>,
    /// How many records may be open dead letters.
    pub(super) dead_records_max: usize,
}

/// Stores the records, and the offsets after them, in one transaction.
pub(super) fn store_batch(
    tx: &Transaction<'_>,
    consumed: &RecordBatch,
    now: Timestamp,
) -> SqlResult<StoredBatch> {
    let RecordBatch {
        node,
        topic,
        records,
        dead_records_max,
    } = consumed;
    let mut batch = ConsumeBatch::begin(tx, topic)?;
    let mut dead: Vec<DeadRecord> = Vec::new();
    let parsed: Vec<_> = records
        .iter()
        .map(|record| parse_record_to_store(node, record))
        .collect();
    let events: Vec<EventRef> = parsed.iter().flatten().copied().collect();
    let mut outcomes = arrival::accept_arrivals(tx, &events, now)?.into_iter();
    for (record, parsed) in records.iter().zip(parsed) {
        let accepted = match parsed {
            Ok(event) => match outcomes.next() {
                Some(AcceptOutcome::Unknown) | None => {
                    Err("no event of this database has its id and payment".to_owned())
                }
                Some(outcome) => Ok((event.outbox_id, outcome)),
            },
            Err(foreign) => Err(foreign),
        };
        let event = match accepted {
            Ok(event) => Some(event),
            Err(reason) => {
                dead.push(dead_record_to_store(record, reason));
                None
            }
        };
        batch.add(record.partition, record.offset, event);
    }
    let capacity = if dead.is_empty() {
        0
    } else {
        dead_records_max.saturating_sub(dead_letter::count_open_dead_records(tx)?)
    };
    let dead_count = dead.len().min(capacity);
    let dropped_count = dead.len() - dead_count;
    for letter in dead.iter().take(dead_count) {
        dead_letter::insert_dead_record(tx, letter, now)?;
    }
    if dropped_count > 0 {
        dead_letter::count_dropped_dead_records(tx, dropped_count)?;
    }
    let stats = batch.finish(records.len())?;
    let unknown = UnknownEvents::among(&dead, node);
    Ok(StoredBatch {
        first_dead: dead.into_iter().next(),
        dead_count,
        dropped_count,
        unknown,
        stats,
    })
}

/// The event of a record, or why it is not one of ours.
fn parse_record_to_store(node: &NodeId, record: &ConsumerRecord) -> Result<EventRef, String> {
    EventRef::parse(node, record.header_str(ID_HEADER), record.value.as_deref())
        .map(|event| event.created_at(record.header_str(TIME_HEADER)))
        .map_err(|foreign| foreign.to_string())
}

fn dead_record_to_store(record: &ConsumerRecord, reason: String) -> DeadRecord {
    let text = |value: &[u8]| String::from_utf8_lossy(value).into_owned();
    DeadRecord {
        topic: record.topic.to_string(),
        partition: record.partition,
        offset: record.offset,
        written_at_ms: record.timestamp,
        reason,
        key: record.key.as_deref().map(<[u8]>::to_vec),
        value: record.value.as_deref().map(<[u8]>::to_vec),
        headers: record
            .headers
            .iter()
            .map(|(name, value)| (name.clone(), value.as_deref().map(text)))
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads headers, one a line, then an empty line, then the value; `key` is the key. A header
    /// without a value has none.
    fn raw(bytes: &[u8]) -> ConsumerRecord {
        let (head, value) = match bytes.windows(2).position(|pair| pair == b"\n\n") {
            _ if bytes.starts_with(b"\n") => (&bytes[..0], Some(&bytes[1..])),
            Some(end) => (&bytes[..end], Some(&bytes[end + 2..])),
            None => (bytes, None),
        };
        let mut record = ConsumerRecord::new(
            "payment-event",
            0,
            0,
            None,
            value.map(<[u8]>::to_vec).map(Into::into),
        );
        for line in head
            .split(|byte| *byte == b'\n')
            .filter(|line| !line.is_empty())
        {
            let end = line
                .windows(2)
                .position(|pair| pair == b": ")
                .unwrap_or(line.len());
            let value = line.get(end + 2..).map(<[u8]>::to_vec);
            if &line[..end] == b"key" {
                record.key = value.map(Into::into);
            } else {
                record.headers.push((
                    String::from_utf8_lossy(&line[..end]).into_owned(),
                    value.map(Into::into),
                ));
            }
        }
        record
    }

    #[test]
    fn the_corpus_of_records() {
        let node = NodeId::parse("shop-7").unwrap();
        let words = [
            "ce_id: ",
            "shop-7-",
            "shop-7-12",
            "\n",
            "\n\n",
            ": ",
            "key: ",
            "traceparent: ",
        ];
        crate::fuzz::fuzz_corpus("record", 10_000, &words, |bytes| {
            let record = raw(bytes);
            match EventRef::parse(&node, record.header_str(ID_HEADER), record.value.as_deref()) {
                Ok(notice) => {
                    assert!(notice.outbox_id > 0 && notice.payment_id > 0);
                    // The text of the record, as it was read.
                    assert_eq!(
                        record.header_str(ID_HEADER),
                        Some(node.event_id(notice.outbox_id).as_str())
                    );
                    assert_eq!(
                        record.value.as_deref(),
                        Some(notice.payment_id.to_string().as_bytes())
                    );
                    true
                }
                Err(foreign) => {
                    let kept = dead_record_to_store(&record, foreign.to_string());
                    // Whatever its length and bytes, its reason is a line, and the rest is stored.
                    assert!(
                        kept.reason.len() < 2000 && !kept.reason.contains(char::is_control),
                        "{}",
                        kept.reason
                    );
                    assert_eq!(
                        (kept.key.as_deref(), kept.value.as_deref()),
                        (record.key.as_deref(), record.value.as_deref())
                    );
                    let json = serde_json::to_string(&kept.headers).unwrap();
                    assert_eq!(
                        serde_json::from_str::<Vec<(String, Option<String>)>>(&json).unwrap(),
                        kept.headers
                    );
                    false
                }
            }
        });
    }
}
