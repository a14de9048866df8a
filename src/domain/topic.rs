//! A Kafka topic, in one incarnation. Pure.

use std::sync::Arc;

/// A topic incarnation: a topic that is deleted and recreated has another id (KIP-516).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topic {
    /// As configured.
    pub name: Arc<str>,
    /// Assigned by the cluster; zeros if it assigns none.
    pub id: [u8; 16],
}
