//! The number of lines in the log. The logger is one for the process, so its counters are too.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use log::Level;
use prometheus_client::encoding::{EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;

static WARNINGS: AtomicU64 = AtomicU64::new(0);
static ERRORS: AtomicU64 = AtomicU64::new(0);

/// Counts a line of the log. The logger calls this.
pub fn count_log_line(level: Level) {
    match level {
        Level::Warn => WARNINGS.fetch_add(1, Relaxed),
        Level::Error => ERRORS.fetch_add(1, Relaxed),
        _ => 0,
    };
}

/// The warnings and errors in the log.
#[derive(Debug, Clone)]
pub(super) struct LogLines;

impl EncodeMetric for LogLines {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), fmt::Error> {
        for (level, count) in [("warn", &WARNINGS), ("error", &ERRORS)] {
            encoder
                .encode_family(&[("level", level)])?
                .encode_counter::<NoLabelSet, _, u64>(&count.load(Relaxed), None)?;
        }
        Ok(())
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Counter
    }
}
