//! A notifier: delivers one channel's part of the delivery table, oldest first, one message after
//! the other.
//!
//! Payments are delivered in their order: a message that was not accepted is tried again before any
//! later one. What a rejection means is decided in [`crate::slack::isolation`]: no payment becomes
//! a dead letter for it. A few payments have a message each, more share a digest, and when very
//! many wait one summary counts them all.
//!
//! Before a POST its rows say SENDING, and after the answer the outcome is recorded before the next
//! POST, so that a crash repeats at most the one message whose answer was not recorded.

use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, after, select_biased};

use crate::domain::payment::Payment;
use crate::domain::timestamp::Timestamp;
use crate::runtime::error_log::ErrorLog;
use crate::runtime::health::{Backoff, HealthHandle, OutageTracker};
use crate::runtime::metrics::{ChannelMetrics, Metrics};
use crate::runtime::resume::ResumeHandle;
use crate::runtime::worker::Stop;
use crate::slack::channel::{Channel, Sink};
use crate::slack::isolation::{Format, Isolation, Verdict};
use crate::slack::message::Summary;
use crate::slack::rate_limit::RateLimiter;
use crate::slack::webhook::PostOutcome;
use crate::store::delivery::{self, Carrier, Outcome, PendingDelivery};
use crate::store::{self, SqlResult, Store, StoreError, Transaction, channel as stored_channel};

/// How long a channel waits after a message that failed.
pub const BACKOFF: Backoff = Backoff {
    base: Duration::from_millis(500),
    cap: Duration::from_mins(1),
};

/// How many lines the log takes between two marks.
const LOG_BATCH: usize = 500;

/// How many payments one transaction of a summary marks: it holds the writer for a few
/// milliseconds.
const SUMMARY_SLICE: usize = 200;

/// How many payments one summary covers at most, so that a stop finds it done in time.
const SUMMARY_MAX: usize = 100_000;

/// How soon a waiting notifier sees an operator's order.
const ACTION_INTERVAL: Duration = Duration::from_secs(1);

/// The time since any beginning; it never goes back.
pub type Clock = Box<dyn Fn() -> Duration + Send>;

/// Delivers the payments of one channel.
pub struct Notifier {
    store: Store,
    channel: Channel,
    limiter: RateLimiter,
    clock: Clock,
    wake: Receiver<()>,
    resume: ResumeHandle,
    outage: OutageTracker,
    metrics: ChannelMetrics,
    errors: ErrorLog,
    isolation: Isolation,
    /// The last action of an operator that was carried out; `None` before the first look.
    last_action: Option<i64>,
    /// An answer that Slack does not send was logged.
    odd_answer_logged: bool,
    /// The outcome of the last message, not recorded because the database refused: it is recorded
    /// before anything else.
    unsaved: Option<Unsaved>,
}

/// The outcome of a message that is still to be recorded.
struct Unsaved {
    batch: Batch,
    outcome: Outcome,
}

/// What one message covers.
enum Batch {
    Payments(Vec<OutgoingPayment>),
    Summary {
        summary: Box<Summary>,
        oldest: Timestamp,
        last_event: i64,
    },
}

/// A payment that is being delivered.
struct OutgoingPayment {
    outbox_id: i64,
    created_at: Timestamp,
    payment: Payment,
}

impl Batch {
    fn len(&self) -> usize {
        match self {
            Self::Payments(payments) => payments.len(),
            Self::Summary { summary, .. } => summary.count,
        }
    }

    fn last_event(&self) -> i64 {
        match self {
            Self::Payments(payments) => payments.last().map_or(0, |last| last.outbox_id),
            Self::Summary { last_event, .. } => *last_event,
        }
    }

    fn carrier(&self) -> Carrier {
        match self {
            Self::Payments(payments) if payments.len() <= 1 => Carrier::Single,
            Self::Payments(_) => Carrier::Digest,
            Self::Summary { .. } => Carrier::Summary,
        }
    }

