//! The reading of the topic that precedes publishing: marks the events that are on it already.

use std::collections::BTreeMap;
use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::cluster::ClusterError;
use super::session::{Context, OPEN_TIMEOUT, Session};
use super::topic_reader::{TopicReader, TopicRecord};
use crate::domain::event::EventRef;
use crate::domain::node_id::{ID_MAX, NodeId};
use crate::domain::node_role::NodeRole;
use crate::domain::timestamp::Timestamp;
use crate::store::topic::{self, PublishedOffsets, PublishedRecord, Reconciled};
use crate::store::{Store, StoreError, Transaction, outbox, unseen};

/// The least time to wait for records.
const WAIT_MIN: Duration = Duration::from_millis(300);

/// A session that still reads the topic.
pub(super) struct Reconciliation {
    session: Box<Session>,
    reader: TopicReader,
    /// Since when no records have arrived.
    idle_since: Instant,
}

/// How many events the records of a step have changed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Changes {
    /// Marked as published.
    pub(super) marked: usize,
    /// Given new ids, because the topic has their ids under other payments, or later ids.
    renumbered: usize,
}

impl Changes {
    pub(super) fn is_any(self) -> bool {
        self.marked + self.renumbered > 0
    }
}

/// Our events may be behind another producer's open transaction, where no consumer sees them.
#[derive(Debug, thiserror::Error)]
#[error(
    "a transaction is open on partition {partition} of {topic}, and hides whether our events are \
        behind it{blocked_by}"
)]
pub(super) struct BlockedByOpenTransaction {
    partition: i32,
    topic: Arc<str>,
    /// Which transaction, where the cluster says so.
    blocked_by: String,
}

impl Reconciliation {
    pub(super) fn new(session: Box<Session>, reader: TopicReader) -> Self {
        Self {
            session,
            reader,
            idle_since: Instant::now(),
        }
    }

    /// Whether everything up to the topic's end was read.
    pub(super) fn is_complete(&self) -> bool {
        self.reader.is_finished()
    }

    /// Whether no records have arrived for too long.
    pub(super) fn is_stalled(&self) -> bool {
        self.idle_since.elapsed() >= OPEN_TIMEOUT
    }

    /// Whether events of earlier sessions may be hidden.
    pub(super) fn has_unseen(&self) -> bool {
        !self.session.unseen.is_empty()
    }

    /// The open transaction of another producer that the reader waits behind.
    pub(super) fn blocked(&self) -> Option<BlockedByOpenTransaction> {
        Some(BlockedByOpenTransaction {
            partition: self.reader.blocked_partition()?,
            topic: self.session.topic.name.clone(),
            blocked_by: self.session.blocked_by.clone().unwrap_or_default(),
        })
    }

    /// The session, ready to publish.
    pub(super) fn into_session(mut self) -> Box<Session> {
        self.session.answered_at = Instant::now();
        self.session
    }

    /// Reads the next records, and marks the events that they are.
    pub(super) async fn read_next(
        &mut self,
        context: &Context,
        deadline: Instant,
    ) -> Result<Changes, ClusterError> {
        let limit = deadline
            .saturating_duration_since(Instant::now())
            .max(WAIT_MIN);
        let records = self.reader.next_within(limit).await?;
        let found = self.own_events(&context.node, &records);
        let offsets = self.read_to(&records);
        self.session.saw(&found);
        // The marks before any other wait: if that times out, the next call has no records.
        let changes = self.save(&context.store, found, offsets)?;
        self.idle_since = Instant::now();
        if self.is_complete() && self.has_unseen() {
            // Records that were deleted meanwhile need not have been seen.
            self.reader.refresh_start_offsets(limit).await?;
        }
        Ok(changes)
    }

    /// The events of the node among these records. Raises the largest id that is known to be on the
    /// topic by those of this database.
    fn own_events(&mut self, node: &NodeId, records: &[TopicRecord]) -> Vec<PublishedRecord> {
        let Session {
            source,
            role,
            last_published,
            ..
        } = &mut *self.session;
        let incarnation = source.incarnation.as_micros().to_string();
        let mut found = Vec::new();
        for record in records {
            let Some(event) = reconciled_event(node, record) else {
                continue;
            };
            let of = record.incarnation.as_ref();
            if of == Some(&incarnation) && event.notice.outbox_id <= ID_MAX {
                *last_published = event.notice.outbox_id.max(*last_published);
            }
            // An earlier database of an edge gave the same ids: its records are not ours.
            if *role == NodeRole::Single || of.is_none_or(|of| *of == incarnation) {
                found.push(event);
            }
        }
        found
    }

