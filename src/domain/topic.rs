//! A topic of Kafka, in one incarnation. Pure.

use std::sync::Arc;

/// A topic in one of its lives: one that is deleted and made again has another id (KIP-516).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topic {
    /// As it is configured.
    pub name: Arc<str>,
    /// Given by the cluster; zeros where it gives none.
    pub id: [u8; 16],
}
