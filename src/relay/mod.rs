//! The relay: publishes the outbox in commit order, then marks what was published. It never
//! deletes.
//!
//! Publish, wait for the acknowledgement, then mark; and while one batch is being marked, publish
//! the next. After a crash between acknowledgement and mark, the publisher finds those events on
//! the topic at the next start, before it publishes anything.

pub mod in_process;
pub mod publisher;

use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, after, at, never, select_biased};

use crate::domain::event::Event;
use crate::domain::payment_record::RecordFormat;
use crate::domain::reason::describe_reason;
use crate::domain::timestamp::Timestamp;
use crate::domain::trace_context::TraceContext;
use crate::relay::publisher::{PublishError, PublishOutcome, Publisher};
use crate::runtime::backoff::{Backoff, RECONNECT_BACKOFF};
use crate::runtime::error_log::ErrorLog;
use crate::runtime::health::HealthHandle;
use crate::runtime::metrics::{DeadLetterKind, PublishFailure};
use crate::runtime::outage::OutageTracker;
use crate::runtime::plural::counted;
use crate::runtime::worker::{HEARTBEAT_INTERVAL, Stop, Waker};
use crate::store::outbox;
use crate::store::publication::{self, Destination, Receipt};
use crate::store::topic::{self, PublishedOffsets};
use crate::store::{PendingWrite, Store, StoreError, Transaction, relay_action, unseen};

/// How often a fenced relay checks whether an operator has resumed it.
const RESUME_POLL: Duration = Duration::from_secs(1);

/// A batch up to this size is followed by the next one at once.
const SMALL_BATCH: usize = 32;

/// Each event above [`SMALL_BATCH`] delays the next batch by this time. So a pause begins to grow
/// at 10,000 events a second: then more arrive in a pause than it needs to grow further.
const PAUSE_PER_EVENT: Duration = Duration::from_micros(100);

/// The longest pause between two batches.
const PAUSE_MAX: Duration = Duration::from_millis(20);

/// How long the next batch waits. Many small transactions cost the broker, the writer and the
/// consumer more than few large ones. With everything on two cores, the pause brings a quarter more
/// payments a second. A full batch means that more wait already.
fn pause_after_batch(events: usize, batch_max: usize) -> Duration {
    if events >= batch_max {
        return Duration::ZERO;
    }
    let above = u32::try_from(events.saturating_sub(SMALL_BATCH)).unwrap_or(u32::MAX);
    PAUSE_PER_EVENT.saturating_mul(above).min(PAUSE_MAX)
}

/// Publishes the outbox.
pub struct Relay {
    store: Store,
    publisher: Box<dyn Publisher>,
    batch_max: usize,
    format: RecordFormat,
    wake: Receiver<()>,
    notifiers: Waker,
    outage: OutageTracker,
    errors: ErrorLog,
    /// Published, and not yet marked in the database: never to be published again.
    unmarked: Vec<Receipt>,
    /// The topic's offsets that are saved with these marks.
    progress: Option<PublishedOffsets>,
    /// The write that marks them, if it has begun.
    marking: Option<PendingWrite<()>>,
    /// Events up to this one are published, and may still be unmarked: not to be read again.
    published_to: i64,
    /// Set while another process publishes as this node: the last resume before that.
    fenced: Option<i64>,
    /// How long the next batch waits after this one.
    pause: Duration,
}

/// The settings of a relay, and its connections to other threads.
pub struct Options {
    /// The maximum number of events of one batch.
    pub batch_max: usize,
    /// What the value of a record has.
    pub format: RecordFormat,
    /// Wakes the relay.
    pub wake: Receiver<()>,
    /// Wakes the notifiers when the relay has written deliveries itself.
    pub notifiers: Waker,
    /// The component on the health page.
    pub health: HealthHandle,
    /// The longest delay between two attempts of an outage.
    pub reconnect_max: Duration,
}

/// The result of one step.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// There may be more at once.
    Progress,
    /// No event waits.
    Idle,
    /// Try again after this time.
    RetryAfter(Duration),
    /// Another process publishes as this node: the relay pauses until an operator resumes it.
    Fenced,
}

