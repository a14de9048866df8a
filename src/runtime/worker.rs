//! A thread as a value: spawned with a name, stopped by request, joined with a deadline. It knows
//! no domain.
//!
//! The owner of a [`Worker`] owns the thread. The threads of a [`WorkerGroup`] report their exits
//! on one channel, so that the service never runs with a dead thread. Each has a [`Heartbeat`],
//! which shows a thread that hangs.

use std::io;
use std::sync::atomic::{AtomicI64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TryRecvError, bounded, unbounded};

use crate::domain::timestamp::Timestamp;

/// A thread without work turns its loop at least this often.
pub const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(30);

/// A type without values: its channels signal only by being closed.
#[derive(Debug)]
pub enum Never {}

/// When a thread last turned its loop. Cloning shares it.
#[derive(Debug, Clone)]
pub struct Heartbeat(Arc<AtomicI64>);

impl Heartbeat {
    fn new() -> Self {
        let heartbeat = Self(Arc::default());
        heartbeat.beat();
        heartbeat
    }

    /// The thread is alive now.
    pub fn beat(&self) {
        self.0.store(Timestamp::now().as_micros(), Relaxed);
    }

    /// When it last was.
    pub fn last(&self) -> Timestamp {
        Timestamp::from_micros(self.0.load(Relaxed))
    }
}

/// The threads of the service. Cloning shares them.
#[derive(Debug, Clone)]
pub struct WorkerGroup {
    exited: Sender<&'static str>,
    exits: Receiver<&'static str>,
    heartbeats: Arc<Mutex<Vec<(String, Heartbeat)>>>,
}

impl Default for WorkerGroup {
    fn default() -> Self {
        let (exited, exits) = unbounded();
        Self {
            exited,
            exits,
            heartbeats: Arc::default(),
        }
    }
}

impl WorkerGroup {
    /// Receives the name of a thread that ended.
    pub fn exits(&self) -> &Receiver<&'static str> {
        &self.exits
    }

    /// When each thread last turned its loop; those of one name are numbered.
    pub fn heartbeats(&self) -> Vec<(String, Timestamp)> {
        let heartbeats = self.heartbeats.lock();
        heartbeats
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .map(|(name, heartbeat)| (name.clone(), heartbeat.last()))
            .collect()
    }

    fn add_heartbeat(&self, name: &str) -> Heartbeat {
        let heartbeat = Heartbeat::new();
        let mut heartbeats = self
            .heartbeats
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let same = |known: &str| {
            known
                .strip_prefix(name)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
        };
        let number = heartbeats.iter().filter(|(known, _)| same(known)).count();
        let name = match number {
            0 => name.to_owned(),
            number => format!("{name}-{}", number + 1),
        };
        heartbeats.push((name, heartbeat.clone()));
        heartbeat
    }
}

/// A worker's view of the request to stop, and its heartbeat.
#[derive(Debug, Clone)]
pub struct Stop {
    signal: Receiver<Never>,
    heartbeat: Heartbeat,
}

impl Stop {
    /// A request that is made by dropping the sender.
    pub fn new() -> (Sender<Never>, Self) {
        Self::with_heartbeat(Heartbeat::new())
    }

    fn with_heartbeat(heartbeat: Heartbeat) -> (Sender<Never>, Self) {
        let (sender, signal) = bounded(0);
        (sender, Self { signal, heartbeat })
    }

    /// Whether the stop was requested. The thread is alive: it asks.
    pub fn is_requested(&self) -> bool {
        self.heartbeat.beat();
        matches!(self.signal.try_recv(), Err(TryRecvError::Disconnected))
    }

    /// For `select!`: becomes ready, as disconnected, when the stop is requested.
    pub fn signal(&self) -> &Receiver<Never> {
        &self.signal
    }

    /// The thread is alive now.
    pub fn beat(&self) {
        self.heartbeat.beat();
    }

    /// The thread's heartbeat.
    pub fn heartbeat(&self) -> &Heartbeat {
        &self.heartbeat
    }
}

/// Wakes a worker, or several. Two wakes before the worker receives the first are one.
#[derive(Debug, Clone)]
pub struct Waker(Arc<[Sender<()>]>);

impl Waker {
    /// A waker, and the receiver that the woken worker waits on.
    pub fn new() -> (Self, Receiver<()>) {
        let (sender, receiver) = bounded(1);
        (Self(Arc::new([sender])), receiver)
    }

    /// A waker of all that these wake.
    pub fn all<'a>(wakers: impl IntoIterator<Item = &'a Self>) -> Self {
        Self(
            wakers
                .into_iter()
                .flat_map(|waker| waker.0.iter().cloned())
                .collect(),
        )
    }

    /// Never blocks: a full channel means that a wake is already pending.
    pub fn wake(&self) {
        for sender in self.0.iter() {
            let _ = sender.try_send(());
        }
    }
}

/// A running thread and the means to end it.
pub struct Worker {
    name: &'static str,
    stop: Option<Sender<Never>>,
    interrupt: Option<Box<dyn FnOnce() + Send>>,
    exited: Receiver<Never>,
    handle: JoinHandle<()>,
}

