//! The order of commits: a batch is committed only once `read_committed` consumers see the batch
//! before it.
//!
//! A broker can die between acknowledging a commit and writing its markers, and return with a
//! transaction that hangs (KIP-664). Ending it hides its events, so they are published again. Had a
//! later batch been committed meanwhile, they would come after it. The markers are written while
//! the records of the next batch are sent, so its commit seldom waits.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use krafka::Kafka;
use krafka::error::KrafkaError;
use krafka::producer::RecordMetadata;
use tokio::time::{Instant, sleep};

use super::hanging::{
    VISIBLE_WITHIN, foreign_transaction, has_hanging_transaction, last_stable_offsets,
    open_transactions,
};

/// The first pause between two looks at the last stable offset. Each is twice as long as the one
/// before.
const FIRST_PAUSE: Duration = Duration::from_millis(1);

/// The longest pause between two looks.
const PAUSE_MAX: Duration = Duration::from_millis(50);

/// The last committed batch of a session.
pub(super) struct CommitOrder {
    kafka: Kafka,
    topic: Arc<str>,
    /// The transactional ids of this node.
    ours: Vec<String>,
    /// By partition, its last offset. Empty: consumers see it.
    last: BTreeMap<i32, i64>,
    /// Another producer's transaction hides it. Its end is not in our hands, so no commit waits.
    is_hidden_by_another: bool,
}

impl CommitOrder {
    pub(super) fn new(kafka: &Kafka, topic: &str, ours: Vec<String>) -> Self {
        Self {
            kafka: kafka.clone(),
            topic: topic.into(),
            ours,
            last: BTreeMap::new(),
            is_hidden_by_another: false,
        }
    }

    /// The commit of a batch with these records was acknowledged.
    pub(super) fn committed(&mut self, records: &[(usize, RecordMetadata)]) {
        for (_, record) in records {
            let last = self.last.entry(record.partition).or_insert(record.offset);
            *last = record.offset.max(*last);
        }
    }

    /// Waits until consumers see the batch before. An error if it hangs: then the next session ends
    /// its transaction.
    pub(super) async fn wait_until_visible(&mut self) -> Result<(), KrafkaError> {
        let deadline = Instant::now() + VISIBLE_WITHIN;
        let mut pause = FIRST_PAUSE;
        while !self.last.is_empty() {
            let partitions: Vec<i32> = self.last.keys().copied().collect();
            let stable = last_stable_offsets(&self.kafka, &self.topic, partitions).await?;
            self.last
                .retain(|partition, last| stable.get(partition).is_none_or(|end| end <= last));
            if self.last.is_empty() {
                self.is_hidden_by_another = false;
            } else if self.is_hidden_by_another {
                break;
            } else if Instant::now() >= deadline {
                self.find_hiding_transaction().await?;
            } else {
                sleep(pause).await;
                pause = (pause * 2).min(PAUSE_MAX);
            }
        }
        Ok(())
    }

    /// An error unless only another producer's transaction hides the batch before.
    async fn find_hiding_transaction(&mut self) -> Result<(), KrafkaError> {
        let partitions: BTreeSet<i32> = self.last.keys().copied().collect();
        let open = open_transactions(&self.kafka, &self.topic, &partitions, &self.ours).await?;
        self.is_hidden_by_another =
            foreign_transaction(&open).is_some() && !has_hanging_transaction(&open);
        if self.is_hidden_by_another {
            return Ok(());
        }
        Err(KrafkaError::timeout(format!(
            "the batch before was committed, and consumers do not see it within {} s",
            VISIBLE_WITHIN.as_secs()
        )))
    }
}
