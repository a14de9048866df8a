//! A thread as a value: spawned with a name, asked to stop, waited for with a bound. No domain in
//! here.
//!
//! Whoever holds the [`Worker`] owns the thread. A thread that ends without having been asked
//! reports its name on the channel that all workers share, so that the service never goes on half
//! dead.

use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, TryRecvError, bounded};

/// What is never sent: these channels speak by being closed.
#[derive(Debug)]
pub enum Never {}

/// A worker's view of the request to stop.
#[derive(Debug, Clone)]
pub struct Stop(Receiver<Never>);

impl Stop {
    /// A request that comes when the sender is dropped.
    pub fn new() -> (Sender<Never>, Self) {
        let (sender, receiver) = bounded(0);
        (sender, Self(receiver))
    }

    /// Whether the stop was asked for.
    pub fn requested(&self) -> bool {
        matches!(self.0.try_recv(), Err(TryRecvError::Disconnected))
    }

    /// For `select!`: becomes ready, as disconnected, when the stop is asked for.
    pub fn signal(&self) -> &Receiver<Never> {
        &self.0
    }
}

/// Wakes a worker, or several. Waking one twice before it looks is waking it once.
#[derive(Debug, Clone)]
pub struct Waker(Arc<[Sender<()>]>);

impl Waker {
    /// A waker and the end that the woken worker waits on.
    pub fn new() -> (Self, Receiver<()>) {
        let (sender, receiver) = bounded(1);
        (Self(Arc::new([sender])), receiver)
    }

    /// One that wakes all that these wake.
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
    /// Starts `body` on a thread called `name`; its end, by return or by panic, is told on `exits`.
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
                let _report = ExitGuard {
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

    /// Calls `interrupt` when the stop is asked for, for a thread that waits on something else than
    /// a channel.
    #[must_use]
    pub fn on_stop(mut self, interrupt: impl FnOnce() + Send + 'static) -> Self {
        self.interrupt = Some(Box::new(interrupt));
        self
    }

    /// Asks the thread to stop, without waiting: several can be asked before the first is waited
    /// for.
    pub fn request_stop(&mut self) {
        drop(self.stop.take());
        if let Some(interrupt) = self.interrupt.take() {
            interrupt();
        }
    }

    /// Asks the thread to stop and waits for its end until `deadline`. A thread that is late is
    /// left behind.
    pub fn stop(mut self, deadline: Instant) -> Result<(), StopTimeout> {
        self.request_stop();
        match self.exited.recv_deadline(deadline) {
            Err(crossbeam_channel::RecvTimeoutError::Timeout) => Err(StopTimeout(self.name)),
            Err(crossbeam_channel::RecvTimeoutError::Disconnected) => {
                // A panic was already reported by the hook and by the guard.
                let _ = self.handle.join();
                Ok(())
            }
        }
    }
}

/// Whether the machine has room for so many more threads at once. Libraries that start some of
/// their own panic where it has not.
pub fn ensure_thread_capacity(threads: usize) -> io::Result<()> {
    let (release, held) = bounded::<Never>(0);
    let start = |_| {
        let held = held.clone();
        thread::Builder::new().spawn(move || drop(held.recv()))
    };
    let started: io::Result<Vec<_>> = (0..threads).map(start).collect();
    drop(release);
    // Those that were started before one could not be end by themselves.
    for thread in started? {
        let _ = thread.join();
    }
    Ok(())
}

/// Dropped when the thread ends, however it ends.
struct ExitGuard {
    name: &'static str,
    exits: Sender<&'static str>,
    _alive: Sender<Never>,
}

impl Drop for ExitGuard {
    fn drop(&mut self) {
        let _ = self.exits.send(self.name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam_channel::{never, select_biased, unbounded};
    use std::time::Duration;

    fn in_a_while() -> Instant {
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
        worker.stop(in_a_while()).unwrap();
        assert_eq!(exited.try_recv().unwrap(), "patient");
    }

    #[test]
    fn a_panic_is_told_by_name() {
        let (exits, exited) = unbounded();
        let worker = Worker::spawn("brittle", &exits, |_stop| {
            std::panic::resume_unwind(Box::new("on purpose"));
        })
        .unwrap();
        assert_eq!(exited.recv_deadline(in_a_while()).unwrap(), "brittle");
        worker.stop(in_a_while()).unwrap();
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
    fn there_is_room_for_some_threads() {
        ensure_thread_capacity(8).unwrap();
    }

    #[test]
    fn two_wakes_are_one() {
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
