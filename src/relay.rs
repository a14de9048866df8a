//! The relay: publishes the outbox in commit order, then marks what was published. It never deletes.
//!
//! Publish, wait for the word, then record. A crash after the word and before the record publishes those events once
//! more at the next start, under the same event ids; the consumer drops the second copies.

use std::time::Duration;

use crossbeam_channel::{Receiver, after, never, select_biased};

use crate::clock::Timestamp;
use crate::counters::Counters;
use crate::outage::{Backoff, Outage, Part};
use crate::publisher::Publisher;
use crate::store::outbox::{self, Place, Receipt};
use crate::store::{Store, StoreError};
use crate::worker::{Stop, Waker};

/// How long the relay waits when the other side is away. The cap is short because nothing is spent by trying: no
/// attempt is counted against any row.
pub const BACKOFF: Backoff = Backoff { base: Duration::from_millis(100), cap: Duration::from_secs(5) };

/// Publishes the outbox.
pub struct Relay {
    store: Store,
    publisher: Box<dyn Publisher>,
    batch_max: usize,
    wake: Receiver<()>,
    notifier: Waker,
    outage: Outage,
    counters: Counters,
    /// Published, but not recorded because the database refused: never to be published again.
    unrecorded: Vec<Receipt>,
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
}

impl Relay {
    /// A relay that is woken by `wake` and wakes the notifier when it has written deliveries itself.
    pub fn new(
        store: Store,
        publisher: Box<dyn Publisher>,
        batch_max: usize,
        wake: Receiver<()>,
        notifier: Waker,
        part: Part,
        counters: Counters,
    ) -> Self {
        let outage = Outage::new(publisher.name(), BACKOFF, part);
        Self { store, publisher, batch_max, wake, notifier, outage, counters, unrecorded: Vec::new() }
    }

    /// Works until the stop, then once more tries to record what was published.
    pub fn run(mut self, stop: &Stop) {
        self.work(stop);
        if let Err(error) = self.record() {
            let count = self.unrecorded.len();
            log::error!("{count} events are published but could not be recorded, and will be published again: {error}");
        }
    }

    fn work(&mut self, stop: &Stop) {
        while !stop.requested() {
            let (wake, pause) = match self.step() {
                Step::Progress => continue,
                Step::Idle => (self.wake.clone(), never()),
                Step::Away(delay) => (never(), after(delay)),
            };
            select_biased! {
                recv(stop.signal()) -> _ => return,
                recv(wake) -> _ => {}
                recv(pause) -> _ => {}
            }
        }
    }

    /// One batch: read, publish, record.
    pub fn step(&mut self) -> Step {
        match self.try_step() {
            Ok(step) => step,
            Err(error) => {
                log::error!("the relay waits for the database: {error}");
                Step::Away(crate::store::PAUSE)
            }
        }
    }

    fn try_step(&mut self) -> Result<Step, StoreError> {
        self.record()?;
        let batch = self.store.read(|connection| outbox::unpublished(connection, self.batch_max))?;
        if batch.is_empty() {
            return Ok(Step::Idle);
        }
        self.counters.relay_attempted(Timestamp::now());
        let published = self.publisher.publish(&batch);
        self.unrecorded = published.receipts;
        self.record()?;
        if let Some(away) = published.away {
            return Ok(Step::Away(self.outage.failed(&away)));
        }
        self.outage.recovered();
        Ok(Step::Progress)
    }

    /// Marks what was published; on success nothing is left to be marked.
    fn record(&mut self) -> Result<(), StoreError> {
        if self.unrecorded.is_empty() {
            return Ok(());
        }
        let receipts = self.unrecorded.clone();
        self.store.write(move |tx| outbox::mark_published(tx, &receipts, Timestamp::now()))?;
        self.counters.published(self.unrecorded.len());
        if self.unrecorded.iter().any(|receipt| receipt.place == Place::Delivery) {
            self.notifier.wake();
        }
        self.unrecorded.clear();
        Ok(())
    }
}
