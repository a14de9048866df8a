//! The consumer: reads the topic as a member of the group, writes each event to the delivery table,
//! then commits the offset. It never waits for Slack.
//!
//! Exactly once: a record and the offset after it are written in one transaction, and reading
//! resumes there, whatever the group's offset is; that one is committed for people who look at the
//! lag. A second copy of an event changes nothing. A record that is not ours, or cannot be read,
//! becomes a dead letter.
//!
//! What the topic does not bring is backfilled from the outbox: an event whose offset was passed,
//! and an event that was published before the topic's ends were asked for, once everything before
//! those ends was read.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{after, select_biased};
use krafka::consumer::ConsumerRecord;

use crate::config;
use crate::domain::event::{EventRef, ID_HEADER, NodeId, TIME_HEADER};
use crate::domain::timestamp::Timestamp;
use crate::domain::topic::Topic;
use crate::kafka::cluster::{ClusterConnection, ClusterError, KafkaRuntime, with_timeout};
use crate::kafka::errors::explain_failure;
use crate::kafka::membership::{FetchOutcome, Membership, Polled};
use crate::kafka::reachability::Reachability;
use crate::kafka::undecodable::Undecodable;
use crate::runtime::error_log::ErrorLog;
use crate::runtime::health::{HealthHandle, OutageTracker, RECONNECT_BACKOFF};
use crate::runtime::metrics::Metrics;
use crate::runtime::worker::{Stop, Waker};
use crate::store::arrival::{self, AcceptOutcome};
use crate::store::dead_letter::{self, DeadRecord};
use crate::store::topic::{self, ConsumeBatch, ConsumeStats};
use crate::store::unconsumed::{self, Page, Unconsumed};
use crate::store::{self, SqlResult, Store, StoreError, Transaction};

/// How long one call of krafka may take where no broker answers; a poll that is dropped loses
/// nothing.
const CALL_TIMEOUT: Duration = Duration::from_secs(3);

/// How often unconsumed events are looked for, and offsets committed.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// An event that has not come after this time is looked for on the topic.
const SWEEP_AFTER: Duration = Duration::from_secs(5);

/// An event that has not come after this time makes the consumer unavailable.
const LATE_AFTER: Duration = Duration::from_mins(1);

/// How many events one transaction backfills.
const BACKFILL_MAX: usize = 1000;

/// How many rows the low-water mark moves over in one transaction of its own.
const ADVANCE_MAX: usize = 10_000;

/// Consumes the topic.
pub struct Consumer {
    // Before the runtime, which its tasks need.
    membership: Option<Membership>,
    connection: ClusterConnection,
    driver: KafkaRuntime,
    store: Store,
    notifier: Waker,
    outage: OutageTracker,
    reachability: Reachability,
    errors: ErrorLog,
    metrics: Metrics,
    /// The partition count for which it has rejoined: one rejoin for a missing assignment, not a
    /// loop.
    rejoined_for: Option<usize>,
    /// Consumed, but not stored yet: kept while the database refuses.
    pending: Arc<Vec<ConsumerRecord>>,
    checked_at: Instant,
    /// After which event the next page of unconsumed events begins.
    page_after: i64,
    sweep: Sweep,
    late: Option<Late>,
}

/// The search for events that the topic will not bring.
enum Sweep {
    /// None is needed.
    Idle,
    /// One begins at the next check, without waiting for an event to be late.
    Due,
    /// These were published before the ends of the topic were asked for.
    Reading {
        events: Vec<i64>,
        ends: BTreeMap<i32, i64>,
    },
}

/// Events that are published and have not come.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error(
    "{count} published events have not come from the topic, the oldest for {age_s} s: is a \
        transaction open on it?"
)]
struct Late {
    count: i64,
    age_s: u64,
}

/// What a step has found.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// So many records were stored; perhaps none.
    Stored(usize),
    /// Try again after this.
    RetryAfter(Duration),
}

impl Consumer {
    /// Joins the group when it first polls.
    pub fn new(
        settings: config::Kafka,
        store: Store,
        notifier: Waker,
        part: HealthHandle,
    ) -> io::Result<Self> {
        Ok(Self {
            membership: None,
            connection: ClusterConnection::new(
                settings,
                format!("payrelay-consumer-{}", store.node()),
            ),
            driver: KafkaRuntime::new()?,
            store,
            notifier,
            outage: OutageTracker::new("Kafka (consumer)", RECONNECT_BACKOFF, part),
            reachability: Reachability::default(),
            errors: ErrorLog::new("consumer"),
            metrics: Metrics::default(),
            rejoined_for: None,
            pending: Arc::default(),
            checked_at: Instant::now(),
            page_after: 0,
            sweep: Sweep::Due,
            late: None,
        })
    }

