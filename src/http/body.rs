//! Request bodies: read as a whole, with a limit of size and of time.

use std::time::Duration;

use http_body_util::BodyExt;
use hyper::body::{Body as _, Bytes, Incoming};
use hyper::header::{EXPECT, HeaderMap};
use tokio::time::{Instant, timeout_at};

use super::limits::BodyLimit;
use super::problem::Problem;

/// An unwanted body is read up to this multiple of the limit, and discarded. So a client that
/// writes before it reads sees the refusal instead of a broken connection.
const DRAIN_FACTOR: usize = 16;

/// The body of a request, and whether it was polled: a client that expects 100 Continue sends it
/// only then.
pub(super) struct IncomingBody {
    body: Incoming,
    polled: bool,
}

impl IncomingBody {
    pub(super) fn new(body: Incoming) -> Self {
        Self {
            body,
            polled: false,
        }
    }

    /// Whether it was read to its end.
    pub(super) fn is_read(&self) -> bool {
        self.body.is_end_stream()
    }

    /// Whether a part of it may be in transit, or wait to be read. A client that still waits for
    /// 100 Continue has sent none.
    pub(super) fn may_have_more(&self, headers: &HeaderMap) -> bool {
        !self.body.is_end_stream() && (self.polled || !headers.contains_key(EXPECT))
    }

    /// Reads it to its end. A small one that has arrived already waits for nothing, and reserves
    /// nothing.
    pub(super) async fn read_to_end(
        &mut self,
        bytes_max: usize,
        timeout: Duration,
        limit: &mut BodyLimit<'_>,
    ) -> Result<Bytes, Problem> {
        let deadline = Instant::now() + timeout;
        if self.body.size_hint().lower() > bytes_max as u64 {
            return Err(Problem::too_large(bytes_max));
        }
        let mut whole = Vec::new();
        while let Some(data) = self.next_data(deadline).await? {
            if whole.len() + data.len() > bytes_max {
                return Err(Problem::too_large(bytes_max));
            }
            if whole.is_empty() && self.body.is_end_stream() {
                return Ok(data);
            }
            limit.reserve(data.len())?;
            whole.extend_from_slice(&data);
        }
        Ok(whole.into())
    }

    /// Whether there is none, or an empty one that arrives within `timeout`.
    pub(super) async fn is_empty_within(&mut self, timeout: Duration) -> bool {
        if self.is_read() {
            return true;
        }
        // An empty body of unknown length still has to show its end.
        self.body.size_hint().lower() == 0
            && matches!(self.next_data(Instant::now() + timeout).await, Ok(None))
    }

    /// Reads and discards the rest, up to a limit of size and of time.
    pub(super) async fn drain(&mut self, bytes_max: usize, timeout: Duration) {
        let deadline = Instant::now() + timeout;
        let mut left = bytes_max.saturating_mul(DRAIN_FACTOR);
        while let Ok(Some(data)) = self.next_data(deadline).await {
            match left.checked_sub(data.len()) {
                Some(rest) => left = rest,
                None => return,
            }
        }
    }

    async fn next_data(&mut self, deadline: Instant) -> Result<Option<Bytes>, Problem> {
        self.polled = true;
        loop {
            match timeout_at(deadline, self.body.frame()).await {
                Err(_) => return Err(Problem::body_timeout()),
                Ok(None) => return Ok(None),
                Ok(Some(Err(error))) => return Err(Problem::broken_body(error.to_string())),
                Ok(Some(Ok(frame))) => {
                    // Trailers are ignored.
                    if let Ok(data) = frame.into_data() {
                        return Ok(Some(data));
                    }
                }
            }
        }
    }
}
