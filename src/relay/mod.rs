//! The relay: publishes the outbox in commit order, then marks what was published. It never
//! deletes.
//!
//! Publish, wait for the word, then record; and while one batch is being recorded, publish the
//! next. After a crash between the word and the record the publisher finds those events on the
//! topic, at the next start, before it publishes anything.

pub mod in_process;
pub mod publisher;

use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, after, at, never, select_biased};

use crate::domain::timestamp::Timestamp;
use crate::relay::publisher::{PublishError, Publisher};
use crate::runtime::error_log::ErrorLog;
use crate::runtime::health::{Outage, Part, RECONNECT_BACKOFF};
use crate::runtime::metrics::Metrics;
use crate::runtime::worker::{Stop, Waker};
use crate::store::outbox;
use crate::store::publication::{self, Place, Receipt};
use crate::store::topic::{self, PublishedOffsets};
use crate::store::{PendingWrite, Store, StoreError, Transaction, relay_action, visibility};

/// How often a relay that is fenced asks whether an operator has resumed it.
const RESUME_POLL: Duration = Duration::from_secs(1);

/// Publishes the outbox.
pub struct Relay {
    store: Store,
    publisher: Box<dyn Publisher>,
    batch_max: usize,
    wake: Receiver<()>,
    notifier: Waker,
    outage: Outage,
    metrics: Metrics,
    errors: ErrorLog,
    /// Published, and not known to be recorded: never to be published again.
    unrecorded: Vec<Receipt>,
    /// How far the topic has everything that is recorded with those.
    reached: Option<PublishedOffsets>,
    /// The recording of those, if it is under way.
    recording: Option<PendingWrite<()>>,
    /// Events up to here are published, and perhaps still being recorded: not to be read again.
    published_to: i64,
    /// Another process publishes as this node; the last time that the relay was resumed before
    /// that.
    fenced: Option<i64>,
}

/// What a step has found.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// There may be more at once.
    Progress,
    /// Nothing waits.
    Idle,
    /// Try again after this.
    Away(Duration),
    /// Another process publishes as this node: nothing is published here until an operator resumes
    /// the relay.
    Fenced,
}

impl Relay {
    /// A relay that is woken by `wake` and wakes the notifier when it has written deliveries
    /// itself.
    pub fn new(
        store: Store,
        publisher: Box<dyn Publisher>,
        batch_max: usize,
        wake: Receiver<()>,
        notifier: Waker,
        part: Part,
        metrics: Metrics,
    ) -> Self {
        let outage = Outage::new(publisher.name(), RECONNECT_BACKOFF, part);
        Self {
            store,
            publisher,
            batch_max,
            wake,
            notifier,
            outage,
            metrics,
            errors: ErrorLog::new("relay"),
            unrecorded: Vec::new(),
            reached: None,
            recording: None,
            published_to: 0,
            fenced: None,
        }
    }

    /// Works until the stop, then once more tries to record what was published.
    pub fn run(mut self, stop: &Stop) {
        self.work(stop);
        // The recording that is under way may fail; then there is one more try.
        if let Err(error) = self.record().or_else(|_| self.record()) {
            let count = self.unrecorded.len();
            log::error!(
                "{count} events are published but could not be recorded; the next start finds \
                    them: {error}"
            );
        }
    }

    fn work(&mut self, stop: &Stop) {
        while !stop.requested() {
            let (wake, pause) = match self.step() {
                Step::Progress => continue,
                Step::Idle => (
                    self.wake.clone(),
                    self.publisher.due().map_or_else(never, at),
                ),
                Step::Away(delay) => (never(), after(delay)),
                Step::Fenced => (never(), after(RESUME_POLL)),
            };
            select_biased! {
                recv(stop.signal()) -> _ => return,
                recv(wake) -> _ => {}
                recv(pause) -> _ => {}
            }
        }
    }

    /// One batch: read, publish, begin to record.
    pub fn step(&mut self) -> Step {
        match self.try_step() {
            Ok(step) => {
                self.errors.succeeded();
                step
            }
            Err(error) => {
                self.errors.failed(&error);
                Step::Away(crate::store::DATABASE_RETRY_DELAY)
            }
        }
    }

