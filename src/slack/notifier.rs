//! A notifier: sends the deliveries of one channel, oldest first, one message after the other.
//!
//! It keeps the order: a message that was not accepted is sent again before any later one.
//! [`crate::slack::isolation`] decides the meaning of a rejection: no payment becomes a dead letter
//! for it. A few payments have a message each, more share a digest, and when very many wait one
//! summary counts them all.
//!
//! Deliveries are SENDING before a POST, and their outcome is recorded before the next POST. So a
//! crash repeats at most the one message whose outcome was not recorded.

mod actions;

use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, after, select_biased};

use serde_json::Value;

use crate::domain::timestamp::Timestamp;
use crate::runtime::backoff::Backoff;
use crate::runtime::error_log::ErrorLog;
use crate::runtime::health::HealthHandle;
use crate::runtime::outage::OutageTracker;
use crate::runtime::resume::ResumeHandle;
use crate::runtime::worker::Stop;
use crate::slack::channel::{Sink, SlackChannel};
use crate::slack::delivery_log::{log_delivered_batch, log_delivered_payment};
use crate::slack::delivery_queue::{DeliveryBatch, DeliveryQueue, UnsavedOutcome};
use crate::slack::isolation::{Format, Isolation, Verdict};
use crate::slack::rate_limit::RateLimiter;
use crate::slack::webhook::PostOutcome;
use crate::store::delivery::{self, Carrier, DeliveryOutcome};
use crate::store::{self, Store, StoreError};

/// How long a channel waits after a message that failed.
pub const BACKOFF: Backoff = Backoff {
    base: Duration::from_millis(500),
    cap: Duration::from_mins(1),
};

/// The maximum number of payments that are logged as delivered after one transaction.
const LOG_BATCH: usize = 500;

/// How soon a waiting notifier sees an operator's action.
const ACTION_INTERVAL: Duration = Duration::from_secs(1);

/// The time since any start; it never goes back.
pub type Clock = Box<dyn Fn() -> Duration + Send>;

/// Delivers the payments of one channel.
pub struct Notifier {
    queue: DeliveryQueue,
    channel: SlackChannel,
    limiter: RateLimiter,
    clock: Clock,
    wake: Receiver<()>,
    resume: ResumeHandle,
    outage: OutageTracker,
    errors: ErrorLog,
    isolation: Isolation,
    /// The last executed action of an operator; `None` before the first query.
    last_action: Option<i64>,
    /// Whether an operator has paused the channel: nothing is sent until a resume.
    is_held: bool,
    /// Whether an unusual response was logged.
    is_unusual_response_logged: bool,
    /// The outcome of the last message. It is saved before anything else, or with the beginning of
    /// the next message.
    unsaved: Option<UnsavedOutcome>,
}

/// The result of a step.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// There may be more to do at once.
    Progress,
    /// No payment waits.
    Idle,
    /// Send nothing before this time has passed.
    RetryAfter(Duration),
}

/// The connections of a notifier to other threads.
pub struct Options {
    /// Wakes the notifier.
    pub wake: Receiver<()>,
    /// An operator's request to resume the channel.
    pub resume: ResumeHandle,
    /// The component on the health page.
    pub health: HealthHandle,
}

impl Notifier {
    /// A notifier of `channel`.
    pub fn new(store: Store, channel: SlackChannel, options: Options) -> Self {
        let Options {
            wake,
            resume,
            health,
        } = options;
        let limiter = RateLimiter::new(
            channel.messages_per_second,
            channel.burst,
            BACKOFF,
            channel.probe_interval,
        );
        let outage = OutageTracker::new(channel.display_name(), BACKOFF, health);
        let queue = DeliveryQueue {
            metrics: store.metrics().channel(&channel.name),
            store,
            channel: channel.name.clone(),
        };
        let errors = ErrorLog::new(format!("notifier {}", channel.name));
        let isolation = Isolation::new(channel.digest_max);
        let started = Instant::now();
        Self {
            queue,
            channel,
            limiter,
            clock: Box::new(move || started.elapsed()),
            wake,
            resume,
            outage,
            errors,
            isolation,
            last_action: None,
            is_held: false,
            is_unusual_response_logged: false,
            unsaved: None,
        }
    }

    /// Replaces the clock, for tests without waiting.
    #[must_use]
    pub fn with_clock(mut self, clock: Clock) -> Self {
        self.clock = clock;
        self
    }

    /// Runs until a stop is requested.
    pub fn run(mut self, stop: &Stop) {
        self.work(stop);
        // One more attempt to save the last outcome.
        if let Err(error) = self.save_outcome() {
            log::error!(
                event = "outcome_not_recorded";
                "the outcome of the last message could not be recorded, it will be sent again: \
                    {error}"
            );
        }
    }

