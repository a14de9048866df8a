//! The publisher to Apache Kafka: acks=all, one batch in flight, and never a second copy.
//!
//! The guarantee: an event that has a receipt is on every in-sync replica; a user's events are on
//! their partition in commit order; no event is there twice. What could double one is a batch whose
//! fate nobody knows: this process ended between the broker's word and the mark, or the client gave
//! up without an answer. So before anything is published by a new connection, the topic is read
//! from where everything is known to be marked to its end, and what is found there is marked. With
//! `exactly-once` the batch of the dead cannot arrive later either: the new producer takes the
//! transactional id over, and the broker aborts what was open under it and refuses what still comes
//! (KIP-98).

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use krafka::CloseOptions;
use krafka::admin::{DescribeTransactionsOptions, ListOffsetsOptions};
use krafka::error::{ErrorCode, KrafkaError};
use krafka::producer::{
    Acks, DeliveryConfirmation, DeliveryHandle, Producer, RecordMetadata, TransactionalProducer,
};
use tokio::sync::Mutex;
use tokio::time::timeout_at;

use crate::config::{self, Delivery};
use crate::domain::event::{Event, EventRef, NodeId, Record};
use crate::domain::timestamp::Timestamp;
use crate::domain::topic::Topic;
use crate::kafka::cluster::{
    ClusterConnection, Failure, KafkaRuntime, REQUEST_TIMEOUT, TopicDescription, describe_topic,
    ensure_topic, partition_ends, with_timeout,
};
use crate::kafka::errors::{explain, explain_failure, is_records_fault, is_unexplained};
use crate::kafka::hanging::{Owner, end_hanging, open_transactions, transactional_ids};
use crate::kafka::reachability::Reachability;
use crate::kafka::topic_config::risks;
use crate::kafka::topic_reader::{ReadTo, TopicReader, TopicRecord};
use crate::kafka::watch::{Sight, Watch};
use crate::relay::publisher::{PublishError, PublishOutcome, Publisher};
use crate::runtime::metrics::Metrics;
use crate::runtime::warnings::Warnings;
use crate::store::outbox;
use crate::store::publication::{Place, Receipt};
use crate::store::topic::{self, PublishedOffsets, PublishedRecord, Reconciled};
use crate::store::visibility::{self, Unseen};
use crate::store::{Store, StoreError, Transaction};

/// How long one call takes at most before it says that the other side is away. What is under way
/// goes on at the next call.
const CALL_TIMEOUT: Duration = Duration::from_secs(3);

/// How long opening the topic may take: what was just made, or has another leader, is refused at
/// first.
const OPEN_TIMEOUT: Duration = Duration::from_secs(20);

/// Without transactions krafka repeats a batch for this long, without ever doubling it.
const DELIVERY_TIMEOUT: Duration = Duration::from_mins(5);

/// How long the broker leaves a transaction open that nobody ends; until then those who read
/// committed records wait behind it. Shorter waits would abort the batches of a slow broker.
const TRANSACTION_TIMEOUT: Duration = Duration::from_mins(1);

/// A transaction that was open for so long may have been ended by the broker itself, which then
/// fences its producer: no sign of another one.
const BROKER_ABORTS_AFTER: Duration = Duration::from_secs(55);

/// A session that was quiet for so long asks every broker that it uses for an answer, also while
/// nothing is published: firewalls and NAT forget quiet connections without a sign.
const QUIET_LIMIT: Duration = Duration::from_secs(5);

/// Fenced twice within this time: there is another one.
const FENCED_TWICE_WITHIN: Duration = Duration::from_mins(5);

/// In a transaction a batch is given up before the broker gives the transaction up.
const DELIVERY_TIMEOUT_IN_TRANSACTION: Duration = Duration::from_secs(45);

/// Longer than it takes to queue a batch, so that a batch of the outbox becomes one batch of each
/// partition, sent by the flush that follows: such a batch is taken whole or not at all, and
/// nothing overtakes.
const LINGER: Duration = Duration::from_secs(1);

/// Room for 1,000 events in one batch of a partition, and less than what a broker takes by default
/// (`message.max.bytes`, 1,048,588).
const BATCH_BYTES_MAX: usize = 1_000_000;

/// Publishes to a topic.
pub struct KafkaPublisher {
    // Before the runtime, which its tasks need.
    line: Pipeline,
    driver: KafkaRuntime,
}

