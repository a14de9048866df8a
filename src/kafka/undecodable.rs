//! Batches of records that cannot be decoded: the checksum is wrong, or they are too large after
//! decompression.
//!
//! A second fetch returns the same bytes, unless another broker leads by then. So the reader tries
//! a batch a few times, and then continues after it. The client does not report the end of a batch,
//! so it is searched.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use krafka::Kafka;
use krafka::consumer::{AutoOffsetReset, Consumer, IsolationLevel};
use krafka::error::KrafkaError;

use super::cluster::{FETCH_BYTES_MAX, INFLATED_BYTES_MAX};

/// Between two attempts: the third one follows after 5 s.
pub(crate) const RETRY_INTERVAL: Duration = Duration::from_millis(2500);

/// This number of attempts, over this time, is enough.
const TRIES: u32 = 3;
const TRIED_FOR: Duration = Duration::from_secs(5);

/// How long a readable offset may need to bring a record. After the last record none arrives.
const PROBE: Duration = Duration::from_secs(1);

/// The place where a partition cannot be decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Undecodable {
    pub(crate) partition: i32,
    pub(crate) offset: i64,
    pub(crate) reason: String,
}

impl Undecodable {
    /// krafka names the place in its message alone.
    pub(crate) fn parse(error: &KrafkaError, topic: &str) -> Option<Self> {
        let KrafkaError::Protocol { message, .. } = error else {
            return None;
        };
        let place = message
            .strip_prefix("undecodable record batch at ")?
            .strip_prefix(topic)?
            .strip_prefix('-')?;
        let (partition, rest) = place.split_once(" offset ")?;
        let digits = rest
            .find(|letter: char| !letter.is_ascii_digit())
            .unwrap_or(rest.len());
        let reason = rest
            .rsplit_once("Underlying error: ")
            .map_or(rest, |(_, reason)| reason);
        Some(Self {
            partition: partition.parse().ok()?,
            offset: rest.get(..digits)?.parse().ok()?,
            reason: reason.to_owned(),
        })
    }
}

/// The attempts of each partition at its undecodable offset.
#[derive(Debug, Default)]
pub(crate) struct Attempts(BTreeMap<i32, Attempt>);

#[derive(Debug)]
struct Attempt {
    offset: i64,
    count: u32,
    since: Instant,
}

impl Attempts {
    /// Counts an attempt. Returns whether there were enough.
    pub(crate) fn add(&mut self, batch: &Undecodable, now: Instant) -> bool {
        let new = || Attempt {
            offset: batch.offset,
            count: 0,
            since: now,
        };
        let attempt = self.0.entry(batch.partition).or_insert_with(new);
        if attempt.offset != batch.offset {
            *attempt = new();
        }
        attempt.count += 1;
        attempt.count >= TRIES && now.duration_since(attempt.since) >= TRIED_FOR
    }
}

/// The next offset after an undecodable batch: of a readable record, or the end. Where such batches
/// follow each other, a short one between them may be skipped.
pub(crate) async fn next_decodable_offset(
    kafka: &Kafka,
    topic: &str,
    batch: &Undecodable,
) -> Result<i64, KrafkaError> {
    let consumer = kafka
        .consumer_without_group()
        .isolation_level(IsolationLevel::ReadCommitted)
        .auto_offset_reset(AutoOffsetReset::None)
        .enable_auto_commit(false)
        .max_poll_records(1)
        .fetch_max_bytes(FETCH_BYTES_MAX)
        .fetch_max_wait(PROBE)
        .max_decompressed_size(INFLATED_BYTES_MAX)
        .metrics_push(false)
        .build()
        .await?;
    let partition = batch.partition;
    consumer.assign(topic, vec![partition]).await?;
    let end = consumer
        .fetch_watermarks(topic, partition)
        .await?
        .1
        .max(batch.offset + 1);
    let mut unreadable = batch.offset;
    let mut step = 1;
    let mut next = loop {
        let offset = (unreadable + step).min(end);
        if offset == end || is_decodable(&consumer, topic, partition, offset).await? {
            break offset;
        }
        unreadable = offset;
        step *= 2;
    };
    while unreadable + 1 < next {
        let middle = unreadable + (next - unreadable) / 2;
        if is_decodable(&consumer, topic, partition, middle).await? {
            next = middle;
        } else {
            unreadable = middle;
        }
    }
    Ok(next)
}

async fn is_decodable(
    consumer: &Consumer,
    topic: &str,
    partition: i32,
    offset: i64,
) -> Result<bool, KrafkaError> {
    consumer.seek(topic, partition, offset).await?;
    match consumer.poll(PROBE).await {
        Ok(_) => Ok(true),
        Err(error) if Undecodable::parse(&error, topic).is_some() => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use krafka::error::ProtocolErrorKind;

    fn error(message: &str) -> KrafkaError {
        KrafkaError::Protocol {
            kind: ProtocolErrorKind::CrcMismatch,
            message: message.to_owned(),
        }
    }

    #[test]
    fn only_a_batch_that_cannot_be_decoded_is_one() {
        let message = "undecodable record batch at a-b-1-2 offset 77; the partition cannot \
            advance. Underlying error: bad";
        let found = Undecodable::parse(&error(message), "a-b-1");
        assert_eq!(
            found,
            Some(Undecodable {
                partition: 2,
                offset: 77,
                reason: "bad".to_owned()
            })
        );
        let message =
            "undecodable record batch at t-0 offset 5 (2 partitions affected in this poll); it";
        assert_eq!(
            Undecodable::parse(&error(message), "t").map(|batch| batch.offset),
            Some(5)
        );
        for message in [
            "undecodable record batch at t-0 offset 5",
            "frame too large",
            "",
        ] {
            assert_eq!(Undecodable::parse(&error(message), "other"), None);
        }
    }

    #[test]
    fn three_attempts_over_5_s_are_enough_for_each_offset() {
        let start = Instant::now();
        let at = |offset| Undecodable {
            partition: 0,
            offset,
            reason: String::new(),
        };
        let mut attempts = Attempts::default();
        assert!((0..10).all(|_| !attempts.add(&at(5), start)));
        assert!(attempts.add(&at(5), start + TRIED_FOR));
        assert!(!attempts.add(&at(6), start + TRIED_FOR), "another batch");
        assert!(!attempts.add(&at(6), start + 2 * TRIED_FOR), "two tries");
        assert!(attempts.add(&at(6), start + 2 * TRIED_FOR));
    }
}
