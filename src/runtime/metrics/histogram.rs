//! Histograms of atomics, with buckets that suit what they measure, and their quantiles.
//!
//! The library's own histogram takes a lock for each observation, and its buckets cannot be read
//! back.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use prometheus_client::encoding::{EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::exemplar::HistogramWithExemplars;
use prometheus_client::metrics::{MetricType, TypedMetric};

/// The unit of a histogram: the values of its buckets are microseconds, or a number of things.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum HistogramUnit {
    Microseconds,
    Things,
}

/// The upper bounds of a histogram's buckets, without the last, infinite one.
#[derive(Debug, Clone, Copy)]
pub struct Buckets {
    unit: HistogramUnit,
    bounds: &'static [u64],
}

const MS: u64 = 1_000;
const SECOND: u64 = 1_000_000;

/// Every bound of a duration, in microseconds: each histogram of durations has a part of them.
const DURATIONS: [u64; 21] = [
    100,
    250,
    500,
    MS,
    2_500,
    5 * MS,
    10 * MS,
    25 * MS,
    50 * MS,
    100 * MS,
    250 * MS,
    500 * MS,
    SECOND,
    2_500 * MS,
    5 * SECOND,
    10 * SECOND,
    30 * SECOND,
    60 * SECOND,
    300 * SECOND,
    1_800 * SECOND,
    7_200 * SECOND,
];

impl Buckets {
    /// A commit: 0.1 ms to 2.5 s.
    pub const COMMIT: Self = Self::durations(0, 14);

    /// A request: 0.5 ms to 10 s.
    pub const REQUEST: Self = Self::durations(2, 16);

    /// The way of an event, which an outage makes long: 1 ms to 2 hours.
    pub const LATENCY: Self = Self::durations(3, DURATIONS.len());

    /// The size of a batch: 1 to 1,000.
    pub const SIZE: Self = Self {
        unit: HistogramUnit::Things,
        bounds: &[1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000],
    };

    const fn durations(start: usize, end: usize) -> Self {
        Self {
            unit: HistogramUnit::Microseconds,
            bounds: DURATIONS.split_at(end).0.split_at(start).1,
        }
    }

    /// As it is exported: seconds, or a number.
    fn exported(self, value: u64) -> f64 {
        match self.unit {
            HistogramUnit::Microseconds => Duration::from_micros(value),
            HistogramUnit::Things => Duration::from_secs(value),
        }
        .as_secs_f64()
    }
}

/// A histogram. Cloning shares it.
#[derive(Debug, Clone)]
pub struct Histogram(Arc<HistogramState>);

#[derive(Debug)]
struct HistogramState {
    buckets: Buckets,
    counts: Box<[AtomicU64]>,
    sum: AtomicU64,
}

impl Histogram {
    /// An empty histogram.
    pub fn new(buckets: Buckets) -> Self {
        Self(Arc::new(HistogramState {
            buckets,
            counts: (0..=buckets.bounds.len())
                .map(|_| AtomicU64::new(0))
                .collect(),
            sum: AtomicU64::new(0),
        }))
    }

    /// Counts a duration, of at least a microsecond's precision.
    pub fn observe(&self, duration: Duration) {
        self.count(u64::try_from(duration.as_micros()).unwrap_or(u64::MAX));
    }

    /// Counts a size.
    pub fn observe_size(&self, size: usize) {
        self.count(size as u64);
    }

    fn count(&self, value: u64) {
        let state = &*self.0;
        let bucket = state.buckets.bounds.partition_point(|bound| *bound < value);
        state.counts[bucket].fetch_add(1, Relaxed);
        state.sum.fetch_add(value, Relaxed);
    }

    /// The number of observations in each bucket until now.
    pub fn counts(&self) -> BucketCounts {
        BucketCounts {
            buckets: self.0.buckets,
            counts: self
                .0
                .counts
                .iter()
                .map(|count| count.load(Relaxed))
                .collect(),
        }
    }
}

impl TypedMetric for Histogram {
    const TYPE: MetricType = MetricType::Histogram;
}

impl EncodeMetric for Histogram {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), fmt::Error> {
        let buckets = self.0.buckets;
        let counts = self.counts().counts;
        let bounds = buckets.bounds.iter().map(|bound| buckets.exported(*bound));
        let filled: Vec<_> = bounds
            .chain([f64::INFINITY])
            .zip(counts.iter().copied())
            .collect();
        let sum = buckets.exported(self.0.sum.load(Relaxed));
        encoder.encode_histogram::<NoLabelSet>(sum, counts.iter().sum(), &filled, None)
    }

    fn metric_type(&self) -> MetricType {
        Self::TYPE
    }
}

