//! Helpers of every thread that know no part of the product: metrics, and the log of errors
//! in a row.

pub mod error_log;
pub mod health;
pub mod metrics;
pub mod plural;
pub mod resume;
pub mod warnings;
pub mod worker;