struct Pipeline {
    state: State,
    context: Arc<Context>,
    /// A batch with an event up to this one was refused for the sake of one record: they go one by
    /// one.
    single_send_until: i64,
    /// This one was refused alone, in a transaction, which says little: it may be the transaction's
    /// fault.
    rejected_once: Option<i64>,
    /// This one was so twice: it goes once more outside of a transaction, where the client tells
    /// which code the broker gave.
    rejected_twice: Option<i64>,
    /// When another producer has taken the transactional id over.
    fenced_at: Option<Instant>,
    /// Whether anything that was published may not be visible yet.
    is_unseen: bool,
    /// Why events that were published are not visible.
    hidden: Option<String>,
    metrics: Metrics,
    reachability: Reachability,
    /// Whether Kafka did not do what was asked last: the next call tries again, also without a
    /// batch.
    is_unavailable: bool,
}

struct Context {
    settings: config::Kafka,
    node: NodeId,
    store: Store,
    /// Of one opening after the other: it knows that a broker has refused us, and when it is to be
    /// asked again.
    link: Mutex<ClusterConnection>,
    /// Risks of the topic's settings go here.
    warnings: Warnings,
}

type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// What is under way. It outlives the call that began it: a call waits for a bounded time, and the
/// next one goes on.
enum State {
    Closed,
    Connecting(BoxFuture<Result<(Session, Box<TopicReader>), Failure>>),
    /// Reading what is on the topic already; since when nothing has come.
    Reconciling(Session, Box<TopicReader>, Instant),
    Ready(Session),
    Sending(BoxFuture<(Session, SendOutcome)>),
    /// Looking whether what was published is visible.
    Checking(BoxFuture<(Session, Result<Option<Sight>, Failure>)>),
}

/// A producer on a topic.
struct Session {
    kafka: krafka::Kafka,
    producer: AnyProducer,
    topic: Topic,
    /// Other producers' open transactions.
    blocked_by: Option<String>,
    /// What was published by earlier sessions and may be hidden, and the events of it that the
    /// topic has shown.
    unseen: Vec<Unseen>,
    visible: BTreeSet<i64>,
    /// The first unpublished event whose id has another payment on the topic.
    first_conflict: Option<i64>,
    /// What this session has published.
    watch: Watch,
    partitions: i32,
    /// When everything that it uses was known to answer.
    answered_at: Instant,
    /// By partition, behind the last record that was looked at or sent: everything new comes after
    /// it.
    ends: BTreeMap<i32, i64>,
}

impl Session {
    fn delivery(&self) -> Delivery {
        match self.producer {
            AnyProducer::Plain(_) => Delivery::AtLeastOnce,
            AnyProducer::Transactional(_) => Delivery::ExactlyOnce,
        }
    }

    /// When it is to be looked at.
    fn check_due(&self) -> Instant {
        let quiet = self.answered_at + QUIET_LIMIT;
        self.watch.due().map_or(quiet, |at| at.min(quiet))
    }