/// The observations in each bucket of a histogram, at one moment.
#[derive(Debug, Clone)]
pub struct BucketCounts {
    buckets: Buckets,
    counts: Vec<u64>,
}

impl BucketCounts {
    /// The observations since an earlier moment.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        let pairs = self.counts.iter().zip(&before.counts);
        Self {
            buckets: self.buckets,
            counts: pairs.map(|(now, then)| now.saturating_sub(*then)).collect(),
        }
    }

    /// The duration that this part of the observations, in thousandths, did not exceed. The value
    /// is at the same place of its bucket as the observation is, as in Prometheus'
    /// `histogram_quantile`. `None` without observations. Above the last bound it is that bound.
    pub fn quantile(&self, thousandths: u64) -> Option<Duration> {
        let total: u64 = self.counts.iter().sum();
        let rank = total.checked_mul(thousandths)?.div_ceil(1000);
        if rank == 0 {
            return None;
        }
        let mut before = 0;
        let mut lower = 0;
        for (upper, count) in self.buckets.bounds.iter().zip(&self.counts) {
            if before + count >= rank {
                let part = u128::from(upper - lower) * u128::from(rank - before);
                let inside = u64::try_from(part / u128::from(*count)).unwrap_or(u64::MAX);
                return Some(Duration::from_micros(lower + inside));
            }
            before += count;
            lower = *upper;
        }
        Some(Duration::from_micros(lower))
    }
}

/// The id of a trace, as the label of an exemplar.
pub(super) type TraceLabel = [(&'static str, String); 1];

/// How long events need. Each bucket also shows the trace of one of its events (an exemplar,
/// <https://prometheus.io/docs/specs/om/open_metrics_spec/#exemplars>), in the format of
/// `OpenMetrics`.
#[derive(Debug, Clone)]
pub struct Latency {
    /// The same counts; those of the library cannot be read back.
    counted: Histogram,
    exported: HistogramWithExemplars<TraceLabel>,
}

impl Latency {
    /// An empty histogram with the buckets of a latency.
    pub fn new() -> Self {
        let bounds = Buckets::LATENCY.bounds.iter();
        let bounds = bounds.map(|bound| Buckets::LATENCY.exported(*bound));
        Self {
            counted: Histogram::new(Buckets::LATENCY),
            exported: HistogramWithExemplars::new(bounds),
        }
    }

    /// Counts an event, with the id of its trace if a tracer recorded it.
    pub fn observe(&self, duration: Duration, trace_id: Option<&str>) {
        self.counted.observe(duration);
        let label = trace_id.map(|id| [("trace_id", id.to_owned())]);
        self.exported.observe(duration.as_secs_f64(), label, None);
    }

    /// The number of observations in each bucket until now.
    pub fn counts(&self) -> BucketCounts {
        self.counted.counts()
    }

    /// What is exported.
    pub(super) fn exported(&self) -> HistogramWithExemplars<TraceLabel> {
        self.exported.clone()
    }
}

impl Default for Latency {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_finds_quantiles_as_prometheus_does() {
        let histogram = Histogram::new(Buckets::REQUEST);
        assert_eq!(histogram.counts().quantile(500), None);
        for _ in 0..98 {
            histogram.observe(Duration::from_micros(700));
        }
        let before = histogram.counts();
        histogram.observe(Duration::from_millis(30));
        histogram.observe(Duration::from_mins(1));
        let counts = histogram.counts();
        let p50 = counts.quantile(500).unwrap();
        assert_eq!(p50, Duration::from_micros(500 + 500 * 50 / 98));
        assert_eq!(counts.quantile(990), Some(Duration::from_millis(50)));
        assert_eq!(counts.quantile(1000), Some(Duration::from_secs(10)));
        let since = counts.since(&before);
        assert_eq!(since.quantile(500), Some(Duration::from_millis(50)));
    }

    #[test]
    fn a_value_at_the_bound_of_a_bucket_is_in_it() {
        let histogram = Histogram::new(Buckets::SIZE);
        for size in [0, 1, 2, 1000, 1001] {
            histogram.observe_size(size);
        }
        let counts = histogram.counts().counts;
        assert_eq!(counts, [2, 1, 0, 0, 0, 0, 0, 0, 0, 1, 1]);
    }
}