impl Relay {
    /// A relay of the outbox in `store`.
    pub fn new(store: Store, publisher: Box<dyn Publisher>, options: Options) -> Self {
        let backoff = Backoff {
            cap: options.reconnect_max,
            ..RECONNECT_BACKOFF
        };
        let outage = OutageTracker::new(publisher.name(), backoff, options.health);
        Self {
            store,
            publisher,
            batch_max: options.batch_max,
            format: options.format,
            wake: options.wake,
            notifiers: options.notifiers,
            outage,
            errors: ErrorLog::new("relay"),
            unmarked: Vec::new(),
            progress: None,
            marking: None,
            published_to: 0,
            fenced: None,
            pause: Duration::ZERO,
        }
    }

    /// Runs until a stop is requested, then marks the last published events.
    pub fn run(mut self, stop: &Stop) {
        self.work(stop);
        // The write in progress may fail; then there is one more attempt.
        if let Err(error) = self.mark_all().or_else(|_| self.mark_all()) {
            log::error!(
                event = "published_not_marked", events = self.unmarked.len();
                "{} published but not marked; the next start looks for them on the topic: {error}",
                counted(self.unmarked.len(), "event")
            );
        }
    }

    fn work(&mut self, stop: &Stop) {
        while !stop.is_requested() {
            let (wake, pause) = match self.step() {
                Step::Progress if self.pause.is_zero() => continue,
                Step::Progress => (never(), after(self.pause)),
                Step::Idle => {
                    let heartbeat = Instant::now() + HEARTBEAT_INTERVAL;
                    let due = self
                        .publisher
                        .due()
                        .map_or(heartbeat, |due| due.min(heartbeat));
                    (self.wake.clone(), at(due))
                }
                Step::RetryAfter(delay) => (never(), after(delay.min(HEARTBEAT_INTERVAL))),
                Step::Fenced => (never(), after(RESUME_POLL)),
            };
            select_biased! {
                recv(stop.signal()) -> _ => return,
                recv(wake) -> _ => {}
                recv(pause) -> _ => {}
            }
        }
    }

    /// One batch: read, publish, begin to mark.
    pub fn step(&mut self) -> Step {
        match self.try_step() {
            Ok(step) => {
                self.errors.succeeded();
                step
            }
            Err(error) => {
                self.errors.failed(&error);
                Step::RetryAfter(crate::store::DATABASE_RETRY_DELAY)
            }
        }
    }

    fn try_step(&mut self) -> Result<Step, StoreError> {
        if self.is_paused()? {
            return Ok(Step::Fenced);
        }
        if self.marking.is_none() {
            // Left over after a database error: the database has to know them before anything else
            // is published.
            self.mark_all()?;
        }
        let after = self.published_to;
        let limit = self.batch_max;
        let format = self.format;
        let batch = self.store.read(|connection| {
            outbox::unpublished_outbox_events(connection, after, limit, format)
        })?;
        if batch.is_empty() && self.publisher.due().is_none_or(|at| at > Instant::now()) {
            self.mark_all()?;
            self.published_to = 0;
            return Ok(Step::Idle);
        }
        // Without events a call only checks the connection and what was published.
        if !batch.is_empty() {
            self.store.metrics().relay_attempted(Timestamp::now());
            self.store
                .metrics()
                .relay()
                .batch_size
                .observe_size(batch.len());
        }
        let PublishOutcome {
            receipts,
            progress,
            error,
        } = self.publisher.publish(&batch);
        self.count_receipts(&batch, &receipts);
        let step = self.next_step(&batch, error);
        self.pause = pause_after_batch(batch.len(), self.batch_max);
        self.mark(&batch, receipts, progress)?;
        Ok(step)
    }

    /// Both are in the order of their ids.
    fn count_receipts(&self, batch: &[Event], receipts: &[Receipt]) {
        let relay = self.store.metrics().relay();
        let now = Timestamp::now();
        let mut events = batch.iter();
        let mut rejected = 0;
        let mut acknowledged = false;
        for receipt in receipts {
            if matches!(receipt.place, Destination::Rejected(_)) {
                rejected += 1;
            } else if let Some(event) = events.find(|event| event.outbox_id == receipt.outbox_id) {
                acknowledged = true;
                let trace_id = event.trace.as_ref().and_then(TraceContext::recorded_id);
                relay.latency.observe(now.since(event.created_at), trace_id);
            }
        }
        if acknowledged {
            relay.succeeded(now);
        }
        if rejected > 0 {
            relay.failed(PublishFailure::Rejected, rejected);
            self.store
                .metrics()
                .dead_lettered(DeadLetterKind::Event, rejected);
        }
    }

