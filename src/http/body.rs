//! Request bodies: read as a whole, with a limit of size and of time.

use std::time::Duration;

use http_body_util::BodyExt;
use hyper::body::{Body as _, Bytes, Incoming};
use tokio::time::{Instant, timeout_at};

use super::limits::BodyBudget;
use super::problem::Problem;

/// An unwanted body is read up to this multiple of the limit, and discarded. So a client that
/// writes before it reads sees the refusal instead of a broken connection.
const DRAIN_FACTOR: usize = 16;

/// The body of a request, and whether it was polled: a client that expects 100 Continue sends it
/// only then.
/// Continue sends it only then.
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

    /// Whether a part of it may be in transit, or wait to be read.
    pub(super) fn may_have_more(&self, expects_continue: bool) -> bool {
        !self.body.is_end_stream() && (self.polled || !expects_continue)
    }
}

/// Reads a body to its end. A small one that has arrived already waits for nothing, and uses no
/// budget.
pub(super) async fn read(
    body: &mut IncomingBody,
    limit: usize,
    patience: Duration,
    held: &mut BodyBudget<'_>,
) -> Result<Bytes, Problem> {
    let deadline = Instant::now() + patience;
    if body.body.size_hint().lower() > limit as u64 {
        return Err(Problem::too_large(limit));
    }
    let mut whole = Vec::new();
    while let Some(data) = next(body, deadline).await? {
        if whole.len() + data.len() > limit {
            return Err(Problem::too_large(limit));
        }
        if whole.is_empty() && body.body.is_end_stream() {
            return Ok(data);
        }
        held.reserve(data.len())?;
        whole.extend_from_slice(&data);
    }
    Ok(whole.into())
}

/// Whether there is no body, or an empty one that has arrived by the end of `patience`.
pub(super) async fn is_empty(body: &mut IncomingBody, patience: Duration) -> bool {
    if body.is_read() {
        return true;
    }
    // An empty body of unknown length still has to show its end.
    body.body.size_hint().lower() == 0
        && matches!(next(body, Instant::now() + patience).await, Ok(None))
}

/// Reads and discards the rest of a body, up to a limit of size and of time.
pub(super) async fn drain(body: &mut IncomingBody, limit: usize, patience: Duration) {
    let deadline = Instant::now() + patience;
    let mut left = limit.saturating_mul(DRAIN_FACTOR);
    while let Ok(Some(data)) = next(body, deadline).await {
        match left.checked_sub(data.len()) {
            Some(rest) => left = rest,
            None => return,
        }
    }
}

async fn next(body: &mut IncomingBody, deadline: Instant) -> Result<Option<Bytes>, Problem> {
    body.polled = true;
    loop {
        match timeout_at(deadline, body.body.frame()).await {
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
