//! Watches published events until a `read_committed` consumer can see them.
//!
//! A check costs one request for each leader, at most once a second, and ends when everything is
//! visible. Events that are invisible for 5 s are investigated. When they become visible that late,
//! the topic is read again, because an abort moves the last stable offset just as a commit does.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use krafka::Kafka;

use super::cluster::{ClusterError, with_kafka_timeout};
use super::hanging::{
    OpenTransaction, VISIBLE_WITHIN, has_hanging_transaction, last_stable_offsets,
    open_transactions,
};
use crate::domain::topic::Topic;
use crate::store::Store;
use crate::store::publication::{Destination, Receipt};
use crate::store::unseen::{self, Unseen};

/// The time from publishing to the first check whether consumers see the events, and from check to
/// check.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// How long one check may need.
const CALL_TIMEOUT: Duration = Duration::from_secs(3);

/// Events that were acknowledged and may not be visible yet.
#[derive(Debug, Default)]
pub(crate) struct VisibilityWatch {
    batches: BTreeMap<i32, VecDeque<Batch>>,
    next_check: Option<Instant>,
    /// Events were invisible for too long.
    was_late: bool,
}

/// A batch's events on one partition.
#[derive(Debug, Clone, Copy)]
struct Batch {
    first: Unseen,
    last_offset: i64,
    acknowledged_at: Instant,
}

/// The result of a check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Visibility {
    /// Everything is visible, or not yet late.
    Fine,
    /// A new session has to read the topic; it also ends hanging transactions.
    Reopen,
    /// Events are invisible, for this reason.
    Hidden(String),
}

impl VisibilityWatch {
    /// Adds acknowledged events.
    pub(crate) fn add(&mut self, receipts: &[Receipt], now: Instant) {
        for (partition, first) in unseen::first_unseen_by_partition(receipts) {
            let batch = Batch {
                first,
                last_offset: last_watched_offset(receipts, partition),
                acknowledged_at: now,
            };
            self.batches.entry(partition).or_default().push_back(batch);
            self.next_check.get_or_insert(now + CHECK_INTERVAL);
        }
    }

    /// When the next check is due.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.next_check
    }

    /// Checks the last stable offsets of the partitions that have invisible events.
    pub(crate) async fn check(
        &mut self,
        kafka: &Kafka,
        store: &Store,
        topic: &Topic,
        ours: &[String],
        bootstrap_servers: &[String],
    ) -> Result<Visibility, ClusterError> {
        let partitions: Vec<i32> = self.batches.keys().copied().collect();
        let stable = with_kafka_timeout(
            CALL_TIMEOUT,
            last_stable_offsets(kafka, &topic.name, partitions),
        )
        .await?;
        let now = Instant::now();
        let rest = self.forget_visible(&stable);
        if self.was_late && rest.values().any(Option::is_none) {
            return Ok(Visibility::Reopen);
        }
        self.next_check = (!self.batches.is_empty()).then_some(now + CHECK_INTERVAL);
        let saw = topic.clone();
        store.write(move |tx| unseen::shorten_unseen(tx, &saw, &rest))?;
        let late = self.late(now);
        if late.is_empty() {
            return Ok(Visibility::Fine);
        }
        self.was_late = true;
        let open = with_kafka_timeout(
            CALL_TIMEOUT,
            open_transactions(kafka, &topic.name, &late, ours),
        )
        .await;
        Ok(self.judge(open, bootstrap_servers))
    }

    /// Stops watching visible batches. Returns the batches that remain, by partition.
    fn forget_visible(&mut self, stable: &BTreeMap<i32, i64>) -> BTreeMap<i32, Option<Unseen>> {
        let mut rest = BTreeMap::new();
        for (partition, batches) in &mut self.batches {
            let Some(end) = stable.get(partition) else {
                continue;
            };
            let before = batches.len();
            while batches
                .front()
                .is_some_and(|batch| batch.last_offset < *end)
            {
                batches.pop_front();
            }
            if batches.len() < before {
                let offset = batches.front().map(|batch| batch.first.offset);
                let outbox_id = batches.iter().map(|batch| batch.first.outbox_id).min();
                let first = offset.zip(outbox_id);
                rest.insert(
                    *partition,
                    first.map(|(offset, outbox_id)| Unseen {
                        partition: *partition,
                        offset,
                        outbox_id,
                    }),
                );
            }
        }
        self.batches.retain(|_, batches| !batches.is_empty());
        rest
    }

    fn late(&self, now: Instant) -> BTreeSet<i32> {
        let is_late = |batch: &Batch| now.duration_since(batch.acknowledged_at) >= VISIBLE_WITHIN;
        let late = self
            .batches
            .iter()
            .filter(|(_, batches)| batches.front().is_some_and(is_late));
        late.map(|(partition, _)| *partition).collect()
    }

    fn judge(
        &self,
        open: Result<Vec<OpenTransaction>, ClusterError>,
        bootstrap_servers: &[String],
    ) -> Visibility {
        let oldest = self
            .batches
            .values()
            .filter_map(|batches| batches.front())
            .map(|batch| batch.first.outbox_id)
            .min();
        let event = oldest.unwrap_or_default();
        let why = match open {
            Err(failure) => format!("the cluster does not say why: {failure}"),
            Ok(open) if has_hanging_transaction(&open) => return Visibility::Reopen,
            Ok(open) => match open.first() {
                Some(open) => open.describe(bootstrap_servers),
                None => "no transaction is open on its partition".to_owned(),
            },
        };
        Visibility::Hidden(format!(
            "event {event} was published and is not visible to read_committed consumers: {why}"
        ))
    }
}

