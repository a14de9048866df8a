//! What a publisher may be given in addition to its settings.

use std::num::NonZeroUsize;

use super::producer_ring::RING_SIZE;
use super::status::StatusReports;
use crate::runtime::warnings::Warnings;

/// What a publisher may be given in addition to its settings.
pub struct Options {
    /// Receives the risks of the topic's settings.
    pub warnings: Warnings,
    /// How many transactional producers take turns; at most 8.
    pub ring_size: NonZeroUsize,
    /// The reports of an edge.
    pub reports: Option<StatusReports>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            warnings: Warnings::default(),
            ring_size: RING_SIZE,
            reports: None,
        }
    }
}
