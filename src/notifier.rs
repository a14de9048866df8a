//! A notifier: works one channel's part of the delivery table off, oldest first, one message after the other.
//!
//! Payments are told in their order: a message that was not taken is tried again before any later one is. The one
//! exception is a payment that is refused on its own while another is taken: it becomes a dead letter. Before a POST its
//! rows say SENDING, and after the answer they are marked before the next POST, so that a crash repeats at most the one
//! message whose answer was not yet recorded.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, after, never, select_biased};

use crate::clock::Timestamp;
use crate::config::DEFAULT_CHANNEL;
use crate::counters::Counters;
use crate::message::Style;
use crate::outage::{Backoff, Outage, Part};
use crate::pace::Gate;
use crate::payment::Payment;
use crate::slack::{Answer, Slack};
use crate::store::delivery::{self, Waiting};
use crate::store::{self, SqlResult, Store, StoreError, Transaction};
use crate::worker::{Stop, Waker};

/// How long a channel waits after a message that failed.
pub const BACKOFF: Backoff = Backoff { base: Duration::from_millis(500), cap: Duration::from_mins(1) };

/// How many lines the log takes between two marks.
const LOG_BATCH: usize = 500;

/// By how much a digest shrinks when it was rejected, to find the payment at fault, and grows again when it was taken.
const ZOOM: usize = 4;

/// Who is told.
#[derive(Debug)]
pub enum Voice {
    /// An incoming webhook of Slack.
    Slack(Box<Slack>),
    /// Nobody yet: no webhook is configured.
    Log,
}

/// What a channel is.
#[derive(Debug)]
pub struct Channel {
    /// As its rows in the delivery table say.
    pub name: String,
    /// Who is told.
    pub voice: Voice,
    /// How messages look.
    pub style: Style,
    /// How many messages a second, for long.
    pub messages_per_second: f64,
    /// How many at once after a quiet time.
    pub burst: usize,
    /// When more payments wait, they are told together.
    pub digest_over: usize,
    /// How many payments a message tells at most.
    pub digest_max: usize,
    /// How often it is tried while it is paused.
    pub probe_interval: Duration,
}

/// Ends a channel's pause.
#[derive(Debug, Clone)]
pub struct Resume {
    asked: Arc<AtomicBool>,
    waker: Waker,
}

impl Resume {
    /// For the notifier that `waker` wakes.
    pub fn new(waker: Waker) -> Self {
        Self { asked: Arc::default(), waker }
    }

    /// The channel is tried at once, whatever it waits for.
    pub fn now(&self) {
        self.asked.store(true, Ordering::Release);
        self.waker.wake();
    }

    fn take(&self) -> bool {
        self.asked.swap(false, Ordering::Acquire)
    }
}

/// The time since any beginning; it never goes back.
pub type Clock = Box<dyn Fn() -> Duration + Send>;

/// Tells the payments of one channel.
pub struct Notifier {
    store: Store,
    channel: Channel,
    gate: Gate,
    clock: Clock,
    wake: Receiver<()>,
    resume: Resume,
    outage: Outage,
    counters: Counters,
    /// How many payments a message may tell: fewer while one that was rejected is being looked for.
    fit: usize,
    suspect: Option<Suspect>,
    /// Told, but not recorded because the database refused: never to be told again.
    unrecorded: Vec<Telling>,
}

/// A payment that was refused on its own. It is at fault if another one is taken next, and the channel is if not.
struct Suspect {
    outbox_id: i64,
    reason: String,
    /// When it is tried again if no other comes.
    retry_at: Duration,
}

/// A payment that is being told.
struct Telling {
    outbox_id: i64,
    created_at: Timestamp,
    payment: Payment,
}

/// What a step has found.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// There may be more at once.
    Progress,
    /// Nothing waits.
    Idle,
    /// Nothing may be told before this has passed.
    Later(Duration),
}

