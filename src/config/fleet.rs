//! `[fleet]`: what edges report, and when a report is remarkable.

use std::time::Duration;

use super::duration::{FOREVER, MS};
use super::typed_keys::TypedKeys;

/// `[fleet]`
#[derive(Debug, Clone)]
pub struct Fleet {
    /// How often an edge reports its state; zero: never.
    pub status_interval: Duration,
    /// A node that was silent for longer is late.
    pub late_after: Duration,
    /// A clock that is further off is remarkable.
    pub clock_skew_max: Duration,
}

pub(super) fn read_fleet_section(keys: &mut TypedKeys<'_>) -> Fleet {
    Fleet {
        status_interval: keys.duration("fleet.status_interval", "60s", Duration::ZERO..=FOREVER),
        late_after: keys.duration("fleet.late_after", "5m", 1000 * MS..=FOREVER),
        clock_skew_max: keys.duration("fleet.clock_skew_max", "60s", 100 * MS..=FOREVER),
    }
}