    /// Asks the leaders and the coordinator for an answer. Any answer of a broker will do, also
    /// that something is not allowed.
    async fn ask(&self) -> Result<(), KrafkaError> {
        let options = ListOffsetsOptions::default();
        let partitions = 0..self.partitions;
        let ends = partition_ends(&self.kafka, &self.topic.name, partitions, options).await?;
        for end in ends.into_values() {
            match end {
                Ok(_) | Err(KrafkaError::Broker { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        if let AnyProducer::Transactional(producer) = &self.producer {
            let ids = [producer.transactional_id()];
            self.kafka
                .admin()
                .describe_transactions(ids, DescribeTransactionsOptions::default())
                .await?;
        }
        Ok(())
    }

    /// These are on the topic, where `read_committed` consumers see them.
    fn saw(&mut self, found: &[PublishedRecord]) {
        for PublishedRecord {
            notice,
            partition,
            offset,
        } in found
        {
            let is_noted =
                |first: &Unseen| first.partition == *partition && first.offset <= *offset;
            if self.unseen.iter().any(is_noted) {
                self.visible.insert(notice.outbox_id);
            }
        }
    }

    /// Behind the last event of each partition that has a receipt. Everything before it has one,
    /// because a partition takes batches in their order. `None` if an offset is one that the topic
    /// has had before: then it is another topic by now.
    fn reached(&mut self, receipts: &[Receipt]) -> Option<PublishedOffsets> {
        let mut offsets = BTreeMap::new();
        for receipt in receipts {
            if let Place::Topic {
                partition,
                offset: Some(offset),
            } = receipt.place
            {
                if self.ends.get(&partition).is_some_and(|end| offset < *end) {
                    return None;
                }
                let end = offsets.entry(partition).or_insert(0);
                *end = offset.max(*end - 1) + 1;
            }
        }
        self.ends.extend(&offsets);
        (!offsets.is_empty()).then(|| PublishedOffsets {
            topic: self.topic.clone(),
            offsets,
        })
    }
}

enum AnyProducer {
    Plain(Box<Producer>),
    Transactional(Box<TransactionalProducer>),
}

/// What came of handing a batch over.
struct SendOutcome {
    /// What was handed over: outbox and payment ids.
    events: Vec<(i64, i64)>,
    receipts: Vec<Receipt>,
    error: Option<KrafkaError>,
    began: Instant,
}

impl KafkaPublisher {
    /// Connects when it first publishes.
    pub fn new(settings: config::Kafka, store: Store) -> io::Result<Self> {
        Self::with_warnings(settings, store, Warnings::default())
    }

    /// The same; risks of the topic's settings go to `warnings`.
    pub fn with_warnings(
        settings: config::Kafka,
        store: Store,
        warnings: Warnings,
    ) -> io::Result<Self> {
        let node = store.node().clone();
        let link = Mutex::new(ClusterConnection::new(
            settings.clone(),
            format!("payrelay-publisher-{node}"),
        ));
        let context = Arc::new(Context {
            settings,
            node,
            store,
            link,
            warnings,
        });
        let driver = KafkaRuntime::new()?;
        // If the database does not say, the topic does.
        let is_unseen = context
            .store
            .read(visibility::is_any_unseen)
            .unwrap_or(true);
        let pipeline = Pipeline {
            state: State::Closed,
            context,
            single_send_until: 0,
            rejected_once: None,
            rejected_twice: None,
            fenced_at: None,
            is_unseen,
            hidden: None,
            metrics: Metrics::default(),
            reachability: Reachability::default(),
            is_unavailable: false,
        };
        Ok(Self {
            line: pipeline,
            driver,
        })
    }

    /// Counts in these.
    #[must_use]
    pub fn with_metrics(mut self, metrics: Metrics) -> Self {
        self.line.metrics = metrics;
        self
    }
}

impl Publisher for KafkaPublisher {
    fn publish(&mut self, batch: &[Event]) -> PublishOutcome {
        self.driver.runtime().block_on(self.line.publish(batch))
    }

    fn due(&self) -> Option<Instant> {
        self.line.due()
    }

    fn name(&self) -> &'static str {
        "Kafka (publisher)"
    }
}

impl Pipeline {
    /// While anything may be invisible, a session looks after it; one that is quiet asks for an
    /// answer; and what is under way, or has failed, goes on without a batch.
    fn due(&self) -> Option<Instant> {
        match &self.state {
            State::Ready(session) => Some(session.check_due()),
            State::Closed => (self.is_unseen || self.is_unavailable).then(Instant::now),
            _ => Some(Instant::now()),
        }
    }

    async fn publish(&mut self, batch: &[Event]) -> PublishOutcome {
        let published = self.advance(batch).await;
        self.is_unavailable = matches!(published.trouble, Some(PublishError::Unavailable(_)));
        if !self.is_unavailable {
            self.reachability.forget();
        }
        published
    }

    async fn advance(&mut self, batch: &[Event]) -> PublishOutcome {
        let deadline = Instant::now() + CALL_TIMEOUT;
        let first = batch.first().map(|event| event.outbox_id);
        // Also while one event is under suspicion: no other one goes along with it.
        let is_suspected =
            first.is_some() && (first == self.rejected_once || first == self.rejected_twice);
        let alone = is_suspected || first.is_some_and(|id| id <= self.single_send_until);
        let delivery = if first.is_some() && first == self.rejected_twice {
            Delivery::AtLeastOnce
        } else {
            self.context.settings.delivery
        };
        loop {
            match std::mem::replace(&mut self.state, State::Closed) {
                State::Closed => {
                    self.state =
                        State::Connecting(Box::pin(open(Arc::clone(&self.context), delivery)));
                }
                State::Connecting(mut work) => match timeout_at(deadline.into(), &mut work).await {
                    Ok(Ok((session, reader))) => {
                        self.state = State::Reconciling(session, reader, Instant::now());
                    }
                    Ok(Err(failed)) => return self.failed(&failed).await,
                    Err(_) => {
                        self.state = State::Connecting(work);
                        return self.failed(&Failure::Timeout(CALL_TIMEOUT)).await;
                    }
                },
                State::Reconciling(session, reader, since)
                    if !reader.done() && Instant::now() >= deadline =>
                {
                    // There is much to read: the caller sees in between whether it is to stop.
                    self.state = State::Reconciling(session, reader, since);
                    return PublishOutcome::default();
                }
                State::Reconciling(session, reader, since) => {
                    if let Some(end) = self
                        .continue_reconciling(session, reader, since, deadline)
                        .await
                    {
                        return end;
                    }
                }
                State::Ready(session) if session.check_due() <= Instant::now() => {
                    self.state =
                        State::Checking(Box::pin(check(session, Arc::clone(&self.context))));
                }
                State::Ready(session) if batch.is_empty() => {
                    self.state = State::Ready(session);
                    return PublishOutcome {
                        trouble: self.hidden.clone().map(PublishError::Hidden),
                        ..PublishOutcome::default()
                    };
                }
                // Nothing is under way on it; what it has published is recorded before the next one
                // looks.
                State::Ready(session) if session.delivery() != delivery => {
                    return PublishOutcome::default();
                }
                State::Ready(session) => {
                    let count = if alone { 1 } else { batch.len() };
                    let batch = Batch::new(&self.context, &batch[..count.min(batch.len())]);
                    self.state = State::Sending(Box::pin(send(session, batch)));
                }
                State::Sending(mut work) => {
                    if let Ok((session, sent)) = timeout_at(deadline.into(), &mut work).await {
                        return self.on_sent(session, sent);
                    }
                    self.state = State::Sending(work);
                    return self.failed(&Failure::Timeout(CALL_TIMEOUT)).await;
                }
                State::Checking(mut work) => {
                    let Ok((session, sight)) = timeout_at(deadline.into(), &mut work).await else {
                        self.state = State::Checking(work);
                        return self.failed(&Failure::Timeout(CALL_TIMEOUT)).await;
                    };
                    if let Some(end) = self.checked(session, sight).await {
                        return end;
                    }
                }
            }
        }
    }

    /// Looks at the next records of the topic. Returns what the caller has to know first.
    async fn continue_reconciling(
        &mut self,
        mut session: Session,
        mut reader: Box<TopicReader>,
        since: Instant,
        deadline: Instant,
    ) -> Option<PublishOutcome> {
        match self.reconcile(&mut session, &mut reader, deadline).await {
            Err(silent @ Failure::Timeout(_)) => {
                let held = reader
                    .blocked_partition()
                    .map(|partition| BlockedByOpenTransaction {
                        partition,
                        topic: session.topic.name.clone(),
                        blocked_by: session.blocked_by.clone().unwrap_or_default(),
                    });
                // The reader is told of no other leader, and of no other life of the topic: the
                // next try asks.
                if since.elapsed() < OPEN_TIMEOUT {
                    self.state = State::Reconciling(session, reader, since);
                }
                Some(match held {
                    Some(held) => away(&held),
                    None => self.failed(&silent).await,
                })
            }
            Err(failed) => Some(self.failed(&failed).await),
            Ok(found) => {
                self.state = if reader.done() {
                    session.answered_at = Instant::now();
                    State::Ready(session)
                } else {
                    State::Reconciling(session, reader, Instant::now())
                };
                // What was to be published may have been there already: the caller has to look
                // again.
                found.then(PublishOutcome::default)
            }
        }
    }

    /// A session that may have hidden events, or does not answer, is given up: the next one reads
    /// the topic first.
    async fn checked(
        &mut self,
        session: Session,
        sight: Result<Option<Sight>, Failure>,
    ) -> Option<PublishOutcome> {
        match sight {
            Ok(Some(Sight::Reopen)) => return Some(PublishOutcome::default()),
            Err(failed) => return Some(self.failed(&failed).await),
            Ok(Some(Sight::Fine)) => self.hidden = None,
            Ok(Some(Sight::Hidden(why))) => self.hidden = Some(why),
            Ok(None) => {}
        }
        self.is_unseen = session.watch.due().is_some();
        self.state = State::Ready(session);
        None
    }

    /// Marks what is on the topic; true if that concerned anything that was to be published.
    async fn reconcile(
        &mut self,
        session: &mut Session,
        reader: &mut TopicReader,
        deadline: Instant,
    ) -> Result<bool, Failure> {
        let patience = deadline
            .saturating_duration_since(Instant::now())
            .max(CALL_TIMEOUT / 10);
        let records = reader.next_within(patience).await?;
        let mut offsets: BTreeMap<i32, i64> = records
            .iter()
            .map(|record| (record.partition, record.offset + 1))
            .collect();
        if reader.done() {
            offsets.extend(
                reader
                    .extents()
                    .iter()
                    .map(|extent| (extent.partition, extent.end)),
            );
        }
        let found: Vec<PublishedRecord> = records
            .iter()
            .filter_map(|record| self.own_event(record))
            .collect();
        session.ends.extend(&offsets);
        if reader.done() {
            offsets.clone_from(&session.ends);
        }
        session.saw(&found);
        let topic = session.topic.clone();
        if session.first_conflict.is_some() && !reader.done() {
            // Should this process end, the next one has to find the conflict again.
            offsets.clear();
        }
        let reached = PublishedOffsets {
            topic: topic.clone(),
            offsets,
        };
        let now = Timestamp::now();
        let whole = reader.done();
        if whole && !session.unseen.is_empty() {
            // What was deleted meanwhile need not have been seen.
            reader.refresh_start_offsets(patience).await?;
        }
        let conflict = session.first_conflict;
        let (reconciled, renumbered) = self.context.store.write(move |tx| {
            let reconciled = topic::reconcile(tx, &found, &reached, now)?;
            // While more is to be read, an event with this id may turn out to be on the topic.
            let first = reconciled
                .first_conflict
                .into_iter()
                .chain(conflict)
                .min()
                .filter(|_| whole);
            let Some(first) = first else {
                return Ok((reconciled, 0));
            };
            let renumbered = outbox::renumber(tx, first)?;
            topic::save_published_offsets(tx, &reached)?;
            Ok((reconciled, renumbered))
        })?;
        let Reconciled {
            marked,
            first_conflict,
            unknown,
        } = reconciled;
        session.first_conflict = first_conflict
            .into_iter()
            .chain(conflict)
            .min()
            .filter(|_| !whole);
        let requeued = if whole {
            self.requeue_hidden(session, reader)?
        } else {
            0
        };
        self.metrics.reconciled(marked);
        if marked > 0 {
            log::info!("{marked} events are on the topic already: marked, not published again");
        }
        if unknown > 0 {
            log::error!(
                "the topic {} has {unknown} events of this node that the database does not know: \
                    it is an older state of the database (put copies back with `payrelay restore`, \
                    which gives no id again), or another process publishes as this node. \
                    `payrelay audit` lists these events",
                topic.name
            );
        }
        if renumbered > 0 {
            log::warn!(
                "{renumbered} unpublished events have new ids: the topic has their ids under \
                    other payments"
            );
        }
        Ok(marked + renumbered + requeued > 0)
    }

    /// The topic was read: what was published and is not there is to be published again.
    fn requeue_hidden(
        &mut self,
        session: &mut Session,
        reader: &TopicReader,
    ) -> Result<usize, StoreError> {
        let mut requeued = 0;
        let unseen = std::mem::take(&mut session.unseen);
        let visible = std::mem::take(&mut session.visible);
        if self.is_unseen || !unseen.is_empty() {
            let read = reader
                .extents()
                .iter()
                .map(|extent| (extent.partition, extent.low..extent.end))
                .collect();
            let requeue = move |tx: &Transaction<'_>| {
                visibility::requeue_hidden(tx, &unseen, &read, &visible)
            };
            requeued = self.context.store.write(requeue)?;
        }
        if requeued > 0 {
            log::warn!(
                "{requeued} published events are not visible on {}: their transaction was \
                    aborted; publishing them again",
                session.topic.name
            );
        }
        self.is_unseen = false;
        self.hidden = None;
        Ok(requeued)
    }

    fn own_event(&self, record: &TopicRecord) -> Option<PublishedRecord> {
        let notice = EventRef::parse(
            &self.context.node,
            record.event_id.as_deref(),
            record.value.as_deref(),
        )
        .ok()?;
        let notice = notice.created_at(record.time.as_deref());
        Some(PublishedRecord {
            notice,
            partition: record.partition,
            offset: record.offset,
        })
    }

    fn on_sent(&mut self, mut session: Session, sent: SendOutcome) -> PublishOutcome {
        let SendOutcome {
            events,
            mut receipts,
            error,
            began,
        } = sent;
        let reached = session.reached(&receipts);
        session.watch.add(&receipts, Instant::now());
        self.is_unseen |= session.watch.due().is_some();
        if events
            .first()
            .is_some_and(|(first, _)| *first > self.single_send_until)
        {
            self.single_send_until = 0;
        }
        let Some(error) = error else {
            self.rejected_twice = None;
            // Otherwise the topic was made anew, and what is known of it has to be asked again.
            if reached.is_some() || receipts.is_empty() {
                session.answered_at = Instant::now();
                self.state = State::Ready(session);
            }
            return PublishOutcome {
                receipts,
                reached,
                trouble: self.hidden.clone().map(PublishError::Hidden),
            };
        };
        // The next try starts afresh, and looks first: another leader, a batch whose answer was
        // lost.
        let mut trouble = None;
        let in_transaction = session.delivery() == Delivery::ExactlyOnce;
        if in_transaction && is_fenced(&error) && began.elapsed() < BROKER_ABORTS_AFTER {
            trouble = Some(self.on_fenced(&error));
        } else if !(is_records_fault(&error) || in_transaction && is_unexplained(&error)) {
            let Context { settings, node, .. } = &*self.context;
            trouble = Some(PublishError::Unavailable(explain(&error, settings, node)));
        } else if let [(outbox_id, payment_id)] = *events.as_slice() {
            if in_transaction {
                let again = self.rejected_once.replace(outbox_id) == Some(outbox_id);
                self.rejected_twice = again.then_some(outbox_id);
            } else {
                self.rejected_twice = None;
                let id = self.context.node.event_id(outbox_id);
                log::error!(
                    "event {id} (payment {payment_id}) is refused by the broker and set aside as \
                        a dead letter: {error}"
                );
                receipts.push(Receipt {
                    outbox_id,
                    place: Place::Rejected(error.to_string().into()),
                });
            }
        } else if let Some((last, _)) = events.last() {
            log::warn!(
                "the broker refused a batch and may mean one record, so they go one by one: {error}"
            );
            self.single_send_until = *last;
        }
        PublishOutcome {
            receipts,
            reached,
            trouble,
        }
    }

    /// Kafka did not do what was asked.
    async fn failed(&mut self, failure: &Failure) -> PublishOutcome {
        let Context {
            settings,
            node,
            link,
            ..
        } = &*self.context;
        // It is locked only while no bootstrap server has answered.
        let kafka = link.try_lock().ok().and_then(|link| link.kafka().cloned());
        let reachability = &mut self.reachability;
        away(&explain_failure(failure, kafka.as_ref(), reachability, settings, node).await)
    }

    /// Once may be an echo: an attempt of ours to take the id over that the network brought late.
    /// Taking it back is safe, because the topic is looked at first. A rival would do the same, and
    /// then one of the two stops.
    fn on_fenced(&mut self, error: &KrafkaError) -> PublishError {
        if self
            .fenced_at
            .take()
            .is_some_and(|before| before.elapsed() < FENCED_TWICE_WITHIN)
        {
            // When it is resumed, the count begins again.
            return PublishError::Fenced(error.to_string());
        }
        self.fenced_at = Some(Instant::now());
        PublishError::Unavailable(format!(
            "another process publishes as this node, or did: taking over from it ({error})"
        ))
    }
}

/// Our events may be behind somebody's open transaction, where nobody sees them.
#[derive(Debug, thiserror::Error)]
#[error(
    "a transaction is open on partition {partition} of {topic}, and hides whether our events are \
        behind it{blocked_by}"
)]
struct BlockedByOpenTransaction {
    partition: i32,
    topic: Arc<str>,
    /// Which one, where the cluster says so.
    blocked_by: String,
}