    /// Counts in these.
    #[must_use]
    pub fn with_metrics(self, metrics: Metrics) -> Self {
        Self { metrics, ..self }
    }

    /// Works until the stop. The membership is kept: the next start takes it up at once.
    pub fn run(mut self, stop: &Stop) {
        while !stop.requested() {
            if let Step::RetryAfter(delay) = self.step() {
                select_biased! {
                    recv(stop.signal()) -> _ => return,
                    recv(after(delay)) -> _ => {}
                }
            }
        }
    }

    /// One poll: consume, store; each second: backfill, commit offsets.
    pub fn step(&mut self) -> Step {
        match self.try_step() {
            Ok(step) => {
                self.errors.succeeded();
                step
            }
            Err(ClusterError::Store(error)) => {
                self.errors.failed(&error);
                Step::RetryAfter(store::DATABASE_RETRY_DELAY)
            }
            Err(ClusterError::TopicChanged) => {
                log::info!("the topic was changed: the consumer rejoins its group");
                self.leave_group();
                Step::Stored(0)
            }
            Err(failure) => {
                if matches!(&failure, ClusterError::Client(error) if error.is_fatal()) {
                    self.disconnect();
                }
                Step::RetryAfter(self.failed(&failure))
            }
        }
    }

    fn failed(&mut self, failure: &ClusterError) -> Duration {
        let explained = self.driver.runtime().block_on(explain_failure(
            failure,
            self.connection.kafka(),
            &mut self.reachability,
            self.connection.settings(),
            self.store.node(),
        ));
        self.outage.failed(&explained)
    }

    fn try_step(&mut self) -> Result<Step, ClusterError> {
        if self.pending.is_empty() {
            let poll = poll(
                &mut self.membership,
                &mut self.connection,
                &self.store,
                &mut self.rejoined_for,
            );
            let Polled {
                records,
                fetch,
                undecodable,
            } = self
                .driver
                .runtime()
                .block_on(async { with_timeout(CALL_TIMEOUT, poll).await })?;
            if let Some(batch) = undecodable {
                self.skip(&batch)?;
            }
            if self
                .membership
                .as_mut()
                .is_some_and(Membership::take_replaced)
            {
                self.sweep = Sweep::Due;
            }
            self.pending = Arc::new(records);
            if let Some(delay) = self.update_health(fetch) {
                return Ok(Step::RetryAfter(delay));
            }
        }
        let count = self.store_pending()?;
        if count > 0 {
            self.notifier.wake();
        }
        if self.checked_at.elapsed() > CHECK_INTERVAL || matches!(self.sweep, Sweep::Due) {
            if !self.check()? {
                self.checked_at = Instant::now();
            }
            self.commit_offsets();
        }
        Ok(Step::Stored(count))
    }

    fn skip(&mut self, batch: &Undecodable) -> Result<(), ClusterError> {
        let Some(membership) = &mut self.membership else {
            return Ok(());
        };
        let skip = membership.skip(batch, &self.store);
        let letter = self
            .driver
            .runtime()
            .block_on(async { with_timeout(CALL_TIMEOUT, skip).await })?;
        log::error!(
            "dead-lettered a batch of {}, partition {}: {}",
            letter.topic,
            letter.partition,
            letter.reason
        );
        Ok(())
    }

    /// krafka answers that there is nothing also while it waits for the group, or where no broker
    /// answers.
    fn update_health(&mut self, fetch: FetchOutcome) -> Option<Duration> {
        if let Some(stall) = self.membership.as_ref().and_then(Membership::stall) {
            self.outage.failed(stall);
            return None;
        }
        match (fetch, &self.late) {
            (FetchOutcome::Failed(error), _) => return Some(self.failed(&error.into())),
            (_, Some(late)) => drop(self.outage.failed(late)),
            (FetchOutcome::Answered, None) => {
                self.reachability.reset();
                self.outage.recovered();
            }
            (FetchOutcome::Unknown, None) => {}
        }
        None
    }

    fn leave_group(&mut self) {
        if let Some(membership) = self.membership.take() {
            self.driver
                .runtime()
                .block_on(membership.leave(CALL_TIMEOUT));
        }
        self.disconnect();
    }

    /// The next poll joins again.
    fn disconnect(&mut self) {
        self.membership = None;
        self.connection.disconnect();
    }

