//! The publisher to Apache Kafka: acks=all, one batch in flight, and never a second copy.
//!
//! The guarantee: an event that has a receipt is on every in-sync replica. A user's events are on
//! their partition in commit order, and no event is there twice. A duplicate could only come from a
//! batch with unknown outcome. Either this process ended between the acknowledgement and the mark,
//! or the client gave up without an answer. So each new session first reads the topic, from the
//! first offset that may not be recorded. It marks the events that it finds there. With
//! `exactly-once` a late batch of a dead process cannot arrive afterwards either. The new session
//! acquires all transactional ids of the node: the broker aborts their open transactions, and
//! rejects their later batches (KIP-98).
//!
//! `Pipeline::advance` is one flat state machine: an arm for each state, a method for each arm.
//! Work outlives the call that began it: a call waits for a bounded time, and the next one
//! continues.

use std::io;
use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};

use krafka::KrafkaError;
use tokio::sync::Mutex;
use tokio::time::timeout_at;

use super::cluster::{ClusterConnection, ClusterError, KafkaRuntime};
use super::errors::{explain_cluster_error, explain_error, is_record_error, is_unexplained_error};
use super::producer::{Batch, Place, SendOutcome, is_producer_fenced, send_batch};
pub use super::publisher_options::Options;
use super::reachability::Reachability;
use super::reconcile::{Changes, Reconciliation};
use super::session::{self, BoxFuture, Checked, Context, Opened, Session};
use super::suspects::{Rejection, Suspects};
use super::watch::Visibility;
use crate::config::{self, DeliveryGuarantee};
use crate::domain::event::Event;
use crate::relay::publisher::{PublishError, PublishOutcome, Publisher};
use crate::store::Store;
use crate::store::publication::{Destination, Receipt};
use crate::store::unseen;

/// How long one call may wait. It then reports that Kafka is unavailable.
const CALL_TIMEOUT: Duration = Duration::from_secs(3);

/// A transaction that was open for this long may have been ended by the broker itself, which then
/// fences its producer. That is no sign of another process.
const BROKER_ABORTS_AFTER: Duration = Duration::from_secs(55);

/// Fenced twice within this time: another process publishes as this node.
const FENCED_TWICE_WITHIN: Duration = Duration::from_mins(5);

/// Publishes to a topic.
pub struct KafkaPublisher {
    // Declared, and so dropped, before the runtime, which its tasks need.
    pipeline: Pipeline,
    runtime: KafkaRuntime,
}

struct Pipeline {
    state: State,
    context: Arc<Context>,
    suspects: Suspects,
    /// When another producer acquired a transactional id of this node.
    fenced_at: Option<Instant>,
    /// Whether published events may not be visible yet.
    is_unseen: bool,
    /// Why published events are not visible.
    hidden: Option<String>,
    reachability: Reachability,
    /// Whether the last request to Kafka failed: the next call retries, also without a batch.
    is_unavailable: bool,
}

enum State {
    Disconnected,
    Connecting(BoxFuture<Result<Opened, ClusterError>>),
    Reconciling(Box<Reconciliation>),
    Ready(Box<Session>),
    Sending(BoxFuture<(Box<Session>, SendOutcome)>),
    Checking(BoxFuture<Checked>),
}

/// The state after a step, and whether the call ends with it.
enum Next {
    Continue(State),
    Return(State, PublishOutcome),
}

/// What one call is to send, and how long it may wait.
struct Call<'a> {
    events: &'a [Event],
    guarantee: DeliveryGuarantee,
    deadline: Instant,
}

impl KafkaPublisher {
    /// Connects when it first publishes.
    pub fn new(settings: config::Kafka, store: Store) -> io::Result<Self> {
        Self::with_options(settings, store, Options::default())
    }

    /// The same, with options.
    pub fn with_options(
        settings: config::Kafka,
        store: Store,
        options: Options,
    ) -> io::Result<Self> {
        let node = store.node().clone();
        let client_id = format!("payrelay-publisher-{node}");
        let connection = Mutex::new(ClusterConnection::new(settings.clone(), client_id));
        // Without an answer of the database, the topic is read.
        let is_unseen = store.read(unseen::has_unseen).unwrap_or(true);
        let pipeline = Pipeline {
            state: State::Disconnected,
            context: Arc::new(Context {
                settings,
                ring_size: options.ring_size,
                node,
                store,
                connection,
                warnings: options.warnings,
                reports: options.reports,
            }),
            suspects: Suspects::default(),
            fenced_at: None,
            is_unseen,
            hidden: None,
            reachability: Reachability::default(),
            is_unavailable: false,
        };
        Ok(Self {
            pipeline,
            runtime: KafkaRuntime::new()?,
        })
    }
}