    /// How far the topic was read, to be recorded with the events.
    fn read_to(&mut self, records: &[TopicRecord]) -> PublishedOffsets {
        let mut offsets: BTreeMap<i32, i64> = records
            .iter()
            .map(|record| (record.partition, record.offset + 1))
            .collect();
        if self.is_complete() {
            let ranges = self.reader.ranges().iter();
            offsets.extend(ranges.map(|range| (range.partition, range.end)));
        }
        self.session.ends.extend(&offsets);
        if self.is_complete() {
            offsets.clone_from(&self.session.ends);
        } else if self.session.first_conflict.is_some() {
            // Should this process end, the next one has to find the conflict again.
            offsets.clear();
        }
        PublishedOffsets {
            topic: self.session.topic.clone(),
            offsets,
            last_published: self.session.last_published,
        }
    }

    /// Marks the events in one transaction. Events whose ids the topic has under other payments get
    /// new ids once the whole topic was read. Until then one of them may turn out to be on it.
    fn save(
        &mut self,
        store: &Store,
        found: Vec<PublishedRecord>,
        offsets: PublishedOffsets,
    ) -> Result<Changes, StoreError> {
        let now = Timestamp::now();
        let is_complete = self.is_complete();
        let known_conflict = self.session.first_conflict;
        let role = self.session.role;
        let (reconciled, renumbered) = store.write(move |tx| {
            let reconciled = topic::reconcile_topic(tx, &found, &offsets, now)?;
            let overtaken = match role {
                NodeRole::Single => None,
                NodeRole::Edge => outbox::first_unpublished_before(tx, offsets.last_published)?,
            };
            let conflict = earlier(reconciled.first_conflict, known_conflict);
            let Some(first) = earlier(conflict, overtaken).filter(|_| is_complete) else {
                return Ok((reconciled, 0));
            };
            let renumbered = outbox::renumber_outbox(tx, first)?;
            topic::save_published_topic_offsets(tx, &offsets)?;
            Ok((reconciled, renumbered))
        })?;
        let conflict = earlier(reconciled.first_conflict, known_conflict);
        self.session.first_conflict = conflict.filter(|_| !is_complete);
        log_reconciled_changes(&self.session.topic.name, &reconciled, renumbered);
        Ok(Changes {
            marked: reconciled.marked,
            renumbered,
        })
    }

    /// After the whole topic was read: published events that it does not have are to be published
    /// again. Returns how many.
    pub(super) fn requeue_hidden(&mut self, store: &Store) -> Result<usize, StoreError> {
        let unseen = mem::take(&mut self.session.unseen);
        let visible = mem::take(&mut self.session.visible);
        let read = self
            .reader
            .ranges()
            .iter()
            .map(|range| (range.partition, range.start..range.end))
            .collect();
        let published = self.session.last_published;
        let role = self.session.role;
        let requeue = move |tx: &Transaction<'_>| {
            let requeued = unseen::requeue_unseen(tx, &unseen, &read, &visible)?;
            if role == NodeRole::Edge
                && let Some(first) = outbox::first_unpublished_before(tx, published)?
            {
                outbox::renumber_outbox(tx, first)?;
            }
            Ok(requeued)
        };
        let requeued = store.write(requeue)?;
        if requeued > 0 {
            log::warn!(
                event = "events_requeued", events = requeued;
                "{requeued} published events are not visible on {}: their transaction was \
                    aborted; publishing them again",
                self.session.topic.name
            );
        }
        Ok(requeued)
    }
}

fn earlier(one: Option<i64>, other: Option<i64>) -> Option<i64> {
    one.into_iter().chain(other).min()
}

fn log_reconciled_changes(topic: &str, reconciled: &Reconciled, renumbered: usize) {
    let Reconciled {
        marked, unknown, ..
    } = reconciled;
    if *marked > 0 {
        log::info!(
            event = "events_reconciled", events = marked;
            "reconciled {marked} events: they are on the topic already, and are not published again"
        );
    }
    if *unknown > 0 {
        log::error!(
            event = "unknown_events", events = unknown;
            "the topic {topic} has {unknown} events of this node that the database does not know: \
                the database is an older copy (put copies back with `payrelay restore`, which \
                gives no id twice), or another process publishes as this node. `payrelay audit` \
                lists these events"
        );
    }
    if renumbered > 0 {
        log::warn!(
            event = "events_renumbered", events = renumbered;
            "{renumbered} unpublished events have new ids: the topic has their ids under other \
                payments, or later ids"
        );
    }
}

fn reconciled_event(node: &NodeId, record: &TopicRecord) -> Option<PublishedRecord> {
    let id = record.event_id.as_deref();
    let value = record.value.as_deref();
    let event = EventRef::parse(node, id, value).ok()?;
    Some(PublishedRecord {
        notice: event.created_at(record.time.as_deref()),
        partition: record.partition,
        offset: record.offset,
    })
}