    fn work(&mut self, stop: &Stop) {
        while !stop.is_requested() {
            let pause = match self.step() {
                Step::Progress => continue,
                // An operator's action arrives through the database.
                Step::Idle => after(ACTION_INTERVAL),
                Step::RetryAfter(delay) => after(delay.min(ACTION_INTERVAL)),
            };
            select_biased! {
                recv(stop.signal()) -> _ => return,
                recv(self.wake) -> _ => {}
                recv(pause) -> _ => {}
            }
        }
    }

    /// One message, if it may go; for the log, a batch of lines.
    pub fn step(&mut self) -> Step {
        match self.try_step() {
            Ok(step) => {
                self.errors.succeeded();
                step
            }
            Err(error) => {
                self.errors.failed(&error);
                Step::RetryAfter(store::DATABASE_RETRY_DELAY)
            }
        }
    }

    fn try_step(&mut self) -> Result<Step, StoreError> {
        if !self.is_saved_with_next() {
            self.save_outcome()?;
        }
        self.execute_actions()?;
        if self.is_held {
            self.save_outcome()?;
            return Ok(Step::Idle);
        }
        match self.channel.sink {
            Sink::Log => self.write_to_log(),
            Sink::Webhook(_) => self.send_next(),
        }
    }

    fn write_to_log(&mut self) -> Result<Step, StoreError> {
        let Some(payments) = self.queue.oldest(LOG_BATCH)? else {
            return Ok(Step::Progress);
        };
        if payments.is_empty() {
            return Ok(Step::Idle);
        }
        let ids: Vec<i64> = payments.iter().map(|payment| payment.outbox_id).collect();
        let now = Timestamp::now();
        self.queue
            .store
            .write(move |tx| delivery::mark_deliveries_delivered(tx, &ids, Carrier::Single, now))?;
        self.queue.metrics.delivered(payments.len());
        for payment in &payments {
            let waited = now.since(payment.created_at);
            let trace_id = payment.trace_id.as_deref();
            self.queue.metrics.latency.observe(waited, trace_id);
            log_delivered_payment(&self.channel, "this log only", payment, now);
        }
        Ok(Step::Progress)
    }

    /// Posts a message, and handles its outcome.
    fn send_next(&mut self) -> Result<Step, StoreError> {
        if self.resume.take_request() {
            self.limiter.resume(self.now());
        }
        let wait = self.limiter.wait(self.now());
        if !wait.is_zero() {
            self.save_outcome()?;
            return Ok(Step::RetryAfter(wait));
        }
        let Some((batch, message)) = self.next_message()? else {
            return Ok(Step::Progress);
        };
        if batch.len() == 0 {
            return Ok(Step::Idle);
        }
        let Sink::Webhook(webhook) = &self.channel.sink else {
            return Ok(Step::Idle);
        };
        self.limiter.sent((self.clock)());
        let started = Instant::now();
        let answer = webhook.post(&message);
        self.queue.metrics.posted(answer.kind(), started.elapsed());
        self.handle_outcome(answer, batch)
    }

    /// The oldest payment, or as many as one message carries, marked as SENDING, and the message.
    /// `None`: some could not be read, and are dead letters now.
    fn next_message(&mut self) -> Result<Option<(DeliveryBatch, Value)>, StoreError> {
        let now = self.now();
        let over = self.channel.summary_over;
        // They count as waiting until their outcome is saved.
        let unsaved = self.unsaved.as_ref().map_or(0, |last| last.batch.len());
        if over > 0
            && self.isolation.is_whole(now)
            && self.queue.has_more_than(over.saturating_add(unsaved))?
        {
            self.save_outcome()?;
            return self.queue.summary(&self.channel.style).map(Some);
        }
        let is_crowded = self
            .queue
            .has_more_than(self.channel.digest_over.saturating_add(unsaved))?;
        let size = if is_crowded {
            self.isolation.size(now)
        } else {
            1
        };
        let oldest = if unsaved > 0 {
            self.queue.oldest_unsent(size)?
        } else {
            self.queue.oldest(size)?
        };
        let Some(mut payments) = oldest else {
            return Ok(None);
        };
        if payments.is_empty() {
            self.save_outcome()?;
            return Ok(Some((DeliveryBatch::Payments(payments), Value::Null)));
        }
        let all: Vec<_> = payments.iter().map(|payment| &payment.payment).collect();
        let message = self.channel.style.message(&all);
        payments.truncate(message.payments);
        let json = match payments.as_slice() {
            [only] if self.isolation.format() == Format::Plain => {
                self.channel.style.plain(&only.payment)
            }
            _ => message.json,
        };
        let time = Timestamp::now();
        self.queue.begin(&payments, self.unsaved.as_ref(), time)?;
        self.report_outcome(time);
        Ok(Some((DeliveryBatch::Payments(payments), json)))
    }