    fn next_step(&mut self, batch: &[Event], error: Option<PublishError>) -> Step {
        if let Some(error) = &error {
            self.store.metrics().relay().failed(error.kind(), 1);
        }
        match error {
            None => {
                self.outage.recovered();
                Step::Progress
            }
            Some(PublishError::Unavailable(reason) | PublishError::Timeout(reason)) => {
                Step::RetryAfter(self.outage.failed(&reason))
            }
            Some(PublishError::Hidden(reason)) => {
                let delay = self.outage.failed(&reason);
                if batch.is_empty() {
                    Step::RetryAfter(delay)
                } else {
                    Step::Progress
                }
            }
            Some(PublishError::Fenced(reason)) => {
                let resumed = self.store.read(relay_action::last_relay_resume);
                self.fenced = Some(resumed.unwrap_or_default());
                self.outage.fenced(&format!(
                    "another process publishes as node {}: {reason}. Payments are accepted, and \
                        their events wait. Stop the other process, then run `payrelay outbox \
                        resume`, or restart this one",
                    self.store.node()
                ));
                Step::Fenced
            }
        }
    }

    /// Waits until the batch before is marked, then begins to mark this one.
    fn mark(
        &mut self,
        batch: &[Event],
        receipts: Vec<Receipt>,
        progress: Option<PublishedOffsets>,
    ) -> Result<(), StoreError> {
        let is_complete = receipts
            .iter()
            .map(|receipt| receipt.outbox_id)
            .eq(batch.iter().map(|event| event.outbox_id));
        let before = self.mark_all();
        self.unmarked.extend(receipts);
        self.progress = progress;
        before?;
        self.begin_marking()?;
        if let Some(last) = batch.last().filter(|_| is_complete) {
            self.published_to = last.outbox_id;
        } else {
            // Events without a receipt are to be read again, and those with one are not: the
            // database has to know first.
            self.mark_all()?;
            self.published_to = 0;
        }
        Ok(())
    }

    /// Whether it is fenced, and no operator has resumed it yet.
    fn is_paused(&mut self) -> Result<bool, StoreError> {
        let Some(before) = self.fenced else {
            return Ok(false);
        };
        let last = self.store.read(relay_action::last_relay_resume)?;
        if last == before {
            return Ok(true);
        }
        let (origin, reason) = self
            .store
            .read(|connection| relay_action::find_relay_action_origin(connection, last))?;
        let why = describe_reason(reason.as_deref());
        log::info!(
            event = "relay_resumed", by = origin.as_str();
            "the relay was resumed by {origin}{why}: taking over from the other process"
        );
        self.fenced = None;
        Ok(false)
    }

    /// Waits until every published event is marked.
    fn mark_all(&mut self) -> Result<(), StoreError> {
        if self.unmarked.is_empty() {
            return Ok(());
        }
        if self.marking.is_none() {
            self.begin_marking()?;
        }
        if let Some(marking) = self.marking.take() {
            marking.wait()?;
        }
        self.store.metrics().published(self.unmarked.len());
        let has_deliveries = self
            .unmarked
            .iter()
            .any(|receipt| receipt.place == Destination::Delivery);
        if has_deliveries {
            self.notifiers.wake();
        }
        self.unmarked.clear();
        Ok(())
    }

    fn begin_marking(&mut self) -> Result<(), StoreError> {
        if self.unmarked.is_empty() {
            return Ok(());
        }
        let receipts = self.unmarked.clone();
        let progress = self.progress.clone();
        let mark = move |tx: &Transaction<'_>| {
            publication::record_publications(tx, &receipts, Timestamp::now())?;
            let Some(progress) = &progress else {
                return Ok(());
            };
            unseen::note_unseen(tx, &progress.topic, &receipts)?;
            topic::save_published_topic_offsets(tx, progress)
        };
        self.marking = Some(self.store.begin_write(mark)?);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_large_batch_that_is_not_full_is_followed_by_a_pause() {
        let milliseconds = |events| pause_after_batch(events, 1000).as_millis();
        assert_eq!([0, 1, 32].map(milliseconds), [0, 0, 0]);
        assert_eq!([42, 132, 232, 999].map(milliseconds), [1, 10, 20, 20]);
        assert_eq!(milliseconds(1000), 0, "more wait already");
        assert_eq!(pause_after_batch(10, 10), Duration::ZERO);
    }
}
