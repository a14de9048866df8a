//! Backpressure: bounds the payments that wait for the writer.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::error::StoreError;

/// Bounds the payments that wait for the writer. Jobs differ in size, so their number alone bounds
/// neither time nor memory.
#[derive(Clone)]
pub(super) struct Backpressure {
    waiting: Arc<AtomicUsize>,
    max: usize,
}

/// The queue capacity that a job occupies until the writer has replied.
pub(super) struct QueueSlot {
    queue: Backpressure,
    payments: usize,
}

impl Backpressure {
    pub(super) fn new(max: usize) -> Self {
        Self {
            waiting: Arc::default(),
            max,
        }
    }

    /// The payments that wait.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    /// Whether a job would be accepted now.
    pub(super) fn has_capacity(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) < self.max
    }

    /// Accepts a job while fewer payments wait than the limit, however large the job: none is so
    /// large that it never is accepted.
    pub(super) fn try_acquire(&self, payments: usize) -> Result<QueueSlot, StoreError> {
        let add = |waiting| (waiting < self.max).then_some(waiting + payments);
        let acquired = self
            .waiting
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
        acquired
            .map(|_| QueueSlot {
                queue: self.clone(),
                payments,
            })
            .map_err(|_| StoreError::Busy)
    }
}

impl Drop for QueueSlot {
    fn drop(&mut self) {
        self.queue
            .waiting
            .fetch_sub(self.payments, Ordering::Relaxed);
    }
}