/// A batch, as it is handed over.
struct Batch {
    events: Vec<(i64, i64)>,
    records: Vec<krafka::Record>,
}

impl Batch {
    fn new(context: &Context, events: &[Event]) -> Self {
        let now = Timestamp::now();
        let to_krafka =
            |event: &Event| to_krafka(&context.settings.topic, event.to_record(&context.node, now));
        Self {
            events: events
                .iter()
                .map(|event| (event.outbox_id, event.payment_id))
                .collect(),
            records: events.iter().map(to_krafka).collect(),
        }
    }
}

async fn open(
    context: Arc<Context>,
    delivery: Delivery,
) -> Result<(Session, Box<TopicReader>), Failure> {
    let Context {
        settings,
        node,
        store,
        link,
        warnings,
    } = &*context;
    let kafka = {
        let mut link = link.lock().await;
        link.forget();
        link.connect().await?
    };
    ensure_topic(&kafka, settings).await?;
    // First the producer: once it is there, nothing of the one before it comes any more.
    let producer = match delivery {
        Delivery::AtLeastOnce => AnyProducer::Plain(Box::new(
            builder(&kafka)
                .delivery_timeout(DELIVERY_TIMEOUT)
                .build()
                .await?,
        )),
        Delivery::ExactlyOnce => {
            let [id] = transactional_ids(node);
            AnyProducer::Transactional(Box::new(transactional(&kafka, &id).await?))
        }
    };
    let TopicDescription {
        topic, partitions, ..
    } = describe_topic(&kafka, &settings.topic).await?;
    warnings.set(risks(&kafka, &settings.topic, &settings.bootstrap_servers).await);
    let partitions = i32::try_from(partitions).unwrap_or(i32::MAX);
    let blocked_by = end_ours(&kafka, &producer, &context, &topic, partitions).await?;
    let known = store.read(|connection| topic::partitions(connection, &topic))?;
    // By the writer, which records what was just published before that.
    let noted = topic.clone();
    let unseen = store.write(move |tx| visibility::unseen(tx, &noted))?;
    let from = |number| {
        let published_to = known
            .iter()
            .find(|known| known.partition == number)
            .map(|known| known.published_to)?;
        let first_unseen = unseen
            .iter()
            .find(|first| first.partition == number)
            .map(|first| first.offset);
        Some(first_unseen.map_or(published_to, |offset| offset.min(published_to)))
    };
    let reader = TopicReader::open_within(
        OPEN_TIMEOUT,
        &kafka,
        &topic.name,
        ReadTo::HighWatermark,
        from,
    )
    .await?;
    // Gone, or made anew, since it was identified: the next try starts with what there is then.
    let reader = reader.filter(|reader| reader.topic_id() == topic.id);
    let reader = reader.ok_or_else(|| KrafkaError::UnknownTopic {
        topic: settings.topic.clone(),
    })?;
    let (visible, watch) = Default::default();
    let ends = BTreeMap::new();
    let first_conflict = None;
    let answered_at = Instant::now();
    let session = Session {
        kafka,
        producer,
        topic,
        blocked_by,
        unseen,
        visible,
        first_conflict,
        watch,
        partitions,
        answered_at,
        ends,
    };
    Ok((session, Box::new(reader)))
}

