//! A notifier: works one channel's part of the delivery table off, oldest first, one message after the other.
//!
//! Payments are told in their order: a message that was not taken is tried again before any later one is. One that is
//! refused on its own, and again, is a suspect: the next one is tried and tells whether the payment is at fault, which makes
//! it a dead letter, or the channel, which pauses. A probe of a paused channel begins with the oldest again, and goes one
//! further than the last one: several payments at fault do not stop those behind them.
//!
//! Before a POST its rows say SENDING, and after the answer they are marked before the next POST, so that a crash repeats
//! at most the one message whose answer was not yet recorded.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, after, never, select_biased};

use crate::clock::Timestamp;
use crate::config::DEFAULT_CHANNEL;
use crate::message::Style;
use crate::outage::{Backoff, Outage, Part};
use crate::pace::Gate;
use crate::payment::Payment;
use crate::runtime::error_log::ErrorLog;
use crate::runtime::metrics::{ChannelMetrics, Metrics};
use crate::slack::{Answer, Slack};
use crate::store::delivery::{self, Waiting};
use crate::store::{self, SqlResult, Store, StoreError, Transaction};
use crate::worker::{Stop, Waker};

/// How long a channel waits after a message that failed.
pub const BACKOFF: Backoff = Backoff { base: Duration::from_millis(500), cap: Duration::from_mins(1) };

/// How many lines the log takes between two marks.
const LOG_BATCH: usize = 500;

/// A digest that was rejected shrinks to a quarter, to find the payment at fault; one that was taken grows by half.
const SHRINK: usize = 4;
const GROW: usize = 2;

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
    metrics: ChannelMetrics,
    errors: ErrorLog,
    /// How many payments a message may tell: fewer while one that was rejected is being looked for.
    fit: usize,
    /// Refused once, alone: it is tried again before it is a suspect.
    slip: Option<i64>,
    /// Refused on their own since a message was last taken, or since the last pause.
    suspects: Vec<i64>,
    /// How many were refused before the last pause.
    refused_before: usize,
    /// Refused after a pause, before another one was taken: each is tried once more.
    accused: Vec<i64>,
    /// No other payment waits, to tell why these were refused: when they are tried again.
    alone_until: Option<Duration>,
    /// Told, but not recorded because the database refused: never to be told again.
    unrecorded: Vec<Telling>,
    /// Not told, and not recorded for the same reason.
    unsettled: Option<Unsettled>,
}