    fn try_step(&mut self) -> Result<Step, StoreError> {
        if self.is_paused()? {
            return Ok(Step::Fenced);
        }
        if self.recording.is_none() {
            // Left over where the database refused: before anything else is published, it has to
            // know.
            self.record()?;
        }
        let (after, limit) = (self.published_to, self.batch_max);
        let batch = self
            .store
            .read(|connection| outbox::unpublished(connection, after, limit))?;
        if batch.is_empty() && self.publisher.due().is_none_or(|at| at > Instant::now()) {
            self.record()?;
            self.published_to = 0;
            return Ok(Step::Idle);
        }
        // Without events a call only looks after the connection and what was published.
        if !batch.is_empty() {
            self.metrics.relay_attempted(Timestamp::now());
        }
        let published = self.publisher.publish(&batch);
        let whole = published
            .receipts
            .iter()
            .map(|receipt| receipt.outbox_id)
            .eq(batch.iter().map(|e| e.outbox_id));
        let step = match published.trouble {
            None => {
                self.outage.recovered();
                Step::Progress
            }
            Some(PublishError::Unavailable(away)) => Step::Away(self.outage.failed(&away)),
            Some(PublishError::Hidden(why)) => {
                let delay = self.outage.failed(&why);
                if batch.is_empty() {
                    Step::Away(delay)
                } else {
                    Step::Progress
                }
            }
            Some(PublishError::Fenced(reason)) => {
                self.fenced = Some(
                    self.store
                        .read(relay_action::last_resume)
                        .unwrap_or_default(),
                );
                self.outage.fenced(&format!(
                    "another process publishes as node {}: {reason}. Payments are accepted, and \
                        their events wait. Stop the other process, then run `payrelay outbox \
                        resume`, or restart this one",
                    self.store.node()
                ));
                Step::Fenced
            }
        };
        let before = self.record();
        self.unrecorded.extend(published.receipts);
        self.reached = published.reached;
        before?;
        self.begin_record()?;
        if let Some(last) = batch.last().filter(|_| whole) {
            self.published_to = last.outbox_id;
        } else {
            // What has no receipt is to be read again, and what has one is not: the database has to
            // know first.
            self.record()?;
            self.published_to = 0;
        }
        Ok(step)
    }

    /// While it is fenced: whether no operator has resumed it yet.
    fn is_paused(&mut self) -> Result<bool, StoreError> {
        let Some(before) = self.fenced else {
            return Ok(false);
        };
        if self.store.read(relay_action::last_resume)? == before {
            return Ok(true);
        }
        log::info!("the relay was resumed by an operator: taking over from the other process");
        self.fenced = None;
        Ok(false)
    }

    /// Waits until all that was published is recorded; on success nothing is left to be recorded.
    fn record(&mut self) -> Result<(), StoreError> {
        if self.unrecorded.is_empty() {
            return Ok(());
        }
        if self.recording.is_none() {
            self.begin_record()?;
        }
        if let Some(recording) = self.recording.take() {
            recording.wait()?;
        }
        self.metrics.published(self.unrecorded.len());
        if self
            .unrecorded
            .iter()
            .any(|receipt| receipt.place == Place::Delivery)
        {
            self.notifier.wake();
        }
        self.unrecorded.clear();
        Ok(())
    }

    fn begin_record(&mut self) -> Result<(), StoreError> {
        if !self.unrecorded.is_empty() {
            let (receipts, reached) = (self.unrecorded.clone(), self.reached.clone());
            let mark = move |tx: &Transaction<'_>| {
                publication::mark_published(tx, &receipts, Timestamp::now())?;
                let Some(reached) = &reached else {
                    return Ok(());
                };
                visibility::note(tx, &reached.topic, &receipts)?;
                topic::save_published_offsets(tx, reached)
            };
            self.recording = Some(self.store.begin_write(mark)?);
        }
        Ok(())
    }
}