async fn transactional(
    kafka: &krafka::Kafka,
    id: &str,
) -> Result<TransactionalProducer, KrafkaError> {
    builder(kafka)
        .delivery_timeout(DELIVERY_TIMEOUT_IN_TRANSACTION)
        .transaction_timeout(TRANSACTION_TIMEOUT)
        .build_transactional(id)
        .await
}

/// Ends our own hanging transactions, before anything else is sent. Returns what other producers'
/// transactions hold back.
async fn end_ours(
    kafka: &krafka::Kafka,
    sender: &AnyProducer,
    context: &Context,
    topic: &Topic,
    partitions: i32,
) -> Result<Option<String>, KrafkaError> {
    let partitions = (0..partitions).collect();
    let ids = transactional_ids(&context.node);
    let open = match with_timeout(
        CALL_TIMEOUT,
        open_transactions(kafka, &topic.name, &partitions, &ids),
    )
    .await
    {
        Ok(open) => open,
        Err(failed) => {
            log::debug!("the cluster does not describe open transactions: {failed}");
            return Ok(None);
        }
    };
    let mut hanging: BTreeMap<&str, Vec<i32>> = BTreeMap::new();
    for open in &open {
        if let Owner::OursEnded { transactional_id } = &open.owner {
            log::warn!(
                "{open}, although its coordinator has ended it: ending it, and publishing its \
                    events again"
            );
            hanging
                .entry(transactional_id)
                .or_default()
                .push(open.partition);
        }
    }
    for (id, partitions) in hanging {
        match sender {
            AnyProducer::Transactional(producer) if producer.transactional_id() == id => {
                end_hanging(producer, &topic.name, &partitions).await?;
            }
            _ => end_hanging(&transactional(kafka, id).await?, &topic.name, &partitions).await?,
        }
    }
    let other = open
        .iter()
        .find(|open| matches!(open.owner, Owner::Other { .. }));
    Ok(other.map(|open| format!(": {}", open.describe(&context.settings.bootstrap_servers))))
}