    /// The first and the last payment.
    fn span(&self) -> String {
        let ends = match self {
            Self::Payments(payments) => payments
                .first()
                .zip(payments.last())
                .map(|(first, last)| (first.payment.id, last.payment.id)),
            Self::Summary { summary, .. } => summary.span(),
        };
        ends.map_or_else(String::new, |(first, last)| format!("{first} to {last}"))
    }
}

/// What a step has found.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// There may be more at once.
    Progress,
    /// Nothing waits.
    Idle,
    /// Nothing may be delivered before this has passed.
    RetryAfter(Duration),
}

/// The connections of a notifier to other threads.
pub struct Options<'a> {
    /// Wakes it.
    pub wake: Receiver<()>,
    /// An operator's request to resume the channel.
    pub resume: ResumeHandle,
    /// The component on the health page.
    pub health: HealthHandle,
    /// Counts the channel's messages.
    pub metrics: &'a Metrics,
}

impl Notifier {
    /// A notifier of `channel`.
    pub fn new(store: Store, channel: Channel, options: Options<'_>) -> Self {
        let Options {
            wake,
            resume,
            health,
            metrics,
        } = options;
        let limiter = RateLimiter::new(
            channel.messages_per_second,
            channel.burst,
            BACKOFF,
            channel.probe_interval,
        );
        let outage = OutageTracker::new(channel.display_name(), BACKOFF, health);
        let metrics = metrics.channel(&channel.name);
        let errors = ErrorLog::new(format!("notifier {}", channel.name));
        let isolation = Isolation::new(channel.digest_max);
        let started = Instant::now();
        Self {
            store,
            channel,
            limiter,
            clock: Box::new(move || started.elapsed()),
            wake,
            resume,
            outage,
            metrics,
            errors,
            isolation,
            last_action: None,
            odd_answer_logged: false,
            unsaved: None,
        }
    }

    /// By another clock, for tests that do not wait.
    #[must_use]
    pub fn with_clock(mut self, clock: Clock) -> Self {
        self.clock = clock;
        self
    }

    /// Works until the stop.
    pub fn run(mut self, stop: &Stop) {
        self.work(stop);
        // An outcome that the database refused is tried once more.
        if let Err(error) = self.save_outcome() {
            log::error!(
                "the outcome of the last message could not be recorded, it will be sent again: \
                    {error}"
            );
        }
    }

