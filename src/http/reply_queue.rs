//! Brings answers of other threads to the requests that wait for them, many with one wake.
//!
//! A oneshot that is sent from another thread wakes the runtime with a system call, each time; a
//! commit that answers sixty requests made sixty (counted with strace). Here the first letter of a
//! batch wakes the runtime once; handing the others out happens on its own thread, where it costs
//! next to nothing.

use std::sync::{Mutex, PoisonError};

use tokio::sync::{Notify, oneshot};

type Reply = Box<dyn FnOnce() + Send>;

/// The letters that have not been handed out.
#[derive(Default)]
pub(super) struct ReplyQueue {
    letters: Mutex<Vec<Reply>>,
    arrived: Notify,
}

impl ReplyQueue {
    /// Called on any thread: has `value` sent to who waits for it. A request that went away gets no
    /// answer.
    pub(super) fn post<T: Send + 'static>(&self, to: oneshot::Sender<T>, value: T) {
        let first = {
            // A letter is pushed or it is not: a panic elsewhere leaves no half of one.
            let mut letters = self.letters.lock().unwrap_or_else(PoisonError::into_inner);
            letters.push(Box::new(move || drop(to.send(value))));
            letters.len() == 1
        };
        if first {
            self.arrived.notify_one();
        }
    }

    /// Hands letters out, for ever. Runs on the thread of those who wait.
    pub(super) async fn deliver(&self) {
        loop {
            self.arrived.notified().await;
            let letters =
                std::mem::take(&mut *self.letters.lock().unwrap_or_else(PoisonError::into_inner));
            for letter in letters {
                letter();
            }
        }
    }
}
