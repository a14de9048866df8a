//! A handle by which an operator ends the pause of a channel.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::worker::Waker;

/// Ends a channel's pause.
#[derive(Debug, Clone)]
pub struct ResumeHandle {
    requested: Arc<AtomicBool>,
    waker: Waker,
}

impl ResumeHandle {
    /// A handle for the notifier that `waker` wakes.
    pub fn new(waker: Waker) -> Self {
        Self {
            requested: Arc::default(),
            waker,
        }
    }

    /// Requests an attempt at once, whatever the channel waits for.
    pub fn resume_now(&self) {
        self.requested.store(true, Ordering::Release);
        self.waker.wake();
    }

    /// Makes the notifier look for an operator's action.
    pub fn wake(&self) {
        self.waker.wake();
    }

    /// Whether it was requested since the last call.
    pub fn take_request(&self) -> bool {
        self.requested.swap(false, Ordering::Acquire)
    }
}
