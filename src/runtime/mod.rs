//! What every thread may use, and what names no part of the product: metrics.

pub mod metrics;
