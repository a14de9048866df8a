//! The consumer: reads the topic as a member of the group, writes each event to the delivery table,
//! then commits the offset. It never waits for Slack.
//!
//! Exactly once: a record and the offset after it are written in one transaction, and reading
//! resumes there, independent of the group's offset. The group's offset is committed for people who
//! look at lag. A duplicate of an event changes nothing. A record that is not ours, or cannot be
//! read, becomes a dead letter.
//!
//! Events that the topic does not bring are backfilled from the outbox. An event whose offset was
//! passed is one of them. So is an event that was published before the topic's ends were read, once
//! everything before those ends was consumed.

mod backfill;

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{after, select_biased};
use krafka::consumer::ConsumerRecord;

use crate::config;
use crate::domain::timestamp::Timestamp;
use crate::kafka::cluster::{ClusterConnection, ClusterError, KafkaRuntime, with_kafka_timeout};
use crate::kafka::errors::{explain_cluster_error, is_fenced_by_another_member};
use crate::kafka::membership::Membership;
use crate::kafka::poll_outcome::{FetchOutcome, Polled};
use crate::kafka::reachability::Reachability;
use crate::kafka::stored_batch::{RecordBatch, store_batch};
use crate::kafka::undecodable::Undecodable;
use crate::runtime::backoff::RECONNECT_BACKOFF;
use crate::runtime::error_log::ErrorLog;
use crate::runtime::health::HealthHandle;
use crate::runtime::metrics::DeadLetterKind;
use crate::runtime::outage::OutageTracker;
use crate::runtime::worker::{Stop, Waker};
use crate::store::topic;
use crate::store::{self, Store, StoreError};

/// How long one call of krafka may wait where no broker answers; dropping a poll loses nothing.
const CALL_TIMEOUT: Duration = Duration::from_secs(3);

/// How often it searches for unconsumed events, and commits offsets.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// Two payrelays of one node take the membership from each other. Each waits for this long before
/// it does so again.
const FENCED_PAUSE: Duration = Duration::from_secs(10);

/// Consumes the topic.
pub struct Consumer {
    // This field comes before the runtime, so Rust drops it first: its tasks still need the
    // runtime.
    membership: Option<Membership>,
    connection: ClusterConnection,
    driver: KafkaRuntime,
    store: Store,
    notifier: Waker,
    outage: OutageTracker,
    reachability: Reachability,
    errors: ErrorLog,
    /// The partition count for which it has rejoined, so that a missing assignment triggers one
    /// rejoin, not a loop.
    rejoined_for: Option<usize>,
    /// Consumed, but not stored yet, while the database fails.
    pending: Arc<Vec<ConsumerRecord>>,
    checked_at: Instant,
    /// The event after which the next page of unconsumed events begins.
    page_after: i64,
    sweep: Sweep,
    /// The first unconsumed event, and since when it is the first.
    first_unconsumed: Option<(i64, Instant)>,
    late: Option<Late>,
}

/// The search for events that the topic will not bring.
enum Sweep {
    /// No search is needed.
    Idle,
    /// A search begins at the next check, without waiting for an event to be late.
    Due,
    /// These were published before the ends of the topic were read.
    Reading {
        events: Vec<i64>,
        ends: BTreeMap<i32, i64>,
    },
}

/// Published events that have not arrived.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error(
    "{count} published events have not arrived from the topic, the oldest for {age_s} s: is a \
        transaction open on it?"
)]
struct Late {
    count: i64,
    age_s: u64,
}

