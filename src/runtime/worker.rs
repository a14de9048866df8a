//! A thread as a value: spawned with a name, stopped by request, joined with a deadline. It knows
//! no domain.
//!
//! The owner of a [`Worker`] owns the thread. Each thread that exits reports its name on a channel
//! that all workers share, so that the service never runs with a dead thread.

use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, TryRecvError, bounded};

/// A type without values: its channels signal only by being closed.
#[derive(Debug)]
pub enum Never {}

/// A worker's view of the request to stop.
#[derive(Debug, Clone)]
pub struct Stop(Receiver<Never>);

impl Stop {
    /// A request that is made by dropping the sender.
    pub fn new() -> (Sender<Never>, Self) {
        let (sender, receiver) = bounded(0);
        (sender, Self(receiver))
    }

    /// Whether the stop was requested.
    pub fn is_requested(&self) -> bool {
        matches!(self.0.try_recv(), Err(TryRecvError::Disconnected))
    }

    /// For `select!`: becomes ready, as disconnected, when the stop is requested.
    pub fn signal(&self) -> &Receiver<Never> {
        &self.0
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
    /// Starts `body` on a thread called `name`. Its end, by return or by panic, is reported on
    /// `exits`.
    pub fn spawn(
        name: &'static str,
        exits: &Sender<&'static str>,
        body: impl FnOnce(Stop) + Send + 'static,
    ) -> io::Result<Self> {
        let (stop, signal) = Stop::new();
        let (alive, exited) = bounded(0);
        let exits = exits.clone();
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
    use crossbeam_channel::{never, select_biased, unbounded};
    use std::time::Duration;

    fn worker_deadline() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    #[test]
    fn a_worker_stops_when_asked() {
        let (exits, exited) = unbounded();
        let worker = Worker::spawn("patient", &exits, |stop| {
            select_biased! { recv(stop.signal()) -> _ => {} }
        })
        .unwrap();
        assert!(exited.try_recv().is_err());
        worker.stop(worker_deadline()).unwrap();
        assert_eq!(exited.try_recv().unwrap(), "patient");
    }

    #[test]
    fn a_panic_of_a_worker_is_reported_by_name() {
        let (exits, exited) = unbounded();
        let worker = Worker::spawn("brittle", &exits, |_stop| {
            std::panic::resume_unwind(Box::new("on purpose"));
        })
        .unwrap();
        assert_eq!(exited.recv_deadline(worker_deadline()).unwrap(), "brittle");
        worker.stop(worker_deadline()).unwrap();
    }

    #[test]
    fn a_worker_that_hangs_is_left_behind() {
        let (exits, _exited) = unbounded();
        let (release, held) = bounded::<Never>(0);
        let worker = Worker::spawn("deaf", &exits, move |_stop| {
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
