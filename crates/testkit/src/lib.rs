//! The test harness: a real Kafka, a fake Slack, a hostile network, the real binary.
//!
//! Everything here uses real sockets of 127.0.0.1, and ends with its owner: dropping a value stops
//! its threads and processes. A process also ends with a test run that never drops its value.

#![expect(clippy::expect_used, reason = "a test fails by panicking")]
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a failed test shows its log"
)]
#![allow(missing_docs, reason = "the names say it")]
#![expect(
    clippy::new_without_default,
    reason = "a constructor here starts something"
)]

pub mod axe;
pub mod bench;
pub mod browser;
pub mod child;
pub mod cluster;
pub mod hostile;
pub mod http;
pub mod kafka;
pub mod listen;
pub mod maven;
pub mod mutations;
pub mod paths;
pub mod pipeline;
pub mod process;
pub mod promtool;
pub mod proxy;
pub mod publishing;
pub mod random;
pub mod scrape;
pub mod slack;
pub mod store;
pub mod timed;
pub mod tls;
pub mod topic;

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Between two looks at a condition: short compared to what tests wait for, long compared to the
/// cost of a look.
const POLL: Duration = Duration::from_millis(3);

/// Waits until `condition` holds, and panics with `what` when it does not within `limit`.
#[track_caller]
pub fn wait_until(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) {
    wait_for(what, limit, || condition().then_some(()));
}

/// Waits until `poll` has a value, and panics with `what` when it has none within `limit`.
#[track_caller]
pub fn wait_for<T>(what: &str, limit: Duration, mut poll: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    let found = try_wait(limit, &mut poll);
    let elapsed = start.elapsed();
    found.unwrap_or_else(|| panic!("waited {elapsed:.1?} (limit {limit:?}) for: {what}"))
}

/// Waits until `poll` has a value; none when it has none within `limit`.
pub fn try_wait<T>(limit: Duration, mut poll: impl FnMut() -> Option<T>) -> Option<T> {
    let start = Instant::now();
    loop {
        // Read before the look, so that a look which itself takes long is never the last one
        // unseen.
        let elapsed = start.elapsed();
        let value = poll();
        if value.is_some() || elapsed >= limit {
            return value;
        }
        thread::park_timeout(POLL);
    }
}

/// Lets time pass: for a fault at a random moment, never to wait for something.
pub fn let_time_pass(time: Duration) {
    let end = Instant::now() + time;
    while let Some(left) = end
        .checked_duration_since(Instant::now())
        .filter(|left| !left.is_zero())
    {
        thread::park_timeout(left);
    }
}

/// Stops threads when it is dropped, also by a panic: a join would wait for ever otherwise.
pub struct StopOnDrop<'a>(pub &'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

/// Locks even after a panic elsewhere: the first failure is the one to read, not the poisoned locks
/// after it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