    fn store_pending(&mut self) -> Result<usize, StoreError> {
        let Some(membership) = self
            .membership
            .as_mut()
            .filter(|_| !self.pending.is_empty())
        else {
            return Ok(0);
        };
        let (node, records, topic) = (
            self.store.node().clone(),
            Arc::clone(&self.pending),
            membership.topic().clone(),
        );
        let dead_records_max = self.connection.settings().dead_records_max.get();
        let StoredBatch {
            first_dead,
            dead_count,
            dropped_count,
            unknown,
            stats,
        } = self.store.write(move |tx| {
            store_batch(
                tx,
                &node,
                &topic,
                &records,
                dead_records_max,
                Timestamp::now(),
            )
        })?;
        let records = std::mem::take(&mut self.pending);
        membership.stored(&records);
        let topic = &membership.topic().name;
        if let Some(UnknownEvents {
            count,
            partition,
            offset,
        }) = unknown
        {
            self.metrics.unknown_events(count);
            log::error!(
                "{topic} has {count} records of node {} that this database did not write, the \
                    first at {partition}@{offset}: another process publishes as this node, or \
                    this database is older than the topic",
                self.store.node()
            );
        }
        if let Some(DeadRecord {
            partition,
            offset,
            reason,
            ..
        }) = first_dead
        {
            log::warn!(
                "dead-lettered {dead_count} records of {topic} and dropped {dropped_count}, the \
                    first at {partition}@{offset}: {reason}"
            );
        }
        if stats != ConsumeStats::default() {
            let ConsumeStats {
                duplicates,
                inversions,
            } = stats;
            log::warn!(
                "{topic}: consumed {duplicates} duplicates and {inversions} out-of-order events"
            );
        }
        Ok(records.len())
    }

    /// Looks for unconsumed events, and backfills those that will not come. Returns whether there
    /// is more to do at once.
    fn check(&mut self) -> Result<bool, StoreError> {
        let waiting = self.store.read(unconsumed::count)?;
        let age = waiting.age(Timestamp::now());
        self.late = (age > LATE_AFTER).then_some(Late {
            count: waiting.count,
            age_s: age.as_secs(),
        });
        let mut more = false;
        if waiting.count == 0 {
            self.sweep = Sweep::Idle;
            self.page_after = 0;
        } else {
            let after = self.page_after;
            let page = self
                .store
                .read(|connection| unconsumed::page(connection, after))?;
            self.page_after = page.next.unwrap_or(0);
            more = self.backfill_passed(&page)? > 0 && page.next.is_some();
            self.sweep(&page, age)?;
        }
        if self.store.read(unconsumed::is_behind)? {
            more |= self
                .store
                .write_in_background(|tx| unconsumed::advance(tx, ADVANCE_MAX))?;
        }
        Ok(more)
    }

    /// Backfills events before the offsets from which their partitions are read.
    fn backfill_passed(&self, page: &Page) -> Result<usize, StoreError> {
        let Some(membership) = &self.membership else {
            return Ok(0);
        };
        let has_passed = |event: &&Unconsumed| {
            event
                .partition
                .zip(event.offset)
                .is_some_and(|(partition, offset)| membership.has_passed(partition, offset))
        };
        let passed: Vec<i64> = page
            .events
            .iter()
            .filter(has_passed)
            .map(|event| event.outbox_id)
            .collect();
        self.backfill(&passed)
    }

    /// Backfills events whose offsets say nothing: of a topic that was recreated or has lost its
    /// end, or without offset.
    fn sweep(&mut self, page: &Page, age: Duration) -> Result<(), StoreError> {
        let Some(membership) = &self.membership else {
            return Ok(());
        };
        let runtime = self.driver.runtime();
        match &self.sweep {
            Sweep::Idle if age < SWEEP_AFTER => {}
            // The events first, then the ends: so they are before the ends, if they are there.
            Sweep::Idle | Sweep::Due => {
                match runtime
                    .block_on(async { with_timeout(CALL_TIMEOUT, membership.ends()).await })
                {
                    Ok(ends) => {
                        let events = page.events.iter().map(|event| event.outbox_id).collect();
                        self.sweep = Sweep::Reading { events, ends };
                    }
                    Err(failure) => {
                        log::debug!("the ends of the topic could not be asked for: {failure}");
                    }
                }
            }
            Sweep::Reading { events, ends } => {
                if runtime.block_on(membership.has_read(ends)) {
                    self.backfill(events)?;
                    self.sweep = Sweep::Idle;
                }
            }
        }
        Ok(())
    }