impl Publisher for KafkaPublisher {
    fn publish(&mut self, batch: &[Event]) -> PublishOutcome {
        self.runtime
            .runtime()
            .block_on(self.pipeline.publish(batch))
    }

    fn due(&self) -> Option<Instant> {
        self.pipeline.due()
    }

    fn name(&self) -> &'static str {
        "Kafka (publisher)"
    }
}

impl Pipeline {
    /// When the publisher is to be called again if no batch comes before. A ready session must
    /// check whether published events are visible, and ask quiet connections for an answer.
    /// Unfinished or failed work continues at once.
    fn due(&self) -> Option<Instant> {
        match &self.state {
            State::Ready(session) => Some(session.idle_check_due()),
            State::Disconnected => self.must_connect().then(Instant::now),
            _ => Some(Instant::now()),
        }
    }

    /// Without an event as well: an edge reports its state.
    fn must_connect(&self) -> bool {
        self.is_unseen || self.is_unavailable || self.context.reports.is_some()
    }

    async fn publish(&mut self, batch: &[Event]) -> PublishOutcome {
        let outcome = self.advance(batch).await;
        self.is_unavailable = outcome.is_unavailable();
        if !self.is_unavailable {
            self.reachability.reset();
        }
        outcome
    }

    async fn advance(&mut self, batch: &[Event]) -> PublishOutcome {
        let call = self.call(batch);
        loop {
            let next = match mem::replace(&mut self.state, State::Disconnected) {
                State::Disconnected => self.connect(call.guarantee),
                State::Connecting(work) => self.await_connection(work, &call).await,
                State::Reconciling(work) => self.reconcile(work, &call).await,
                State::Ready(session) => self.start_work(session, &call),
                State::Sending(work) => self.await_send(work, &call).await,
                State::Checking(work) => self.await_check(work, &call).await,
            };
            match next {
                Next::Continue(state) => self.state = state,
                Next::Return(state, outcome) => {
                    self.state = state;
                    return outcome;
                }
            }
        }
    }

