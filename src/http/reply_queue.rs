//! Returns the replies of other threads to the requests that wait for them, many with one wake-up.
//!
//! A oneshot that is sent from another thread wakes the runtime with a system call, each time. A
//! commit with sixty replies made sixty (counted with strace). Here the first reply of a batch
//! wakes the runtime once. Its own thread then sends the oneshots, which costs next to nothing.

use std::sync::{Mutex, PoisonError};

use tokio::sync::{Notify, oneshot};

type Reply = Box<dyn FnOnce() + Send>;

/// The replies that are still to be sent.
#[derive(Default)]
pub(super) struct ReplyQueue {
    replies: Mutex<Vec<Reply>>,
    arrived: Notify,
}

impl ReplyQueue {
    /// Called on any thread: sends `value` to the waiting request. A request that was dropped gets
    /// no reply.
    pub(super) fn push<T: Send + 'static>(&self, to: oneshot::Sender<T>, value: T) {
        let first = {
            // A reply is pushed or it is not: a panic elsewhere leaves no half of one.
            let mut replies = self.replies.lock().unwrap_or_else(PoisonError::into_inner);
            replies.push(Box::new(move || drop(to.send(value))));
            replies.len() == 1
        };
        if first {
            self.arrived.notify_one();
        }
    }

    /// Sends replies, for ever. Runs on the thread of the requests.
    pub(super) async fn run(&self) {
        loop {
            self.arrived.notified().await;
            let replies =
                std::mem::take(&mut *self.replies.lock().unwrap_or_else(PoisonError::into_inner));
            for reply in replies {
                reply();
            }
        }
    }
}