/// A worker that did not end in time.
#[derive(Debug, thiserror::Error)]
#[error("thread {0} did not stop in time")]
pub struct StopTimeout(pub &'static str);

impl Worker {
    /// Starts `body` on a thread called `name`. Its end, by return or by panic, is reported to the
    /// group.
    pub fn spawn(
        name: &'static str,
        group: &WorkerGroup,
        body: impl FnOnce(Stop) + Send + 'static,
    ) -> io::Result<Self> {
        let (stop, signal) = Stop::with_heartbeat(group.add_heartbeat(name));
        let (alive, exited) = bounded(0);
        let exits = group.exited.clone();
        let handle = thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                let _report = WorkerExitGuard {
                    name,
                    exits,
                    _alive: alive,
                };
                body(signal);
            })?;
        Ok(Self {
            name,
            stop: Some(stop),
            interrupt: None,
            exited,
            handle,
        })
    }

    /// Calls `interrupt` when the stop is requested, for a thread that waits on something else than
    /// a channel.
    #[must_use]
    pub fn on_stop(mut self, interrupt: impl FnOnce() + Send + 'static) -> Self {
        self.interrupt = Some(Box::new(interrupt));
        self
    }

    /// Requests the stop, without waiting: several threads can get the request before the first is
    /// joined.
    pub fn request_stop(&mut self) {
        drop(self.stop.take());
        if let Some(interrupt) = self.interrupt.take() {
            interrupt();
        }
    }

    /// Requests the stop, and waits for the end of the thread until `deadline`. A thread that is
    /// late is left behind.
    pub fn stop(mut self, deadline: Instant) -> Result<(), StopTimeout> {
        self.request_stop();
        match self.exited.recv_deadline(deadline) {
            Err(crossbeam_channel::RecvTimeoutError::Timeout) => Err(StopTimeout(self.name)),
            Err(crossbeam_channel::RecvTimeoutError::Disconnected) => {
                // The hook and the guard have already reported a panic.
                let _ = self.handle.join();
                Ok(())
            }
        }
    }
}

/// Checks that the operating system starts this number of threads more. Libraries that start
/// threads panic where it does not.
pub fn ensure_worker_capacity(threads: usize) -> io::Result<()> {
    let (release, held) = bounded::<Never>(0);
    let start = |_| {
        let held = held.clone();
        thread::Builder::new().spawn(move || drop(held.recv()))
    };
    let started: io::Result<Vec<_>> = (0..threads).map(start).collect();
    drop(release);
    // If one thread cannot start, the others end when `release` is dropped.
    for thread in started? {
        let _ = thread.join();
    }
    Ok(())
}

/// Reports the end of the thread when it is dropped.
struct WorkerExitGuard {
    name: &'static str,
    exits: Sender<&'static str>,
    _alive: Sender<Never>,
}

impl Drop for WorkerExitGuard {
    fn drop(&mut self) {
        let _ = self.exits.send(self.name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam_channel::{never, select_biased};

    fn worker_deadline() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    #[test]
    fn a_worker_stops_when_asked() {
        let group = WorkerGroup::default();
        let worker = Worker::spawn("patient", &group, |stop| {
            select_biased! { recv(stop.signal()) -> _ => {} }
        })
        .unwrap();
        assert!(group.exits().try_recv().is_err());
        worker.stop(worker_deadline()).unwrap();
        assert_eq!(group.exits().try_recv().unwrap(), "patient");
    }

    #[test]
    fn a_panic_of_a_worker_is_reported_by_name() {
        let group = WorkerGroup::default();
        let worker = Worker::spawn("brittle", &group, |_stop| {
            std::panic::resume_unwind(Box::new("on purpose"));
        })
        .unwrap();
        let exited = group.exits().recv_deadline(worker_deadline());
        assert_eq!(exited.unwrap(), "brittle");
        worker.stop(worker_deadline()).unwrap();
    }

    #[test]
    fn a_worker_that_hangs_is_left_behind() {
        let group = WorkerGroup::default();
        let (release, held) = bounded::<Never>(0);
        let worker = Worker::spawn("deaf", &group, move |_stop| {
            let _ = held.recv();
        })
        .unwrap();
        assert_eq!(
            worker.stop(Instant::now()).unwrap_err().to_string(),
            "thread deaf did not stop in time"
        );
        drop(release);
    }

    #[test]
    fn each_worker_has_a_heartbeat_under_a_name_of_its_own() {
        let group = WorkerGroup::default();
        let names = || -> Vec<String> {
            let heartbeats = group.heartbeats().into_iter();
            heartbeats.map(|(name, _)| name).collect()
        };
        let first = group.add_heartbeat("reader");
        let second = group.add_heartbeat("reader");
        group.add_heartbeat("read");
        assert_eq!(names(), ["reader", "reader-2", "read"]);
        first.0.store(1, Relaxed);
        let (_sender, stop) = Stop::with_heartbeat(first.clone());
        assert!(!stop.is_requested());
        assert!(
            first.last() > Timestamp::from_micros(1)
                && second.last() >= first.last().minus(Duration::from_secs(10))
        );
    }

    #[test]
    fn some_more_workers_can_be_started() {
        ensure_worker_capacity(8).unwrap();
    }

    #[test]
    fn two_wakes_of_a_worker_are_one() {
        let (waker, woken) = Waker::new();
        waker.wake();
        waker.wake();
        assert!(woken.try_recv().is_ok());
        select_biased! {
            recv(woken) -> _ => panic!("woken twice"),
            recv(never::<()>()) -> _ => {}
            default => {}
        }
    }
}