    fn backfill(&self, events: &[i64]) -> Result<usize, StoreError> {
        let topic = self
            .membership
            .as_ref()
            .map(|membership| membership.topic().clone());
        let mut count = 0;
        for events in events.chunks(BACKFILL_MAX) {
            let (topic, events) = (topic.clone(), events.to_vec());
            let backfill = move |tx: &Transaction<'_>| {
                unconsumed::backfill(tx, topic.as_ref(), &events, Timestamp::now())
            };
            count += self.store.write(backfill)?;
            self.notifier.wake();
        }
        if count > 0 {
            log::warn!(
                "backfilled {count} published events from the outbox: the topic does not bring \
                    them any more"
            );
        }
        Ok(count)
    }

    /// A commit that fails is made good by the next one: the offsets that count are in the
    /// database.
    fn commit_offsets(&mut self) {
        if let Some(membership) = &mut self.membership
            && let Err(error) = self
                .driver
                .runtime()
                .block_on(async { with_timeout(CALL_TIMEOUT, membership.commit()).await })
        {
            log::debug!(
                "the group's offsets could not be committed, the next commit will: {error}"
            );
        }
    }
}

/// The next records. Joins the group first, unless this is a member.
async fn poll(
    membership: &mut Option<Membership>,
    connection: &mut ClusterConnection,
    store: &Store,
    rejoined_for: &mut Option<usize>,
) -> Result<Polled, ClusterError> {
    let membership = match membership {
        Some(membership) => membership,
        None => membership.insert(join(connection, store).await?),
    };
    membership.poll(store, rejoined_for).await
}

async fn join(
    connection: &mut ClusterConnection,
    store: &Store,
) -> Result<Membership, ClusterError> {
    let membership = Membership::join(connection, store.node()).await?;
    let topic = membership.topic().clone();
    if store.write(move |tx| topic::abandon_others(tx, Some(&topic)))? {
        log::warn!(
            "the topic {} is not the one that was used before",
            membership.topic().name
        );
    }
    Ok(membership)
}

/// What came of a batch.
struct StoredBatch {
    /// The first record that is not ours, or cannot be read.
    first_dead: Option<DeadRecord>,
    /// How many of these are kept.
    dead_count: usize,
    /// How many are only counted.
    dropped_count: usize,
    /// Those with an id of this node.
    unknown: Option<UnknownEvents>,
    stats: ConsumeStats,
}

/// Records of this node that this database did not write, and where the first of them is.
struct UnknownEvents {
    count: usize,
    partition: i32,
    offset: i64,
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

/// The records, and the offsets after them, in one transaction.
fn store_batch(
    tx: &Transaction<'_>,
    node: &NodeId,
    topic: &Topic,
    records: &[ConsumerRecord],
    dead_records_max: usize,
    now: Timestamp,
) -> SqlResult<StoredBatch> {
    let mut batch = ConsumeBatch::begin(tx, topic)?;
    let mut dead: Vec<DeadRecord> = Vec::new();
    for record in records {
        let event = match store_record(tx, node, record, now)? {
            Ok(event) => Some(event),
            Err(letter) => {
                dead.push(letter);
                None
            }
        };
        batch.add(record.partition, record.offset, event);
    }
    let room = if dead.is_empty() {
        0
    } else {
        dead_records_max.saturating_sub(dead_letter::open_records(tx)?)
    };
    let dead_count = dead.len().min(room);
    let dropped_count = dead.len() - dead_count;
    for letter in dead.iter().take(dead_count) {
        dead_letter::insert_record(tx, letter, now)?;
    }
    if dropped_count > 0 {
        dead_letter::drop_records(tx, dropped_count)?;
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

/// One record: to the delivery table if it is ours.
fn store_record(
    tx: &Transaction<'_>,
    node: &NodeId,
    record: &ConsumerRecord,
    now: Timestamp,
) -> SqlResult<Result<(i64, AcceptOutcome), DeadRecord>> {
    let reason = match EventRef::parse(node, record.header_str(ID_HEADER), record.value.as_deref())
    {
        Ok(notice) => {
            match arrival::accept(tx, notice.created_at(record.header_str(TIME_HEADER)), now)? {
                AcceptOutcome::Unknown => {
                    "no event of this database has its id and payment".to_owned()
                }
                arrival => return Ok(Ok((notice.outbox_id, arrival))),
            }
        }
        Err(foreign) => foreign.to_string(),
    };
    Ok(Err(dead_record(record, reason)))
}

fn dead_record(record: &ConsumerRecord, reason: String) -> DeadRecord {
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

    /// Headers, one a line, then an empty line, then the value; `key` is the key. A header without
    /// a value has none.
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
        crate::fuzz::corpus("record", 10_000, &words, |bytes| {
            let record = raw(bytes);
            match EventRef::parse(&node, record.header_str(ID_HEADER), record.value.as_deref()) {
                Ok(notice) => {
                    assert!(notice.outbox_id > 0 && notice.payment_id > 0);
                    // It is written as it was read.
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
                    let kept = dead_record(&record, foreign.to_string());
                    // Of whatever length and bytes it is, its reason is a line, and the rest is
                    // kept.
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