/// What the rows of a message that was not taken are to say.
#[derive(Debug, Clone)]
struct Unsettled {
    ids: Arc<[i64]>,
    /// `None`: as if it had not been tried.
    error: Option<String>,
    unknown: bool,
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
        metrics: &Metrics,
    ) -> Self {
        let gate = Gate::new(channel.messages_per_second, channel.burst, BACKOFF, channel.probe_interval);
        let outage = Outage::new(whom(&channel), BACKOFF, part);
        let metrics = metrics.channel(&channel.name);
        let errors = ErrorLog::new(format!("notifier {}", channel.name));
        let (fit, started) = (channel.digest_max, Instant::now());
        Self {
            store,
            channel,
            gate,
            clock: Box::new(move || started.elapsed()),
            wake,
            resume,
            outage,
            metrics,
            errors,
            fit,
            slip: None,
            suspects: Vec::new(),
            refused_before: 0,
            accused: Vec::new(),
            alone_until: None,
            unrecorded: Vec::new(),
            unsettled: None,
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
        // What the database refused to take note of is tried once more.
        if let Err(error) = self.record() {
            log::error!("what was told could not be recorded, and will be told again: {error}");
        }
    }

    fn work(&mut self, stop: &Stop) {
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
        match self.try_step() {
            Ok(step) => {
                self.errors.succeeded();
                step
            }
            Err(error) => {
                self.errors.failed(&error);
                Step::Later(store::PAUSE)
            }
        }
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
            self.begin_with_the_oldest();
        }
        let wait = self.gate.wait(self.now());
        if !wait.is_zero() {
            return Ok(Step::Later(wait));
        }
        if let Some(wait) = self.still_alone()? {
            return Ok(Step::Later(wait));
        }
        let waiting = self.next()?;
        let Some(mut telling) = self.renderable(waiting)? else { return Ok(Step::Progress) };
        if telling.is_empty() {
            return Ok(self.nothing_but_suspects());
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

    /// The oldest one, or as many as fit if there is a crowd. While one is looked for that is at fault, one at a time.
    fn next(&mut self) -> Result<Vec<Waiting>, StoreError> {
        while let Some(accused) = self.accused.first().copied() {
            // They are among the oldest.
            let waiting = self.waiting(self.accused.len())?;
            if let Some(found) = waiting.into_iter().find(|waiting| waiting.outbox_id == accused) {
                return Ok(vec![found]);
            }
            self.accused.remove(0);
        }
        if self.slip.is_some() || self.refused_before > 0 || !self.suspects.is_empty() {
            let mut waiting = self.waiting(self.suspects.len() + 1)?;
            waiting.retain(|waiting| !self.suspects.contains(&waiting.outbox_id));
            waiting.truncate(1);
            return Ok(waiting);
        }
        let crowd = self.more_than(self.channel.digest_over)?;
        self.waiting(if crowd { self.fit } else { 1 })
    }

    fn settle(&mut self, answer: Answer, telling: Vec<Telling>) -> Result<Step, StoreError> {
        let (now, ids) = (self.now(), ids(&telling));
        match answer {
            Answer::Taken => {
                self.gate.succeeded();
                self.outage.recovered();
                self.fit = (self.fit + (self.fit / GROW).max(1)).min(self.channel.digest_max);
                let guilty = std::mem::take(&mut self.suspects);
                // Each was refused twice, just before this one was taken. After a pause it was once, and it may have been
                // the channel until now: those are tried once more.
                let sure = self.refused_before == 0;
                (self.slip, self.refused_before) = (None, 0);
                self.accused.retain(|accused| !ids.contains(accused));
                let step = self.taken(telling)?;
                if sure {
                    self.bury_suspects(guilty)?;
                } else {
                    self.accused.extend(guilty);
                }
                Ok(step)
            }
            Answer::Limited(retry_after) => {
                let wait = self.gate.limited(now, retry_after, fastrand::f64());
                self.outage.limited(&format!("Slack asks for a pause of {:.0} s", wait.as_secs_f64()));
                self.put_back(ids, None, false)?;
                Ok(Step::Later(wait))
            }
            Answer::Failed(error) => {
                let wait = self.gate.failed(now, fastrand::f64());
                let _ = self.outage.failed(&error);
                self.put_back(ids, Some(error), false)?;
                Ok(Step::Later(wait))
            }
            Answer::Unknown(error) => {
                let wait = self.gate.failed(now, fastrand::f64());
                let _ = self.outage.failed(&error);
                log::warn!(
                    "no answer to a message with payments {}: it may show twice: {error}",
                    span(&telling).unwrap_or_default()
                );
                self.metrics.unknown_outcome();
                self.put_back(ids, Some(error), true)?;
                Ok(Step::Later(wait))
            }
            Answer::Closed(error) => {
                let wait = self.pause(&error);
                // Whatever was refused before, it is the channel.
                self.begin_with_the_oldest();
                self.put_back(ids, Some(error), false)?;
                Ok(Step::Later(wait))
            }
            Answer::Rejected(error) => self.rejected(error, ids),
        }
    }

    /// One of several is at fault, or the only one is, or the channel: smaller and smaller messages tell.
    fn rejected(&mut self, error: String, ids: Vec<i64>) -> Result<Step, StoreError> {
        let [only] = ids.as_slice() else {
            self.fit = (ids.len() / SHRINK).max(1);
            log::warn!("a message with {} payments was rejected: {error}; trying with fewer", ids.len());
            self.put_back(ids, None, false)?;
            return Ok(Step::Progress);
        };
        if self.accused.first() == Some(only) {
            self.accused.remove(0);
            self.put_back(ids.clone(), Some(error), false)?;
            self.bury_suspects(ids)?;
            return Ok(Step::Progress);
        }
        if self.refused_before == 0 && self.slip != Some(*only) {
            self.slip = Some(*only);
            let wait = self.gate.failed(self.now(), fastrand::f64());
            let _ = self.outage.failed(&error);
            self.put_back(ids, Some(error), false)?;
            return Ok(Step::Later(wait));
        }
        self.slip = None;
        self.suspects.push(*only);
        if self.suspects.len() > self.refused_before.max(1) {
            self.pause(&error);
            self.refused_before = self.suspects.len();
            self.suspects.clear();
        }
        self.put_back(ids, Some(error), false)?;
        Ok(Step::Progress)
    }

    fn begin_with_the_oldest(&mut self) {
        self.suspects.clear();
        self.accused.clear();
        (self.slip, self.alone_until) = (None, None);
    }

    /// Until another payment comes, nobody knows whether these are at fault or the channel.
    fn nothing_but_suspects(&mut self) -> Step {
        if self.suspects.is_empty() {
            return Step::Idle;
        }
        self.refused_before = self.suspects.len();
        self.suspects.clear();
        let count = self.refused_before;
        self.outage.paused(&format!("it has refused {count} payments, and no other waits to tell why"));
        self.alone_until = Some(self.now().saturating_add(self.channel.probe_interval));
        Step::Progress
    }

    /// For how long the refused ones, and no other, wait.
    fn still_alone(&mut self) -> Result<Option<Duration>, StoreError> {
        if let Some(until) = self.alone_until {
            let wait = until.saturating_sub(self.now());
            if !wait.is_zero() && !self.more_than(self.refused_before)? {
                return Ok(Some(wait));
            }
            self.alone_until = None;
        }
        Ok(None)
    }

    fn more_than(&self, count: usize) -> Result<bool, StoreError> {
        let name = &self.channel.name;
        self.store.read(|connection| delivery::more_than(connection, name, count))
    }

    fn pause(&mut self, error: &str) -> Duration {
        self.outage.paused(&error);
        self.gate.pause(self.now())
    }

    fn waiting(&self, limit: usize) -> Result<Vec<Waiting>, StoreError> {
        let name = &self.channel.name;
        self.store.read(|connection| delivery::waiting(connection, name, limit))
    }

    /// What can be told; what cannot is set aside first, and then there is nothing yet.
    fn renderable(&self, waiting: Vec<Waiting>) -> Result<Option<Vec<Telling>>, StoreError> {
        let (mut telling, mut poison) = (Vec::with_capacity(waiting.len()), Vec::new());
        for Waiting { outbox_id, created_at, payment } in waiting {
            match payment {
                Ok(payment) => telling.push(Telling { outbox_id, created_at, payment }),
                Err(reason) => poison.push((outbox_id, Some(reason))),
            }
        }
        if poison.is_empty() {
            return Ok(Some(telling));
        }
        self.bury(poison)?;
        Ok(None)
    }

    fn bury_suspects(&self, suspects: Vec<i64>) -> Result<(), StoreError> {
        self.bury(suspects.into_iter().map(|outbox_id| (outbox_id, None)).collect())
    }

    /// Without a reason of its own it is that of the last failure.
    fn bury(&self, dead: Vec<(i64, Option<String>)>) -> Result<(), StoreError> {
        if dead.is_empty() {
            return Ok(());
        }
        for (outbox_id, reason) in &dead {
            let reason = reason.as_deref().unwrap_or("it was refused on its own");
            log::error!("event {outbox_id} cannot be told and is a dead letter now: {reason}");
        }
        let (now, count) = (Timestamp::now(), dead.len());
        self.store.write(move |tx: &Transaction<'_>| -> SqlResult<()> {
            dead.iter().try_for_each(|(outbox_id, reason)| delivery::bury(tx, *outbox_id, reason.as_deref(), now))
        })?;
        self.metrics.dead(count);
        Ok(())
    }

    fn taken(&mut self, told: Vec<Telling>) -> Result<Step, StoreError> {
        let step = if told.is_empty() { Step::Idle } else { Step::Progress };
        self.unrecorded = told;
        self.record()?;
        Ok(step)
    }

    fn put_back(&mut self, ids: Vec<i64>, error: Option<String>, unknown: bool) -> Result<(), StoreError> {
        self.unsettled = Some(Unsettled { ids: ids.into(), error, unknown });
        self.record()
    }

    /// Takes note of what came of the last message; on success nothing is left to be noted.
    fn record(&mut self) -> Result<(), StoreError> {
        if let Some(unsettled) = self.unsettled.clone() {
            self.store.write(move |tx| match &unsettled.error {
                None => delivery::release(tx, &unsettled.ids),
                Some(error) => delivery::mark_failed(tx, &unsettled.ids, error, unsettled.unknown),
            })?;
            self.unsettled = None;
        }
        if self.unrecorded.is_empty() {
            return Ok(());
        }
        let (ids, now) = (ids(&self.unrecorded), Timestamp::now());
        self.store.write(move |tx| delivery::mark_delivered(tx, &ids, now))?;
        self.metrics.delivered(self.unrecorded.len());
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
