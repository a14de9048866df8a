//! Events that the topic does not bring, backfilled from the outbox.

use std::time::{Duration, Instant};

use super::{CALL_TIMEOUT, Consumer, Late, Sweep};
use crate::domain::timestamp::Timestamp;
use crate::kafka::cluster::with_kafka_timeout;
use crate::store::unconsumed::{self, Unconsumed, UnconsumedPage};
use crate::store::{StoreError, Transaction};

/// The maximum number of rows that the low-water mark moves over in a transaction of its own.
const ADVANCE_MAX: usize = 1_000;

/// How many such transactions one check makes at most.
const ADVANCES_MAX: usize = 10;

/// The maximum number of events in one backfill transaction.
const BACKFILL_MAX: usize = 1000;

/// The consumer searches the topic for an event that it has not received after this time.
const SWEEP_AFTER: Duration = Duration::from_secs(5);

/// An event that has not arrived after this time makes the consumer unavailable.
const LATE_AFTER: Duration = Duration::from_mins(1);

impl Consumer {
    /// Searches for unconsumed events, and backfills those that will not arrive. Returns whether
    /// there is more to do at once.
    pub(super) fn check(&mut self) -> Result<bool, StoreError> {
        // Above the mark, rows with a delivery would hide those without one.
        let is_behind = self.advance_mark()?;
        let (waiting, first_page) = self.store.read(unconsumed::first_page_of_unconsumed)?;
        let first = first_page.events.first().map(|event| event.outbox_id);
        let age = waiting
            .age(Timestamp::now())
            .max(self.age_of_first_unconsumed(first));
        self.late = (age > LATE_AFTER).then_some(Late {
            count: waiting.count,
            age_s: age.as_secs(),
        });
        let mut more = is_behind;
        if waiting.count == 0 {
            if !is_behind {
                self.sweep = Sweep::Idle;
            }
            self.page_after = 0;
        } else {
            let page = match self.page_after {
                0 => first_page,
                after => self
                    .store
                    .read(|connection| unconsumed::page_of_unconsumed(connection, after))?,
            };
            self.page_after = page.next.unwrap_or(0);
            more |= self.backfill_passed(&page)? > 0 && page.next.is_some();
            self.sweep(&page, age)?;
        }
        Ok(more)
    }

    /// Moves the low-water mark. Returns whether it is still behind.
    fn advance_mark(&self) -> Result<bool, StoreError> {
        for _ in 0..ADVANCES_MAX {
            let advance =
                |tx: &Transaction<'_>| unconsumed::advance_unconsumed_mark(tx, ADVANCE_MAX);
            if !self.store.read(unconsumed::is_unconsumed_mark_behind)?
                || !self.store.write_in_background(advance)?
            {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// For how long this event has been the first that is unconsumed. Its own time may be in the
    /// future, if the clock was set back.
    fn age_of_first_unconsumed(&mut self, first: Option<i64>) -> Duration {
        let now = Instant::now();
        let since = match (first, self.first_unconsumed) {
            (Some(first), Some((known, since))) if first == known => since,
            _ => now,
        };
        self.first_unconsumed = first.map(|first| (first, since));
        now.duration_since(since)
    }

    /// Backfills events before the offsets from which their partitions are read.
    fn backfill_passed(&self, page: &UnconsumedPage) -> Result<usize, StoreError> {
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

    /// Backfills events whose offsets do not help: of a topic that was recreated or truncated, or
    /// without offset.
    fn sweep(&mut self, page: &UnconsumedPage, age: Duration) -> Result<(), StoreError> {
        let Some(membership) = &self.membership else {
            return Ok(());
        };
        let runtime = self.driver.runtime();
        match &self.sweep {
            Sweep::Idle if age < SWEEP_AFTER => {}
            // First the events that are missing, then the end of each partition. So an event that
            // is on the topic is before these ends.
            Sweep::Idle | Sweep::Due => {
                match runtime
                    .block_on(async { with_kafka_timeout(CALL_TIMEOUT, membership.ends()).await })
                {
                    Ok(ends) => {
                        let events = page.events.iter().map(|event| event.outbox_id).collect();
                        self.sweep = Sweep::Reading { events, ends };
                    }
                    Err(failure) => {
                        log::debug!("the ends of the topic could not be read: {failure}");
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
            let topic = topic.clone();
            let events = events.to_vec();
            let backfill = move |tx: &Transaction<'_>| {
                unconsumed::backfill_unconsumed(tx, topic.as_ref(), &events, Timestamp::now())
            };
            count += self.store.write(backfill)?;
            self.notifier.wake();
        }
        if count > 0 {
            log::warn!(
                event = "events_backfilled", events = count;
                "backfilled {count} published events from the outbox: the topic does not bring \
                    them any more"
            );
        }
        Ok(count)
    }
}
