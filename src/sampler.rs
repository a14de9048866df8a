//! The sampler: counts everything that waits, and keeps the last sample and an hour of points in
//! memory.
//!
//! `/health/ready`, the list of channels and the summary line read them, so no request counts rows.
//! A sample has points in time, and ages are computed when they are read: while a database hangs,
//! the ages grow.

pub mod disk_forecast;
mod latency_window;
mod point;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, at, never, select_biased};

use self::latency_window::LatencyWindow;
pub use self::latency_window::{Latencies, Quantiles};
pub use self::point::Point;
use crate::domain::reason::describe_reason;
use crate::domain::timestamp::Timestamp;
use crate::runtime::error_log::ErrorLog;
use crate::runtime::metrics::MetricTotals;
use crate::runtime::worker::{Stop, Waker};
use crate::store::action_watch::{ActionCounts, ActionWatch, NewAction};
use crate::store::backlog::{Backlog, BacklogCounter};
use crate::store::gauges::{self, StoredGauges};
use crate::store::{FileSizes, Store, StoreError};

/// How often it samples without a request.
const INTERVAL: Duration = Duration::from_secs(5);

/// A reader that finds an older sample requests another one, and gets the existing one.
const FRESH: Duration = Duration::from_millis(100);

/// After a sample it pauses for at least this multiple of the sample's duration, however often it
/// is requested.
const PAUSE_FACTOR: u32 = 10;

/// One hour.
const HISTORY: usize = 720;

/// A sample: the waiting rows at one moment.
#[derive(Debug, Clone)]
pub struct Sample {
    /// The moment.
    pub at: Timestamp,
    /// The waiting rows.
    pub backlog: Backlog,
    /// The totals of the process.
    pub totals: MetricTotals,
    /// The files of the database.
    pub files: FileSizes,
    /// Other numbers of the database.
    pub gauges: StoredGauges,
    /// Replays and discards of dead letters since the start.
    pub actions: ActionCounts,
}

/// The samples. Cloning shares them.
#[derive(Debug, Clone)]
pub struct Samples {
    history: Arc<Mutex<SampleHistory>>,
    waker: Waker,
}

#[derive(Debug, Default)]
struct SampleHistory {
    latest: Option<Arc<Sample>>,
    sampled_at: Option<Instant>,
    points: VecDeque<Point>,
    latencies: Latencies,
}

impl Samples {
    /// The last sample; `None` before the first. If it is old, a new one is requested.
    pub fn latest(&self) -> Option<Arc<Sample>> {
        let history = self.lock();
        if history.sampled_at.is_none_or(|at| at.elapsed() > FRESH) {
            self.waker.wake();
        }
        history.latest.clone()
    }

    /// The last sample, however old; `None` before the first.
    pub fn last(&self) -> Option<Arc<Sample>> {
        self.lock().latest.clone()
    }

    /// A point for every five seconds of the last hour, oldest first.
    pub fn history(&self) -> Vec<Point> {
        self.lock().points.iter().copied().collect()
    }

    /// The latencies of the last minute.
    pub fn latencies(&self) -> Latencies {
        self.lock().latencies.clone()
    }

    fn lock(&self) -> MutexGuard<'_, SampleHistory> {
        // The value is consistent whenever the lock is free, so lock poisoning is ignored.
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts everything that waits.
pub struct Sampler {
    store: Store,
    counter: BacklogCounter,
    topic: Option<String>,
    action_watch: ActionWatch,
    samples: Samples,
    requests: Receiver<()>,
    latencies: LatencyWindow,
    errors: ErrorLog,
}

impl Sampler {
    /// A sampler of these channels and, with Kafka, this topic; and its samples.
    pub fn new(store: Store, channels: &[String], topic: Option<String>) -> (Self, Samples) {
        let (waker, requests) = Waker::new();
        let samples = Samples {
            history: Arc::default(),
            waker,
        };
        let counter = BacklogCounter::new(channels);
        (
            Self {
                store,
                counter,
                topic,
                action_watch: ActionWatch::default(),
                samples: samples.clone(),
                requests,
                latencies: LatencyWindow::default(),
                errors: ErrorLog::new("sampler"),
            },
            samples,
        )
    }

    /// Runs until a stop is requested.
    pub fn run(mut self, stop: &Stop) {
        let mut tick_at = Instant::now();
        let mut rest_until = tick_at;
        while !stop.is_requested() {
            let resting = Instant::now() < rest_until;
            let requests = if resting {
                never()
            } else {
                self.requests.clone()
            };
            let wake_at = if resting { rest_until } else { tick_at };
            select_biased! {
                recv(stop.signal()) -> _ => return,
                recv(requests) -> _ => {}
                recv(at(wake_at)) -> _ => if resting { continue },
            }
            let started = Instant::now();
            self.sample();
            if started >= tick_at {
                let latencies = self.latencies.add(self.store.metrics());
                self.samples.lock().latencies = latencies;
                self.keep_point();
                tick_at = started + INTERVAL;
            }
            rest_until = Instant::now() + (started.elapsed() * PAUSE_FACTOR).max(FRESH);
        }
    }

    /// Samples once. After a database error the last one stays, whose ages grow.
    pub fn sample(&mut self) {
        match self.try_sample() {
            Ok(()) => self.errors.succeeded(),
            Err(error) => self.errors.failed(&error),
        }
    }

    fn try_sample(&mut self) -> Result<(), StoreError> {
        let at = Timestamp::now();
        let counter = &mut self.counter;
        let action_watch = &mut self.action_watch;
        let topic = self.topic.as_deref();
        let (backlog, gauges, (actions, new_actions)) = self.store.read(|connection| {
            Ok((
                counter.count(connection)?,
                gauges::read_stored_gauges(connection, topic)?,
                action_watch.look(connection)?,
            ))
        })?;
        new_actions.iter().for_each(log_new_action);
        let sample = Sample {
            at,
            backlog,
            totals: self.store.metrics().totals(),
            files: FileSizes::of_database(self.store.path()),
            gauges,
            actions,
        };
        let mut history = self.samples.lock();
        history.latest = Some(Arc::new(sample));
        history.sampled_at = Some(Instant::now());
        Ok(())
    }

    fn keep_point(&self) {
        let mut history = self.samples.lock();
        let Some(sample) = history.latest.clone() else {
            return;
        };
        let Sample {
            at,
            ref backlog,
            totals,
            files,
            ..
        } = *sample;
        if history.points.len() == HISTORY {
            history.points.pop_front();
        }
        history.points.push_back(Point {
            at,
            totals,
            unpublished: backlog.unpublished.count,
            unconsumed: backlog.unconsumed.count,
            undelivered: backlog.undelivered().count,
            dead_letters: backlog.dead_letters.count,
            disk_free_bytes: files.disk_free_bytes,
        });
    }
}

/// One line for what an operator did, over HTTP or by a command.
fn log_new_action(new: &NewAction) {
    let NewAction {
        dead_letter_id,
        action,
        origin,
        outcome,
        reason,
    } = new;
    let action = action.as_str();
    let why = describe_reason(reason.as_deref());
    log::info!(
        event = "dead_letter_action", dead_letter = dead_letter_id, action = action,
        by = origin.as_str();
        "dead letter {dead_letter_id}, {action} by {origin}{why}: {outcome}"
    );
}
