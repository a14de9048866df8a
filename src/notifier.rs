//! The notifier: works the delivery table off, oldest first, one message after the other.
//!
//! A message that was not taken is tried again, with backoff, before any later one is: payments are told in their
//! order. A message is marked before the next one is posted, so that a crash repeats at most the one whose answer was
//! not yet recorded.

use std::time::Duration;

use crossbeam_channel::{Receiver, after, never, select_biased};

use crate::clock::Timestamp;
use crate::counters::Counters;
use crate::outage::{Backoff, Outage, Part};
use crate::payment::{Payment, Status};
use crate::slack::Slack;
use crate::store::delivery::{self, Pending};
use crate::store::{self, Store, StoreError};
use crate::worker::Stop;

/// How long a message waits after it was not taken.
pub const BACKOFF: Backoff = Backoff { base: Duration::from_millis(500), cap: Duration::from_mins(1) };

/// How many lines the log takes between two marks.
const LOG_BATCH: usize = 500;

/// Who is told.
pub enum Channel {
    /// An incoming webhook of Slack.
    Slack(Slack),
    /// Nobody yet: no webhook is configured.
    Log,
}

/// Tells payments.
pub struct Notifier {
    store: Store,
    channel: Channel,
    wake: Receiver<()>,
    outage: Outage,
    counters: Counters,
    /// Told, but not recorded because the database refused: never to be told again.
    unrecorded: Vec<Pending>,
}

/// What a step has found.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// There may be more at once.
    Progress,
    /// Nothing waits.
    Idle,
    /// What waits is not due before this has passed.
    Later(Duration),
}

impl Notifier {
    /// A notifier that is woken by `wake`.
    pub fn new(store: Store, channel: Channel, wake: Receiver<()>, part: Part, counters: Counters) -> Self {
        Self { store, channel, wake, outage: Outage::new("Slack", BACKOFF, part), counters, unrecorded: Vec::new() }
    }

    /// Works until the stop.
    pub fn run(mut self, stop: &Stop) {
        while !stop.requested() {
            let pause = match self.step() {
                Step::Progress => continue,
                Step::Idle => never(),
                Step::Later(delay) => after(delay),
            };
            select_biased! {
                recv(stop.signal()) -> _ => return,
                recv(self.wake) -> _ => {}
                recv(pause) -> _ => {}
            }
        }
    }

    /// The oldest message, if it is due; for the log, a batch of them.
    pub fn step(&mut self) -> Step {
        self.try_step().unwrap_or_else(|error| {
            log::error!("the notifier waits for the database: {error}");
            Step::Later(store::PAUSE)
        })
    }

    fn try_step(&mut self) -> Result<Step, StoreError> {
        self.record()?;
        let limit = match self.channel {
            Channel::Slack(_) => 1,
            Channel::Log => LOG_BATCH,
        };
        let pending = self.store.read(|connection| delivery::pending(connection, limit))?;
        let Some(first) = pending.first() else { return Ok(Step::Idle) };
        let now = Timestamp::now();
        let wait = first.next_attempt_at.since(now);
        // No wait is longer than the cap: a clock that was ahead when it was written has been set right since.
        if !wait.is_zero() && wait <= BACKOFF.cap {
            return Ok(Step::Later(wait));
        }
        let told = match &self.channel {
            Channel::Slack(slack) => slack.post(&line(&first.payment)),
            Channel::Log => Ok(()),
        };
        match told {
            Ok(()) => {
                self.outage.recovered();
                self.unrecorded = pending;
                self.record()?;
                Ok(Step::Progress)
            }
            Err(error) => {
                let _ = self.outage.failed(&error);
                let delay = BACKOFF.delay(first.attempts.saturating_add(1), fastrand::f64());
                let (id, next) = (first.outbox_id, Timestamp::now().plus(delay));
                self.store.write(move |tx| delivery::mark_failed(tx, id, &error.to_string(), next))?;
                Ok(Step::Later(delay))
            }
        }
    }

    /// Marks what was told; on success nothing is left to be marked.
    fn record(&mut self) -> Result<(), StoreError> {
        if self.unrecorded.is_empty() {
            return Ok(());
        }
        let ids: Vec<i64> = self.unrecorded.iter().map(|pending| pending.outbox_id).collect();
        let now = Timestamp::now();
        self.store.write(move |tx| delivery::mark_delivered(tx, &ids, now))?;
        self.counters.delivered(self.unrecorded.len());
        let to = match self.channel {
            Channel::Slack(_) => "to Slack",
            Channel::Log => "to this log only",
        };
        for pending in self.unrecorded.drain(..) {
            let took_ms = now.since(pending.created_at).as_millis();
            log::info!("delivered {to}, {took_ms} ms after its commit: {}", line(&pending.payment));
        }
        Ok(())
    }
}

/// What is said of a payment.
pub fn line(payment: &Payment) -> String {
    let Payment { id, user_id, reservation_id, amount, currency, .. } = payment;
    match payment.status {
        Status::Completed => {
            format!("Payment {id} COMPLETED: user {user_id} paid {amount} {currency} for reservation {reservation_id}")
        }
        Status::Failed => {
            let failure = payment.failure.as_deref().unwrap_or("no reason was stored");
            format!("Payment {id} FAILED: user {user_id}, reservation {reservation_id}: {failure}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_the_contract_shows() {
        let completed = Payment {
            id: 1,
            user_id: 42,
            reservation_id: 1001,
            amount: 150_000,
            currency: "KRW".into(),
            status: Status::Completed,
            failure: None,
            executed_at: Timestamp::from_micros(0),
        };
        assert_eq!(line(&completed), "Payment 1 COMPLETED: user 42 paid 150000 KRW for reservation 1001");
        let failed = Payment { id: 2, status: Status::Failed, failure: Some("already paid".into()), ..completed };
        assert_eq!(line(&failed), "Payment 2 FAILED: user 42, reservation 1001: already paid");
    }
}