/// `None`: there was nothing to look at.
async fn check(
    mut session: Session,
    context: Arc<Context>,
) -> (Session, Result<Option<Sight>, Failure>) {
    let Context {
        settings,
        node,
        store,
        ..
    } = &*context;
    if session.answered_at.elapsed() >= QUIET_LIMIT {
        if let Err(failure) = with_timeout(REQUEST_TIMEOUT, session.ask()).await {
            return (session, Err(failure));
        }
        session.answered_at = Instant::now();
    }
    if session.watch.due().is_none_or(|at| at > Instant::now()) {
        return (session, Ok(None));
    }
    let ids = transactional_ids(node);
    let Session {
        kafka,
        topic,
        watch,
        ..
    } = &mut session;
    let sight = watch
        .check(kafka, store, topic, &ids, &settings.bootstrap_servers)
        .await;
    (session, sight.map(Some))
}

fn builder(kafka: &krafka::Kafka) -> krafka::producer::ProducerBuilder {
    kafka
        .producer()
        .acks(Acks::All)
        .idempotent(true)
        .linger(LINGER)
        .batch_size(BATCH_BYTES_MAX)
        // Operators watch payrelay, not its client.
        .metrics_push(false)
}

/// Never dropped half-way: it is polled by one call after the other until it is through.
async fn send(session: Session, batch: Batch) -> (Session, SendOutcome) {
    let began = Instant::now();
    let Batch { events, records } = batch;
    let (answers, error) = match &session.producer {
        AnyProducer::Plain(producer) => send_plain(producer, records).await,
        AnyProducer::Transactional(producer) => {
            match send_in_transaction(producer, records).await {
                Ok(answers) => (answers, None),
                Err(error) => (Vec::new(), Some(error)),
            }
        }
    };
    if error.is_some() {
        // What is still queued must not be sent behind the back of the next producer.
        let at_once = CloseOptions::new().timeout(Duration::ZERO);
        let _ = match &session.producer {
            AnyProducer::Plain(producer) => producer.close_with(at_once).await,
            AnyProducer::Transactional(producer) => producer.close_with(at_once).await,
        };
    }
    let receipt = |(index, metadata): (usize, RecordMetadata)| Receipt {
        outbox_id: events[index].0,
        place: place(&metadata),
    };
    let receipts = answers.into_iter().map(receipt).collect();
    (
        session,
        SendOutcome {
            events,
            receipts,
            error,
            began,
        },
    )
}

