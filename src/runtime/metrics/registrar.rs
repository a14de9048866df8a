//! Registers the metrics of the process.

use std::sync::atomic::AtomicU64;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Metric, Registry};

use super::histogram::{Buckets, Histogram};
use super::labeled::LabeledMetrics;

/// A gauge of a number that is no integer: a point in time.
pub(super) type TimeGauge = Gauge<f64, AtomicU64>;

/// Registers metrics, each with its help.
pub(super) struct Registrar<'a>(pub(super) &'a mut Registry);

impl Registrar<'_> {
    pub(super) fn add<M: Metric + Clone>(&mut self, name: &str, help: &str, metric: M) -> M {
        self.0.register(name, help, metric.clone());
        metric
    }

    pub(super) fn counter(&mut self, name: &str, help: &str) -> Counter {
        self.add(name, help, Counter::default())
    }

    pub(super) fn gauge(&mut self, name: &str, help: &str) -> Gauge {
        self.add(name, help, Gauge::default())
    }

    pub(super) fn time(&mut self, name: &str, help: &str) -> TimeGauge {
        self.add(name, help, TimeGauge::default())
    }

    pub(super) fn histogram(&mut self, name: &str, help: &str, buckets: Buckets) -> Histogram {
        self.add(name, help, Histogram::new(buckets))
    }

    /// A counter for each value of a label.
    pub(super) fn counters<const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        label: &'static str,
        values: [&str; N],
    ) -> [Counter; N] {
        let family = self.add(name, help, LabeledMetrics::default());
        values.map(|value| family.add(&[(label, value)], Counter::default()))
    }

    /// A counter for each value of an enum, in the order of its values.
    pub(super) fn enum_counters<'a>(
        &mut self,
        name: &str,
        help: &str,
        label: &'static str,
        values: impl Iterator<Item = &'a str>,
    ) -> Vec<Counter> {
        let family = self.add(name, help, LabeledMetrics::default());
        let series = |value| family.add(&[(label, value)], Counter::default());
        values.map(series).collect()
    }
}