    fn work(&mut self, stop: &Stop) {
        while !stop.requested() {
            let pause = match self.step() {
                Step::Progress => continue,
                // An operator's order comes by way of the database.
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
        self.save_outcome()?;
        self.carry_out_actions()?;
        match self.channel.sink {
            Sink::Log => self.write_to_log(),
            Sink::Slack(_) => self.send_next(),
        }
    }

    fn write_to_log(&mut self) -> Result<Step, StoreError> {
        let waiting = self.waiting(LOG_BATCH)?;
        let Some(payments) = self.split_unreadable(waiting)? else {
            return Ok(Step::Progress);
        };
        if payments.is_empty() {
            return Ok(Step::Idle);
        }
        let ids: Vec<i64> = payments.iter().map(|payment| payment.outbox_id).collect();
        let now = Timestamp::now();
        self.store
            .write(move |tx| delivery::mark_delivered(tx, &ids, Carrier::Single, now))?;
        self.metrics.delivered(payments.len());
        for payment in &payments {
            self.log_delivered("this log only", payment, now);
        }
        Ok(Step::Progress)
    }

    /// Posts a message, and handles its outcome.
    fn send_next(&mut self) -> Result<Step, StoreError> {
        if self.resume.take() {
            self.limiter.resume(self.now());
        }
        let wait = self.limiter.wait(self.now());
        if !wait.is_zero() {
            return Ok(Step::RetryAfter(wait));
        }
        let Some(batch) = self.next_batch()? else {
            return Ok(Step::Progress);
        };
        if batch.len() == 0 {
            return Ok(Step::Idle);
        }
        let form = self.isolation.form();
        let message = match &batch {
            Batch::Payments(payments) => match payments.as_slice() {
                [only] if form == Format::Plain => self.channel.style.plain(&only.payment),
                several => {
                    let payments: Vec<_> = several.iter().map(|payment| &payment.payment).collect();
                    self.channel.style.message(&payments).json
                }
            },
            Batch::Summary { summary, .. } => self.channel.style.summary(summary),
        };
        let Sink::Slack(slack) = &self.channel.sink else {
            return Ok(Step::Idle);
        };
        self.limiter.sent((self.clock)());
        let answer = slack.post(&message);
        self.handle(answer, batch)
    }

    /// The oldest payment, or as many as one message carries. Their rows say SENDING. `None`: some
    /// could not be read, and are dead letters now.
    fn next_batch(&mut self) -> Result<Option<Batch>, StoreError> {
        let now = self.now();
        let over = self.channel.summary_over;
        if over > 0 && self.isolation.is_whole(now) && self.has_more_than(over)? {
            return self.next_summary();
        }
        let crowd = self.has_more_than(self.channel.digest_over)?;
        let size = if crowd { self.isolation.size(now) } else { 1 };
        let waiting = self.waiting(size)?;
        let Some(mut payments) = self.split_unreadable(waiting)? else {
            return Ok(None);
        };
        let all: Vec<_> = payments.iter().map(|payment| &payment.payment).collect();
        let count_that_fit = self.channel.style.message(&all).payments;
        payments.truncate(count_that_fit);
        let ids: Vec<i64> = payments.iter().map(|payment| payment.outbox_id).collect();
        self.store
            .write(move |tx| delivery::mark_sending(tx, &ids))?;
        Ok(Some(Batch::Payments(payments)))
    }

    /// Everything that waits, a slice at a time, so that no transaction is long.
    fn next_summary(&mut self) -> Result<Option<Batch>, StoreError> {
        let mut summary = Box::<Summary>::default();
        let mut oldest = None;
        let mut last_event = 0;
        while summary.count < SUMMARY_MAX {
            let name = self.channel.name.clone();
            let slice = self
                .store
                .write(move |tx| delivery::begin_sending(tx, &name, last_event, SUMMARY_SLICE))?;
            let Some(last) = slice.last() else { break };
            last_event = last.outbox_id;
            for PendingDelivery {
                outbox_id,
                created_at,
                payment,
            } in slice
            {
                match payment {
                    Ok(payment) => {
                        oldest.get_or_insert(created_at);
                        summary.add(payment);
                    }
                    Err(reason) => self.dead_letter(vec![(outbox_id, reason)])?,
                }
            }
        }
        let oldest = oldest.unwrap_or_else(Timestamp::now);
        Ok(Some(Batch::Summary {
            summary,
            oldest,
            last_event,
        }))
    }

    fn handle(&mut self, answer: PostOutcome, batch: Batch) -> Result<Step, StoreError> {
        let now = self.now();
        let (step, outcome) = match answer {
            PostOutcome::Accepted(odd) => {
                self.limiter.succeeded();
                self.outage.recovered();
                self.isolation.accepted();
                if let Some(odd) = odd.filter(|_| !self.odd_answer_logged) {
                    self.odd_answer_logged = true;
                    log::warn!(
                        "{}: {odd}; the message counts as delivered",
                        self.channel.display_name()
                    );
                }
                (Step::Progress, Outcome::Delivered(batch.carrier()))
            }
            PostOutcome::RateLimited(retry_after) => {
                let wait = self.limiter.limited(now, retry_after, fastrand::f64());
                self.outage.limited(&format!(
                    "Slack asks for a pause of {:.0} s",
                    wait.as_secs_f64()
                ));
                (Step::RetryAfter(wait), Outcome::Requeued)
            }
            PostOutcome::Unavailable(error, retry_after) => {
                let wait = self.limiter.failed(now, retry_after, fastrand::f64());
                let _ = self.outage.failed(&error);
                (Step::RetryAfter(wait), Outcome::Failed(error))
            }
            PostOutcome::Unknown(error) => {
                (self.unanswered(&error, &batch), Outcome::Unknown(error))
            }
            PostOutcome::ChannelDisabled(error) => {
                (Step::RetryAfter(self.pause(&error)), Outcome::Failed(error))
            }
            PostOutcome::PayloadRejected(error) => self.rejected(error, batch.len()),
        };
        self.unsaved = Some(Unsaved { batch, outcome });
        self.save_outcome()?;
        Ok(step)
    }

    fn unanswered(&mut self, error: &str, batch: &Batch) -> Step {
        log::warn!(
            "no answer to a message with payments {}: it may show twice: {error}",
            batch.span()
        );
        self.metrics.unknown_outcome();
        if self.isolation.unanswered() {
            return Step::RetryAfter(
                self.pause(&format!("several messages in a row got no answer: {error}")),
            );
        }
        let wait = self.limiter.failed(self.now(), None, fastrand::f64());
        let _ = self.outage.failed(&error);
        Step::RetryAfter(wait)
    }

    fn rejected(&mut self, error: String, payments: usize) -> (Step, Outcome) {
        match self.isolation.rejected(payments, self.now()) {
            Verdict::SendFewer => {
                log::warn!(
                    "a message with {payments} payments was rejected: {error}; sending fewer at a \
                        time"
                );
                (Step::Progress, Outcome::Requeued)
            }
            Verdict::SendPlain => {
                log::warn!(
                    "a message with one payment was rejected: {error}; sending it as plain text"
                );
                (Step::Progress, Outcome::Failed(error))
            }
            Verdict::Pause => (Step::RetryAfter(self.pause(&error)), Outcome::Failed(error)),
        }
    }

    fn pause(&mut self, error: &str) -> Duration {
        self.outage.paused(&error);
        self.limiter.pause(self.now())
    }

    /// What operators asked since the last look.
    fn carry_out_actions(&mut self) -> Result<(), StoreError> {
        let Some(mut last) = self.last_action else {
            // What was asked of a process before this one is over.
            self.last_action = Some(self.store.read(stored_channel::last_action)?);
            return Ok(());
        };
        let name = self.channel.name.clone();
        while let Some(asked) = self
            .store
            .read(|connection| stored_channel::next_action(connection, &name, last))?
        {
            last = asked.id;
            self.last_action = Some(last);
            self.carry_out(asked)?;
        }
        Ok(())
    }

    fn carry_out(&mut self, asked: stored_channel::Asked) -> Result<(), StoreError> {
        let stored_channel::Asked { id, action, origin } = asked;
        let name = self.channel.name.clone();
        let outcome = match action {
            stored_channel::Action::Resume => {
                self.limiter.resume(self.now());
                self.store
                    .write(move |tx| stored_channel::finish(tx, id, "resumed"))?;
                "resumed".to_owned()
            }
            stored_channel::Action::Skip(_) if !self.outage.is_paused() => {
                let outcome = "nothing was skipped: the channel is not paused";
                self.store
                    .write(move |tx| stored_channel::finish(tx, id, outcome))?;
                outcome.to_owned()
            }
            stored_channel::Action::Skip(reason) => {
                let reason = format!("skipped by {origin}: {reason}");
                let now = Timestamp::now();
                let skipped = self.store.write(move |tx| {
                    let skipped = delivery::skip_oldest(tx, &name, &reason, now)?;
                    let outcome = match skipped {
                        Some(event) => format!("event {event} is a dead letter"),
                        None => "nothing was skipped: no payment waits".to_owned(),
                    };
                    stored_channel::finish(tx, id, &outcome)?;
                    Ok(outcome)
                })?;
                self.metrics.dead(1);
                self.limiter.resume(self.now());
                skipped
            }
        };
        log::info!(
            "channel {}: asked by {origin}: {outcome}",
            self.channel.name
        );
        Ok(())
    }

    fn has_more_than(&self, count: usize) -> Result<bool, StoreError> {
        let name = &self.channel.name;
        self.store
            .read(|connection| delivery::more_than(connection, name, count))
    }

    fn waiting(&self, limit: usize) -> Result<Vec<PendingDelivery>, StoreError> {
        let name = &self.channel.name;
        self.store
            .read(|connection| delivery::waiting(connection, name, limit))
    }

    /// The payments that can be delivered. Those that cannot be read become dead letters first, and
    /// then there is nothing yet.
    fn split_unreadable(
        &self,
        waiting: Vec<PendingDelivery>,
    ) -> Result<Option<Vec<OutgoingPayment>>, StoreError> {
        let mut payments = Vec::with_capacity(waiting.len());
        let mut unreadable = Vec::new();
        for PendingDelivery {
            outbox_id,
            created_at,
            payment,
        } in waiting
        {
            match payment {
                Ok(payment) => payments.push(OutgoingPayment {
                    outbox_id,
                    created_at,
                    payment,
                }),
                Err(reason) => unreadable.push((outbox_id, reason)),
            }
        }
        if unreadable.is_empty() {
            return Ok(Some(payments));
        }
        self.dead_letter(unreadable)?;
        Ok(None)
    }

    fn dead_letter(&self, dead: Vec<(i64, String)>) -> Result<(), StoreError> {
        for (outbox_id, reason) in &dead {
            log::error!("event {outbox_id} dead-lettered, it cannot be delivered: {reason}");
        }
        let (now, count) = (Timestamp::now(), dead.len());
        self.store
            .write(move |tx: &Transaction<'_>| -> SqlResult<()> {
                dead.iter().try_for_each(|(outbox_id, reason)| {
                    delivery::bury(tx, *outbox_id, Some(reason), now)
                })
            })?;
        self.metrics.dead(count);
        Ok(())
    }

    /// Records the outcome of the last message, a slice at a time; on success nothing is left to be
    /// recorded.
    fn save_outcome(&mut self) -> Result<(), StoreError> {
        let Some(Unsaved { batch, outcome }) = &self.unsaved else {
            return Ok(());
        };
        let now = Timestamp::now();
        let last = batch.last_event();
        loop {
            let name = self.channel.name.clone();
            let outcome = outcome.clone();
            let settled = self
                .store
                .write(move |tx| delivery::settle(tx, &name, last, &outcome, SUMMARY_SLICE, now))?;
            if settled < SUMMARY_SLICE {
                break;
            }
        }
        if matches!(outcome, Outcome::Delivered(_)) {
            self.metrics.delivered(batch.len());
            self.log_batch(batch, now);
        }
        self.unsaved = None;
        Ok(())
    }

    fn log_batch(&self, batch: &Batch, now: Timestamp) {
        let to = self.channel.display_name();
        let oldest = match batch {
            Batch::Payments(payments) => match payments.as_slice() {
                [only] => return self.log_delivered(&to, only, now),
                [first, ..] => first.created_at,
                [] => return,
            },
            Batch::Summary { oldest, .. } => *oldest,
        };
        let kind = batch.carrier().as_str();
        let (count, span, age_ms) = (batch.len(), batch.span(), now.since(oldest).as_millis());
        log::info!(
            "delivered to {to} in a {kind}: {count} payments, {span}; the oldest {age_ms} ms \
                after its commit"
        );
    }

    fn log_delivered(&self, to: &str, payment: &OutgoingPayment, now: Timestamp) {
        let age_ms = now.since(payment.created_at).as_millis();
        let line = self.channel.style.line(&payment.payment);
        log::info!("delivered to {to}, {age_ms} ms after its commit: {line}");
    }

    fn now(&self) -> Duration {
        (self.clock)()
    }
}
