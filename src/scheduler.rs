//! The scheduler: at every interval it wakes the relay for stuck events, deletes rows that are past
//! their retention, and writes one summary line.

use std::time::{Duration, Instant};

use crossbeam_channel::{after, select_biased};

use crate::config;
use crate::domain::timestamp::Timestamp;
use crate::runtime::error_log::ErrorLog;
use crate::runtime::metrics::{MetricTotals, Metrics};
use crate::runtime::plural::counted;
use crate::runtime::worker::{Stop, Waker};
use crate::sampler::{Sample, Samples};
use crate::store::dead_letter;
use crate::store::idempotency;
use crate::store::outbox;
use crate::store::waiting::Waiting;
use crate::store::{SqlResult, Store, StoreError, Transaction};

/// How many events, or keys, one transaction of the purge deletes: it holds the writer for half a
/// millisecond.
const BATCH: usize = 30;

/// After each batch the purge pauses for four times the duration of the batch. Payments have the
/// disk four fifths of the time, and a million rows are deleted within minutes.
const PAUSE_FACTOR: u32 = 4;

/// A batch that had to wait for its turn does not count as a long one.
const PAUSE_MAX: Duration = Duration::from_millis(100);

/// Wakes stuck events, purges, and summarizes.
pub struct Scheduler {
    store: Store,
    settings: config::Scheduler,
    keys: config::Idempotency,
    relay: Waker,
    notifiers: Waker,
    metrics: Metrics,
    snapshots: Samples,
    summarized: MetricTotals,
    errors: ErrorLog,
}

/// The settings of a scheduler, and its connections to other threads.
pub struct Options {
    /// `[scheduler]`
    pub settings: config::Scheduler,
    /// `[idempotency]`
    pub keys: config::Idempotency,
    /// Wakes the relay when events are stuck.
    pub relay: Waker,
    /// Wakes the notifiers at each round.
    pub notifiers: Waker,
    /// Counts what was done since the last summary.
    pub metrics: Metrics,
    /// The waiting events of the summary.
    pub snapshots: Samples,
}

impl Scheduler {
    /// A scheduler of `store`.
    pub fn new(store: Store, options: Options) -> Self {
        let Options {
            settings,
            keys,
            relay,
            notifiers,
            metrics,
            snapshots,
        } = options;
        Self {
            store,
            settings,
            keys,
            relay,
            notifiers,
            metrics,
            snapshots,
            summarized: MetricTotals::default(),
            errors: ErrorLog::new("scheduler"),
        }
    }

    /// Runs until a stop is requested.
    pub fn run(mut self, stop: &Stop) {
        loop {
            select_biased! {
                recv(stop.signal()) -> _ => return,
                recv(after(self.settings.interval)) -> _ => {}
            }
            match self.step(Timestamp::now(), stop) {
                Ok(()) => self.errors.succeeded(),
                Err(error) => self.errors.failed(&error),
            }
        }
    }

    /// One round.
    pub fn step(&mut self, now: Timestamp, stop: &Stop) -> Result<(), StoreError> {
        if let Some(snapshot) = self.snapshots.latest() {
            self.wake_for_stuck(snapshot.backlog.unpublished, now);
        }
        // A command may have replayed dead letters in the database.
        self.notifiers.wake();
        let cutoff = now.minus(self.settings.retention);
        let purged = self.purge(stop, move |tx| outbox::purge_outbox(tx, cutoff, BATCH))?;
        let cutoff = self
            .store
            .service_time()
            .saturating_sub(self.keys.retention);
        let keys_max = self.keys.keys_max.get();
        let keys = self.purge(stop, move |tx| {
            idempotency::purge_idempotency_keys(tx, cutoff, keys_max, BATCH)
        })?;
        let cutoff = now.minus(self.settings.retention);
        let letters = self.purge(stop, move |tx| {
            dead_letter::purge_dead_letters(tx, cutoff, BATCH)
        })?;
        log::debug!(
            "purged {} and {}",
            counted(keys, "idempotency key"),
            counted(letters, "closed dead letter")
        );
        // The purge may have run for as long as the interval.
        if let Some(snapshot) = self.snapshots.latest() {
            self.summary(&snapshot, purged, Timestamp::now());
        }
        Ok(())
    }

    /// Wakes the relay if events wait and its last attempt is long ago. The time counts from that
    /// attempt, not from the events: during an outage the relay retries all the time.
    fn wake_for_stuck(&self, unpublished: Waiting, now: Timestamp) {
        let Some(oldest) = unpublished.oldest_at else {
            return;
        };
        let idle = now.since(oldest.max(self.metrics.last_relay_attempt()));
        if idle > self.settings.retry_after {
            log::warn!(
                "{} unpublished, and the relay has not tried for {} s: waking it",
                counted(unpublished.count, "event"),
                idle.as_secs()
            );
            self.relay.wake();
        }
    }

    /// Deletes batch after batch, each in the background of the writer. It ends when no row is old
    /// enough, the next round is due, or a stop is requested.
    fn purge(
        &self,
        stop: &Stop,
        batch: impl Fn(&Transaction<'_>) -> SqlResult<usize> + Copy + Send + 'static,
    ) -> Result<usize, StoreError> {
        let round = Instant::now();
        let mut purged = 0;
        loop {
            let started = Instant::now();
            let count = self.store.write_in_background(batch)?;
            purged += count;
            if count < BATCH || round.elapsed() > self.settings.interval {
                return Ok(purged);
            }
            select_biased! {
                recv(stop.signal()) -> _ => return Ok(purged),
                recv(after((started.elapsed() * PAUSE_FACTOR).min(PAUSE_MAX))) -> _ => {}
            }
        }
    }

    fn summary(&mut self, snapshot: &Sample, purged: usize, now: Timestamp) {
        let totals = self.metrics.totals();
        let backlog = &snapshot.backlog;
        let show = |waiting: Waiting| {
            format!(
                "{} (oldest {} s)",
                waiting.count,
                waiting.age(now).as_secs()
            )
        };
        log::info!(
            "summary: published {}, delivered {}, unknown outcomes {}, purged {purged}; waiting: \
                {} to publish, {} to consume, {} to deliver; dead letters: {}",
            totals.published - self.summarized.published,
            totals.delivered - self.summarized.delivered,
            totals.unknown_outcomes - self.summarized.unknown_outcomes,
            show(backlog.unpublished),
            show(backlog.unconsumed),
            show(backlog.undelivered()),
            show(backlog.dead_letters),
        );
        self.summarized = totals;
    }
}