/// What was taken, by its place in the batch, and the first error.
async fn send_plain(
    producer: &Producer,
    records: Vec<krafka::Record>,
) -> (Vec<(usize, RecordMetadata)>, Option<KrafkaError>) {
    let (mut handles, mut error) = (Vec::with_capacity(records.len()), None);
    for record in records {
        match producer.enqueue(record).await {
            Ok(handle) => handles.push(handle),
            Err(failed) => {
                error = Some(failed);
                break;
            }
        }
    }
    let flushed = producer.flush().await;
    let mut taken = Vec::with_capacity(handles.len());
    for (index, handle) in handles.into_iter().enumerate() {
        match handle.await {
            Ok(metadata) => taken.push((index, metadata)),
            Err(failed) => error = error.or(Some(failed)),
        }
    }
    (taken, error.or(flushed.err()))
}

/// All or nothing. Where the outcome is not known, the topic tells: it is looked at before anything
/// else is sent.
async fn send_in_transaction(
    producer: &TransactionalProducer,
    records: Vec<krafka::Record>,
) -> Result<Vec<(usize, RecordMetadata)>, KrafkaError> {
    producer.begin()?;
    match fill(producer, records).await {
        Ok(taken) => producer.commit().await.map(|()| taken),
        Err(error) if is_fenced(&error) => Err(error),
        Err(error) => match producer.abort().await {
            // With the later protocol a producer that was fenced learns it here.
            Err(failed) if is_fenced(&failed) => Err(failed),
            // If it could not be aborted, the next producer has it done.
            Ok(()) | Err(_) => Err(error),
        },
    }
}

