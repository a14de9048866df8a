//! Helpers of every thread: threads as values, health, outages and their backoff, the log of
//! repeated errors, warnings, metrics.

pub mod backoff;
pub mod error_log;
pub mod health;
pub mod local_user;
pub mod metrics;
pub mod outage;
pub mod plural;
pub mod resume;
pub mod warnings;
pub mod worker;
