//! Request bodies: read whole, with a limit of size and of time.

use std::time::Duration;

use http_body_util::BodyExt;
use hyper::body::{Body as _, Bytes, Incoming};
use tokio::time::{Instant, timeout_at};

use super::problem::Problem;

/// A body that is over the limit is read on for so many times the limit, and thrown away, so that a client that
/// writes before it reads gets to see the refusal instead of a broken connection.
const DISCARD_TIMES: usize = 16;

/// Reads a body to its end.
pub(super) async fn read(mut body: Incoming, limit: usize, patience: Duration) -> Result<Bytes, Problem> {
    let deadline = Instant::now() + patience;
    if body.size_hint().lower() > limit as u64 {
        // Told by Content-Length. A client that waits for 100 Continue is refused without sending anything.
        return Err(Problem::too_large(limit));
    }
    let mut whole = Vec::new();
    while let Some(data) = next(&mut body, deadline).await? {
        if whole.len() + data.len() > limit {
            discard(body, limit * DISCARD_TIMES, deadline).await;
            return Err(Problem::too_large(limit));
        }
        if whole.is_empty() && body.is_end_stream() {
            return Ok(data);
        }
        whole.extend_from_slice(&data);
    }
    Ok(whole.into())
}

/// Reads and throws away, until the end, the limit or the deadline.
pub(super) async fn discard(mut body: Incoming, limit: usize, deadline: Instant) {
    let mut left = limit;
    while let Ok(Some(data)) = next(&mut body, deadline).await {
        match left.checked_sub(data.len()) {
            Some(rest) => left = rest,
            None => return,
        }
    }
}

async fn next(body: &mut Incoming, deadline: Instant) -> Result<Option<Bytes>, Problem> {
    loop {
        match timeout_at(deadline, body.frame()).await {
            Err(_) => return Err(Problem::body_timeout()),
            Ok(None) => return Ok(None),
            Ok(Some(Err(error))) => return Err(Problem::broken_body(error.to_string())),
            Ok(Some(Ok(frame))) => {
                // Trailers carry nothing that is asked for.
                if let Ok(data) = frame.into_data() {
                    return Ok(Some(data));
                }
            }
        }
    }
}