async fn fill(
    producer: &TransactionalProducer,
    records: Vec<krafka::Record>,
) -> Result<Vec<(usize, RecordMetadata)>, KrafkaError> {
    let mut handles: Vec<DeliveryHandle> = Vec::with_capacity(records.len());
    for record in records {
        handles.push(producer.enqueue(record).await?);
    }
    let flushed = producer.flush().await;
    let mut taken = Vec::with_capacity(handles.len());
    let mut error = None;
    for (index, handle) in handles.into_iter().enumerate() {
        match handle.await {
            Ok(metadata) => taken.push((index, metadata)),
            Err(failed) => {
                error.get_or_insert(failed);
            }
        }
    }
    // The record's own error has the broker's code, where the client gives it.
    match (error, flushed) {
        (Some(error), _) => Err(error),
        (None, flushed) => flushed.map(|()| taken),
    }
}

fn is_fenced(error: &KrafkaError) -> bool {
    let codes = [ErrorCode::ProducerFenced, ErrorCode::InvalidProducerEpoch];
    matches!(error, KrafkaError::Fenced { .. })
        || matches!(error, KrafkaError::Broker { code, .. } if codes.contains(code))
}

fn away(failed: &dyn std::fmt::Display) -> PublishOutcome {
    PublishOutcome {
        trouble: Some(PublishError::Unavailable(failed.to_string())),
        ..PublishOutcome::default()
    }
}

fn to_krafka(topic: &str, record: Record) -> krafka::Record {
    let out = krafka::Record::new(topic, record.value)
        .key(record.key)
        .timestamp(record.timestamp_ms);
    record
        .headers
        .into_iter()
        .fold(out, |out, (name, value)| out.header(name, value))
}

fn place(metadata: &RecordMetadata) -> Place {
    // A broker that drops a second copy may not tell where the first one is.
    let offset = (metadata.delivery == DeliveryConfirmation::Offset).then_some(metadata.offset);
    Place::Topic {
        partition: metadata.partition,
        offset,
    }
}