impl Notifier {
    /// A notifier that is woken by `wake`.
    pub fn new(
        store: Store,
        channel: Channel,
        wake: Receiver<()>,
        resume: Resume,
        part: Part,
        counters: Counters,
    ) -> Self {
        let gate = Gate::new(channel.messages_per_second, channel.burst, BACKOFF, channel.probe_interval);
        let outage = Outage::new(whom(&channel), BACKOFF, part);
        let (fit, started) = (channel.digest_max, Instant::now());
        Self {
            store,
            channel,
            gate,
            clock: Box::new(move || started.elapsed()),
            wake,
            resume,
            outage,
            counters,
            fit,
            suspect: None,
            unrecorded: Vec::new(),
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

    /// One message, if it may go; for the log, a batch of lines.
    pub fn step(&mut self) -> Step {
        self.try_step().unwrap_or_else(|error| {
            log::error!("the notifier waits for the database: {error}");
            Step::Later(store::PAUSE)
        })
    }

    fn try_step(&mut self) -> Result<Step, StoreError> {
        self.record()?;
        match self.channel.voice {
            Voice::Log => {
                let told = self.waiting(LOG_BATCH)?;
                let Some(told) = self.renderable(told)? else { return Ok(Step::Progress) };
                self.taken(told)
            }
            Voice::Slack(_) => self.tell(),
        }
    }

    /// Posts a message, and settles what came of it.
    fn tell(&mut self) -> Result<Step, StoreError> {
        if self.resume.take() {
            self.gate.resume(self.now());
            self.suspect = None;
        }
        let wait = self.gate.wait(self.now());
        if !wait.is_zero() {
            return Ok(Step::Later(wait));
        }
        let (name, over) = (&self.channel.name, self.channel.digest_over);
        let crowd = self.store.read(|connection| delivery::more_than(connection, name, over))?;
        let waiting = self.waiting(if crowd { self.fit } else { 1 })?;
        let Some(mut telling) = self.renderable(waiting)? else { return Ok(Step::Progress) };
        if telling.is_empty() {
            return Ok(self.nothing_but_a_suspect());
        }
        let payments: Vec<_> = telling.iter().map(|telling| &telling.payment).collect();
        let message = self.channel.style.message(&payments);
        telling.truncate(message.payments);
        let Voice::Slack(slack) = &self.channel.voice else { return Ok(Step::Idle) };
        let ids = ids(&telling);
        self.store.write(move |tx| delivery::mark_sending(tx, &ids))?;
        self.gate.sent((self.clock)());
        let answer = slack.post(&message.json);
        self.settle(answer, telling)
    }

    fn settle(&mut self, answer: Answer, telling: Vec<Telling>) -> Result<Step, StoreError> {
        let (now, ids) = (self.now(), ids(&telling));
        match answer {
            Answer::Taken => {
                self.gate.succeeded();
                self.outage.recovered();
                self.fit = (self.fit * ZOOM).min(self.channel.digest_max);
                self.taken(telling)
            }
            Answer::Limited(retry_after) => {
                let wait = self.gate.limited(now, retry_after, fastrand::f64());
                self.outage.limited(&format!("Slack asks for a pause of {:.0} s", wait.as_secs_f64()));
                self.store.write(move |tx| delivery::release(tx, &ids))?;
                Ok(Step::Later(wait))
            }
            Answer::Failed(error) => {
                let wait = self.gate.failed(now, fastrand::f64());
                let _ = self.outage.failed(&error);
                self.store.write(move |tx| delivery::mark_failed(tx, &ids, &error, false))?;
                Ok(Step::Later(wait))
            }
            Answer::Unknown(error) => {
                let wait = self.gate.failed(now, fastrand::f64());
                let _ = self.outage.failed(&error);
                log::warn!(
                    "no answer to a message with payments {}: it may show twice: {error}",
                    span(&telling).unwrap_or_default()
                );
                self.counters.unknown_outcome();
                self.store.write(move |tx| delivery::mark_failed(tx, &ids, &error, true))?;
                Ok(Step::Later(wait))
            }
            Answer::Closed(error) => {
                let wait = self.pause(&error);
                self.store.write(move |tx| delivery::mark_failed(tx, &ids, &error, false))?;
                Ok(Step::Later(wait))
            }
            Answer::Rejected(error) => self.rejected(error, ids),
        }
    }

    /// One of several is at fault, or the only one is, or the channel: smaller and smaller messages tell.
    fn rejected(&mut self, error: String, ids: Vec<i64>) -> Result<Step, StoreError> {
        let [only] = ids.as_slice() else {
            self.fit = (ids.len() / ZOOM).max(1);
            log::warn!("a message with {} payments was rejected: {error}; trying with fewer", ids.len());
            self.store.write(move |tx| delivery::release(tx, &ids))?;
            return Ok(Step::Progress);
        };
        if self.suspect.take().is_some() {
            // Two of them, one after the other: it is not the payments.
            self.pause(&error);
        } else {
            let retry_at = self.now() + self.channel.probe_interval;
            self.suspect = Some(Suspect { outbox_id: *only, reason: error.clone(), retry_at });
        }
        self.store.write(move |tx| delivery::mark_failed(tx, &ids, &error, false))?;
        Ok(Step::Progress)
    }

    /// Until another payment comes, nobody knows whether this one is at fault or the channel.
    fn nothing_but_a_suspect(&mut self) -> Step {
        let Some(suspect) = &self.suspect else { return Step::Idle };
        let wait = suspect.retry_at.saturating_sub(self.now());
        if wait.is_zero() {
            self.suspect = None;
            return Step::Progress;
        }
        self.outage.paused(&suspect.reason);
        Step::Later(wait)
    }

    fn pause(&mut self, error: &str) -> Duration {
        self.outage.paused(&error);
        self.gate.pause(self.now())
    }

    fn waiting(&self, limit: usize) -> Result<Vec<Waiting>, StoreError> {
        let suspect = self.suspect.as_ref().map(|suspect| suspect.outbox_id);
        let more = usize::from(suspect.is_some());
        let name = &self.channel.name;
        let mut waiting = self.store.read(|connection| delivery::waiting(connection, name, limit + more))?;
        waiting.retain(|waiting| Some(waiting.outbox_id) != suspect);
        waiting.truncate(limit);
        Ok(waiting)
    }

    /// What can be told; what cannot is set aside first, and then there is nothing yet.
    fn renderable(&mut self, waiting: Vec<Waiting>) -> Result<Option<Vec<Telling>>, StoreError> {
        let (mut telling, mut poison) = (Vec::with_capacity(waiting.len()), Vec::new());
        for Waiting { outbox_id, created_at, payment } in waiting {
            match payment {
                Ok(payment) => telling.push(Telling { outbox_id, created_at, payment }),
                Err(reason) => poison.push((outbox_id, reason)),
            }
        }
        if poison.is_empty() {
            return Ok(Some(telling));
        }
        self.bury(poison)?;
        Ok(None)
    }

    fn bury(&mut self, poison: Vec<(i64, String)>) -> Result<(), StoreError> {
        for (outbox_id, reason) in &poison {
            log::error!("event {outbox_id} cannot be told and is a dead letter now: {reason}");
        }
        let now = Timestamp::now();
        self.store.write(move |tx: &Transaction<'_>| -> SqlResult<()> {
            poison.iter().try_for_each(|(outbox_id, reason)| delivery::bury(tx, *outbox_id, reason, now))
        })
    }

    fn taken(&mut self, told: Vec<Telling>) -> Result<Step, StoreError> {
        let step = if told.is_empty() { Step::Idle } else { Step::Progress };
        self.unrecorded = told;
        self.record()?;
        if let Some(Suspect { outbox_id, reason, .. }) = self.suspect.take() {
            // Another one was taken: it is not the channel.
            self.bury(vec![(outbox_id, reason)])?;
        }
        Ok(step)
    }

    /// Marks what was told; on success nothing is left to be marked.
    fn record(&mut self) -> Result<(), StoreError> {
        if self.unrecorded.is_empty() {
            return Ok(());
        }
        let (ids, now) = (ids(&self.unrecorded), Timestamp::now());
        self.store.write(move |tx| delivery::mark_delivered(tx, &ids, now))?;
        self.counters.delivered(self.unrecorded.len());
        self.log_told(now);
        self.unrecorded.clear();
        Ok(())
    }

    fn log_told(&self, now: Timestamp) {
        let age_ms = |telling: &Telling| now.since(telling.created_at).as_millis();
        match (&self.channel.voice, self.unrecorded.as_slice()) {
            (Voice::Slack(_), several @ [first, _, ..]) => {
                let to = whom(&self.channel);
                let (count, span, age_ms) = (several.len(), span(several).unwrap_or_default(), age_ms(first));
                log::info!("delivered to {to}: {count} payments, {span}; the oldest {age_ms} ms after its commit");
            }
            (voice, told) => {
                let to = match voice {
                    Voice::Slack(_) => whom(&self.channel),
                    Voice::Log => "this log only".to_owned(),
                };
                for telling in told {
                    let line = self.channel.style.line(&telling.payment);
                    log::info!("delivered to {to}, {} ms after its commit: {line}", age_ms(telling));
                }
            }
        }
    }

    fn now(&self) -> Duration {
        (self.clock)()
    }
}

fn ids(telling: &[Telling]) -> Vec<i64> {
    telling.iter().map(|telling| telling.outbox_id).collect()
}

fn span(telling: &[Telling]) -> Option<String> {
    let (first, last) = (telling.first()?, telling.last()?);
    Some(format!("{} to {}", first.payment.id, last.payment.id))
}

fn whom(channel: &Channel) -> String {
    if channel.name == DEFAULT_CHANNEL { "Slack".to_owned() } else { format!("Slack ({})", channel.name) }
}