fn last_watched_offset(receipts: &[Receipt], wanted: i32) -> i64 {
    let offset = |receipt: &Receipt| match receipt.place {
        Destination::Topic { partition, offset } if partition == wanted => offset,
        _ => None,
    };
    receipts.iter().filter_map(offset).max().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn receipt(outbox_id: i64, partition: i32, offset: i64) -> Receipt {
        Receipt {
            outbox_id,
            place: Destination::Topic {
                partition,
                offset: Some(offset),
            },
        }
    }

    fn rest(partition: i32, left: Option<(i64, i64)>) -> BTreeMap<i32, Option<Unseen>> {
        [(
            partition,
            left.map(|(offset, outbox_id)| Unseen {
                partition,
                offset,
                outbox_id,
            }),
        )]
        .into()
    }

    #[test]
    fn batches_before_the_last_stable_offset_are_dropped() {
        let mut watch = VisibilityWatch::default();
        let start = Instant::now();
        assert_eq!(watch.due(), None);
        watch.add(
            &[receipt(1, 0, 10), receipt(2, 1, 5), receipt(3, 0, 11)],
            start,
        );
        watch.add(&[receipt(4, 0, 13)], start + CHECK_INTERVAL);
        watch.add(&[receipt(2, 0, 15)], start + VISIBLE_WITHIN);
        assert_eq!(watch.due(), Some(start + CHECK_INTERVAL));
        assert_eq!(watch.forget_visible(&[(0, 11), (1, 5)].into()), [].into());
        assert_eq!(watch.late(start + VISIBLE_WITHIN), [0, 1].into());
        // A republished event has the smallest id of the remaining ones, though it is not the
        // first.
        assert_eq!(
            watch.forget_visible(&[(0, 12), (1, 5)].into()),
            rest(0, Some((13, 2)))
        );
        assert_eq!(watch.forget_visible(&[(1, 6)].into()), rest(1, None));
        assert_eq!(watch.late(start + VISIBLE_WITHIN), [].into());
        assert_eq!(watch.forget_visible(&[(0, 16)].into()), rest(0, None));
        assert!(watch.batches.is_empty());
    }

    #[test]
    fn receipts_without_an_offset_are_not_watched() {
        let mut watch = VisibilityWatch::default();
        let nowhere = [
            Destination::Delivery,
            Destination::Rejected("no".into()),
            Destination::Topic {
                partition: 0,
                offset: None,
            },
        ];
        let receipts: Vec<_> = nowhere
            .into_iter()
            .map(|place| Receipt {
                outbox_id: 1,
                place,
            })
            .collect();
        watch.add(&receipts, Instant::now());
        assert_eq!(watch.due(), None);
    }
}
