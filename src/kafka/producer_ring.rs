//! The transactional producers of a node, which take turns: one transaction at a time, and the next
//! one under the next id.
//!
//! A broker acknowledges the end of a transaction before it has written the markers. Until then it
//! rejects the next transaction of the same id (`CONCURRENT_TRANSACTIONS`, KIP-98). The next id
//! need not wait. The order is kept: a batch is sent only after the commit of the one before it was
//! acknowledged. And `read_committed` consumers see offsets in order.
//!
//! An id that no process uses any more could still have an open transaction, or a batch on its way.
//! So a session first acquires every id that a process of this node may have used.

use std::num::NonZeroUsize;
use std::time::Duration;

use krafka::error::KrafkaError;
use krafka::producer::TransactionalProducer;
use krafka::{CloseOptions, Kafka};
use tokio::task::JoinSet;

use super::commit_order::CommitOrder;
use super::producer_builder::transactional_producer;
use crate::config;
use crate::domain::node_id::NodeId;

/// How many producers take turns, unless a test or a benchmark says otherwise.
pub(super) const RING_SIZE: NonZeroUsize = NonZeroUsize::new(4).unwrap();

/// The largest ring that any version may use: a session acquires the ids of all of them.
pub(super) const RING_SIZE_MAX: usize = 8;

/// Every transactional id that a process of this node may have used. Those of the largest ring, and
/// the only one of versions before the ring.
///
/// The old id of a node `shop-1` is an id of the ring of a node `shop`. So a node whose own id ends
/// like that has no old id.
pub(crate) fn transactional_ids(node: &NodeId) -> Vec<String> {
    let of_ring = (0..RING_SIZE_MAX).map(|index| format!("payrelay-{node}-{index}"));
    let is_in_other_ring = node
        .as_str()
        .rsplit_once('-')
        .and_then(|(_, end)| Some((end.len(), end.parse::<usize>().ok()?)))
        .is_some_and(|(digits, index)| digits == 1 && index < RING_SIZE_MAX);
    let old = (!is_in_other_ring).then(|| format!("payrelay-{node}"));
    of_ring.chain(old).collect()
}

/// Producers that take turns.
pub(super) struct ProducerRing {
    producers: Vec<TransactionalProducer>,
    turn: usize,
    order: CommitOrder,
}

impl ProducerRing {
    /// Acquires every transactional id of the node: fences their last producers, and aborts their
    /// open transactions. The first `size` of them take turns.
    pub(super) async fn acquire(
        kafka: &Kafka,
        node: &NodeId,
        settings: &config::Kafka,
        size: NonZeroUsize,
    ) -> Result<Self, KrafkaError> {
        let mut acquiring = JoinSet::new();
        for (index, id) in transactional_ids(node).into_iter().enumerate() {
            let kafka = kafka.clone();
            let compression = settings.compression;
            acquiring.spawn(async move {
                let producer = transactional_producer(&kafka, &id, compression).await;
                (index, producer)
            });
        }
        let mut acquired = acquiring.join_all().await;
        acquired.sort_unstable_by_key(|(index, _)| *index);
        let mut producers = Vec::new();
        let mut failed = None;
        for (_, result) in acquired {
            match result {
                Ok(producer) => producers.push(producer),
                Err(error) => failed = Some(error),
            }
        }
        let in_ring = size.get().min(RING_SIZE_MAX);
        let unused = producers.split_off(if failed.is_some() { 0 } else { in_ring });
        close_producers(&unused).await;
        match failed {
            Some(error) => Err(error),
            None => Ok(Self {
                producers,
                turn: 0,
                order: CommitOrder::new(kafka, &settings.topic, transactional_ids(node)),
            }),
        }
    }

    /// The producer whose turn it is, and the order that its commit keeps.
    pub(super) fn current(&mut self) -> (&TransactionalProducer, &mut CommitOrder) {
        (&self.producers[self.turn], &mut self.order)
    }

    /// Its commit was acknowledged: the next one's turn.
    pub(super) fn pass_turn(&mut self) {
        self.turn = (self.turn + 1) % self.producers.len();
    }

    /// The producer with this id, if it is in the ring.
    pub(super) fn find(&self, transactional_id: &str) -> Option<&TransactionalProducer> {
        self.producers
            .iter()
            .find(|producer| producer.transactional_id() == transactional_id)
    }

    /// The ids that take turns.
    pub(super) fn ids(&self) -> impl Iterator<Item = &str> {
        self.producers
            .iter()
            .map(TransactionalProducer::transactional_id)
    }

    /// Records that are still queued are not sent any more.
    pub(super) async fn close(&self) {
        close_producers(&self.producers).await;
    }
}

async fn close_producers(producers: &[TransactionalProducer]) {
    for producer in producers {
        let at_once = CloseOptions::new().timeout(Duration::ZERO);
        let _ = producer.close_with(at_once).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(node: &str) -> Vec<String> {
        transactional_ids(&NodeId::parse(node).unwrap())
    }

    #[test]
    fn a_node_has_the_ids_of_the_largest_ring_and_the_old_one() {
        let of_shop = ids("shop");
        assert_eq!(of_shop.len(), RING_SIZE_MAX + 1);
        assert_eq!(of_shop[0], "payrelay-shop-0");
        assert_eq!(of_shop[RING_SIZE_MAX - 1], "payrelay-shop-7");
        assert_eq!(of_shop[RING_SIZE_MAX], "payrelay-shop");
    }

    #[test]
    fn no_two_nodes_share_a_transactional_id() {
        let nodes = [
            "shop", "shop-0", "shop-1", "shop-7", "shop-8", "shop-1-1", "shop-01",
        ];
        let all: Vec<String> = nodes.into_iter().flat_map(ids).collect();
        let distinct: std::collections::BTreeSet<_> = all.iter().collect();
        assert_eq!(distinct.len(), all.len(), "{all:?}");
    }
}