    fn call<'a>(&self, batch: &'a [Event]) -> Call<'a> {
        let configured = self.context.settings.delivery;
        Call {
            events: &batch[..self.suspects.batch_len(batch)],
            guarantee: self.suspects.guarantee(batch, configured),
            deadline: Instant::now() + CALL_TIMEOUT,
        }
    }

    fn connect(&self, guarantee: DeliveryGuarantee) -> Next {
        let work = session::open(Arc::clone(&self.context), guarantee);
        Next::Continue(State::Connecting(Box::pin(work)))
    }

    async fn await_connection(
        &mut self,
        mut work: BoxFuture<Result<Opened, ClusterError>>,
        call: &Call<'_>,
    ) -> Next {
        match timeout_at(call.deadline.into(), &mut work).await {
            Ok(Ok((session, reader))) => {
                let work = Reconciliation::new(session, reader);
                Next::Continue(State::Reconciling(Box::new(work)))
            }
            Ok(Err(error)) => Next::Return(State::Disconnected, self.unavailable(&error).await),
            Err(_) => self.still_waiting(State::Connecting(work)).await,
        }
    }

    /// Everything that is on the topic is recorded before anything is published.
    async fn reconcile(&mut self, mut work: Box<Reconciliation>, call: &Call<'_>) -> Next {
        if !work.is_complete() && Instant::now() >= call.deadline {
            // There is much to read: return, so that the relay sees a request to stop.
            return Next::Return(State::Reconciling(work), PublishOutcome::default());
        }
        match work.read_next(&self.context, call.deadline).await {
            Ok(changes) => match self.reconciled(work, changes) {
                Ok(next) => next,
                Err(error) => Next::Return(State::Disconnected, self.unavailable(&error).await),
            },
            Err(error @ ClusterError::Timeout(_)) => {
                let outcome = match work.blocked() {
                    Some(blocked) => {
                        publisher_failed(PublishError::Unavailable(blocked.to_string()))
                    }
                    None => self.unavailable(&error).await,
                };
                // The reader does not notice another leader or a recreated topic: a new session
                // does.
                let state = if work.is_stalled() {
                    State::Disconnected
                } else {
                    State::Reconciling(work)
                };
                Next::Return(state, outcome)
            }
            Err(error) => Next::Return(State::Disconnected, self.unavailable(&error).await),
        }
    }

    /// An event of the batch may have been on the topic already: then the relay has to read the
    /// outbox again.
    fn reconciled(
        &mut self,
        mut work: Box<Reconciliation>,
        changes: Changes,
    ) -> Result<Next, ClusterError> {
        self.context.store.metrics().reconciled(changes.marked);
        let mut is_changed = changes.is_any();
        let state = if work.is_complete() {
            if self.is_unseen || work.has_unseen() {
                is_changed |= work.requeue_hidden(&self.context.store)? > 0;
            }
            self.is_unseen = false;
            self.hidden = None;
            State::Ready(work.into_session())
        } else {
            State::Reconciling(work)
        };
        Ok(if is_changed {
            Next::Return(state, PublishOutcome::default())
        } else {
            Next::Continue(state)
        })
    }

    /// A ready session checks what is due, else sends.
    fn start_work(&self, mut session: Box<Session>, call: &Call<'_>) -> Next {
        let due = if call.events.is_empty() {
            session.idle_check_due()
        } else {
            session.check_due()
        };
        if due <= Instant::now() {
            let work = session::check(session, Arc::clone(&self.context), call.events.len());
            return Next::Continue(State::Checking(Box::pin(work)));
        }
        if call.events.is_empty() {
            let outcome = PublishOutcome {
                error: self.hidden.clone().map(PublishError::Hidden),
                ..PublishOutcome::default()
            };
            return Next::Return(State::Ready(session), outcome);
        }
        if session.guarantee() != call.guarantee {
            // No batch is in flight on it. Its receipts are recorded before the next session reads
            // the topic.
            return Next::Return(State::Disconnected, PublishOutcome::default());
        }
        let place = Place {
            topic: &self.context.settings.topic,
            partition: session.partition,
            source: &session.source,
        };
        let batch = Batch::new(&place, session.last_published, call.events);
        let work = async move {
            let sent = send_batch(&mut session.producer, batch).await;
            (session, sent)
        };
        Next::Continue(State::Sending(Box::pin(work)))
    }

    async fn await_send(
        &mut self,
        mut work: BoxFuture<(Box<Session>, SendOutcome)>,
        call: &Call<'_>,
    ) -> Next {
        match timeout_at(call.deadline.into(), &mut work).await {
            Ok((session, sent)) => self.on_sent(session, sent),
            Err(_) => self.still_waiting(State::Sending(work)).await,
        }
    }

    fn on_sent(&mut self, mut session: Box<Session>, mut sent: SendOutcome) -> Next {
        let progress = session.record_progress(&sent.receipts);
        self.is_unseen |= session.watch.due().is_some();
        self.suspects.answered(&sent.events);
        let Some(error) = sent.error.take() else {
            self.suspects.accepted();
            // Offsets that the topic has had before mean that it was recreated: connect again.
            let state = if progress.is_some() || sent.receipts.is_empty() {
                session.answered_at = Instant::now();
                State::Ready(session)
            } else {
                State::Disconnected
            };
            let outcome = PublishOutcome {
                receipts: sent.receipts,
                progress,
                error: self.hidden.clone().map(PublishError::Hidden),
            };
            return Next::Return(state, outcome);
        };
        // The next session reads the topic first: there may be another leader, or a batch whose
        // acknowledgement was lost.
        let error = self.on_send_error(session.guarantee(), &mut sent, &error);
        let outcome = PublishOutcome {
            receipts: sent.receipts,
            progress,
            error,
        };
        Next::Return(State::Disconnected, outcome)
    }

    /// Decides whether an error is the environment's, another process's, or a record's. Only after
    /// a single event was rejected outside of a transaction, it becomes a dead letter.
    fn on_send_error(
        &mut self,
        guarantee: DeliveryGuarantee,
        sent: &mut SendOutcome,
        error: &KrafkaError,
    ) -> Option<PublishError> {
        let in_transaction = guarantee == DeliveryGuarantee::ExactlyOnce;
        if in_transaction && is_producer_fenced(error) && sent.began.elapsed() < BROKER_ABORTS_AFTER
        {
            return Some(self.on_fenced(error));
        }
        if !(is_record_error(error) || in_transaction && is_unexplained_error(error)) {
            let Context { settings, node, .. } = &*self.context;
            return Some(PublishError::Unavailable(explain_error(
                error, settings, node,
            )));
        }
        match self.suspects.rejected(&sent.events, guarantee) {
            Rejection::Batch => log::warn!(
                event = "batch_rejected";
                "the broker rejected a batch, perhaps because of a single record; sending its \
                    events one at a time: {error}"
            ),
            Rejection::Suspect => {}
            Rejection::Event => self.dead_letter(sent, error),
        }
        None
    }

    fn dead_letter(&self, sent: &mut SendOutcome, error: &KrafkaError) {
        for event in &sent.events {
            let id = self.context.node.event_id(event.outbox_id);
            let payment = event.payment_id;
            log::error!(
                event = "event_dead_lettered", payment = payment;
                "dead-lettered event {id} (payment {payment}): the broker rejects it: {error}"
            );
            sent.receipts.push(Receipt {
                outbox_id: event.outbox_id,
                place: Destination::Rejected(error.to_string().into()),
            });
        }
    }

    async fn await_check(&mut self, mut work: BoxFuture<Checked>, call: &Call<'_>) -> Next {
        let Ok((session, visibility)) = timeout_at(call.deadline.into(), &mut work).await else {
            return self.still_waiting(State::Checking(work)).await;
        };
        match visibility {
            // The next session reads the topic first.
            Ok(Some(Visibility::Reopen)) => {
                return Next::Return(State::Disconnected, PublishOutcome::default());
            }
            Err(error) => {
                return Next::Return(State::Disconnected, self.unavailable(&error).await);
            }
            Ok(Some(Visibility::Fine)) => self.hidden = None,
            Ok(Some(Visibility::Hidden(reason))) => self.hidden = Some(reason),
            Ok(None) => {}
        }
        self.is_unseen = session.watch.due().is_some();
        Next::Continue(State::Ready(session))
    }

    /// The call has waited long enough; the work continues at the next call.
    async fn still_waiting(&mut self, state: State) -> Next {
        let outcome = self.unavailable(&ClusterError::Timeout(CALL_TIMEOUT)).await;
        Next::Return(state, outcome)
    }

    async fn unavailable(&mut self, error: &ClusterError) -> PublishOutcome {
        let Context {
            settings,
            node,
            connection,
            ..
        } = &*self.context;
        // It is locked only while no bootstrap server has answered.
        let kafka = connection
            .try_lock()
            .ok()
            .and_then(|connection| connection.kafka().cloned());
        let reachability = &mut self.reachability;
        let reason =
            explain_cluster_error(error, kafka.as_ref(), reachability, settings, node).await;
        publisher_failed(match error {
            ClusterError::Timeout(_) => PublishError::Timeout(reason),
            _ => PublishError::Unavailable(reason),
        })
    }

    /// A single fencing may be an echo: our own earlier attempt to acquire the id, which the
    /// network delivered late. Acquiring it again is safe, because the topic is read first. Another
    /// process would do the same, and then one of the two stops.
    fn on_fenced(&mut self, error: &KrafkaError) -> PublishError {
        let is_second = self
            .fenced_at
            .take()
            .is_some_and(|before| before.elapsed() < FENCED_TWICE_WITHIN);
        if is_second {
            // After an operator resumes the relay, the count begins again.
            return PublishError::Fenced(error.to_string());
        }
        self.fenced_at = Some(Instant::now());
        PublishError::Unavailable(format!(
            "another process publishes, or has published, as this node: taking over from it \
                ({error})"
        ))
    }
}

fn publisher_failed(error: PublishError) -> PublishOutcome {
    PublishOutcome {
        error: Some(error),
        ..PublishOutcome::default()
    }
}