    fn handle_outcome(
        &mut self,
        answer: PostOutcome,
        batch: DeliveryBatch,
    ) -> Result<Step, StoreError> {
        let now = self.now();
        let (step, outcome) = match answer {
            PostOutcome::Accepted(remark) => {
                self.limiter.succeeded();
                self.outage.recovered();
                self.isolation.accepted();
                if let Some(remark) = remark.filter(|_| !self.is_unusual_response_logged) {
                    self.is_unusual_response_logged = true;
                    log::warn!(
                        event = "unusual_response", channel = self.channel.name.as_str();
                        "{}: {remark}; the message counts as delivered",
                        self.channel.display_name()
                    );
                }
                (Step::Progress, DeliveryOutcome::Delivered(batch.carrier()))
            }
            PostOutcome::RateLimited(retry_after) => {
                let wait = self.limiter.limited(now, retry_after, fastrand::f64());
                self.outage.limited(&format!(
                    "Slack asks for a pause of {:.0} s",
                    wait.as_secs_f64()
                ));
                (Step::RetryAfter(wait), DeliveryOutcome::Requeued)
            }
            PostOutcome::Unavailable(error, retry_after) => {
                let wait = self.limiter.failed(now, retry_after, fastrand::f64());
                let _ = self.outage.failed(&error);
                (Step::RetryAfter(wait), DeliveryOutcome::Failed(error))
            }
            PostOutcome::Unknown(error) => (
                self.on_unknown(&error, &batch),
                DeliveryOutcome::Unknown(error),
            ),
            PostOutcome::ChannelDisabled(error) => (
                Step::RetryAfter(self.pause(&error)),
                DeliveryOutcome::Failed(error),
            ),
            PostOutcome::PayloadRejected(error) => self.on_rejected(error, batch.len()),
        };
        self.unsaved = Some(UnsavedOutcome { batch, outcome });
        if !self.is_saved_with_next() {
            self.save_outcome()?;
        }
        Ok(step)
    }

    fn on_unknown(&mut self, error: &str, batch: &DeliveryBatch) -> Step {
        log::warn!(
            event = "unknown_outcome", channel = self.channel.name.as_str(), payments = batch.len();
            "no response to a message with payments {}: it may appear twice: {error}",
            batch.span()
        );
        self.queue.metrics.unknown_outcome();
        if self.isolation.unanswered() {
            return Step::RetryAfter(self.pause(&format!(
                "several consecutive messages got no response: {error}"
            )));
        }
        let wait = self.limiter.failed(self.now(), None, fastrand::f64());
        let _ = self.outage.failed(&error);
        Step::RetryAfter(wait)
    }

    fn on_rejected(&mut self, error: String, payments: usize) -> (Step, DeliveryOutcome) {
        match self.isolation.rejected(payments, self.now()) {
            Verdict::SendFewer => {
                log::warn!(
                    event = "message_rejected", channel = self.channel.name.as_str(),
                    payments = payments;
                    "a message with {payments} payments was rejected: {error}; sending fewer at a \
                        time"
                );
                (Step::Progress, DeliveryOutcome::Requeued)
            }
            Verdict::SendPlain => {
                log::warn!(
                    event = "payment_rejected", channel = self.channel.name.as_str();
                    "a message with one payment was rejected: {error}; sending it as plain text"
                );
                (Step::Progress, DeliveryOutcome::Failed(error))
            }
            Verdict::Pause => (
                Step::RetryAfter(self.pause(&error)),
                DeliveryOutcome::Failed(error),
            ),
        }
    }

    fn pause(&mut self, error: &str) -> Duration {
        let command = format!("payrelay channels resume {}", self.channel.name);
        self.outage.paused(&error, &command);
        self.limiter.pause(self.now())
    }

    /// Saves the outcome of the last message, if it is unsaved.
    fn save_outcome(&mut self) -> Result<(), StoreError> {
        let Some(UnsavedOutcome { batch, outcome }) = &self.unsaved else {
            return Ok(());
        };
        let now = Timestamp::now();
        self.queue.save(batch, outcome, now)?;
        self.report_outcome(now);
        Ok(())
    }

    /// The outcome of the last message is saved now.
    fn report_outcome(&mut self, now: Timestamp) {
        let Some(UnsavedOutcome { batch, outcome }) = self.unsaved.take() else {
            return;
        };
        if matches!(outcome, DeliveryOutcome::Delivered(_)) {
            self.queue.metrics.delivered(batch.len());
            self.queue
                .metrics
                .message_payments
                .observe_size(batch.len());
            batch.count_latencies(&self.queue.metrics, now);
            log_delivered_batch(&self.channel, &batch, now);
        }
    }

    /// Whether the transaction that begins the next message also saves the outcome of the last one.
    /// That saves a commit for each message. It needs a delivered message, and no pause after it.
    fn is_saved_with_next(&mut self) -> bool {
        let now = self.now();
        let unsaved = self.unsaved.as_ref();
        unsaved.is_some_and(UnsavedOutcome::is_delivered) && self.limiter.wait(now).is_zero()
    }

    fn now(&self) -> Duration {
        (self.clock)()
    }
}