/// The result of a step.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// This number of records was stored; perhaps 0.
    Stored(usize),
    /// Try again after this time.
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
            rejoined_for: None,
            pending: Arc::default(),
            checked_at: Instant::now(),
            page_after: 0,
            sweep: Sweep::Due,
            first_unconsumed: None,
            late: None,
        })
    }

    /// Runs until a stop is requested. The member does not leave its group, so that the next start
    /// resumes at once.
    pub fn run(mut self, stop: &Stop) {
        while !stop.is_requested() {
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
                log::info!(
                    event = "topic_changed";
                    "the topic was changed; rejoining the consumer group"
                );
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
        let explained = self.driver.runtime().block_on(explain_cluster_error(
            failure,
            self.connection.kafka(),
            &mut self.reachability,
            self.connection.settings(),
            self.store.node(),
        ));
        let delay = self.outage.failed(&explained);
        if is_fenced_by_another_member(failure) {
            delay.max(FENCED_PAUSE)
        } else {
            delay
        }
    }

    fn try_step(&mut self) -> Result<Step, ClusterError> {
        if self.pending.is_empty() {
            let poll = poll_as_consumer(
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
                .block_on(async { with_kafka_timeout(CALL_TIMEOUT, poll).await })?;
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
            .block_on(async { with_kafka_timeout(CALL_TIMEOUT, skip).await })?;
        log::error!(
            event = "batch_dead_lettered", partition = letter.partition, offset = letter.offset;
            "dead-lettered a batch of {}, partition {}: {}",
            letter.topic,
            letter.partition,
            letter.reason
        );
        self.store
            .metrics()
            .dead_lettered(DeadLetterKind::Record, 1);
        Ok(())
    }

    /// krafka also reports no records while it waits for the group, or where no broker answers.
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
        let batch = RecordBatch {
            node: self.store.node().clone(),
            topic: membership.topic().clone(),
            records: Arc::clone(&self.pending),
            dead_records_max: self.connection.settings().dead_records_max.get(),
        };
        let stored = self
            .store
            .write(move |tx| store_batch(tx, &batch, Timestamp::now()))?;
        let records = std::mem::take(&mut self.pending);
        membership.stored(&records);
        stored.log(self.store.node(), &membership.topic().name);
        self.count_latencies(&records);
        let metrics = self.store.metrics().consumer();
        metrics
            .unknown_events
            .inc_by(stored.unknown_events() as u64);
        metrics
            .records_dropped
            .inc_by(stored.dropped_records() as u64);
        self.store
            .metrics()
            .dead_lettered(DeadLetterKind::Record, stored.dead_records());
        Ok(records.len())
    }

    /// A record's timestamp is the time of its publication, in milliseconds, by the clock of the
    /// node that wrote it.
    fn count_latencies(&self, records: &[ConsumerRecord]) {
        let now = Timestamp::now();
        for record in records {
            let micros = record.timestamp.saturating_mul(1000);
            let waited = now.since(Timestamp::from_micros(micros));
            self.store.metrics().consumer().latency.observe(waited);
        }
    }

    /// The next commit repairs one that failed: the offsets that count are in the database.
    fn commit_offsets(&mut self) {
        if let Some(membership) = &mut self.membership
            && let Err(error) = self
                .driver
                .runtime()
                .block_on(async { with_kafka_timeout(CALL_TIMEOUT, membership.commit()).await })
        {
            log::debug!("the group's offsets could not be committed, will retry: {error}");
        }
    }
}

/// The next records. Joins the group first, unless this is a member.
async fn poll_as_consumer(
    membership: &mut Option<Membership>,
    connection: &mut ClusterConnection,
    store: &Store,
    rejoined_for: &mut Option<usize>,
) -> Result<Polled, ClusterError> {
    let membership = match membership {
        Some(membership) => membership,
        None => membership.insert(join_as_consumer(connection, store).await?),
    };
    membership.poll(store, rejoined_for).await
}

async fn join_as_consumer(
    connection: &mut ClusterConnection,
    store: &Store,
) -> Result<Membership, ClusterError> {
    let membership = Membership::join(connection, store.node()).await?;
    let topic = membership.topic().clone();
    if store.write(move |tx| topic::abandon_other_topics(tx, Some(&topic)))? {
        log::warn!(
            event = "topic_recreated";
            "the topic {} was recreated, or is not the one used before",
            membership.topic().name
        );
    }
    Ok(membership)
}
