//! The open connections, and which of them is closed for a new one when all are in use.
//!
//! First a connection whose client has not sent a complete head for [`HEAD_TIMEOUT`], then the one
//! that has been idle longest. A connection with a request in progress, or with an unwritten
//! response, is never closed for another.

use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;

/// How long a connection without a complete head stays open while others wait.
const HEAD_TIMEOUT: Duration = Duration::from_secs(2);

/// A connection that got its response just now may be about to send its next request.
const IDLE_MIN: Duration = Duration::from_millis(100);

/// The open connections.
#[derive(Debug)]
pub(super) struct Connections {
    open: Mutex<OpenConnections>,
    clock: ConnectionClock,
}

/// Milliseconds since the server started.
#[derive(Debug, Clone, Copy)]
struct ConnectionClock(Instant);

impl ConnectionClock {
    fn now(self) -> u64 {
        u64::try_from(self.0.elapsed().as_millis()).unwrap_or(ANSWERING - 1)
    }
}

#[derive(Debug, Default)]
struct OpenConnections {
    next: u64,
    states: HashMap<u64, Arc<ConnectionState>>,
}

/// The state of one connection.
#[derive(Debug)]
pub(super) struct ConnectionState {
    /// Since when it waits for a head, in milliseconds; or [`BUSY`], or [`ANSWERING`].
    waits_since: AtomicU64,
    /// The number of its requests, with the one in progress; 0 before the first head.
    requests: AtomicU64,
    close: Notify,
    /// It was asked to close, and does so after its response.
    is_ending: AtomicBool,
    clock: ConnectionClock,
}

/// While a request is in progress.
const BUSY: u64 = u64::MAX;

/// From the end of the request until the kernel has the whole response.
const ANSWERING: u64 = u64::MAX - 1;

/// An open connection; dropping it removes it.
#[derive(Debug)]
pub(super) struct ConnectionSlot {
    connections: Arc<Connections>,
    number: u64,
    pub(super) state: Arc<ConnectionState>,
}

impl Connections {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            open: Mutex::default(),
            clock: ConnectionClock(Instant::now()),
        })
    }

    pub(super) fn open(self: &Arc<Self>) -> ConnectionSlot {
        let state = Arc::new(ConnectionState {
            waits_since: AtomicU64::new(self.clock.now()),
            requests: AtomicU64::new(0),
            close: Notify::new(),
            is_ending: AtomicBool::new(false),
            clock: self.clock,
        });
        let mut open = self.lock();
        let number = open.next;
        open.next += 1;
        open.states.insert(number, Arc::clone(&state));
        ConnectionSlot {
            connections: Arc::clone(self),
            number,
            state,
        }
    }

    /// Asks one connection to close; false if each of them is busy, or young.
    pub(super) fn close_one(&self) -> bool {
        let now = self.clock.now();
        let open = self.lock();
        let victim = open
            .states
            .values()
            .filter_map(|state| state.rank(now).map(|rank| (rank, state)))
            .max_by_key(|(rank, _)| *rank);
        let Some((_, state)) = victim else {
            return false;
        };
        state.is_ending.store(true, Relaxed);
        state.close.notify_one();
        true
    }

    fn lock(&self) -> MutexGuard<'_, OpenConnections> {
        // The map is consistent whenever the lock is free, so lock poisoning is ignored.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ConnectionState {
    /// The order in which connections are closed; `None`: not this one.
    fn rank(&self, now: u64) -> Option<(bool, u64)> {
        let since = self.waits_since.load(Relaxed);
        if matches!(since, BUSY | ANSWERING) || self.is_ending.load(Relaxed) {
            return None;
        }
        let waited = now.saturating_sub(since);
        let silent = self.is_silent();
        let limit = if silent { HEAD_TIMEOUT } else { IDLE_MIN };
        (u128::from(waited) >= limit.as_millis()).then_some((silent, waited))
    }

    /// Whether no complete head has arrived yet.
    pub(super) fn is_silent(&self) -> bool {
        self.requests.load(Relaxed) == 0
    }

    /// The kernel has all written bytes.
    fn flushed(&self) {
        let _ = self
            .waits_since
            .compare_exchange(ANSWERING, self.clock.now(), Relaxed, Relaxed);
    }

    /// Waits until the connection is asked to close.
    pub(super) async fn closed(&self) {
        self.close.notified().await;
    }
}

impl ConnectionSlot {
    pub(super) fn request_begins(&self) {
        self.state.requests.fetch_add(1, Relaxed);
        self.state.waits_since.store(BUSY, Relaxed);
    }

    pub(super) fn request_ends(&self) {
        self.state.waits_since.store(ANSWERING, Relaxed);
    }
}

impl Drop for ConnectionSlot {
    fn drop(&mut self) {
        self.connections.lock().states.remove(&self.number);
    }
}

/// A stream whose flushes show that a response is written. hyper flushes only after it has written
/// all of a response that is complete at its start, as all of ours are.
#[derive(Debug)]
pub(super) struct ConnectionStream<S> {
    stream: S,
    state: Arc<ConnectionState>,
}

impl<S> ConnectionStream<S> {
    pub(super) fn new(stream: S, state: Arc<ConnectionState>) -> Self {
        Self { stream, state }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for ConnectionStream<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for ConnectionStream<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.stream).poll_flush(context))?;
        self.state.flushed();
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set_connection(slot: &ConnectionSlot, requests: u64, waits_since: u64) {
        slot.state.requests.store(requests, Relaxed);
        slot.state.waits_since.store(waits_since, Relaxed);
    }

    #[test]
    fn silent_connections_end_first_then_the_one_that_is_idle_longest() {
        let now = 10_000;
        let connections = Connections::new();
        let slots: Vec<_> = (0..5).map(|_| connections.open()).collect();
        set_connection(&slots[0], 0, 8_500); // silent, but young
        set_connection(&slots[1], 0, 7_000); // silent
        set_connection(&slots[2], 3, 1_000); // idle longest
        set_connection(&slots[3], 3, BUSY);
        set_connection(&slots[4], 3, 9_950); // got its response just now
        let ranks: Vec<_> = slots.iter().map(|slot| slot.state.rank(now)).collect();
        assert_eq!(
            ranks,
            [None, Some((true, 3_000)), Some((false, 9_000)), None, None]
        );
    }

    #[test]
    fn a_connection_with_work_is_never_asked_to_end() {
        let connections = Connections::new();
        let slot = connections.open();
        slot.request_begins();
        assert!(!connections.close_one());
        slot.request_ends();
        assert_eq!(
            slot.state.rank(u64::MAX),
            None,
            "its response is being written"
        );
        slot.state.flushed();
        assert!(slot.state.rank(u64::MAX).is_some());
        drop(slot);
        assert!(!connections.close_one(), "there is none");
    }
}
