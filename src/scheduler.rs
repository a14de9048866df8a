//! The scheduler: at every interval it wakes the relay for stuck events, and writes one summary
//! line. Every second it deletes events that are past their retention.

use std::time::{Duration, Instant};

use crossbeam_channel::{after, select_biased};

use crate::config;
use crate::domain::timestamp::Timestamp;
use crate::runtime::error_log::ErrorLog;
use crate::runtime::metrics::MetricTotals;
use crate::runtime::plural::counted;
use crate::runtime::worker::{Stop, Waker};
use crate::sampler::{Sample, Samples};
use crate::store::dead_letter;
use crate::store::idempotency;
use crate::store::outbox;
use crate::store::waiting::Waiting;
use crate::store::{SqlResult, Store, StoreError, Transaction};

/// How often rows that are past their retention are deleted: a few at a time instead of many at
/// each interval.
const PURGE_INTERVAL: Duration = Duration::from_secs(1);

/// How long one slice of the purge may hold the writer. The writer pauses between background jobs.
const SLICE_TIME: Duration = Duration::from_millis(1);

/// The least and the largest number of rows of a slice.
const SLICE_ROWS: std::ops::RangeInclusive<usize> = 10..=500;

/// Wakes stuck events, purges, and summarizes.
pub struct Scheduler {
    store: Store,
    settings: config::Scheduler,
    keys: config::Idempotency,
    relay: Waker,
    notifiers: Waker,
    snapshots: Samples,
    summarized: MetricTotals,
    /// Events that were purged since the last summary.
    purged: usize,
    /// How many rows one slice of the purge deletes.
    slice_rows: usize,
    /// Since when the purge has not come to its end.
    behind_since: Option<Instant>,
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
    /// The waiting events of the summary.
    pub snapshots: Samples,
}

/// The result of a purge.
#[derive(Default)]
struct Purged {
    /// The number of rows.
    count: usize,
    /// Whether no row is left that is old enough.
    is_complete: bool,
}

impl Scheduler {
    /// A scheduler of `store`.
    pub fn new(store: Store, options: Options) -> Self {
        let Options {
            settings,
            keys,
            relay,
            notifiers,
            snapshots,
        } = options;
        Self {
            store,
            settings,
            keys,
            relay,
            notifiers,
            snapshots,
            summarized: MetricTotals::default(),
            purged: 0,
            slice_rows: *SLICE_ROWS.start(),
            behind_since: None,
            errors: ErrorLog::new("scheduler"),
        }
    }

    /// Runs until a stop is requested.
    pub fn run(mut self, stop: &Stop) {
        let mut round = Instant::now();
        loop {
            stop.beat();
            select_biased! {
                recv(stop.signal()) -> _ => return,
                recv(after(self.settings.interval.min(PURGE_INTERVAL))) -> _ => {}
            }
            let now = Timestamp::now();
            let result = if round.elapsed() < self.settings.interval {
                self.purge_events(now, stop)
            } else {
                round = Instant::now();
                self.step(now, stop)
            };
            match result {
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
        self.purge_events(now, stop)?;
        let cutoff = self
            .store
            .service_time()
            .saturating_sub(self.keys.retention);
        let keys_max = self.keys.keys_max.get();
        let keys = self.purge(stop, move |tx, rows| {
            idempotency::purge_idempotency_keys(tx, cutoff, keys_max, rows)
        })?;
        let metrics = self.store.metrics().store();
        metrics.purged_keys.inc_by(keys.count as u64);
        let cutoff = now.minus(self.settings.retention);
        let letters = self.purge(stop, move |tx, rows| {
            dead_letter::purge_dead_letters(tx, cutoff, rows)
        })?;
        log::debug!(
            "purged {} and {}",
            counted(keys.count, "idempotency key"),
            counted(letters.count, "closed dead letter")
        );
        // The purge may have run for as long as the interval.
        if let Some(snapshot) = self.snapshots.latest() {
            let purged = std::mem::take(&mut self.purged);
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
        let idle = now.since(oldest.max(self.store.metrics().last_relay_attempt()));
        if idle > self.settings.retry_after {
            log::warn!(
                event = "relay_woken", events = unpublished.count, idle_seconds = idle.as_secs();
                "{} unpublished, and the relay has not tried for {} s: waking it",
                counted(unpublished.count, "event"),
                idle.as_secs()
            );
            self.relay.wake();
        }
    }

    /// Deletes delivered events that are past their retention, with their deliveries.
    fn purge_events(&mut self, now: Timestamp, stop: &Stop) -> Result<(), StoreError> {
        let cutoff = now.minus(self.settings.retention);
        let purged = self.purge(stop, move |tx, rows| outbox::purge_outbox(tx, cutoff, rows))?;
        self.purged += purged.count;
        let metrics = self.store.metrics().store();
        metrics.purged_events.inc_by(purged.count as u64);
        if purged.is_complete {
            if self.behind_since.take().is_some() {
                log::info!(
                    event = "purge_complete";
                    "the purge has deleted everything that is past its retention"
                );
            }
        } else if !stop.is_requested() && self.behind_since.is_none() {
            self.behind_since = Some(Instant::now());
            log::warn!(
                event = "purge_behind";
                "the purge is behind: it deletes fewer events than become older than \
                    scheduler.retention, and the file grows"
            );
        }
        Ok(())
    }

    /// Deletes slice after slice, each in the background of the writer. It ends when no row is old
    /// enough, the next round is due, or a stop is requested.
    fn purge(
        &mut self,
        stop: &Stop,
        delete: impl Fn(&Transaction<'_>, usize) -> SqlResult<usize> + Copy + Send + 'static,
    ) -> Result<Purged, StoreError> {
        let began = Instant::now();
        let mut purged = Purged::default();
        while !stop.is_requested() && began.elapsed() <= self.settings.interval {
            let rows = self.slice_rows;
            let (count, needed) = self.store.write_in_background(move |tx| {
                let started = Instant::now();
                Ok((delete(tx, rows)?, started.elapsed()))
            })?;
            purged.count += count;
            if count < rows {
                purged.is_complete = true;
                break;
            }
            let next = if needed > SLICE_TIME {
                rows / 2
            } else {
                rows * 2
            };
            self.slice_rows = next.clamp(*SLICE_ROWS.start(), *SLICE_ROWS.end());
        }
        Ok(purged)
    }

    fn summary(&mut self, snapshot: &Sample, purged: usize, now: Timestamp) {
        let totals = self.store.metrics().totals();
        let backlog = &snapshot.backlog;
        let show = |waiting: Waiting| {
            format!(
                "{} (oldest {} s)",
                waiting.count,
                waiting.age(now).as_secs()
            )
        };
        log::info!(
            event = "summary", published = totals.published - self.summarized.published,
            delivered = totals.delivered - self.summarized.delivered,
            unknown_outcomes = totals.unknown_outcomes - self.summarized.unknown_outcomes,
            purged = purged, unpublished = backlog.unpublished.count,
            unconsumed = backlog.unconsumed.count, undelivered = backlog.undelivered().count,
            dead_letters = backlog.dead_letters.count;
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
